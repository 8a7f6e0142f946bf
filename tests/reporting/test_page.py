"""The page: well-formed, self-contained, and with the numbers of the records."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.cost import compare
from cheapgrad.environment import Examination, Finding
from cheapgrad.planning import HeldPart, PlannedLayer
from cheapgrad.reporting import HeldRecord, RefusedFile, TensorRecord, read_directory, render_page
from cheapgrad.reporting.record_files import RecordDirectory
from cheapgrad.sketch import RowSample, StochasticRounding
from tests.reporting.page_reader import find, make_file, read, read_table, render, text_of
from tests.reporting.records import make_audit, make_bits, make_method, make_plan, make_record, make_rows

HOSTILE = "<script>alert(1)</script>'\"&]]>\x00\x1b\ud800"
HELD = (HeldRecord("fc1", "aten::addmm", 4096), HeldRecord("fc1", "aten::relu", 512), HeldRecord("", "aten::mm", 64))
TENSORS = (TensorRecord("fc1.weight", 0.1, 0.25, 3.25, 0.02), TensorRecord("fc1.bias", 0.3, 1.75, 4.5, 0.07))


def make_full_record(**changes):
    exact = make_method(held=HELD, predicted_relative_variance=None)
    rows = make_rows(tensors=TENSORS, held=(HeldRecord("fc1", "aten::addmm", 1024),), **changes)
    return make_record(exact, rows, make_bits(tensors=TENSORS[:1]))


@pytest.fixture(scope="module")
def scans():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
    x = torch.randn(16, 64)
    exact = cheapgrad.scan(model, x)
    cheapgrad.approximate(model, cheapgrad.Rule("*", stored=StochasticRounding(bits=4)), skip_small=False)
    return exact, cheapgrad.scan(model, x)


def test_page_is_well_formed_and_loads_nothing():
    page = render_page(RecordDirectory((make_file(make_full_record()),), ()))
    tree = read(page)
    assert not re.findall(r"https?:|//|@import|url\(", page.replace("<!DOCTYPE html>", ""))
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(element.tag for element in tree.iter())
    assert not [name for element in tree.iter() for name in element.attrib if name.startswith("on")]
    assert all(element.get("href", "#").startswith("#") for element in tree.iter())
    identifiers = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(identifiers) == len(set(identifiers))


def test_same_records_make_the_same_page():
    files = RecordDirectory((make_file(make_full_record()),), ())
    assert render_page(files) == render_page(files)


def test_every_chart_has_a_title_and_a_table_beside_it():
    page = render(make_file(make_full_record()))
    charts = [svg for svg in page.iter("svg") if svg.get("role") == "img"]
    # Bytes by module and operation, variance, bias, accuracy against time and bytes.
    assert len(charts) == 6
    for chart in charts:
        title, description = (find(page, name) for name in chart.get("aria-labelledby", "").split())
        assert title is not None
        assert text_of(title)
        assert description is not None
        assert text_of(description)
    assert all(
        figure.find(".//table") is not None and figure.find(".//svg") is not None for figure in page.iter("figure")
    )
    for region in page.iter("div"):
        if region.get("class") == "scroll":
            assert region.get("tabindex") == "0"
            assert find(page, region.get("aria-labelledby", "")) is not None


def test_frontier_has_the_numbers_of_the_record():
    record = make_full_record()
    headings, rows = read_table(render(make_file(record)), "frontier-0")
    for method in record.models[0].methods:
        cells = dict(zip(headings[1:], rows[method.label], strict=True))
        exact_variance = method.predicted_relative_variance
        assert cells == {
            "batch": repr(method.batch_size),
            "accuracymeasured": repr(method.accuracy_mean),
            "± deviationmeasured": repr(method.accuracy_deviation),
            "stepmeasured": repr(method.step_seconds),
            "step ÷ exact (c)measured": repr(method.step_time_fraction),
            "bytes heldmeasured": repr(method.held_bytes),
            "bytes ÷ exactmeasured": repr(method.held_bytes_fraction),
            "variancemodelled": "–" if exact_variance is None else repr(exact_variance),
            "variancemeasured": repr(method.measured_relative_variance),
            "ωmeasured": repr(method.noise_fraction),
            "c(1 + ω)computed": repr(method.cost_times_noise),
            "largest |z|measured": repr(method.max_abs_z),
            "bandcomputed": repr(method.band),
            "bias": "–" if method.kind == "exact" else "none found",
        }


def test_layers_have_the_numbers_of_the_record():
    page = render(make_file(make_full_record()))
    headings, rows = read_table(page, "variance-0")
    assert headings == ["parameter", "cotangent rows 0.5measured", "stored 4 bitsmeasured"]
    assert rows == {"whole gradient": ["0.2", "0.001"], "fc1.weight": ["0.25", "0.25"], "fc1.bias": ["1.75", "–"]}
    _, rows = read_table(page, "bias-0")
    assert rows["fc1.bias"] == ["4.5", "–"]
    assert rows["band: chance explains up tocomputed"] == ["7.0", "7.0"]
    assert rows["draws"] == ["256", "256"]
    _, rows = read_table(page, "held-0-modules")
    assert rows == {
        "all": ["4672", "1024"],
        "all ÷ exact": ["1.0", repr(1024 / 4672)],
        "fc1": ["4608", "1024"],
        "(model)": ["64", "0"],
    }
    _, rows = read_table(page, "held-0-operations")
    assert rows["aten::relu"] == ["512", "0"]


def test_scans_stand_side_by_side_exact_first(scans):
    exact, planned = scans
    page = render(make_file(planned, "approximate"), make_file(exact, "exact"))
    headings, rows = read_table(page, "held-0-modules")
    assert headings == ["module", "exactmeasured", "approximatemeasured"]
    assert rows["all"] == [repr(exact.total.saved_bytes), repr(planned.total.saved_bytes)]
    for name in ("0", "1", "2"):
        assert rows[name] == [repr(exact.row(name).saved_bytes), repr(planned.row(name).saved_bytes)]
    _, rows = read_table(page, "held-0-operations")
    for cost in exact.operations:
        if cost.saved_bytes:
            expected = sum(each.saved_bytes for each in exact.operations if each.operation == cost.operation)
            assert rows[cost.operation][0] == repr(expected)
    assert "Not audited" in text_of(find(page, "verdict"))


def test_comparison_has_both_totals(scans):
    comparison = compare(*scans)
    headings, rows = read_table(render(make_file(comparison)), "held-0-modules")
    assert headings == ["module", "beforemeasured", "aftermeasured"]
    assert rows["all"] == [repr(comparison.before.saved_bytes), repr(comparison.after.saved_bytes)]


def test_models_with_other_modules_stay_apart(scans):
    other = cheapgrad.scan(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    page = render(make_file(scans[0], "exact"), make_file(other, "other"))
    assert find(page, "held-1-modules-caption") is not None


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        (
            {},
            "unbiased",
            "No bias found in 2 gradients: nearest to the edge of what chance explains is cotangent rows 0.5, "
            "|z| = 4.50 of 7.00",
        ),
        ({"unbiased": False, "max_abs_z": 9.5}, "biased", "BIAS FOUND in DigitsViT, cotangent rows 0.5 (z = 9.50)"),
        ({"unbiased": False, "max_abs_z": math.inf}, "biased", "(z = ∞)"),
    ],
)
def test_verdict(changes, state, words):
    page = render(make_file(make_full_record(**changes)))
    verdict = find(page, "verdict")
    assert verdict is not None
    assert verdict.get("class") == f"verdict {state}"
    assert words in text_of(verdict)
    alarms = [text_of(cell) for cell in page.iter("td") if "alarm" in (cell.get("class") or "")]
    assert bool(alarms) == (state == "biased")


def test_hostile_names_stay_text():
    rows = dataclasses.replace(
        make_rows(remark=HOSTILE, held=(HeldRecord(HOSTILE, HOSTILE, 8),)),
        label=HOSTILE,
        tensors=(TensorRecord(HOSTILE, 0.1, 0.1, 1.0, 0.1),),
    )
    record = dataclasses.replace(
        make_record(make_method(held=HELD), rows), data=HOSTILE, environment={HOSTILE: HOSTILE}
    )
    file = make_file(record, command=HOSTILE, remark=HOSTILE, label=HOSTILE)
    directory = RecordDirectory((file,), (RefusedFile(HOSTILE, HOSTILE),))
    page = render_page(directory, HOSTILE)
    assert "<script" not in page
    page.encode()
    assert "<script>alert(1)</script>'\"&]]>���" in text_of(read(page))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e308, 5e-324, -1.0])
def test_any_number_can_be_shown(value):
    tensors = (TensorRecord("fc1", value, value, value, value), TensorRecord("fc2", 0.1, None, 1.0, 0.1))
    method = make_rows(
        tensors=tensors,
        # Accuracies are shares, if they are numbers.
        accuracies=(value, 0.5) if not 1 < abs(value) < math.inf else (0.5, 0.5),
        step_time_fraction=value,
        held_bytes_fraction=value,
        step_seconds=value,
        noise_fraction=value,
        max_abs_z=value,
        band=value,
        predicted_relative_variance=value,
    )
    page = render(make_file(make_record(make_method(), method)))
    _, rows = read_table(page, "variance-0")
    assert rows["fc1"] == [repr(value)]
    coordinates = [element.get(name) for element in page.iter() for name in ("x", "y", "cx", "cy", "width", "height")]
    assert {"nan", "inf", "-inf"}.isdisjoint(coordinates)
    assert not [path for path in page.iter("path") if re.search("nan|inf", path.get("d", ""))]


def test_records_without_content_make_a_page():
    empty = dataclasses.replace(make_record(), models=(), wide=(), seeds=(), environment={})
    page = render(make_file(empty))
    assert "Not audited" in text_of(find(page, "verdict"))
    without_methods = dataclasses.replace(
        make_record(), models=(dataclasses.replace(make_record().models[0], methods=()),)
    )
    assert find(render(make_file(without_methods)), "frontier") is None
    untrained = make_record(make_method(accuracies=()), make_rows(accuracies=()))
    assert read_table(render(make_file(untrained)), "frontier-0")[1]["exact"][1] == "–"


def test_many_layers_are_drawn_in_part_and_listed_in_full():
    tensors = tuple(TensorRecord(f"layer{i}", 0.1, 0.001 * i, 1.0, 0.1) for i in range(300))
    page = render(make_file(make_record(make_method(), make_rows(tensors=tensors))))
    assert len(read_table(page, "variance-0")[1]) == 301
    assert "The 24 largest of 300 parameters" in text_of(page)


def test_measured_and_modelled_are_told_apart():
    page = render(make_file(make_full_record()))
    table = find(page, "frontier-0-caption")
    assert table is not None
    modelled = [cell for cell in page.iter("td") if "modelled" in (cell.get("class") or "")]
    assert {cell.get("data-value") for cell in modelled} == {"0.1", "0.0004"}


def test_origin_names_files_commands_and_what_was_not_understood():
    refused = RefusedFile("package.json", "it states no kind")
    file = make_file(make_record(), command="cheapgrad demo --quick", remark="known by its keys")
    page = render(file, make_file(make_record(), "silent", environment={}), refused=(refused,))
    _, rows = read_table(page, "files")
    assert rows["run.json"] == ["cheapgrad.demo", "0, 1, 2", "known by its keys"]
    assert rows["package.json"] == ["not understood", "–", "it states no kind"]
    origin = text_of(find(page, "origin"))
    assert "run.json: cheapgrad demo --quick" in origin
    assert "silent.json: the command is not recorded" in origin
    assert "Not recorded in silent.json." in origin
    assert read_table(page, "environment")[1]["python"] == ["3.11"]


PLANNED = (
    PlannedLayer("fc1", stored=StochasticRounding(bits=4), noise_fraction=0.03),
    PlannedLayer("fc2", cotangent=RowSample(keep=0.5), noise_fraction=0.02),
)


def test_plan_has_its_layers_and_totals(tmp_path):
    (tmp_path / "plan.json").write_text(make_plan(*PLANNED).to_json())
    page = read(render_page(read_directory(tmp_path)))
    _, rows = read_table(page, "plan-0-totals")
    assert rows["held for backwardcounted"] == ["1000", "250", "0.25"]
    assert rows["backward FLOPscounted"] == ["20", "15", "0.75"]
    assert rows["noise (ω)modelled"] == ["0.0", "0.05", "–"]
    _, rows = read_table(page, "plan-0-layers")
    assert rows["fc1"] == [repr(StochasticRounding(bits=4)), "–", "0.03"]
    assert rows["fc2"] == ["–", repr(RowSample(keep=0.5)), "0.02"]
    summary = text_of(find(page, "summary"))
    assert "the plan holds 250 B instead of 1000 B and is predicted to add" in summary
    assert find(page, "held") is None
    assert "add 0.05 of the mini-batch variance; c(1 + ω) = 0.25 × 1.05 = 0.263 is below 1" in summary
    plan = dataclasses.replace(make_plan(*PLANNED), in_optimizer_units=True)
    (tmp_path / "plan.json").write_text(plan.to_json())
    summary = text_of(find(read(render_page(read_directory(tmp_path))), "summary"))
    page = read(render_page(read_directory(tmp_path)))
    assert "add 0.05 of the mini-batch variance in units of the optimizer's steps; c(1 + ω)" in summary
    _, rows = read_table(page, "plan-0-totals")
    assert rows["noise (ω) in units of the optimizer's stepsmodelled"] == ["0.0", "0.05", "–"]
    assert "in units of the optimizer's steps, parameter by parameter" in text_of(find(page, "variance"))
    assert "Asked for: memory = 25 %; a remark" in text_of(find(page, "plan"))


HELD_PARTS = (
    HeldPart("fc1", "aten::addmm", 600, 150),
    HeldPart("fc2", "aten::addmm", 300, 0),
    HeldPart("fc2", "SketchedLinear", 0, 40),
    HeldPart("", "aten::gelu", 90, 50),
    HeldPart("(loss)", "aten::nll_loss", 10, 10),
)


def test_plan_shows_its_bytes_against_the_exact_step_and_its_noise_as_modelled():
    page = render(make_file(make_plan(*PLANNED, held=HELD_PARTS), "planned step"))
    headings, rows = read_table(page, "held-0-modules")
    assert headings == ["module", "exactmeasured", "plannedmeasured"]
    assert rows == {
        "all": ["1000", "250"],
        "all ÷ exact": ["1.0", "0.25"],
        "fc1": ["600", "150"],
        "fc2": ["300", "40"],
        "(model)": ["90", "50"],
        "(loss)": ["10", "10"],
    }
    _, rows = read_table(page, "held-0-operations")
    assert rows["aten::addmm"] == ["900", "150"]
    assert rows["SketchedLinear"] == ["0", "40"]
    headings, rows = read_table(page, "variance-0")
    assert headings == ["layer", "plannedmodelled"]
    assert rows == {"whole gradient": ["0.05"], "fc1": ["0.03"], "fc2": ["0.02"]}
    variance = find(page, "variance")
    assert variance is not None
    cells = [cell for cell in variance.iter("td") if cell.get("data-value")]
    assert all("modelled" in (cell.get("class") or "") for cell in cells)
    marks = [mark.get("class", "") for mark in variance.iter() if "mark" in mark.get("class", "").split()]
    assert marks
    assert all("modelled" in mark for mark in marks)
    # Nobody tested it for bias.
    assert find(page, "bias") is None
    assert "Not audited" in text_of(find(page, "verdict"))
    summary = text_of(find(page, "summary"))
    assert "planned step: exact holds 1000 B for backward, planned holds 250 B, 0.25 of it." in summary
    assert "planned step: the plan is predicted to add 0.05 of the mini-batch variance" in summary


def test_plan_and_audit_of_one_model_stand_apart():
    # A layer's noise is what it adds to all parameters, a parameter's is what arrives there.
    torch.manual_seed(0)
    audit = make_audit(nn.Sequential(nn.Linear(4, 3)))
    page = render(make_file(audit, "audit"), make_file(make_plan(*PLANNED), "plan"))
    assert read_table(page, "variance-0")[0] == ["parameter", "auditmeasured"]
    assert read_table(page, "variance-1")[0] == ["layer", "plannedmodelled"]
    assert find(page, "bias-0-caption") is not None


def test_plan_without_layers_and_of_many(tmp_path):
    (tmp_path / "empty.json").write_text(make_plan().to_json())
    many = [PlannedLayer(f"l{i}", noise_fraction=i / 100) for i in range(50)]
    (tmp_path / "many.json").write_text(make_plan(*many).to_json())
    page = read(render_page(read_directory(tmp_path)))
    assert read_table(page, "plan-0-layers")[1] == {}
    assert len(read_table(page, "plan-1-layers")[1]) == 50
    assert len(read_table(page, "variance-0")[1]) == 51
    assert "The 24 largest of 50 layers" in text_of(find(page, "variance"))


def test_what_the_doctor_found_is_on_the_page():
    examination = Examination((Finding("torch", "broken", "1.13", "update it"), Finding("python", "ok", "3.11")))
    page = render(make_file(examination, "a doctor"), make_file(examination, "another"))
    for number in (0, 1):
        _, rows = read_table(page, f"doctor-{number}")
        assert rows == {"torch": ["broken", "1.13", "update it"], "python": ["ok", "3.11", "–"]}
    assert "broken" in [text_of(cell) for cell in page.iter("td") if cell.get("class") == "alarm"]
    assert all(" " not in element.get("id", "") for element in page.iter())
