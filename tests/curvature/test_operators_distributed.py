"""Two gloo processes with half of the data each are one process with all of them."""

from __future__ import annotations

from pathlib import Path

from tests.two_processes import run_two_processes


def test_two_processes_equal_one(tmp_path: Path) -> None:
    run_two_processes("tests.curvature.distributed_worker", tmp_path / "store")
