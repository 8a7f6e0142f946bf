"""What operators refuse: graphs that are stale, terms that do not count alike, models and losses that raise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cheapgrad.curvature import (
    AbstractDataOperator,
    BatchReader,
    Categorical,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    MonteCarloFisher,
)
from cheapgrad.errors import (
    ArgumentError,
    BatchError,
    CheapgradError,
    ForwardError,
    ModelTypeError,
    NonFiniteCurvatureError,
    StaleGraphError,
)

KINDS = (Hessian, GaussNewton, EmpiricalFisher)
LABELS = torch.tensor([0, 1, 2, 1, 1, 0])


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)).double().eval()


def _rows(count: int = 6) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _add_to(name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            dict([*model.named_parameters(), *model.named_buffers()])[name].add_(0.5)

    return change


def _replace_weight(model: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def _replace_data(model: Any) -> None:
    model[3].bias.data = model[3].bias.data.clone()


class TestStaleGraphs:
    @pytest.mark.parametrize("parameters", [None, ["3.weight"]])
    @pytest.mark.parametrize(
        ("change", "name"),
        [
            (_add_to("0.weight"), "0.weight"),
            (_add_to("0.bias"), "0.bias"),
            (_add_to("3.bias"), "3.bias"),
            (_add_to("1.running_mean"), "1.running_mean"),
            (_replace_weight, "0.weight"),
            (_replace_data, "3.bias"),
        ],
    )
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_tensor_of_the_model_is_watched(self, kind, change, name, parameters):
        model = _network()
        operator = kind(model, nn.CrossEntropyLoss(), (_rows(), LABELS), parameters=parameters)
        held = operator.linearized()
        vector = torch.ones(held.shape[0], dtype=torch.float64)
        assert torch.allclose(held @ vector, operator @ vector)
        part = held.micro_batches[0].operator
        change(model)
        for stale in (held, part):
            with pytest.raises(StaleGraphError, match=f"1 parameters or buffers have changed .* first '{name}'"):
                stale @ vector
        assert torch.allclose(held.linearized() @ vector, operator @ vector)

    def test_what_has_not_changed_goes_on(self):
        model = _network()
        held = Hessian(model, nn.CrossEntropyLoss(), (_rows(), LABELS)).linearized()
        vector = torch.ones(held.shape[0], dtype=torch.float64)
        before = held @ vector
        nn.functional.cross_entropy(model(_rows()), LABELS).backward()
        assert torch.equal(held @ vector, before)


class TestUnequalTerms:
    WEIGHTS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    IGNORED = LABELS.masked_fill(LABELS == 0, -100)
    # Loss, targets, and the number of terms in a batch.
    CASES = (
        (nn.CrossEntropyLoss(weight=WEIGHTS), LABELS, lambda batch: TestUnequalTerms.WEIGHTS[batch[1]].sum()),
        (nn.CrossEntropyLoss(), IGNORED, lambda batch: (batch[1] >= 0).sum()),
        (nn.CrossEntropyLoss(ignore_index=1), LABELS, lambda batch: (batch[1] != 1).sum()),
        (Categorical(ignore_index=1), LABELS, lambda batch: (batch[1] != 1).sum()),
    )

    @pytest.mark.parametrize(("loss", "targets", "size"), CASES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_batches_that_count_otherwise_are_refused_or_counted(self, kind, loss, targets, size):
        rows, model = _rows(), _network()
        vector = torch.ones(sum(each.numel() for each in model.parameters()), dtype=torch.float64)
        batches = [(rows[:1], targets[:1]), (rows[1:3], targets[1:3]), (rows[3:], targets[3:])]
        batches = batches[1:] if targets is self.IGNORED else batches
        with pytest.raises(BatchError, match=r"for each target in batch 0, but .* in batch 1"):
            kind(model, loss, batches)
        lazy = kind(model, loss, torch.utils.data.DataLoader(batches, batch_size=None))
        with pytest.raises(BatchError, match="in batch 1"):
            lazy @ vector
        with pytest.raises(BatchError, match="in batch 1"):
            lazy.micro_batches  # noqa: B018
        reader = BatchReader(size=size)
        if kind is EmpiricalFisher:
            with pytest.raises(BatchError, match="not for an EmpiricalFisher"):
                kind(model, loss, batches, reader=reader)
            return
        together = (torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches]))
        whole = kind(model, loss, together) @ vector
        assert torch.allclose(kind(model, loss, batches, reader=reader) @ vector, whole, rtol=1e-9, atol=1e-12)
        # The twin that counts examples, which is what is refused, is another matrix.
        twin = kind(model, loss, batches, reader=BatchReader(size=lambda batch: len(batch[1]))) @ vector
        assert float((twin - whole).norm() / whole.norm()) > 1e-2

    @pytest.mark.parametrize(
        ("loss", "targets"),
        [
            (nn.CrossEntropyLoss(), LABELS),
            (nn.CrossEntropyLoss(ignore_index=1), torch.tensor([0, 1, 0, 0, 1, 2])),
            (nn.CrossEntropyLoss(weight=WEIGHTS), LABELS.clamp(max=0)),
            (nn.CrossEntropyLoss(weight=WEIGHTS), nn.functional.one_hot(LABELS, 3).double()),
        ],
    )
    @pytest.mark.parametrize("kind", KINDS)
    def test_batches_whose_terms_count_alike_are_one_batch(self, kind, loss, targets):
        rows, model = _rows(), _network()
        whole = kind(model, loss, (rows, targets))
        parts = kind(model, loss, [(rows[:3], targets[:3]), (rows[3:], targets[3:])])
        vector = torch.ones(whole.shape[0], dtype=torch.float64)
        assert torch.allclose(parts @ vector, whole @ vector, rtol=1e-9, atol=1e-12)


class TestModelsAndLossesThatRaise:
    CASES = (
        (_rows()[:, :3], LABELS, r"forward pass of a Sequential on batch 1 raised .* \(inputs: \[6, 3\]"),
        (_rows(), LABELS[:5], r"batch 1 raised .*outputs: \[6, 3\] torch.float64, targets: \[5\]"),
        (_rows(), LABELS + 7, r"batch 1 raised IndexError: Target .* targets: \[6\] torch.int64"),
    )

    # Targets of a MonteCarloFisher only say what is left out, so that their classes do not matter.
    @pytest.mark.parametrize(
        ("kind", "case"), [*itertools.product(KINDS, CASES), *((MonteCarloFisher, case) for case in CASES[:2])]
    )
    def test_the_batch_is_named(self, kind, case):
        inputs, targets, match = case
        operator = kind(_network(), nn.CrossEntropyLoss(), [(_rows(), LABELS), (inputs, targets)])
        with pytest.raises(ForwardError, match=match) as caught:
            operator @ torch.ones(operator.shape[0], dtype=torch.float64)
        assert isinstance(caught.value.__cause__, Exception)

    @pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full"), BatchError("ours")])
    def test_exhausted_memory_and_our_own_errors_pass_as_they_are(self, error):
        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            raise error

        operator = Hessian(_network(), loss, (_rows(), LABELS))
        with pytest.raises(type(error), match=str(error)):
            operator @ torch.ones(operator.shape[0], dtype=torch.float64)

    def test_targets_are_not_drawn_from_outputs_that_are_not_finite(self):
        rows = _rows()
        rows[2, 1] = torch.nan
        operator = MonteCarloFisher(_network(), nn.CrossEntropyLoss(), (rows, LABELS))
        with pytest.raises(NonFiniteCurvatureError, match="3 of 18 outputs for batch 0 are not finite"):
            operator @ torch.ones(operator.shape[0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"draws": 3}, "draws must be of type Draws, but got an int 3"),
        ({"reader": {}}, "reader must be of type BatchReader, but got a dict of 0"),
        ({"parameters": nn.Linear(2, 2)}, r"but got a Linear; for a module give its name"),
        ({"parameters": [nn.Linear(2, 2)]}, "but got a Linear;"),
        ({"parameters": 3}, "but got an int 3"),
    ],
)
def test_arguments_of_another_kind_are_named(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        MonteCarloFisher(_network(), nn.CrossEntropyLoss(), (_rows(), LABELS), **arguments)


def test_swapped_arguments_do_not_print_a_tensor() -> None:
    build: Callable[..., AbstractDataOperator] = Hessian
    with pytest.raises(ModelTypeError, match=r"but got a Tensor of shape \(6, 4\)$"):
        build(_rows(), nn.CrossEntropyLoss(), (_network(), LABELS))
    with pytest.raises(CheapgradError, match=r"got a tuple of 2; use reduction='mean'|got a tuple"):
        build(_network(), (_rows(), LABELS), nn.CrossEntropyLoss())
