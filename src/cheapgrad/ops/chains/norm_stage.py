"""Layer normalisation over the last axis as a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops.chains.stage import AbstractOpenedStage, AbstractStage, KeptRows, Rebuild
from cheapgrad.ops.plan import Plan, RootUse
from cheapgrad.sketch import AbstractStrategy, DenseMatrix, Moment, Operands


@dataclass(frozen=True)
class AbstractNormStage(AbstractStage):
    """A norm over features: what follows may want its input, from which the output can be computed again."""


@dataclass(frozen=True)
class LayerNormStage(AbstractNormStage):
    r"""``y = x_hat * weight + bias`` with ``x_hat = (x - mean) / sqrt(var + eps)`` per row; weight, bias may be None.

    With ``g = weight * grad``, the gradient of the input is ``(g - mean(g) - x_hat mean(g x_hat)) / sqrt(var + eps)``:
    quadratic in ``x_hat``. A codec therefore keeps two independent codes of ``x_hat``, one for each factor, so that the
    product is unbiased; the first one also serves the weight's gradient and the layers that follow, which are linear.

    Attributes:
        eps: added to the variance.
        features: I.
        stored: codec for the normalised rows, or None to keep the input.
        use: told when the input is kept, or None.
    """

    eps: float
    features: int
    stored: AbstractStrategy | None = None
    use: RootUse | None = field(default=None, compare=False, repr=False)

    @classmethod
    def for_plan(cls, plan: Plan, eps: float, features: int) -> LayerNormStage:
        """Return the stage that keeps what a plan says."""
        return cls(eps, features, plan.stored, plan.root_use)

    def options(self) -> tuple[Any, ...]:
        """Return name and arguments of `for_plan`."""
        return "layer_norm", self.eps, self.features

    @property
    def rebuilds_output(self) -> bool:
        """Yes: one pass over the kept rows."""
        return True

    def forward(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Return the normalised rows."""
        weight, bias = parameters
        return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)

    def record(self, x: Tensor, parameters: tuple[Tensor | None, ...], is_rebuilt: bool) -> tuple[Tensor, ...]:
        """Return the input, or ``1 / sqrt(var + eps)`` and two codes of ``x_hat``."""
        if self.stored is None:
            return () if is_rebuilt else (x,)
        x_hat, _, rstd = torch.ops.aten.native_layer_norm(x, [x.shape[-1]], None, None, self.eps)
        operands = Operands(Moment.STORED, DenseMatrix(x_hat.reshape(-1, x.shape[-1])))
        return (rstd.reshape(-1, 1), *self.stored.store(operands), *self.stored.store(operands))

    def open(
        self,
        record: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
        rows: KeptRows,
        rebuild: Rebuild | None,
    ) -> AbstractOpenedStage:
        """Normalise the kept rows again, or decode them."""
        if self.stored is None:
            input_KI = rebuild() if rebuild is not None and not record else rows.take_visibly(record[0])
            return _NormalisedAgain(self.eps, input_KI, parameters)
        rstd_N, *codes = record
        half = len(codes) // 2
        first_KI, second_KI = (
            rows.decode(self.stored, tuple(code), self.features, rstd_N.dtype) for code in (codes[:half], codes[half:])
        )
        return _Decoded(first_KI, second_KI, rows.take(rstd_N), parameters)


class _NormalisedAgain(AbstractOpenedStage):
    def __init__(self, eps: float, input_KI: Tensor, parameters: tuple[Tensor | None, ...]) -> None:
        self._input_KI = input_KI
        self._parameters = parameters
        self._shape = [input_KI.shape[-1]]
        self._output_KI, self._mean_K, self._rstd_K = torch.ops.aten.native_layer_norm(
            input_KI, self._shape, *parameters, eps
        )

    def output(self) -> Tensor:
        """Return the normalised rows."""
        return self._output_KI

    def pull_back(self, grad_KO: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """Return PyTorch's own gradients, on the kept rows."""
        weight, bias = self._parameters
        mask = [wanted[0], wanted[1] and weight is not None, wanted[2] and bias is not None]
        gradients = torch.ops.aten.native_layer_norm_backward(
            grad_KO.to(self._output_KI.dtype),
            self._input_KI,
            self._shape,
            self._mean_K,
            self._rstd_K,
            weight,
            bias,
            mask,
        )
        kept = [gradient if wished else None for gradient, wished in zip(gradients, mask, strict=True)]
        return kept[0], (kept[1], kept[2])


class _Decoded(AbstractOpenedStage):
    def __init__(
        self, normalised_KI: Tensor, again_KI: Tensor, rstd_K: Tensor, parameters: tuple[Tensor | None, ...]
    ) -> None:
        self._normalised_KI, self._again_KI = normalised_KI, again_KI
        self._rstd_K = rstd_K
        self._parameters = parameters

    def output(self) -> Tensor:
        """Return an unbiased stand-in for the normalised rows."""
        weight, bias = self._parameters
        if weight is None:
            return self._normalised_KI
        if bias is None:
            return self._normalised_KI * weight
        return torch.addcmul(bias, self._normalised_KI, weight)

    def pull_back(self, grad_KO: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """Return gradients in which no code is multiplied with itself."""
        weight, _ = self._parameters
        grad_KO = grad_KO.to(self._normalised_KI.dtype)
        grad_weight = (grad_KO * self._normalised_KI).sum(0) if wanted[1] else None
        grad_bias = grad_KO.sum(0) if wanted[2] else None
        if not wanted[0]:
            return None, (grad_weight, grad_bias)
        scaled_KI = grad_KO if weight is None else grad_KO * weight
        along_K = (scaled_KI * self._again_KI).mean(1, keepdim=True)
        centred_KI = scaled_KI - scaled_KI.mean(1, keepdim=True)
        return centred_KI.addcmul_(self._normalised_KI, along_K, value=-1).mul_(self._rstd_K), (
            grad_weight,
            grad_bias,
        )
