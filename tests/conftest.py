"""What every test starts from."""

from __future__ import annotations

import os

import pytest
import torch

# What the compiler generates is built without the optimiser of C++: a third of the time, for the same code.
os.environ.setdefault("TORCHINDUCTOR_DEBUG_COMPILE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, and thereby list as not run, the tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="not run: needs a CUDA device"))


@pytest.fixture(autouse=True)
def _wide_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tables wrap at the width of whoever runs the tests; what they say is then cut in two.
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
