"""Likelihoods: what a network's outputs say about the targets, and the square root of that curvature."""

from __future__ import annotations

import abc
import math
import numbers
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from cheapgrad.errors import LossError, TargetError


class AbstractOutputs(abc.ABC):
    """A distribution of the target given outputs ``[..., C]``; positions before the last axis are independent.

    The curvature of an example is ``Jᵀ S Sᵀ J``, where J is the Jacobian of its outputs and ``S Sᵀ`` the Hessian of its
    negative log-likelihood with respect to the outputs, which for these likelihoods is also the Fisher information.

    The likelihoods of `cheapgrad.curvature` are losses in PyTorch's scaling, means over terms or entries. These are
    densities, as a posterior needs them: sums over an example's positions, the classes last.
    """

    @abc.abstractmethod
    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``log p(target | outputs)`` per example ``[B]``, summed over positions."""

    @abc.abstractmethod
    def square_root(self, outputs: Tensor) -> Tensor:
        """Return S ``[..., C, C]`` with ``S Sᵀ`` = Hessian of the negative log-likelihood."""

    @abc.abstractmethod
    def sample_targets(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return targets drawn from the likelihood at the given outputs."""

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:  # noqa: B027 - nothing to check unless a likelihood says so
        """Raise if targets are none of this likelihood; nothing is checked here, nor in a subclass that does not.

        Also called where targets have no part in the curvature, since ones that do not fit betray another mistake.
        """

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of the negative log-likelihood with respect to the outputs, like `outputs`."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(-self.log_likelihood(leaf, targets).sum(), leaf)
        return gradient


@final
@dataclass(frozen=True)
class CategoricalOutputs(AbstractOutputs):
    """Classes, by logits: the loss is the cross-entropy, summed over an example's positions.

    Law:
        ``S = diag(√p) − p √pᵀ`` with p the softmax, hence ``S Sᵀ = diag(p) − p pᵀ``.

    Example:
        >>> root = CategoricalOutputs().square_root(torch.zeros(1, 2))
        >>> (root @ root.mT)[0]
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probability of class indices `targets`, of the outputs' shape without its last axis."""
        self.check_targets(outputs, targets)
        values = -functional.cross_entropy(outputs.flatten(0, -2), targets.flatten().long(), reduction="none")
        return values.reshape(outputs.shape[0], -1).sum(1)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise unless the targets are class indices for each position.

        Raises:
            LossError: if they have another shape or dtype.
            TargetError: if a class is out of range.
        """
        if targets.shape != outputs.shape[:-1] or targets.is_floating_point():
            raise LossError(
                f"class indices for outputs of shape {tuple(outputs.shape)} are whole numbers of shape "
                f"{tuple(outputs.shape[:-1])}, but got {targets.dtype} of shape {tuple(targets.shape)}; "
                "put classes on the outputs' last axis"
            )
        check_classes(targets, outputs.shape[-1])

    def square_root(self, outputs: Tensor) -> Tensor:
        """Return ``diag(√p) − p √pᵀ``."""
        p = outputs.softmax(-1)
        return torch.diag_embed(p.sqrt()) - p[..., :, None] * p.sqrt()[..., None, :]

    def sample_targets(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return class indices."""
        p = outputs.softmax(-1).flatten(0, -2)
        return torch.multinomial(p, 1, generator=generator).reshape(outputs.shape[:-1])


@final
@dataclass(frozen=True)
class GaussianOutputs(AbstractOutputs):
    """Real targets with independent noise: the loss is ``‖target − output‖² / (2 variance)`` per example.

    Attributes:
        variance: of the noise, positive.

    Law:
        ``S = I / √variance``.

    Raises:
        LossError: if the variance is not a positive number.

    Example:
        >>> GaussianOutputs(4.0).square_root(torch.zeros(1, 2))[0]
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        is_number = isinstance(self.variance, numbers.Real) and not isinstance(self.variance, bool)
        if not (is_number and math.isfinite(self.variance) and self.variance > 0):
            raise LossError(
                f"the variance of a Gaussian likelihood must be a positive number, but got {self.variance!r}"
            )

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-density of `targets`, which have the outputs' shape."""
        self.check_targets(outputs, targets)
        squares = (targets - outputs).square() / self.variance + math.log(2 * math.pi * self.variance)
        return -0.5 * squares.reshape(outputs.shape[0], -1).sum(1)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise `LossError` unless the targets have the outputs' shape."""
        if targets.shape != outputs.shape:
            raise LossError(
                f"targets of a Gaussian likelihood have the outputs' shape {tuple(outputs.shape)}, but got "
                f"{tuple(targets.shape)}"
            )

    def square_root(self, outputs: Tensor) -> Tensor:
        """Return the identity divided by the noise's standard deviation."""
        identity = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        return (identity / math.sqrt(self.variance)).expand(*outputs.shape, outputs.shape[-1])

    def sample_targets(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return outputs with noise."""
        noise = torch.randn(outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
        return outputs + math.sqrt(self.variance) * noise


def check_classes(classes: Tensor, count: int) -> None:
    """Raise `TargetError` unless all entries are whole numbers from 0 to `count` - 1."""
    is_whole = not (classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool)
    bad = ((classes < 0) | (classes >= count)) if is_whole else torch.ones_like(classes, dtype=torch.bool)
    if bad.any():
        shown = f"{classes[bad].flatten()[0].item()!r} of {classes.dtype}"
        raise TargetError(
            f"{int(bad.sum())} of {classes.numel()} targets are no classes: whole numbers from 0 to {count - 1} were "
            f"expected, but got {shown}; leave out what has no class"
        )
