"""Linear maps: PyTorch's, and the transposed kind of GPT-2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cheapgrad.convert.kinds.layer_kind import LayerKind, LayerUse, runs_stock_forward
from cheapgrad.convert.kinds.products import why_not_product
from cheapgrad.ops.chains.joining import linear_in_chain
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, LayerShape, LayerTensors, Moment, Variance
from cheapgrad.sketch.law import dense_bytes, dense_flops

# Below this many weights the draw costs more time than the smaller products save, and a layer with few weights has few
# outputs for its rounding noise to be averaged over.
_LINEAR_LIMITS = {Moment.STORED: 128 * 128, Moment.COTANGENT: 128 * 128}


def _run_linear(module: Any, plan: Plan, x: Tensor) -> Tensor:
    return linear_in_chain(x, module.weight, module.bias, plan)


def matrix_shape(module: Any, x: Tensor, output: Tensor) -> LayerShape:
    """Return the sizes of one use of a layer whose rows are the flattened leading axes."""
    return LayerShape(
        rows=output.numel() // output.shape[-1],
        inputs=x.shape[-1],
        outputs=output.shape[-1],
        examples=x.shape[0] if x.dim() > 1 else 1,
        element_bytes=output.element_size(),
    )


def _matrix_variance(
    strategy: AbstractStrategy, moment: Moment, use: LayerUse, memory: Any, weight_OI: Tensor
) -> Variance:
    tensors = LayerTensors(
        use.input.reshape(-1, use.input.shape[-1]),
        use.cotangent.reshape(-1, use.cotangent.shape[-1]),
        weight_OI.detach() if use.wants_input else None,
        use.examples,
    )
    return strategy.variance_with_memory(tensors, moment, memory)


def _matrix_flops(strategy: AbstractStrategy | None, moment: Moment, shape: LayerShape) -> float:
    return dense_flops(shape) if strategy is None else strategy.law.flops(shape, moment)


def _matrix_bytes(strategy: AbstractStrategy | None, moment: Moment, shape: LayerShape) -> float:
    return dense_bytes(shape) if strategy is None else strategy.law.saved_bytes(shape, moment)


LINEAR = LayerKind(
    name="Linear",
    accepts=runs_stock_forward(nn.Linear),
    run=_run_linear,
    sizes=lambda module: (module.in_features, module.out_features),
    shape=matrix_shape,
    flops=_matrix_flops,
    saved_bytes=_matrix_bytes,
    why_not=why_not_product,
    least_weights=_LINEAR_LIMITS,
    variance=lambda module, strategy, moment, use, memory: _matrix_variance(
        strategy, moment, use, memory, module.weight
    ),
    cotangent_rows=lambda cotangent: cotangent.reshape(-1, cotangent.shape[-1]),
    cotangent_like=lambda rows_NO, cotangent: rows_NO.view(cotangent.shape),
)


def _is_transposed_linear(cls: type[nn.Module]) -> bool:
    """Recognise the GPT-2 style projection ``y = x W + b`` without importing the library that defines it."""
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in cls.__mro__)


def _run_transposed_linear(module: Any, plan: Plan, x: Tensor) -> Tensor:
    # As one matrix, so that the very same product runs as in the stock forward.
    return linear_in_chain(x, module.weight.t(), module.bias, plan, is_flat=True)


TRANSPOSED_LINEAR = LayerKind(
    name="Conv1D",
    accepts=_is_transposed_linear,
    run=_run_transposed_linear,
    sizes=lambda module: (module.weight.shape[0], module.weight.shape[1]),
    shape=matrix_shape,
    flops=_matrix_flops,
    saved_bytes=_matrix_bytes,
    why_not=why_not_product,
    least_weights=_LINEAR_LIMITS,
    variance=lambda module, strategy, moment, use, memory: _matrix_variance(
        strategy, moment, use, memory, module.weight.t()
    ),
    cotangent_rows=lambda cotangent: cotangent.reshape(-1, cotangent.shape[-1]),
    cotangent_like=lambda rows_NO, cotangent: rows_NO.view(cotangent.shape),
    input_name="x",
)
