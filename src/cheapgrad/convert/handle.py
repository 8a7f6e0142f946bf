"""The handle of a converted model: what was done, exact mode, predictions, and the way back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert.layer_record import LayerRecord
from cheapgrad.convert.predictions import predict_sizes, predict_variances
from cheapgrad.convert.scopes import close_scopes
from cheapgrad.convert.sketched_layer import Probe, SketchedLayer, Switch, sketched_class
from cheapgrad.convert.summary import render_summary
from cheapgrad.convert.uncovered import HeldElsewhere, list_uncovered, remark_on_uncovered
from cheapgrad.cost import CostComparison, CostReport, compare, scan
from cheapgrad.errors import (
    ConversionError,
    ModelTypeError,
    NoMatchError,
    PlacementError,
    ShapeError,
    nearest_match,
)
from cheapgrad.exactness import forced_exact
from cheapgrad.sketch import AbstractStrategy


class Handle:
    """What `approximate` returns.

    Args:
        model: the converted model.
        records: one record per matched layer.
        switch: the switch its converted layers share.
    """

    def __init__(self, model: nn.Module, records: tuple[LayerRecord, ...], switch: Switch) -> None:
        self.model = model
        self._records = records
        self._switch = switch
        self._reverted = False

    @property
    def rows(self) -> tuple[LayerRecord, ...]:
        """One record per matched layer, with the predictions for the sizes last seen."""
        layers = dict(self._converted())
        self._records = tuple(self._up_to_date(record, layers) for record in self._records)
        return self._records

    def _up_to_date(self, record: LayerRecord, layers: dict[str, SketchedLayer]) -> LayerRecord:
        if record.status != "converted" or self._reverted:
            return record
        if record.name not in layers:
            remark = "the layer was replaced or removed since it was converted"
            return dataclasses.replace(record, status="gone", remark=remark, stored=None, cotangent=None)
        layer = layers[record.name]
        return dataclasses.replace(_show_cotangent(record, layer), **predict_sizes(layer))

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Run the stock code of every layer inside the context: exact gradients, second derivatives allowed.

        Copies of the model have a switch of their own, which is off; so has the one that ``scan(model, fake=True)``
        makes. `measure_cost` knows about that.
        """
        self._check_live()
        self._switch.exact_depth += 1
        try:
            yield
        finally:
            self._switch.exact_depth -= 1

    def revert(self) -> None:
        """Give every layer its original class back; the model is as it was before `approximate`.

        Raises:
            ConversionError: if it was reverted already, or another tool has swapped the class of a layer since.
        """
        self._check_live()
        layers = list(self._converted())
        for name, module in layers:
            _check_own_class(name, module)
        shown = dict(layers)
        self._records = tuple(
            _show_cotangent(record, shown[record.name]) if record.name in shown else record for record in self._records
        )
        for _, module in layers:
            object.__setattr__(module, "__class__", module._cheapgrad.original_class)
            del module.__dict__["_cheapgrad"]
        close_scopes(self.model)
        self._reverted = True

    def strategies(self) -> dict[str, AbstractStrategy]:
        """Return the cotangent's strategy of every converted layer that has one, by the layer's name."""
        plans = {name: module._cheapgrad.plan for name, module in self._converted()}
        return {name: plan.cotangent for name, plan in plans.items() if plan.cotangent is not None}

    def replace_strategies(self, strategies: Mapping[str, AbstractStrategy]) -> None:
        """Give layers another strategy of the same kind for the cotangent, such as one with another budget.

        Graphs that exist already keep the strategies they were made with.

        Args:
            strategies: by the layer's name, of the class that the layer has now.

        Raises:
            NoMatchError: if a name is none of `strategies`.
            PlacementError: if a strategy is of another class.
            ConversionError: if the handle was reverted.
        """
        self._check_live()
        layers = dict(self._converted())
        present = self.strategies()
        for name, strategy in strategies.items():
            if name not in present:
                raise NoMatchError(
                    f"no layer {name!r} has a strategy for its cotangent{nearest_match(name, present)} "
                    f"(layers: {', '.join(map(repr, list(present)[:8])) or 'none'})"
                )
            if type(strategy) is not type(present[name]):
                raise PlacementError(f"layer {name!r} has {present[name]!r}, which {strategy!r} cannot stand in for")
        for name, strategy in strategies.items():
            layers[name]._cheapgrad.replace_cotangent(strategy)

    def seen_sizes(self) -> dict[str, Any]:
        """Return the sizes of every converted layer's last training pass, by the layer's name; None before one.

        Raises:
            ConversionError: if the handle was reverted.
        """
        self._check_live()
        return {name: module._cheapgrad.shape for name, module in self._converted()}

    def predict(self, closure: Callable[[], Tensor]) -> tuple[LayerRecord, ...]:
        """Evaluate every layer's law on the tensors of one exact forward and backward pass.

        Args:
            closure: runs the model on a batch and returns a scalar loss. It must not call ``backward``; the gradients
                held by the parameters, buffers and torch's random state are as before when it is done.

        Returns:
            The records, with variances filled in: modelled, each layer on its own, without the noise that reaches it
            from the layers above.

        Raises:
            ShapeError: if the closure does not return a scalar that requires grad.
        """
        self._check_live()
        layers = dict(self._converted())
        # Batch norms count the batches they see.
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        for module in layers.values():
            module._cheapgrad.probe = Probe()
        try:
            # A compiled model runs eagerly here: the probes are side effects that no graph may hold.
            with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(), torch.enable_grad():
                gradients = self._gradients(closure, [module._cheapgrad.probe for module in layers.values()])
                # Inside too: some laws draw, such as that of a lazily refreshed basis.
                predictions = {name: predict_variances(module, gradients) for name, module in layers.items()}
        finally:
            for module in layers.values():
                module._cheapgrad.probe = None
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        self._records = tuple(
            dataclasses.replace(record, **predictions.get(record.name, {})) for record in self._records
        )
        return self.rows

    def _gradients(self, closure: Callable[[], Tensor], probes: list[Probe | None]) -> dict[int, Tensor]:
        """Return the gradients of parameters and of the probed inputs, by the tensor's id."""
        loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ShapeError(
                f"the closure must return a scalar loss that requires grad, but returned {_describe(loss)}; "
                "return e.g. loss_function(model(x), y) without calling backward"
            )
        wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        wanted += [x for probe in probes if probe is not None for x in probe.inputs]
        gradients = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
        return {
            id(tensor): gradient for tensor, gradient in zip(wanted, gradients, strict=True) if gradient is not None
        }

    def measure_cost(
        self, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, fake: bool = False, **kwargs: Any
    ) -> CostComparison:
        """Scan a training step of the model twice, exact and as converted, and put the two ledgers side by side.

        Where the rows of the handle are modelled from laws, layer by layer, this is counted: which of dX and dW a layer
        really computes, and what the network holds when a neighbour keeps the same tensor.

        Args:
            *inputs: of the model's forward.
            loss: called with the model's output; see `cheapgrad.scan`.
            fake: scan without data and without memory.
            **kwargs: of the model's forward.

        Returns:
            The figures of every module before (exact) and after (sketched), and the totals.

        Raises:
            ConversionError: if the handle was reverted. What `cheapgrad.scan` refuses or runs into is raised as there.

        Example:
            >>> import cheapgrad
            >>> model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128))
            >>> handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=cheapgrad.sketch.RowSample(keep=0.5)))
            >>> cost = handle.measure_cost(torch.randn(64, 128))
            >>> cost.before.backward_flops / cost.after.backward_flops
            2.0
        """
        self._check_live()
        # Not this handle's own switch: a copy of the model, as a scan without data makes one, does not share it.
        with forced_exact():
            exact = scan(self.model, *inputs, loss=loss, fake=fake, **kwargs)
        sketched = scan(self.model, *inputs, loss=loss, fake=fake, **kwargs)
        comparison = _remark_on_chains(compare(exact, sketched), sketched)
        remark = remark_on_uncovered(list_uncovered(self.model, self._records, sketched))
        return dataclasses.replace(comparison, remarks=(*comparison.remarks, *([remark] if remark else [])))

    def uncovered(
        self, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, fake: bool = False, **kwargs: Any
    ) -> tuple[HeldElsewhere, ...]:
        """Scan a training step and list what still holds bytes because no rule reaches it, the largest first.

        These are modules that no rule matches or that have no sketched operation, functions that the model's own
        forward passes call, and what must stay exact, such as queries and keys. Every record says why.

        Args:
            *inputs: of the model's forward.
            loss: called with the model's output; see `cheapgrad.scan`.
            fake: scan without data and without memory.
            **kwargs: of the model's forward.

        Raises:
            ConversionError: if the handle was reverted. What `cheapgrad.scan` refuses or runs into is raised as there.

        Example:
            >>> import cheapgrad
            >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8), nn.Softmax(-1))
            >>> handle = cheapgrad.approximate(model, cheapgrad.recipes.memory(bits=4), skip_small=False)
            >>> for each in handle.uncovered(torch.randn(32, 64)):
            ...     print(each.module, each.held_bytes)
            3 1024
        """
        self._check_live()
        report = scan(self.model, *inputs, loss=loss, fake=fake, **kwargs)
        return list_uncovered(self.model, self._records, report)

    def summary(self) -> str:
        """Return the table of converted and skipped layers with predicted bytes, FLOPs and relative variance.

        It is as wide as the terminal, or as ``COLUMNS`` says; columns that do not fit are named below it. Where output
        goes elsewhere, all of it is shown.
        """
        return render_summary(self.rows, reverted=self._reverted)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        converted = sum(record.status == "converted" for record in self.rows)
        return (
            f"<cheapgrad.Handle of {type(self.model).__name__}: {converted} of {len(self._records)} layers converted>"
        )

    def _converted(self) -> Iterator[tuple[str, SketchedLayer]]:
        for name, module in self.model.named_modules():
            if isinstance(module, SketchedLayer) and module._cheapgrad.switch is self._switch:
                yield name, module

    def _check_live(self) -> None:
        if self._reverted:
            raise ConversionError("this handle was reverted already; call cheapgrad.approximate again")


def _show_cotangent(record: LayerRecord, layer: SketchedLayer) -> LayerRecord:
    """Return the record with the strategy in force, which another handle of the conversion may have replaced."""
    cotangent = layer._cheapgrad.plan.cotangent
    return dataclasses.replace(record, cotangent=repr(cotangent) if cotangent else None)


def _check_own_class(name: str, module: SketchedLayer) -> None:
    own = sketched_class(module._cheapgrad.original_class)
    if type(module) is not own:
        raise ConversionError(
            f"layer {name!r} is a {type(module).__name__} now, not the {own.__name__} that the conversion made: "
            "another tool (fully_shard, a parametrization) has swapped its class since; undo that first"
        )


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _remark_on_chains(comparison: CostComparison, sketched: CostReport) -> CostComparison:
    """Return the comparison with the layers named that carry the backward FLOPs of others."""
    ends = [
        cost.module for cost in sketched.operations if cost.operation.endswith("ChainFunction") and cost.backward_flops
    ]
    if not ends:
        return comparison
    shown = ", ".join(map(repr, ends[:3])) + (f" and {len(ends) - 3} more" if len(ends) > 3 else "")
    remark = (
        f"after: layers in a chain run backward as one, and all their backward FLOPs stand with the last: {shown}; "
        "compare the totals"
    )
    return dataclasses.replace(comparison, remarks=(*comparison.remarks, remark))


def get_handle(model: nn.Module) -> Handle:
    """Return a handle for a model that is converted already, such as a deep copy or one loaded from a pickle.

    Raises:
        ModelTypeError: if `model` is not a module.
        ConversionError: if it has no converted layer, or layers of several conversions.
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"model must be a torch.nn.Module, but got {model!r} of type {type(model).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SketchedLayer)}
    switches = {id(module._cheapgrad.switch): module._cheapgrad.switch for module in layers.values()}
    if not layers:
        raise ConversionError("the model has no converted layer; convert it with cheapgrad.approximate(model, rules)")
    if len(switches) != 1:
        raise ConversionError(
            f"the model has layers of {len(switches)} conversions, so there is no one handle; "
            "keep the handles that cheapgrad.approximate returned"
        )
    records = tuple(
        LayerRecord(
            name=name,
            kind=module._cheapgrad.original_class.__name__,
            status="converted",
            stored=repr(module._cheapgrad.plan.stored) if module._cheapgrad.plan.stored else None,
            cotangent=repr(module._cheapgrad.plan.cotangent) if module._cheapgrad.plan.cotangent else None,
        )
        for name, module in layers.items()
    )
    return Handle(model, records, next(iter(switches.values())))
