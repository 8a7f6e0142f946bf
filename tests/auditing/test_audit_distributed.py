"""Two gloo processes audit together."""

from __future__ import annotations

from pathlib import Path

from tests.two_processes import run_two_processes


def test_two_processes_pool_their_draws(tmp_path: Path) -> None:
    run_two_processes("tests.auditing.distributed_worker", tmp_path / "store")


def test_parameters_that_are_shared_out_are_audited_whole(tmp_path: Path) -> None:
    run_two_processes("tests.auditing.fsdp_worker", tmp_path / "store", timeout=300)
