"""What tests of chains share."""

from __future__ import annotations

import pytest

from tests.ops.chains.networks import choose_all_rows


@pytest.fixture
def full(monkeypatch):
    """Keep all rows: every gradient is to be PyTorch's."""
    choose_all_rows(monkeypatch)
