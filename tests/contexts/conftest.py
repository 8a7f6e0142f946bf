"""Settings of the compiler for these tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _compile_in_this_process():
    """Start no pool of compiling processes, each of which would import torch first."""
    import torch._inductor.config as inductor_config

    with inductor_config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()
