"""What an audit prints and writes."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from cheapgrad import AuditReport, audit
from cheapgrad.errors import OutputError, RecordError
from tests.auditing import planted
from tests.auditing.planted import make_batch, make_network, mean_loss, right_loss


@pytest.fixture(scope="module")
def good():
    return audit(make_network(planted.sampled_rows()), mean_loss, make_batch(), reference=right_loss)


@pytest.fixture(scope="module")
def bad():
    return audit(make_network(planted.top_rows), mean_loss, make_batch(), reference=right_loss, draws=8)


def test_report_travels_through_json(good, bad, tmp_path):
    for report in (good, bad):
        report.save(tmp_path / "audit.json")
        data = json.loads((tmp_path / "audit.json").read_text(), parse_constant=pytest.fail)
        assert (data["kind"], data["version"]) == ("cheapgrad.audit", 1)
        assert data["unbiased"] == report.unbiased
        assert data["verdict"] == report.verdict()
        assert AuditReport.from_dict(data) == report
    assert bad.max_abs_z == math.inf
    assert data["max_abs_z"] == "inf"
    assert set(data["provenance"]) <= {field.name for field in dataclasses.fields(AuditReport)} | {
        "deterministic_error"
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "audit.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.pop("band"), "lacks 'band'"),
        (lambda data: data.update(draws="many"), "draws must be of type int, but is a str 'many'"),
        (lambda data: data.update(cosine="huge"), "cosine must be of type float, but is a str 'huge'"),
        (lambda data: data["layers"][1].update(name=None), r"layers\[1\]\.name must be of type str"),
        (lambda data: data.update(layers={}), "layers must be a list"),
        (lambda data: data.update(kind="cheapgrad.plan"), "of kind 'cheapgrad.plan', not 'cheapgrad.audit'"),
        (lambda data: data.update(version=7), "cheapgrad.audit of version 7"),
        (lambda data: data.update(band="inf"), "band must be a finite number above 0, but is inf"),
        (lambda data: data.update(tests=0), "tests must be at least 1, but is 0"),
        (lambda data: data.update(squared_norm=10**400), "squared_norm is a whole number of 401 digits"),
        (lambda data: data.clear(), "this is no audit: it should say 'kind': 'cheapgrad.audit'"),
    ],
)
def test_damaged_reports_are_refused(good, damage, message):
    data = json.loads(json.dumps(good.to_dict()))
    damage(data)
    with pytest.raises(RecordError, match=message):
        AuditReport.from_dict(data)


def test_file_is_whole_or_not_there(good, tmp_path):
    target = tmp_path / "audit.json"
    target.write_text("older")
    with pytest.raises(OutputError, match=r"cannot write .*nowhere"):
        good.save(tmp_path / "nowhere" / "audit.json")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*directory"):
        good.save(tmp_path / "directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.json", "directory"]
    assert target.read_text() == "older"


def test_table_names_the_parameters_and_the_verdict(good, bad):
    text = str(good)
    assert text.count("\n3.weight") == 1
    assert "BIASED" not in text.replace("UNBIASED", "")
    assert f"beyond ±{good.band:.1f} is bias (alpha 0.01, {good.tests} tests)" in text
    assert text.splitlines()[-1] == good.verdict()
    assert good.verdict().startswith(f"UNBIASED as far as 64 draws show: largest z {good.max_abs_z:.1f}")
    assert "\nBIASED 3.weight" in str(bad)
    assert bad.verdict().startswith("BIASED in 1 of 6 parameters: 3.weight (z inf, scale 0.")
    assert "3.weight" in bad.table(top=1)
    assert "5 more parameters: report.table(top=None) shows all" in bad.table(top=1)
    assert "more parameters" not in bad.table(top=None)


def test_verdict_of_a_bias_that_only_the_whole_shows(good):
    report = dataclasses.replace(good, max_abs_z=99.0)
    assert not report.unbiased
    assert report.verdict().startswith("BIASED in the gradient as a whole; band")


def test_lines_fit(good):
    assert max(len(line) for line in good.table().splitlines()[:-4]) <= 160


def test_bar_on_standard_error(capsys):
    model, batch = make_network(planted.one_percent_too_long), make_batch()
    audit(model, mean_loss, batch, reference=right_loss, draws=8, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "confirming an alarm" in captured.err
    audit(model, mean_loss, batch, reference=right_loss, draws=8)
    assert capsys.readouterr().err == ""
