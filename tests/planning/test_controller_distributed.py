"""Two gloo processes choose the same budgets, and keep the noise of their mean gradient."""

from __future__ import annotations

from pathlib import Path

from tests.two_processes import run_two_processes


def test_two_processes_choose_the_same_budgets_and_keep_the_noise(tmp_path: Path) -> None:
    run_two_processes("tests.planning.distributed_worker", tmp_path / "store")
