"""Added variance of a method, as a multiple of that of the mini-batch gradient, at the weights that it has reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments.preparing import Batch, Prepared, exactly

_SEED = 3000


def measure_noise(prepared: Prepared, batches: Sequence[Batch], draws: int) -> dict[str, Any]:
    """Return omega with its standard error, the mini-batch variance, and the squared norm of the expected gradient.

    With exact gradients g_k of K batches, ``σ² = Σ‖g_k − ḡ‖²/(K − 1)``, ``‖E g‖²`` is estimated by ``‖ḡ‖² − σ²/K``,
    and ``ω = mean ‖ĝ_k − g_k‖² / σ²`` over the draws: for a biased method the squared bias is in it.
    A controller sees none of it; ω is that of its budgets between trials.

    Args:
        prepared: the model and its method.
        batches: of equal size, at least 2.
        draws: of the gradient, for each batch.
    """
    with torch.random.fork_rng(devices=[]), prepared.unwatched():
        torch.manual_seed(_SEED)
        with exactly(prepared):
            exact = [prepared.draw_gradient(batch) for batch in batches]
        count = len(batches)
        mean = [torch.stack(parts).mean(0) for parts in zip(*exact, strict=True)]
        variance = sum(_squared_distance(gradient, mean) for gradient in exact) / (count - 1)
        squared_norm = sum(float(part.double().square().sum()) for part in mean) - variance / count
        result: dict[str, Any] = {
            "mini_batch_variance": _finite(variance),
            "squared_gradient": _finite(squared_norm),
            "omega": None,
            "omega_standard_error": None,
        }
        if prepared.handle is None:
            return result
        errors = [
            _squared_distance(prepared.draw_gradient(batch), gradient)
            for batch, gradient in zip(batches, exact, strict=True)
            for _ in range(draws)
        ]
    average = sum(errors) / len(errors)
    spread = math.sqrt(sum((error - average) ** 2 for error in errors) / (len(errors) - 1) / len(errors))
    if variance > 0:
        result |= {"omega": _finite(average / variance), "omega_standard_error": _finite(spread / variance)}
    return result


def _squared_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return sum(float((one - two).double().square().sum()) for one, two in zip(first, second, strict=True))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
