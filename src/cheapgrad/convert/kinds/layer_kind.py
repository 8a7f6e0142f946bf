"""What a kind of module tells about itself, so that it can be converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cheapgrad.sketch import AbstractStrategy, Moment, Variance


@dataclass(frozen=True)
class LayerUse:
    """The tensors of one use of a layer, recorded in an exact pass.

    Attributes:
        input: X, in the layer's own shape.
        cotangent: G, in the shape of the output.
        wants_input: whether the input needs a gradient.
    """

    input: Tensor
    cotangent: Tensor
    wants_input: bool

    @property
    def examples(self) -> int:
        """B: the first axis of an input with at least two."""
        return self.input.shape[0] if self.input.dim() > 1 else 1


@dataclass(frozen=True)
class LayerKind:
    """How a kind of module is converted.

    Attributes:
        name: the stock module's name.
        accepts: tells whether a module's class is of this kind (its forward is the stock one).
        run: ``(module, plan, *inputs) -> output``, bit-identical to the stock forward, a tensor or a tuple of which it
            is the first.
        sizes: module to (input features, output features), or None where budgets do not depend on them.
        shape: (module, input, output) to the sizes that costs are functions of.
        flops: (strategy or None for exact, moment, sizes) to the FLOPs of dX and dW.
        saved_bytes: (strategy or None for exact, moment, sizes) to the bytes held in place of X.
        variance: ``(module, strategy, moment, use, memory) -> Variance`` for one use of the layer, which
            `predict_variance` reads; None where it does not follow from one input and one cotangent.
        why_not: ``(module, strategy, moment) -> `` the reason why a strategy has no meaning for the module, or "".
        cotangent_rows: ``(cotangent) -> [N, O]``, the matrix that strategies sketch.
        cotangent_like: ``([N, O], cotangent) -> `` a stand-in in the cotangent's shape.
        input_name: what the stock forward calls its first argument.
        slow_cotangents: strategies that are unbiased for the cotangent but save no time here.
        least_weights: layers with fewer weights are too small to pay, by moment.
        weights: how many numbers its products multiply with; None where `weight` holds them.
        row_wise: whether it has no products to save and matters only as a stage of a chain.
        draws_codes: whether a forward pass that stores draws besides what the stock forward draws.
    """

    name: str
    accepts: Callable[[type[nn.Module]], bool]
    run: Callable[..., Any]
    sizes: Callable[[Any], tuple[int, int]] | None
    shape: Callable[[Any, Tensor, Tensor], Any]
    flops: Callable[[AbstractStrategy | None, Moment, Any], float]
    saved_bytes: Callable[[AbstractStrategy | None, Moment, Any], float]
    variance: Callable[[Any, AbstractStrategy, Moment, LayerUse, Any], Variance] | None
    why_not: Callable[[nn.Module, AbstractStrategy, Moment], str]
    cotangent_rows: Callable[[Tensor], Tensor]
    cotangent_like: Callable[[Tensor, Tensor], Tensor]
    least_weights: Mapping[Moment, int]
    input_name: str = "input"
    slow_cotangents: tuple[type[AbstractStrategy], ...] = ()
    weights: Callable[[Any], int] | None = None
    row_wise: bool = False
    draws_codes: bool = True

    def predict_variance(
        self, module: nn.Module, strategy: AbstractStrategy, moment: Moment, use: LayerUse, memory: Any
    ) -> Variance:
        """Return the variance of one use of a layer, by the law of its kind.

        Args:
            module: the layer.
            strategy: what is sketched.
            moment: where.
            use: the tensors of the use.
            memory: what the strategy remembers between steps.

        Raises:
            RuntimeError: no law gives it; a zero would be read as "exact".
        """
        # Of a row-wise layer rows are drawn at the end of its chain, by another cotangent than its own.
        if self.variance is None or (self.row_wise and moment is Moment.COTANGENT):
            raise RuntimeError(
                f"no law gives the variance of {strategy!r} as {moment.value} in {self.name} from one input and one "
                "cotangent; cheapgrad.audit measures it"
            )
        return self.variance(module, strategy, moment, use, memory)


# What a stock forward calls on its own module: a subclass that overrides one of these has another forward.
_FORWARD_PARTS = ("forward", "_conv_forward", "_output_padding")


def runs_stock_forward(stock: type[nn.Module]) -> Callable[[type[nn.Module]], bool]:
    """Return a test for classes whose forward is that of `stock`."""
    parts = [part for part in _FORWARD_PARTS if part in dir(stock)]
    return lambda cls: issubclass(cls, stock) and all(getattr(cls, part) is getattr(stock, part) for part in parts)
