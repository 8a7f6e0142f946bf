"""The picture."""

from __future__ import annotations

import dataclasses
import io
import sys

import pytest
from PIL import Image

from cheapgrad.errors import MissingExtraError
from cheapgrad.reporting import draw_scatter
from tests.reporting.records import make_method, make_record, make_rows


def test_picture_has_a_row_of_panels_for_each_model():
    record = make_record()
    one = Image.open(io.BytesIO(draw_scatter(record)))
    two = Image.open(io.BytesIO(draw_scatter(dataclasses.replace(record, models=record.models * 2))))
    assert one.format == "PNG"
    assert one.width == two.width >= 1200
    assert two.height > 1.5 * one.height


def test_methods_change_the_picture():
    pictures = [
        draw_scatter(make_record(make_method(), make_rows(step_time_fraction=fraction))) for fraction in (0.5, 0.9)
    ]
    assert pictures[0] != pictures[1]


def test_one_seed_draws_without_bars():
    assert draw_scatter(make_record(make_method(accuracies=(0.9,)), seeds=(0,))).startswith(b"\x89PNG")


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"needs matplotlib.*pip install 'cheapgrad\[report\]'"):
        draw_scatter(make_record())
