"""What a directory of records is read as, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.cost import compare
from cheapgrad.environment import Examination, Finding
from cheapgrad.errors import RecordError
from cheapgrad.field_types import find_misfit
from cheapgrad.planning import PlannedLayer
from cheapgrad.reporting import DemoRecord, read_directory
from cheapgrad.reporting.record_files import KINDS
from cheapgrad.sketch import StochasticRounding
from tests.reporting.records import make_audit, make_plan, make_record


@pytest.fixture(scope="module")
def records():
    torch.manual_seed(0)
    scan = cheapgrad.scan(nn.Linear(8, 4), torch.randn(5, 8))
    audit = make_audit(nn.Linear(4, 3))
    examination = Examination((Finding("torch", "ok", "2.13"),), {"torch": "2.13"})
    return {
        "cheapgrad.audit": audit,
        "cheapgrad.comparison": compare(scan, scan),
        "cheapgrad.demo": make_record(),
        "cheapgrad.plan": make_plan(PlannedLayer("fc1", stored=StochasticRounding(bits=4), noise_fraction=0.1)),
        "cheapgrad.doctor": examination,
        "cheapgrad.scan": scan,
    }


def write(directory, name, data):
    path = directory / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_every_kind_is_marked_and_read_back(records, tmp_path):
    for kind, record in records.items():
        data = record.to_dict()
        assert (data["kind"], data["version"]) == (kind, 1)
        write(tmp_path, f"{kind}.json", data)
    files = read_directory(tmp_path).files
    assert {file.kind: file.record for file in files} == records
    assert {file.kind for file in files} == {kind.name for kind in KINDS}
    assert all(not file.remark for file in files)


def test_unmarked_records_are_known_by_their_keys_and_said_to_be(records, tmp_path):
    for kind, record in records.items():
        data = record.to_dict()
        del data["kind"], data["version"]
        write(tmp_path, f"{kind}.json", data)
    files = read_directory(tmp_path).files
    assert {file.kind: file.record for file in files} == records
    assert all("known by its keys" in file.remark for file in files)


def test_origin_is_read_where_it_is_stated(records, tmp_path):
    data = records["cheapgrad.scan"].to_dict()
    origin = {"label": "planned", "environment": {"torch": "2.13"}, "seeds": [1, 2], "command": "cheapgrad scan m:f"}
    write(tmp_path, "a.json", {**data, **origin})
    write(tmp_path, "b.json", {**data, "label": 3, "environment": [], "seeds": "x", "command": None})
    stated, unstated = read_directory(tmp_path).files
    assert (stated.label, stated.environment, stated.seeds, stated.command) == (
        "planned",
        {"torch": "2.13"},
        (1, 2),
        "cheapgrad scan m:f",
    )
    assert (unstated.label, unstated.environment, unstated.seeds, unstated.command) == ("b", {}, (), None)
    assert stated.record == records["cheapgrad.scan"]


def test_records_of_the_demo_before_layers_were_in_it(tmp_path):
    data = make_record().to_dict()
    del data["command"], data["kind"], data["version"]
    for method in data["models"][0]["methods"]:
        del method["tensors"], method["held"]
    write(tmp_path, "demo.json", data)
    assert read_directory(tmp_path).files[0].record == make_record()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"kind": "cheapgrad.scam"},
            "its kind is 'cheapgrad.scam', which reports do not know; did you mean 'cheapgrad.scan'",
        ),
        ({"kind": 3}, "its kind is '3'"),
        ({"name": "cheapgrad"}, "it states no kind, and no record has its keys"),
        ([1, 2], "it holds a list"),
        ("null", "it holds a NoneType"),
    ],
)
def test_strangers_are_named(tmp_path, content, reason):
    write(tmp_path, "demo.json", make_record().to_dict())
    write(tmp_path, "stranger.json", content)
    (refused,) = read_directory(tmp_path).refused
    assert refused.name == "stranger.json"
    assert reason in refused.reason


def _without(key):
    data = make_record().to_dict()
    del data["models"][0]["methods"][1][key]
    return data


def _with(key, value):
    data = make_record().to_dict()
    data["models"][0]["methods"][1][key] = value
    return data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no JSON"),
        ('{"kind": "cheapgrad.demo", ', "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ({**make_record().to_dict(), "version": 2}, "of version 2, and this cheapgrad reads versions 1 to 1"),
        ({**make_record().to_dict(), "version": "1"}, "of version '1'"),
        ({"kind": "cheapgrad.demo", "version": 1}, "'models' is missing"),
        (_without("step_seconds"), "is a damaged cheapgrad.demo: 'step_seconds' is missing"),
        (_with("step_seconds", "fast"), "models[0].methods[1].step_seconds is 'fast', not float"),
        (_with("batch_size", 1.5), "models[0].methods[1].batch_size is 1.5, not int"),
        (_with("accuracies", [0.5, "x"]), "models[0].methods[1].accuracies[1] is 'x', not float"),
        (_with("unbiased", 1), "models[0].methods[1].unbiased is 1, not bool"),
        (_with("tensors", 5), "is a damaged cheapgrad.demo: TypeError"),
    ],
)
def test_damaged_records_are_errors(tmp_path, content, message):
    write(tmp_path, "fine.json", make_record().to_dict())
    write(tmp_path, "damaged.json", content)
    with pytest.raises(RecordError) as caught:
        read_directory(tmp_path)
    assert "'damaged.json'" in str(caught.value)
    assert message in str(caught.value)


def test_bytes_that_are_no_text_are_an_error(tmp_path):
    (tmp_path / "damaged.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match=r"'damaged.json' is no JSON"):
        read_directory(tmp_path)


def test_directory_without_records(tmp_path):
    with pytest.raises(RecordError, match="missing' does not exist"):
        read_directory(tmp_path / "missing")
    with pytest.raises(RecordError, match=r"holds no record; write one there, e.g. with 'cheapgrad demo"):
        read_directory(tmp_path)
    path = write(tmp_path, "package.json", {"name": "x"})
    with pytest.raises(RecordError, match=r"holds no record; package\.json: it states no kind"):
        read_directory(tmp_path)
    with pytest.raises(RecordError, match=r"package\.json' is a file; name the directory"):
        read_directory(path)


def test_other_files_and_directories_are_left_alone(tmp_path):
    write(tmp_path, "demo.json", make_record().to_dict())
    write(tmp_path, "notes.txt", "{")
    (tmp_path / "deeper.json").mkdir()
    found = read_directory(tmp_path)
    assert [file.name for file in found.files] == ["demo.json"]
    assert found.refused == ()
    assert isinstance(found.files[0].record, DemoRecord)


@pytest.mark.parametrize(
    ("value", "annotation", "misfit"),
    [
        (1, float, None),
        (1.0, int, "x is 1.0, not int"),
        (True, float, "x is True, not float"),
        (True, int, "x is True, not int"),
        (True, bool, None),
        (None, int | None, None),
        ("a", int | None, "x is 'a', not int"),
        ((1, 2), tuple[int, int], None),
        ((1,), tuple[int, int], "x has 1 entries, not 2"),
        ([1], tuple[int, ...], "x is [1], not a list"),
        ({}, dict[str, int], None),
        ({"a": 1}, dict[str, int], None),
        ({"a": 1.5}, Mapping[str, str | float], None),
        ({"a": None}, Mapping[str, str | float], "x['a'] is None, not str"),
        ({1: 2.0}, Mapping[str, Any], "a key of x is 1, not str"),
        ([], Mapping[str, Any], "x is [], not Mapping"),
        ("a" * 100, int, "x is '" + "a" * 56 + "..., not int"),
    ],
)
def test_fields_hold_what_they_state(value, annotation, misfit):
    assert find_misfit(value, annotation, "x") == misfit


def test_all_damaged_records_are_named_at_once(tmp_path):
    report = cheapgrad.scan(nn.Linear(4, 2), torch.randn(2, 4)).to_dict()
    write(tmp_path, "a.json", {**report, "total": {**report["total"], "saved_bytes": -1}})
    write(tmp_path, "b.json", report)
    write(tmp_path, "c.json", {**report, "version": 99})
    with pytest.raises(RecordError) as caught:
        read_directory(tmp_path)
    assert "'a.json' is a damaged cheapgrad.scan: total.saved_bytes must be at least 0, but is -1" in str(caught.value)
    assert "'c.json' is a cheapgrad.scan of version 99" in str(caught.value)
    assert "b.json" not in str(caught.value)
