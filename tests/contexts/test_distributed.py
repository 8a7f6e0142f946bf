"""The table's entries on two gloo processes, seeded alike: ranks draw apart, and average to one unbiased gradient."""

from __future__ import annotations

import pytest
import torch

from tests.contexts.checks import check_draws
from tests.contexts.table import CONTEXTS, ROWS
from tests.two_processes import run_two_processes

TIMEOUT_SECONDS = 240
ENTRIES = [
    (context.key, row) for context in CONTEXTS if context.key in ("ddp", "fsdp2") for row in ROWS if context.covers(row)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes drew."""
    folder = tmp_path_factory.mktemp("distributed")
    store, found = folder / "store", folder / "results.pt"
    run_two_processes("tests.contexts.distributed_worker", store, found, timeout=TIMEOUT_SECONDS)
    return torch.load(found, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(("context", "row"), ENTRIES, ids=[f"{key}-{row.name}" for key, row in ENTRIES])
def test_entry(results, context, row):
    result = results[context, row.name]
    assert result["synchronised"], "the ranks hold different gradients"
    check_draws(row, result["draws"])
    first, second = (row.layer.matrix(own) for own in result["own"])
    if not row.draws:
        assert torch.equal(first, second)
        return
    assert not torch.equal(first, second), "both ranks drew the same sketch"
    if row.placement.selects:
        assert torch.equal(first, torch.diag(first.diagonal()))


@pytest.mark.slow
def test_without_the_rank_both_would_draw_the_same(results):
    assert torch.equal(*results["unsalted"])
