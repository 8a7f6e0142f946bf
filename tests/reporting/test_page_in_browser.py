"""The page in a real browser: nothing is complained of, nothing loaded, nothing sticks out."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.cost import compare
from cheapgrad.environment import Examination, Finding
from cheapgrad.planning import HeldPart, PlanFigures, PlannedLayer
from cheapgrad.reporting import RecordDirectory, RefusedFile, TensorRecord, render_page
from cheapgrad.sketch import Pivotal, RowSample, StochasticRounding
from cheapgrad.sketch.scores import PredictedNorm
from tests.reporting.browser import Browser, find_browser
from tests.reporting.page_reader import make_file
from tests.reporting.records import make_audit, make_bits, make_method, make_plan, make_record, make_rows
from tests.reporting.test_page import HELD

WIDTHS = (375, 1440)
LONG_NAME = "model.encoder.layers.11.self_attention.output_projection_with_a_long_name_that_never_ends" * 2
STICKING_OUT = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# Red, green and blue of the page and of its text.
COLOURS = "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name].match(/\\d+/g).map(Number))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = find_browser()
    if path is None:
        pytest.skip("not run: no Chromium on the path, nor named by CHEAPGRAD_BROWSER")
    browser = Browser(path, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def make_demo() -> RecordDirectory:
    tensors = tuple(
        TensorRecord(f"{name}.{LONG_NAME}", 0.1, 10.0 ** (-i), 1.0 + i, 0.1) for i, name in enumerate("abcdef")
    )
    methods = [make_method(held=HELD), *(make_rows(tensors=tensors, held=HELD, family=f"f{i}") for i in range(9))]
    record = make_record(*methods, make_bits(remark=LONG_NAME))
    return RecordDirectory((make_file(record, command=LONG_NAME),), ())


def make_others() -> RecordDirectory:
    """Return one record of every other kind, with names and texts as long as they come."""
    torch.manual_seed(0)
    long_names = [f"encoder.{LONG_NAME}.{number}" for number in range(30)]
    rows = RowSample(keep=0.1234567890123456, scores=PredictedNorm(), design=Pivotal())
    layers = [
        PlannedLayer(
            name, stored=StochasticRounding(bits=4, group=128, fused=True), cotangent=rows, noise_fraction=0.01
        )
        for name in long_names
    ]
    held = tuple(HeldPart(name, f"aten::{LONG_NAME}", 10**9, 10**8) for name in long_names)
    figures = PlanFigures(30 * 10**9, 10**12, 2 * 10**12, 0.0), PlanFigures(3 * 10**9, 10**12, 10**12, 0.3)
    plan = dataclasses.replace(
        make_plan(*layers, held=held), exact=figures[0], predicted=figures[1], remarks=(LONG_NAME, "a remark " * 40)
    )
    model = nn.Sequential(OrderedDict({LONG_NAME.replace(".", "_"): nn.Linear(4, 8), "head": nn.Linear(8, 3)}))
    scan = cheapgrad.scan(model, torch.randn(16, 4))
    files = (
        make_file(plan, f"plan_{LONG_NAME}"),
        make_file(make_audit(model), f"audit {LONG_NAME}"),
        make_file(scan, "exact", command=LONG_NAME),
        make_file(scan, f"scan {LONG_NAME}"),
        make_file(compare(scan, scan), "comparison"),
        make_file(Examination((Finding(LONG_NAME, "broken", LONG_NAME, "do this " * 40),)), "doctor"),
    )
    return RecordDirectory(files, (RefusedFile(f"{LONG_NAME}.json", LONG_NAME),))


# What each of them shows as charts.
PAGES = {"demo": (make_demo, 6), "others": (make_others, 9)}


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    make, _ = PAGES[request.param]
    path = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    path.write_text(render_page(make()))
    return path


@pytest.mark.parametrize("media", ["screen", "print"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_and_nothing_is_complained_of(browser, page, width, scheme, media):
    browser.complaints.clear()
    browser.requests.clear()
    browser.show(page, width, scheme=scheme, media=media)
    assert browser.evaluate("document.querySelectorAll('svg.chart').length") == PAGES[page.stem][1]
    # Paper is never as narrow as a telephone.
    if media == "screen" or width > 700:
        assert browser.evaluate(STICKING_OUT) <= 0
    paper, ink = (sum(colour) for colour in browser.evaluate(COLOURS))
    assert (paper < ink) == (scheme == "dark" and media == "screen")
    assert browser.complaints == []
    assert set(browser.requests) == {page.as_uri()}


def test_text_in_charts_can_be_read_on_a_telephone(browser, page):
    browser.show(page, 375)
    heights = browser.evaluate(
        "[...document.querySelectorAll('svg.chart text')].map(text => text.getBoundingClientRect().height)"
    )
    assert heights
    assert min(heights) > 9


def test_paper_shows_whole_tables(browser, page):
    browser.show(page, 1440, media="print")
    hidden = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollHeight > box.clientHeight + 1).length"
    assert browser.evaluate(hidden) == 0
    assert browser.print_page().startswith(b"%PDF")


def test_a_page_that_is_wrong_is_caught(browser, page, tmp_path):
    # What the tests above look for has to be found where it is.
    wrong = page.read_text().replace("</body>", '<div style="width: 5000px">wide</div><img src="missing.png"/></body>')
    path = tmp_path / "wrong.html"
    path.write_text(wrong)
    browser.complaints.clear()
    browser.show(path, 375)
    assert browser.evaluate(STICKING_OUT) > 4000
    assert browser.complaints
