"""Layers that compute ``W a + b``: linear maps and convolutions, with groups."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from cheapgrad.curvature.kronecker.layers.abstract import AbstractLayer, Use, append_one
from cheapgrad.curvature.kronecker.rows import DenseRows


class AbstractAffine(AbstractLayer):
    """Weight and bias as one matrix per group: the bias is the last column, next to an activation of one."""

    @property
    @abc.abstractmethod
    def groups(self) -> int:
        """Q: independent matrices in the layer."""

    @abc.abstractmethod
    def _read_activations(self, x: Tensor) -> Tensor:
        """Return what the weight multiplies, ``[Q, B, T, I]``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, outputs of a group, inputs of a group with the bias."""
        weight: Any = self.module.weight
        outputs = weight.shape[0] // self.groups
        inputs = weight[0].numel() if "weight" in self.chosen else 0
        return self.groups, outputs, inputs + ("bias" in self.chosen)

    def find_obstacle(self) -> str | None:
        """Return None: every setting of these is supported."""
        return None

    def read_use(self, x: Tensor, output: Tensor, examples: int) -> Use:
        """Return the rows, of the bias alone where the weight is not chosen."""
        self._check_examples(x, examples)
        rows = self._read_activations(x)
        if "weight" not in self.chosen:
            rows = rows[..., :0]
        # A clone, since the model may change the tensor in place later on.
        return Use(DenseRows(append_one(rows) if "bias" in self.chosen else rows.clone()), output)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return weight and bias side by side."""
        Q, O, _ = self.shape
        own: Any = self.module
        leading = next(iter(tensors.values())).shape
        leading = leading[: len(leading) - (own.weight.ndim if "weight" in self.chosen else 1)]
        parts = [tensors[name].reshape(*leading, Q, O, -1) for name in self.parameter_names]
        return torch.cat(parts, -1)

    def unpack(self, block_QOI: Tensor) -> dict[str, Tensor]:
        """Return the columns of the weight and that of the bias."""
        leading, parts = block_QOI.shape[:-3], {}
        own: Any = self.module
        if "weight" in self.chosen:
            parts["weight"] = block_QOI[..., : own.weight[0].numel()].reshape(*leading, *own.weight.shape)
        if "bias" in self.chosen:
            parts["bias"] = block_QOI[..., -1].reshape(*leading, -1)
        return parts


@final
class LinearLayer(AbstractAffine):
    """`torch.nn.Linear` on ``[B, ..., I]``: the axes between are positions."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    @property
    def groups(self) -> int:
        """One."""
        return 1

    def _read_activations(self, x: Tensor) -> Tensor:
        return x.detach().reshape(1, x.shape[0], -1, x.shape[-1])

    def read_cotangent(self, use: Use, cotangent: Tensor) -> Tensor:
        """Return ``[1, B, T, O]``."""
        return cotangent.reshape(1, cotangent.shape[0], -1, cotangent.shape[-1])


@final
class ConvolutionLayer(AbstractAffine):
    """`torch.nn.Conv1d` and `torch.nn.Conv2d`: every output position multiplies a patch of the input."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d)

    @property
    def groups(self) -> int:
        """The convolution's groups; curvature between them is left out."""
        own: Any = self.module
        return own.groups

    def _read_activations(self, x: Tensor) -> Tensor:
        own: Any = self.module
        x = x.detach()
        pads = _find_pads(own)
        if any(pads):
            x = functional.pad(x, pads, mode="constant" if own.padding_mode == "zeros" else own.padding_mode)
        flat = isinstance(own, nn.Conv1d)
        kernel, dilation, stride = ((1, *sizes) if flat else sizes for sizes in _sizes(own))
        patches = functional.unfold(x[:, :, None] if flat else x, kernel, dilation=dilation, stride=stride)
        return patches.reshape(len(x), own.groups, -1, patches.shape[-1]).permute(1, 0, 3, 2)

    def read_cotangent(self, use: Use, cotangent: Tensor) -> Tensor:
        """Return ``[Q, B, T, O]``."""
        B = cotangent.shape[0]
        return cotangent.reshape(B, self.groups, self.shape[1], -1).permute(1, 0, 3, 2)


def _sizes(module: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return module.kernel_size, module.dilation, module.stride


def _find_pads(module: Any) -> list[int]:
    """Return the padding as `torch.nn.functional.pad` wants it: left and right of the last axis first."""
    pads: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [0 if module.padding == "valid" else module.padding[axis]] * 2
    return pads
