"""The picture."""

from __future__ import annotations

import dataclasses
import io
import sys

import pytest
from PIL import Image

from cheapgrad.errors import MissingExtraError
from cheapgrad.reporting import draw_scatter, scatter
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


def test_method_far_below_does_not_press_the_others_together(monkeypatch):
    limits = []
    fill = scatter._fill_panel

    def fill_and_look(panel, model, attribute):
        fill(panel, model, attribute)
        limits.append((panel.get_ylim(), [text.get_text() for text in panel.texts]))

    monkeypatch.setattr(scatter, "_fill_panel", fill_and_look)
    draw_scatter(make_record(make_method(), make_rows(accuracies=(0.2, 0.3, 0.4))))
    for (low, high), texts in limits:
        assert 88 < low < 98 < high
        assert texts == ["↓ 30 %"]


def test_same_label_is_listed_once_and_equal_batches_share_theirs(monkeypatch):
    from matplotlib.figure import Figure

    listed = []
    monkeypatch.setattr(Figure, "legend", lambda self, handles, labels, **options: listed.extend(labels))
    batch = make_method("batch of 57", kind="batch", family="batch")
    record = make_record(make_method(), batch, make_rows())
    other = dataclasses.replace(
        record.models[0], methods=(make_method(), dataclasses.replace(batch, label="batch of 9"))
    )
    draw_scatter(dataclasses.replace(record, models=(record.models[0], other)))
    assert listed == ["exact", "batch of equal step time, budget 1", "cotangent rows 0.5"]
