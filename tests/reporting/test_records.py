"""Records go to strict JSON and come back."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from cheapgrad.reporting import records
from tests.reporting.records import make_method, make_record, make_rows


def test_record_survives_strict_json():
    record = make_record(make_method(), make_rows(max_abs_z=math.inf, unbiased=False, predicted_relative_variance=None))
    text = json.dumps(record.to_dict(), allow_nan=False)
    assert type(record).from_dict(json.loads(text)) == record
    assert '"max_abs_z": "inf"' in text


def test_derived_figures_are_written_out():
    method = make_record().to_dict()["models"][0]["methods"][1]
    assert method["accuracy_mean"] == pytest.approx(0.975)
    assert method["accuracy_deviation"] == pytest.approx(0.01)
    assert method["cost_times_noise"] == pytest.approx(0.75 * 1.2)


def test_one_seed_has_no_deviation():
    assert math.isnan(make_method(accuracies=(0.9,)).accuracy_deviation)
    assert (
        make_record(make_method(accuracies=(0.9,))).to_dict()["models"][0]["methods"][0]["accuracy_deviation"] == "nan"
    )


def test_every_figure_says_where_it_comes_from():
    figures = make_record().to_dict()["models"][0]["methods"][0]
    assert set(records.PROVENANCE) <= set(figures)
    assert {text.split(":")[0] for text in records.PROVENANCE.values()} == {"measured", "modelled", "computed"}


def test_bias_of_one_method_is_bias_of_the_whole():
    assert make_record().unbiased
    assert not make_record(make_method(), make_rows(unbiased=False)).unbiased


def test_reporting_itself_does_not_load_matplotlib_or_rich():
    program = "import sys, cheapgrad.reporting; print({'matplotlib', 'rich'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
