"""What the outputs of a model mean as a distribution, for targets drawn from it."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from cheapgrad.errors import LossError


class AbstractLikelihood(abc.ABC):
    """A distribution of targets given outputs; called as a loss it is its mean negative log-likelihood."""

    @abc.abstractmethod
    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return the mean loss, a scalar."""

    @abc.abstractmethod
    def draw_root(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        """Return a random tensor s like the outputs with ``E[s sᵀ] = ∂²loss/∂outputs²``.

        It is the loss' gradient at targets drawn from the model, times the root of the number of its terms. Different
        terms of the loss are independent, so only the products within a term count; see `term_axes`.
        """

    @abc.abstractmethod
    def term_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the axes that run within a term of the loss."""


@final
@dataclass(frozen=True)
class Categorical(AbstractLikelihood):
    """Cross-entropy of logits ``[B, C]`` or ``[B, C, ...]``, a mean over its terms like `torch.nn.CrossEntropyLoss`.

    Attributes:
        ignore_index: class targets that do not count.
        label_smoothing: changes the loss, not its second derivative.

    Example:
        >>> likelihood = Categorical()
        >>> root = likelihood.draw_root(torch.zeros(1, 2), torch.tensor([0]), torch.Generator().manual_seed(0))
        >>> root.abs()
        tensor([[0.5, 0.5]])
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(
            outputs, targets, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )

    def draw_root(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``(p − onehot(c)) / √terms`` with classes c drawn from p."""
        axis = self.term_axes(outputs)[0]
        logits = outputs.movedim(axis, -1)
        p_NC = logits.softmax(-1).reshape(-1, logits.shape[-1])
        drawn_N = torch.multinomial(p_NC, 1, generator=generator).squeeze(1)
        root_NC = p_NC - nn.functional.one_hot(drawn_N, p_NC.shape[1]).to(p_NC.dtype)
        terms = root_NC.shape[0]
        if not targets.is_floating_point():
            counted_N = (targets != self.ignore_index).reshape(-1)
            terms = int(counted_N.sum())
            root_NC = root_NC * counted_N.unsqueeze(1)
        return (root_NC / terms**0.5).reshape(logits.shape).movedim(-1, axis)

    def term_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the class axis: the first of unbatched outputs, else the second."""
        return (min(1, outputs.ndim - 1),)


@final
@dataclass(frozen=True)
class Gaussian(AbstractLikelihood):
    """Squared error, averaged over all entries as `torch.nn.MSELoss` does."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error."""
        return nn.functional.mse_loss(outputs, targets)

    def draw_root(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Return normal numbers of variance ``2 / entries``."""
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        return noise * (2 / outputs.numel()) ** 0.5

    def term_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """Return all axes but the examples'."""
        return tuple(range(1, outputs.ndim))


@final
@dataclass(frozen=True)
class Bernoulli(AbstractLikelihood):
    """Binary cross-entropy of logits, averaged over all entries as `torch.nn.BCEWithLogitsLoss` does."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean binary cross-entropy."""
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def draw_root(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``(p − coin) / √entries`` with coins drawn from p."""
        p = outputs.sigmoid()
        return (p - torch.bernoulli(p, generator=generator)) / outputs.numel() ** 0.5

    def term_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """Return all axes but the examples'."""
        return tuple(range(1, outputs.ndim))


def as_likelihood(loss: Any) -> AbstractLikelihood:
    """Return the distribution whose mean negative log-likelihood a loss is, up to a constant.

    Args:
        loss: an `AbstractLikelihood`, `torch.nn.CrossEntropyLoss`, `torch.nn.MSELoss` or `torch.nn.BCEWithLogitsLoss`.

    Raises:
        LossError: if it is another one, a sum, or weighs classes.

    Example:
        >>> as_likelihood(torch.nn.CrossEntropyLoss(ignore_index=0))
        Categorical(ignore_index=0, label_smoothing=0.0)
    """
    if isinstance(loss, AbstractLikelihood):
        return loss
    known = {nn.CrossEntropyLoss: Categorical, nn.MSELoss: Gaussian, nn.BCEWithLogitsLoss: Bernoulli}
    weights = [name for name in ("weight", "pos_weight") if getattr(loss, name, None) is not None]
    if type(loss) not in known or weights or loss.reduction != "mean":
        what = f"{loss!r}" + (f" with {' and '.join(weights)}" if weights else "")
        raise LossError(
            f"targets cannot be drawn for the loss {what}; use CrossEntropyLoss(), MSELoss() or BCEWithLogitsLoss() "
            "without weights and with reduction='mean', write an AbstractLikelihood, or take GaussNewton, which needs "
            "none"
        )
    if isinstance(loss, nn.CrossEntropyLoss):
        return Categorical(loss.ignore_index, loss.label_smoothing)
    return known[type(loss)]()
