"""Affine parameters of norms: one small block, whose curvature is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from cheapgrad.curvature.kronecker.layers.abstract import AbstractLayer, Use
from cheapgrad.curvature.kronecker.rows import DenseRows

_CHANNEL_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@final
class NormLayer(AbstractLayer):
    """Scale and shift of a norm, as one vector: its matrix ``G`` is the block itself, and the activation is one.

    The gradient of the scale is ``Σ_t g_t ⊙ x̂_t`` with x̂ the normalised input, that of the shift ``Σ_t g_t``. BatchNorm
    has to be in ``eval()``: in training its output depends on the other examples.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.LayerNorm, nn.RMSNorm, *_CHANNEL_NORMS, *_INSTANCE_NORMS)

    @property
    def shape(self) -> tuple[int, int, int]:
        """One group, all chosen entries, one input."""
        return 1, sum(self.module.get_parameter(name).numel() for name in self.parameter_names), 1

    def find_obstacle(self) -> str | None:
        """Return None: what depends on the mode is looked at with the model as a whole."""
        return None

    def read_use(self, x: Tensor, output: Tensor, examples: int) -> Use:
        """Return ones as activations, and the normalised input."""
        self._check_examples(x, examples)
        ones = x.new_ones(1, examples, 1, 1)
        return Use(DenseRows(ones), output, self._to_rows(self._normalise(x.detach())).clone())

    def read_cotangent(self, use: Use, cotangent: Tensor) -> Tensor:
        """Return ``[1, B, 1, O]``: an example's whole gradient."""
        cotangent_BTD = self._to_rows(cotangent)
        assert use.normalised_BTD is not None
        scaled_BTD = cotangent_BTD * use.normalised_BTD
        parts = {"weight": scaled_BTD, "bias": cotangent_BTD}
        return torch.cat([parts[name].sum(1) for name in self.parameter_names], -1)[None, :, None]

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return scale and shift one after the other."""
        own = [self.module.get_parameter(name) for name in self.parameter_names]
        flat = [
            tensors[name].flatten(tensors[name].ndim - like.ndim)
            for name, like in zip(self.parameter_names, own, strict=True)
        ]
        return torch.cat(flat, -1)[..., None, :, None]

    def unpack(self, block_QOI: Tensor) -> dict[str, Tensor]:
        """Return scale and shift."""
        flat = block_QOI[..., 0, :, 0]
        own = [self.module.get_parameter(name) for name in self.parameter_names]
        parts = flat.split([like.numel() for like in own], -1)
        return {
            name: part.reshape(*flat.shape[:-1], *like.shape)
            for name, part, like in zip(self.parameter_names, parts, own, strict=True)
        }

    def _normalise(self, x: Tensor) -> Tensor:
        own: Any = self.module
        if isinstance(own, nn.LayerNorm):
            return functional.layer_norm(x, own.normalized_shape, eps=own.eps)
        if isinstance(own, nn.RMSNorm):
            return functional.rms_norm(x, own.normalized_shape, eps=own.eps)
        if isinstance(own, nn.GroupNorm):
            return functional.group_norm(x, own.num_groups, eps=own.eps)
        if isinstance(own, _INSTANCE_NORMS) and own.running_mean is None:
            return functional.instance_norm(x, eps=own.eps)
        return functional.batch_norm(x, own.running_mean, own.running_var, training=False, eps=own.eps)

    def _to_rows(self, x: Tensor) -> Tensor:
        """Return ``[B, T, D]`` with D the axis (or axes) that the scale runs along."""
        if isinstance(self.module, (nn.LayerNorm, nn.RMSNorm)):
            return x.reshape(x.shape[0], -1, self.module.get_parameter(self.parameter_names[0]).numel())
        return x.reshape(x.shape[0], x.shape[1], -1).mT
