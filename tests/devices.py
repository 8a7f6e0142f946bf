"""Devices that tables of tests run on; the GPU's rows are skipped, and listed, where there is none."""

from __future__ import annotations

import pytest

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
