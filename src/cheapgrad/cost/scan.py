"""The ledger of one training step: FLOPs and bytes, by module and by operation."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.autograd.graph import saved_tensors_hooks

from cheapgrad.cost._ledger import Ledger
from cheapgrad.cost._module_tracker import ModuleTracker
from cheapgrad.cost._preparation import (
    check_arguments,
    detach_inputs,
    fake_copies,
    find_mistyped_options,
    has_compiled_parts,
    undisturbed,
)
from cheapgrad.cost._saved_tensors import describe_tensors, key_storages, list_owned_tensors, list_tensors
from cheapgrad.cost._writing import OutputNotes, write_report
from cheapgrad.cost.report import CostReport
from cheapgrad.errors import (
    ArgumentError,
    BackwardError,
    FormulaError,
    ForwardError,
    ForwardResultError,
    describe_value,
)

_NO_GRADIENT = "nothing that the model or the loss returned requires a gradient: there was no backward pass"
_NO_WORKSPACE = (
    "bytes held by LSTMs are without their workspace: only oneDNN knows its size, and only when it runs on real tensors"
)
_COMPILED = "compiled parts ran eagerly: what the compiler fuses, keeps or computes again is not in these figures"
_FOREIGN_HOOKS = (
    "some tensors were saved under hooks of the model's own, such as save_on_cpu: bytes held are those of what the "
    "hooks keep in their place, on whichever device, as far as it is made of tensors"
)
_NO_PARAMETER_GRADIENT = (
    "parameters of {} require a gradient and got none, so that backward figures are without them: they ran without a "
    "graph (in a reentrant checkpoint whose input requires no gradient, or under no_grad)"
)
_MISTYPED = "{!r} went to the model's forward, which takes any keyword; the scan's own option is called {!r}"
_SELECTIVE = "what checkpoints with contexts of their own (selective ones) keep is not among the bytes held"


def scan(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    fake: bool = False,
    **kwargs: Any,
) -> CostReport:
    r"""Run one forward and one backward pass and write down what every module computes and holds.

    FLOPs are those of the operations that really run, two for each multiply-add of a product of matrices, a
    convolution or an attention; operations that only take a few steps for each element are not counted, but listed.
    Bytes held are those of the distinct storages that the graph keeps alive when the forward pass is over, as in
    `measure_held_bytes`; parameters and buffers are left out, the batch is not. Each storage belongs to the module and
    the operation that saved it first. Backward FLOPs belong to the module that made the autograd node, by the number
    that autograd gives each node.

    Args:
        model: any module, in the mode it is in; compiled parts run eagerly.
        *inputs: of its forward, on the devices it needs.
        loss: called with the model's output, returns the tensor that is differentiated. By default the output's entry
            ``loss`` where it has one, as models of Hugging Face do, and otherwise everything in it that requires grad.
        fake: run on fake tensors, without data and without memory: for models and batches that do not fit this
            machine. Model and inputs may then live on the meta device, too, and count as if on the CPU.
        **kwargs: of its forward; a batch that is a dictionary goes in as ``scan(model, **batch)``.

    Returns:
        The report; its remarks say what its figures are without. Gradients, the values of buffers and torch's random
        state are as before; what the forward pass assigns to the model's attributes, or initialises, stays. Converted
        models draw as in training. Hooks on tensors and modules run, as in any step.

    Law:
        Exact: the figures of all rows add up to the total, and the total equals `torch.utils.flop_counter` wherever
        that is right; where it is not, see the documentation. It says nothing of time, and bytes held are not peak
        memory (`peak_memory`). Not for forward passes that take gradients by `torch.func`: those allow no hooks.

    Raises:
        ArgumentError: `loss` is no function.
        ModelTypeError: `model` is not a module.
        InputsError: the inputs do not fit the signature of the model's forward.
        MetaTensorError: a parameter, buffer or input has no data, and `fake` is not set.
        FakeModelError: `fake` is set, and the model cannot be copied, or waits for its first batch.
        ForwardError: the forward pass or the loss raised; the message names the module, the cause is the original.
        BackwardError: the backward pass raised.
        ForwardResultError: there is no tensor in what the model or the loss returned.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> report = scan(model, torch.ones(32, 8))
        >>> report.row("0").forward_flops == 2 * 32 * 8 * 16
        True
        >>> report.total.saved_bytes == 32 * 8 * 4 + 32 * 16 * 4
        True
        >>> report.uncounted
        ('aten::relu', 'aten::sum', 'aten::threshold_backward')
    """
    check_arguments(model, inputs, kwargs, fake)
    if loss is not None and not callable(loss):
        raise ArgumentError(f"loss must be a function of the model's output, but got {describe_value(loss)}")
    with contextlib.ExitStack() as stack:
        if fake:
            model, inputs, kwargs = stack.enter_context(fake_copies(model, inputs, kwargs))
        gradients = stack.enter_context(undisturbed(model, (inputs, kwargs)))
        tracker = ModuleTracker(model)
        ledger, outputs = Ledger(tracker, fake=fake), OutputNotes(len(tracker.names))
        stack.enter_context(tracker.attached(outputs.add))
        is_compiled = has_compiled_parts(tracker.modules)
        if is_compiled:
            # Eagerly, a module and what was compiled of it are two modules, each with its row.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
        inputs, kwargs = detach_inputs((inputs, kwargs))
        stack.enter_context(ledger)
        with saved_tensors_hooks(ledger.post.pack, ledger.post.unpack):
            output, targets = _run_forward(model, inputs, kwargs, loss, tracker)
        owned = key_storages(list_owned_tensors([model]))
        savings, leaves = ledger.end_forward((output, targets), owned)
        gradients.set_aside(leaves)
        _run_backward(targets, tracker)
        without_gradient = _list_without_gradient(tracker, outputs) if targets else ""
    mistyped = find_mistyped_options(model, kwargs, ("loss", "fake"))
    remarks = {
        **{_MISTYPED.format(*pair): True for pair in mistyped},
        _NO_GRADIENT: not targets,
        _NO_PARAMETER_GRADIENT.format(without_gradient): bool(without_gradient),
        _NO_WORKSPACE: fake and ledger.has_run("aten::mkldnn_rnn_layer"),
        _COMPILED: is_compiled,
        _FOREIGN_HOOKS: ledger.has_foreign_hooks,
        _SELECTIVE: ledger.has_selective_checkpoints,
    }
    return write_report(
        ledger, outputs, savings, remarks=tuple(text for text, applies in remarks.items() if applies), fake=fake
    )


def _run_forward(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any], Tensor] | None,
    tracker: ModuleTracker,
) -> tuple[Any, list[Tensor]]:
    """Return the model's output, and the tensors that are differentiated."""
    try:
        output = model(*inputs, **kwargs)
    except (FormulaError, MemoryError):
        raise
    except Exception as error:
        raise ForwardError(_describe_failure(error, tracker, inputs, kwargs)) from error
    if not any(True for _ in list_tensors(output)):
        raise ForwardResultError(
            f"the model returned {type(output).__name__}, in which no tensor was found; let it return tensors, or "
            "tuples, lists, dictionaries or dataclasses of them"
        )
    if loss is None:
        return output, _choose_targets(output)
    try:
        value = loss(output)
    except (FormulaError, MemoryError):
        raise
    except Exception as error:
        raise ForwardError(
            f"the loss raised {type(error).__name__}: {error}{_advise_on_values(error)}; the output was "
            f"{describe_tensors(output)}"
        ) from error
    if not isinstance(value, Tensor):
        raise ForwardResultError(f"the loss returned {describe_value(value)}; let it return a tensor")
    return output, [value] if value.requires_grad else []


def _choose_targets(output: Any) -> list[Tensor]:
    """Return the loss in a model's output, or else everything in it that requires grad."""
    own_loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own_loss, Tensor) and own_loss.requires_grad:
        return [own_loss]
    distinct = {id(tensor): tensor for tensor in list_tensors(output) if tensor.requires_grad}
    return list(distinct.values())


def _run_backward(targets: list[Tensor], tracker: ModuleTracker) -> None:
    if not targets:
        return
    try:
        torch.autograd.backward(targets, [torch.ones_like(target) for target in targets])
    except (FormulaError, MemoryError):
        raise
    except Exception as error:
        number = tracker.find_failure(error)
        place = "" if number is None else f" in a recomputation of {tracker.describe(number)}"
        raise BackwardError(f"the backward pass raised{place} {type(error).__name__}: {error}") from error


def _list_without_gradient(tracker: ModuleTracker, outputs: OutputNotes) -> str:
    """Return the modules that ran without a graph though their parameters want gradients; at most three by name."""
    names = [
        tracker.describe(number)
        for number, module in enumerate(tracker.modules)
        if tracker.calls[number] and number not in outputs.with_graph and _waits_for_gradients(module)
    ]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _waits_for_gradients(module: nn.Module) -> bool:
    """Tell whether a module's own parameters require gradients and none has got one."""
    wanting = [own for own in module._parameters.values() if own is not None and own.requires_grad]
    return bool(wanting) and all(own.grad is None for own in wanting)


def _describe_failure(error: Exception, tracker: ModuleTracker, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    number = tracker.find_failure(error)
    place = "" if number is None else f" in {tracker.describe(number)}"
    text = (
        f"the forward pass raised{place} {type(error).__name__}: {error}{_advise_on_values(error)}; the inputs were "
        f"{describe_tensors((inputs, kwargs))}"
    )
    if any(isinstance(value, Mapping) for value in inputs):
        text += "; a batch that is a dictionary of arguments goes in as scan(model, **batch)"
    elif any(isinstance(value, (tuple, list)) for value in inputs):
        text += "; a batch that is a tuple or list of inputs goes in as scan(model, *batch)"
    return text


def _advise_on_values(error: Exception) -> str:
    """Return what to do where a program asked a fake tensor for its value."""
    asked = isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))
    return "; this depends on values, which fake tensors have not: scan without fake=True" if asked else ""
