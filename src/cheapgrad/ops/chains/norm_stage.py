"""Layer normalisation over the last axis as a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops.chains.stage import AbstractOpenedStage, AbstractStage, KeptRows, Rebuild
from cheapgrad.ops.plan import Plan, RootUse
from cheapgrad.sketch import AbstractStrategy, DenseMatrix, Moment, Operands, StochasticRounding
from cheapgrad.sketch._codes import decode_groups
from cheapgrad.sketch.fusing import work_by_rows


def encode_twice(codec: AbstractStrategy, x_hat: Tensor) -> tuple[Tensor, ...]:
    """Return two independent codes of normalised rows ``[..., I]``."""
    matrix_NI = x_hat.reshape(-1, x_hat.shape[-1])
    if isinstance(codec, StochasticRounding):
        return codec.store_twice(matrix_NI, codec.bits)
    operands = Operands(Moment.STORED, DenseMatrix(matrix_NI))
    return (*codec.store(operands), *codec.store(operands))


@dataclass(frozen=True)
class SecondCode:
    """The second code of normalised rows, on the kept rows: what their product with a cotangent is averaged with.

    Attributes:
        tensors: packed codes ``[K, groups, bytes]`` and scales ``[K, groups, 2]``, or decoded rows ``[K, I]`` where
            rows are no whole groups.
        codec: of both codes.
    """

    tensors: tuple[Tensor, ...]
    codec: AbstractStrategy

    def pull_back(
        self, grad_KI: Tensor, normalised_KI: Tensor, root_K: Tensor, scale_I: Tensor | None, *, is_centred: bool
    ) -> Tensor:
        """Return ``(g - mean(g) - x_hat mean(g x_hat)) * root`` with ``g = scale * grad``, by two independent codes.

        Args:
            grad_KI: cotangent of the output.
            normalised_KI: the first code, decoded.
            root_K: ``[K, 1]``.
            scale_I: weight, or None.
            is_centred: whether a mean is subtracted, from x and so from g.
        """
        rows = grad_KI, normalised_KI, root_K, *self.tensors
        shared = () if scale_I is None else (scale_I.detach(),)
        codec = self.codec
        bits, fused = (codec.bits, codec.fused) if isinstance(codec, StochasticRounding) else (0, False)
        options = {"bits": bits, "is_centred": is_centred, "is_decoded": len(self.tensors) == 1}
        return work_by_rows(_pull_back, rows, shared, fused=fused, **options)[0]


def _pull_back(
    grad_KI: Tensor,
    normalised_KI: Tensor,
    root_K: Tensor,
    *others: Tensor,
    bits: int,
    is_centred: bool,
    is_decoded: bool,
) -> tuple[Tensor]:
    again_KI, *scale_I = others if is_decoded else (_decode(others[0], others[1], bits, grad_KI), *others[2:])
    scaled_KI = grad_KI * scale_I[0] if scale_I else grad_KI
    along_K = (scaled_KI * again_KI).mean(1, keepdim=True)
    centred_KI = scaled_KI - scaled_KI.mean(1, keepdim=True) if is_centred else scaled_KI
    return (torch.addcmul(centred_KI, normalised_KI, along_K, value=-1).mul_(root_K),)


def _decode(packed: Tensor, scales: Tensor, bits: int, like_KI: Tensor) -> Tensor:
    return decode_groups(packed, scales, bits=bits, dtype=like_KI.dtype)[0].view(like_KI.shape)


def take_codes(
    codec: AbstractStrategy, record: tuple[Tensor, ...], features: int, rows: KeptRows
) -> tuple[Tensor, Tensor, SecondCode]:
    """Return the kept rows of a norm's record: the factor, the first code decoded, and the second one.

    Args:
        codec: of both codes.
        record: the factor ``[N, 1]``, then what `encode_twice` returned.
        features: I.
        rows: the rows to take.
    """
    root_N, *codes = record
    half = len(codes) // 2
    first_KI = rows.decode(codec, tuple(codes[:half]), features, root_N.dtype)
    if isinstance(codec, StochasticRounding) and features % codec.group == 0:
        groups = features // codec.group
        second = tuple(rows.take(tensor).unflatten(1, (groups, -1)) for tensor in codes[half:])
    else:
        second = (rows.decode(codec, tuple(codes[half:]), features, root_N.dtype),)
    return rows.take(root_N), first_KI, SecondCode(second, codec)


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
    def for_plan(cls, plan: Plan, features: int, numbers: tuple[float, ...]) -> LayerNormStage:
        """Return the stage that keeps what a plan says."""
        return cls(numbers[0], features, plan.stored, plan.root_use)

    def options(self) -> tuple[Any, ...]:
        """Return name and what `for_plan` is told besides the plan and the features."""
        return ("layer_norm",)

    def numbers(self) -> tuple[float, ...]:
        """Return the numbers that `for_plan` is told."""
        return (self.eps,)

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
        return (rstd.reshape(-1, 1), *encode_twice(self.stored, x_hat))

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
        return _Decoded(*take_codes(self.stored, record, self.features, rows), parameters)


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
        self, root_K: Tensor, normalised_KI: Tensor, second: SecondCode, parameters: tuple[Tensor | None, ...]
    ) -> None:
        self._root_K = root_K
        self._normalised_KI, self._second = normalised_KI, second
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
        grad_input = self._second.pull_back(grad_KO, self._normalised_KI, self._root_K, weight, is_centred=True)
        return grad_input, (grad_weight, grad_bias)
