"""The table's entries on two gloo processes, seeded alike: ranks draw apart, and average to one unbiased gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contexts.checks import check_draws
from tests.contexts.table import CONTEXTS, ROWS

TIMEOUT_SECONDS = 240
ROOT = Path(__file__).resolve().parents[2]
ENTRIES = [
    (context.key, row) for context in CONTEXTS if context.key in ("ddp", "fsdp2") for row in ROWS if context.covers(row)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes drew."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "tests.contexts.distributed_worker"]
    workers = [
        subprocess.Popen(
            [*arguments, str(rank), str(folder / "store"), str(folder / "results.pt")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=TIMEOUT_SECONDS)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(("context", "row"), ENTRIES, ids=[f"{key}-{row.name}" for key, row in ENTRIES])
def test_entry(results, context, row):
    result = results[context, row.name]
    assert result["synchronised"], "the ranks hold different gradients"
    check_draws(row, result["draws"])
    first, second = (row.layer.matrix(own) for own in result["own"])
    assert not torch.equal(first, second), "both ranks drew the same sketch"
    if row.placement.selects:
        assert torch.equal(first, torch.diag(first.diagonal()))


@pytest.mark.slow
def test_without_the_rank_both_would_draw_the_same(results):
    assert torch.equal(*results["unsalted"])
