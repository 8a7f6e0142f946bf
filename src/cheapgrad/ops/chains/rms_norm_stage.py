"""Root mean square normalisation over the last axis as a stage."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops.chains.norm_stage import AbstractNormStage, SecondCode, encode_twice, take_codes
from cheapgrad.ops.chains.stage import AbstractOpenedStage, KeptRows, Rebuild
from cheapgrad.ops.plan import Plan, RootUse
from cheapgrad.sketch import AbstractStrategy


class RmsForm(enum.Enum):
    """How a module computes its output in low precision; in what is real they agree."""

    #: As `torch.nn.functional.rms_norm`.
    TORCH = "torch"
    #: Normalised in single precision, rounded, then weighted (Llama, Mistral, Qwen).
    WEIGHTED_LAST = "weighted last"
    #: Normalised and weighted in single precision, then rounded (OLMo).
    ROUNDED_LAST = "rounded last"
    #: The same with ``1 + weight`` (Gemma).
    OFFSET = "offset"

    def forward(self, x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
        """Return the normalised rows, bit for bit as the module does."""
        if self is RmsForm.TORCH or weight is None or eps is None:
            return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        if self is RmsForm.WEIGHTED_LAST:
            return weight * wide.to(x.dtype)
        if self is RmsForm.ROUNDED_LAST:
            return (weight * wide).to(x.dtype)
        return (wide * (1.0 + weight.float())).type_as(x)

    def scale(self, weight: Tensor) -> Tensor:
        """Return what the normalised rows are multiplied by."""
        return 1 + weight if self is RmsForm.OFFSET else weight


@dataclass(frozen=True)
class RmsNormStage(AbstractNormStage):
    r"""``y = x_hat * weight`` with ``x_hat = x / sqrt(mean(x**2) + eps)`` per row; weight may be None.

    With ``g = weight * grad``, the gradient of the input is ``(g - x_hat mean(g x_hat)) / sqrt(mean(x**2) + eps)``:
    quadratic in ``x_hat``. A codec therefore keeps two independent codes of ``x_hat``, one for each factor, as
    `LayerNormStage` does.

    Attributes:
        eps: added to the mean square, or None for the smallest step of the dtype.
        features: I.
        form: how the output is computed.
        stored: codec for the normalised rows, or None to keep the input.
        use: told when the input is kept, or None.
    """

    eps: float | None
    features: int
    form: RmsForm = RmsForm.TORCH
    stored: AbstractStrategy | None = None
    use: RootUse | None = field(default=None, compare=False, repr=False)

    @classmethod
    def for_plan(cls, plan: Plan, features: int, numbers: tuple[float, ...], form: str) -> RmsNormStage:
        """Return the stage that keeps what a plan says."""
        return cls(numbers[0] if numbers else None, features, RmsForm(form), plan.stored, plan.root_use)

    def options(self) -> tuple[Any, ...]:
        """Return name and what `for_plan` is told besides the plan and the features."""
        return "rms_norm", self.form.value

    def numbers(self) -> tuple[float, ...]:
        """Return the numbers that `for_plan` is told."""
        return () if self.eps is None else (self.eps,)

    @property
    def rebuilds_output(self) -> bool:
        """Yes: one pass over the kept rows."""
        return True

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x_hat`` and ``1 / sqrt(mean(x**2) + eps)`` ``[..., 1]``, in single precision at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return wide * root, root

    def forward(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Return the normalised rows."""
        return self.form.forward(x, parameters[0], self.eps)

    def record(self, x: Tensor, parameters: tuple[Tensor | None, ...], is_rebuilt: bool) -> tuple[Tensor, ...]:
        """Return the input, or ``1 / sqrt(mean(x**2) + eps)`` and two codes of ``x_hat``."""
        if self.stored is None:
            return () if is_rebuilt else (x,)
        x_hat, root = self.normalise(x)
        return (root.reshape(-1, 1), *encode_twice(self.stored, x_hat))

    def open(
        self,
        record: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
        rows: KeptRows,
        rebuild: Rebuild | None,
    ) -> AbstractOpenedStage:
        """Normalise the kept rows again, or decode them."""
        weight = parameters[0]
        scale = None if weight is None else self.form.scale(weight)
        if self.stored is None:
            input_KI = rebuild() if rebuild is not None and not record else rows.take_visibly(record[0])
            x_hat_KI, root_K = self.normalise(input_KI)
            return _OpenedRmsNorm(root_K, x_hat_KI, None, scale, self.form.forward(input_KI, weight, self.eps))
        return _OpenedRmsNorm(*take_codes(self.stored, record, self.features, rows), scale, None)


class _OpenedRmsNorm(AbstractOpenedStage):
    def __init__(
        self,
        root_K: Tensor,
        normalised_KI: Tensor,
        second: SecondCode | None,
        scale: Tensor | None,
        output_KI: Tensor | None,
    ) -> None:
        self._root_K = root_K
        self._normalised_KI, self._second = normalised_KI, second
        self._scale = scale
        self._output_KI = output_KI

    def output(self) -> Tensor:
        """Return the output, or an unbiased stand-in for it."""
        if self._output_KI is None:
            self._output_KI = self._normalised_KI if self._scale is None else self._normalised_KI * self._scale
        return self._output_KI

    def pull_back(self, grad_KO: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """Return gradients in which no code is multiplied with itself."""
        grad_KO = grad_KO.to(self._normalised_KI.dtype)
        grad_weight = (grad_KO * self._normalised_KI).sum(0) if wanted[1] and self._scale is not None else None
        if not wanted[0]:
            return None, (grad_weight,)
        if self._second is not None:
            grad_input = self._second.pull_back(
                grad_KO, self._normalised_KI, self._root_K, self._scale, is_centred=False
            )
            return grad_input, (grad_weight,)
        scaled_KI = grad_KO if self._scale is None else grad_KO * self._scale
        along_K = (scaled_KI * self._normalised_KI).mean(1, keepdim=True)
        return torch.addcmul(scaled_KI, self._normalised_KI, along_K, value=-1).mul_(self._root_K), (grad_weight,)
