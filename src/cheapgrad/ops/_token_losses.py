"""Cross-entropy of a chunk of tokens: losses, and what of them flows back into the logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch.transforms import is_inside_transform

# Tokens worked on at a time by default, at least: with fewer, adding to the weight's gradient takes as long as the
# products. As many as there are features are never too many: their logits take no more than that gradient does.
_LEAST_CHUNK = 256


@dataclass(frozen=True)
class LossOptions:
    """The options of a linear layer with cross-entropy.

    Attributes:
        chunk: tokens worked on at a time, or None for a number that suits the count of features.
        ignore_index: target of tokens that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: share of the target that is spread over all classes.
        keep: share of the tokens of a chunk that the weight's gradient is made from, or None for all.
    """

    chunk: int | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    keep: float | None = None

    def chunks(self, tokens: int, features: int) -> Iterator[slice]:
        """Return the slices of tokens that are worked on one after the other."""
        length = self.chunk if self.chunk is not None else max(_LEAST_CHUNK, features)
        # As few as that asks for, of about one size.
        count = max(1, -(-tokens // length))
        length = -(-tokens // count)
        for start in range(0, tokens, length):
            yield slice(start, min(tokens, start + length))

    def token_weights(self, targets_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what each token's loss counts: 0 if it is ignored, for a mean one over the number of those that do."""
        counts_N = targets_N != self.ignore_index
        weight_N = counts_N.to(dtype)
        return weight_N / counts_N.sum() if self.reduction == "mean" else weight_N


def log_probabilities(x_NI: Tensor, weight_CI: Tensor, bias_C: Tensor | None) -> Tensor:
    """Return the logarithms of the softmax of the logits, in single precision at least."""
    logits_NC = torch.nn.functional.linear(x_NI, weight_CI, bias_C)
    return logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32)).log_softmax(1)


def token_losses(log_NC: Tensor, targets_N: Tensor, options: LossOptions) -> Tensor:
    """Return each token's loss ``[N]``, 0 where it is ignored, from the logarithms of its probabilities."""
    is_ignored_N = targets_N == options.ignore_index
    picked_N = log_NC.gather(1, targets_N.masked_fill(is_ignored_N, 0).unsqueeze(1)).squeeze(1)
    if options.label_smoothing:
        picked_N = torch.lerp(picked_N, log_NC.mean(1), options.label_smoothing)
    return (-picked_N).masked_fill(is_ignored_N, 0.0)


def logit_cotangents(log_NC: Tensor, targets_N: Tensor, options: LossOptions) -> Tensor:
    """Return the gradient of each token's loss with its logits ``[N, C]``; outside transforms in place of `log_NC`.

    That is ``softmax(z_n) - (1 - smoothing) e_target - smoothing / C``, as if no token were ignored.
    """
    smoothing = options.label_smoothing
    column = targets_N.masked_fill(targets_N == options.ignore_index, 0).unsqueeze(1)
    hit = log_NC.new_full((1, 1), smoothing - 1.0).expand(column.shape)
    if is_inside_transform():
        return log_NC.exp().scatter_add(1, column, hit) - smoothing / log_NC.shape[1]
    shares_NC = log_NC.exp_().scatter_add_(1, column, hit)
    return shares_NC.sub_(smoothing / log_NC.shape[1]) if smoothing else shares_NC
