"""The Fisher matrix with targets drawn from the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from cheapgrad.curvature.operators.batches import Batch, BatchReader
from cheapgrad.curvature.operators.execution import explain_failure
from cheapgrad.curvature.operators.likelihoods import AbstractLikelihood, as_likelihood
from cheapgrad.curvature.operators.sandwich import AbstractSandwich, OutputProduct
from cheapgrad.errors import NonFiniteCurvatureError, check_count, check_instance


@dataclass(frozen=True)
class Draws:
    """How targets are drawn.

    Attributes:
        count: independent targets per term of the loss, at least 1.
        seed: equal seeds draw equal targets, for every product and every operator of the same batches.

    Raises:
        BudgetError: if the count is not a positive whole number.
    """

    count: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("count", self.count)


@final
class MonteCarloFisher(AbstractSandwich):
    """The Fisher matrix ``F = (1/N) Σ_n E_{ŷ~p(·|x_n)}[g_n(ŷ) g_n(ŷ)ᵀ]``, its expectation replaced by drawn targets.

    The draws are fixed by the seed, the batch's index and the process' rank: the operator is one matrix, not a new one
    in every product. Batches therefore have to come in the same order each time.

    Args:
        model: called as `reader` says, in eval mode if it has dropout or batch norms. Converted layers are exact here.
        loss: `torch.nn.CrossEntropyLoss`, `torch.nn.MSELoss`, `torch.nn.BCEWithLogitsLoss`, or an `AbstractLikelihood`.
        batches: one pair ``(inputs, targets)`` or an iterable of them that can be gone through repeatedly. Targets
            matter for what is left out by ``ignore_index`` only.
        parameters: names of parameters or modules, or tensors; None for all that require grad.
        reader: how a batch is read (`BatchReader`), and where batches are spread over processes.
        draws: how many targets are drawn, and from which seed.

    Law:
        Unbiased over seeds: the mean is the Fisher matrix, which equals `GaussNewton` for these losses; entries have
        a variance that falls as ``1 / count``. Positive semi-definite, of rank at most count × terms. A product costs
        as much as one of `GaussNewton`, whatever the count.

    Raises:
        LossError: if the loss is none of those, or the outputs are not one tensor.
        StochasticModelError: if a layer draws, or depends on the batch as a whole.
        UnsupportedModelError: if PyTorch lacks a derivative.
        BatchError: if batches are of no known form, or their terms do not count alike.
        ForwardError: if the model or the loss raises; the message names the batch.
        NonFiniteCurvatureError: if the outputs are not finite.
        UnknownNameError: if a parameter is not the model's.

    Example:
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> torch.nn.init.zeros_(model.weight).sum().item()
        0.0
        >>> data = (torch.tensor([[2.0]]), torch.tensor([0]))
        >>> MonteCarloFisher(model, torch.nn.CrossEntropyLoss(), data) @ torch.tensor([1.0, 0.0])
        tensor([ 1., -1.])

    References:
        Kunstner, Balles, Hennig, Limitations of the empirical Fisher approximation, NeurIPS 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: AbstractLikelihood | Callable[[Any, Any], Tensor],
        batches: Any,
        *,
        parameters: Iterable[str | Tensor] | None = None,
        reader: BatchReader | None = None,
        draws: Draws | None = None,
    ) -> None:
        self._likelihood = as_likelihood(loss)
        self._draws = Draws() if draws is None else draws
        check_instance("draws", self._draws, Draws, "use e.g. Draws(count=4)")
        super().__init__(model, self._likelihood, batches, parameters=parameters, reader=reader)

    def _metric(self, outputs: Tensor, batch: Batch) -> OutputProduct:
        generator = torch.Generator(outputs.device).manual_seed(self._seed_of(batch))
        if not torch.isfinite(outputs).all():
            raise NonFiniteCurvatureError(
                f"{int((~torch.isfinite(outputs)).sum())} of {outputs.numel()} outputs for batch {batch.index} are not "
                "finite, so no targets can be drawn; look at the model's parameters and inputs"
            )
        with explain_failure(f"drawing targets for batch {batch.index}", outputs=outputs, targets=batch.targets):
            roots = [self._likelihood.draw_root(outputs, batch.targets, generator) for _ in range(self._draws.count)]
        axes = self._likelihood.term_axes(outputs)

        def multiply(tangent: Tensor) -> Tensor:
            total = torch.zeros_like(tangent)
            for root in roots:
                slopes = root * tangent
                total += root * (slopes.sum(axes, keepdim=True) if axes else slopes)
            return total / len(roots)

        return multiply

    def _seed_of(self, batch: Batch) -> int:
        group = self._reader.process_group
        rank = torch.distributed.get_rank(group) if group is not None else 0
        text = f"{self._draws.seed} {rank} {batch.index}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
