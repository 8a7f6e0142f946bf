"""The class swap: a live module gets a class whose backward pass is sketched, and nothing else changes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert.kinds import LayerKind, LayerUse, kind_of
from cheapgrad.exactness import is_forced_exact, is_in_step
from cheapgrad.ops.compiled import plan_text
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, Moment, random


class Switch:
    """Shared by all layers of a conversion, and so by its handles.

    Attributes:
        exact_depth: how many `exact` contexts are open.
        owner: who moves the strategies of layers, or None; see `steering`.
        steered: what these layers carry.
    """

    # Pickles from before there were any lack them.
    owner: object = None
    steered: tuple[Conversion, ...] = ()

    def __init__(self) -> None:
        self.exact_depth = 0

    @property
    def is_exact(self) -> bool:
        """Whether stock code is asked for, by this handle or for everything that runs."""
        return self.exact_depth > 0 or is_forced_exact()

    def __getstate__(self) -> dict[str, int]:
        """Copies and pickles are outside of any context, which nobody would ever close, and nobody steers them."""
        return {"exact_depth": 0}


class Probe:
    """Records the uses of a layer in one exact pass, and those of its inputs that need a gradient."""

    def __init__(self) -> None:
        self.uses: list[LayerUse] = []
        self.inputs: list[Tensor] = []

    def record(self, x: Tensor, cotangent: Tensor, wants_input: bool) -> None:
        """Take in the tensors of one use."""
        self.uses.append(LayerUse(x, cotangent.detach().clone(), wants_input))


@dataclass
class Conversion:
    """What a converted module carries beside its parameters.

    Attributes:
        original_class: the class to go back to.
        plan: strategies and their running estimates.
        switch: shared on/off switch.
        shape: sizes seen in the last eager training forward, or None.
        seen: what `shape` was made from.
        probe: set while a prediction is being made.
        before_steering: the cotangent's strategy as converted, where somebody moves it; else None.
    """

    original_class: type[nn.Module]
    plan: Plan
    switch: Switch
    shape: Any = None
    seen: tuple[Any, ...] = ()
    probe: Probe | None = field(default=None, compare=False)
    before_steering: AbstractStrategy | None = None

    def replace_cotangent(self, strategy: AbstractStrategy) -> None:
        """Sketch the cotangent by another strategy of the same class from now on."""
        text = plan_text(self.plan.stored, strategy, self.plan.recompute)
        self.plan = dataclasses.replace(self.plan, cotangent=strategy, text=text)

    def draws_forward(self, module: nn.Module) -> bool:
        """Tell whether the forward pass of `module` draws: not for a weight that was frozen since."""
        stored = self.plan.stored
        return stored is not None and self.kind.draws_codes and not self.kind.why_not(module, stored, Moment.STORED)

    def note_shape(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Remember the sizes of a forward, if they are new."""
        seen = (x.shape, output.shape, output.dtype)
        if seen != self.seen:
            self.seen, self.shape = seen, self.kind.shape(module, x, output)

    @property
    def kind(self) -> LayerKind:
        """The kind of the original class."""
        # The compiler warns of caches that it looks behind.
        find = kind_of if torch.compiler.is_compiling() else _kind_of_converted
        kind = find(self.original_class)
        if kind is None:
            raise RuntimeError(f"{self.original_class.__name__} is no convertible class")
        return kind


# Asked several times in every forward pass of every layer.
_kind_of_converted = functools.cache(kind_of)


class SketchedLayer(nn.Module):
    """Mixed into the class of a converted module; runs stock code wherever exact gradients are asked or needed."""

    _cheapgrad: Conversion

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock forward, with a sketched backward while training."""
        conversion = self._cheapgrad
        if not args and conversion.kind.input_name in kwargs:
            args = (kwargs.pop(conversion.kind.input_name),)
        if conversion.probe is not None:
            return _run_probed(self, conversion, *args, **kwargs)
        if conversion.switch.is_exact or not self.training:
            if self.training and is_in_step() and args and args[0].numel() and conversion.draws_forward(self):
                random.skip_stream(args[0])
            return conversion.original_class.forward(self, *args, **kwargs)
        # Without an input the stock forward says what is missing.
        x = args[0] if args else None
        if x is None or x.numel() == 0:
            return conversion.original_class.forward(self, *args, **kwargs)
        if not torch.is_grad_enabled():
            # It may be the first half of a reentrant checkpoint, whose second half draws.
            if conversion.draws_forward(self):
                random.skip_stream(x)
            return conversion.original_class.forward(self, *args, **kwargs)
        with random.own_stream(x) if conversion.draws_forward(self) else contextlib.nullcontext():
            output = conversion.kind.run(self, conversion.plan, *args, **kwargs)
        if not torch.compiler.is_compiling():
            # What else it returns, such as the weights of an attention, has no backward pass of its own.
            conversion.note_shape(self, x, output[0] if isinstance(output, tuple) else output)
        return output

    def extra_repr(self) -> str:
        """Say what is sketched, after what the stock module says."""
        plan = self._cheapgrad.plan
        parts = [
            conversion_text for conversion_text in [self._cheapgrad.original_class.extra_repr(self)] if conversion_text
        ]
        parts += [
            f"{name}={value!r}" for name, value in (("stored", plan.stored), ("cotangent", plan.cotangent)) if value
        ]
        return ", ".join(parts)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the original class, since sketched classes are made on demand."""
        return _empty_sketched, (self._cheapgrad.original_class,), self.__getstate__()


def _run_probed(module: SketchedLayer, conversion: Conversion, *args: Any, **kwargs: Any) -> Tensor:
    probe, x = conversion.probe, args[0]
    if probe is None:
        raise RuntimeError("only a layer that is being probed runs this")
    if conversion.kind.variance is None:
        return conversion.original_class.forward(module, *args, **kwargs)
    wants_input = x.requires_grad
    if wants_input:
        # Its own node, so that what reaches it is the gradient of this use alone.
        x = x.view_as(x)
        probe.inputs.append(x)
    output = conversion.original_class.forward(module, x, *args[1:], **kwargs)
    if output.requires_grad:
        conversion.note_shape(module, x, output)
        held = x.detach().clone()
        output.register_hook(lambda grad: probe.record(held, grad, wants_input))
    return output


@functools.cache
def sketched_class(original_class: type[nn.Module]) -> type[nn.Module]:
    """Return the sketched class of a stock class; the same object for the same class."""
    name = f"Sketched{original_class.__name__}"
    return type(
        name,
        (SketchedLayer, original_class),
        {"__doc__": f"`{original_class.__name__}` with a sketched backward pass."},
    )


def _empty_sketched(original_class: type[nn.Module]) -> nn.Module:
    cls = sketched_class(original_class)
    return cls.__new__(cls)
