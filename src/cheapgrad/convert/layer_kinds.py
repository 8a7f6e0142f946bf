"""The kinds of modules that can be converted, and how each runs its sketched forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cheapgrad.ops.linear import sketched_linear
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, LayerShape, Moment, Variance


@dataclass(frozen=True)
class LayerKind:
    """How a kind of module is converted.

    Attributes:
        name: the stock module's name.
        accepts: tells whether a module's class is of this kind (its forward is the stock one).
        run: ``(module, plan, *inputs) -> output``, bit-identical to the stock forward.
        sizes: module to (input features, output features).
        shape: (module, input, output) to the `LayerShape` the laws are functions of.
        variance: ``(module, strategy, moment, input, cotangent, wants input gradient) -> Variance``.
        input_name: what the stock forward calls its first argument.
    """

    name: str
    accepts: Callable[[type[nn.Module]], bool]
    run: Callable[..., Tensor]
    sizes: Callable[[Any], tuple[int, int]]
    shape: Callable[[Any, Tensor, Tensor], LayerShape]
    variance: Callable[[Any, AbstractStrategy, Moment, Tensor, Tensor, bool], Variance]
    input_name: str = "input"


def _runs_stock_forward(stock: type[nn.Module]) -> Callable[[type[nn.Module]], bool]:
    return lambda cls: issubclass(cls, stock) and cls.forward is stock.forward


def _run_linear(module: Any, plan: Plan, x: Tensor) -> Tensor:
    return sketched_linear(x, module.weight, module.bias, plan)


def _matrix_shape(module: Any, x: Tensor, output: Tensor) -> LayerShape:
    return LayerShape(
        rows=output.numel() // output.shape[-1],
        inputs=x.shape[-1],
        outputs=output.shape[-1],
        examples=x.shape[0] if x.dim() > 1 else 1,
        element_bytes=output.element_size(),
    )


def _matrix_variance(
    strategy: AbstractStrategy, moment: Moment, x: Tensor, grad: Tensor, weight_OI: Tensor | None
) -> Variance:
    return strategy.law.variance(
        x.reshape(-1, x.shape[-1]),
        grad.reshape(-1, grad.shape[-1]),
        weight_OI,
        moment=moment,
        examples=x.shape[0] if x.dim() > 1 else 1,
    )


def _linear_variance(
    module: Any, strategy: AbstractStrategy, moment: Moment, x: Tensor, grad: Tensor, wants_input: bool
) -> Variance:
    return _matrix_variance(strategy, moment, x, grad, module.weight.detach() if wants_input else None)


LINEAR = LayerKind(
    name="Linear",
    accepts=_runs_stock_forward(nn.Linear),
    run=_run_linear,
    sizes=lambda module: (module.in_features, module.out_features),
    shape=_matrix_shape,
    variance=_linear_variance,
)


def _is_transposed_linear(cls: type[nn.Module]) -> bool:
    """Recognise the GPT-2 style projection ``y = x W + b`` without importing the library that defines it."""
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in cls.__mro__)


def _run_transposed_linear(module: Any, plan: Plan, x: Tensor) -> Tensor:
    # Two-dimensional, so that the very same product runs as in the stock forward; the example axis goes along.
    examples = x.shape[0] if x.dim() > 1 else 1
    rows = sketched_linear(x.reshape(-1, x.shape[-1]), module.weight.t(), module.bias, plan, examples=examples)
    return rows.view(*x.shape[:-1], module.nf)


TRANSPOSED_LINEAR = LayerKind(
    name="Conv1D",
    accepts=_is_transposed_linear,
    run=_run_transposed_linear,
    sizes=lambda module: (module.weight.shape[0], module.weight.shape[1]),
    shape=_matrix_shape,
    variance=lambda module, strategy, moment, x, grad, wants_input: _matrix_variance(
        strategy, moment, x, grad, module.weight.detach().t() if wants_input else None
    ),
    input_name="x",
)

KINDS: tuple[LayerKind, ...] = (LINEAR, TRANSPOSED_LINEAR)


def kind_of(cls: type[nn.Module]) -> LayerKind | None:
    """Return the kind of a module class, or None if it cannot be converted.

    >>> kind_of(nn.Linear).name
    'Linear'
    """
    return next((kind for kind in KINDS if kind.accepts(cls)), None)
