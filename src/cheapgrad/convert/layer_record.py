"""One line of a conversion: what happened to a module, and what it is predicted to save."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class LayerRecord:
    """What happened to one module.

    All predictions are modelled from the strategies' laws, for the sizes (and, for variances, the tensors) last seen.

    Attributes:
        name: qualified name; empty for the model itself.
        kind: class name.
        status: ``"converted"``, ``"skipped"``, or ``"gone"`` if the layer was replaced since.
        remark: why it was skipped, or what else is worth knowing.
        stored: the strategy as text, or None.
        cotangent: the strategy as text, or None.
        exact_saved_bytes: bytes of the whole input, or None before a batch was seen.
        saved_bytes: bytes kept instead.
        exact_backward_flops: FLOPs of the exact products dX and dW, both of them, whether or not both are needed.
        backward_flops: FLOPs of the sketched ones. `Handle.measure_cost` counts what really runs.
        weight_variance: ``E ||dW_hat - dW||**2`` of this layer alone, or None before `Handle.predict`.
        weight_norm_squared: ``||dW||**2``.
        input_variance: ``E ||dX_hat - dX||**2`` of this layer alone, or None.
        input_norm_squared: ``||dX||**2``.
        unpredicted: why no variance can be predicted from the layer's own tensors; empty before `Handle.predict`.
    """

    name: str
    kind: str
    status: str
    remark: str = ""
    stored: str | None = None
    cotangent: str | None = None
    exact_saved_bytes: float | None = None
    saved_bytes: float | None = None
    exact_backward_flops: float | None = None
    backward_flops: float | None = None
    weight_variance: float | None = None
    weight_norm_squared: float | None = None
    input_variance: float | None = None
    input_norm_squared: float | None = None
    unpredicted: str = ""

    @property
    def relative_variance(self) -> float | None:
        """``weight_variance / weight_norm_squared``, or None if unknown."""
        if self.weight_variance is None or not self.weight_norm_squared:
            return None
        return self.weight_variance / self.weight_norm_squared

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able data."""
        return dataclasses.asdict(self)


def describe_layer(module: nn.Module) -> str:
    """Return a module's type and the shapes of its own parameters.

    >>> describe_layer(nn.Linear(2, 3))
    'Linear(weight [3, 2], bias [3])'
    """
    shapes = [
        f"{name} {'of no shape yet' if is_lazy(parameter) else list(parameter.shape)}"
        for name, parameter in module.named_parameters(recurse=False)
    ]
    return f"{type(module).__name__}({', '.join(shapes)})"
