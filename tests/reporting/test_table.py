"""The tables on the terminal."""

from __future__ import annotations

import io
import math
import re

from rich.console import Console

from cheapgrad.reporting import print_tables
from tests.reporting.records import make_bits, make_method, make_record, make_rows


def printed(record, width=140):
    stream = io.StringIO()
    print_tables(record, Console(file=stream, width=width))
    return stream.getvalue()


def row_of(text, label):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return re.split(r"\s{2,}", line.strip())


def test_every_figure_is_in_its_column():
    text = printed(make_record())
    assert row_of(text, "cotangent rows 0.5") == [
        "cotangent rows 0.5", "128", "97.5 ± 1.0", "0.75", "1.00", "0.100", "0.120", "0.200", "0.90", "4.5",
    ]  # fmt: skip
    assert row_of(text, "stored 4 bits")[2:9] == [
        "98.0 ± 1.0", "1.20", "0.67", "4.0e-04", "4.0e-04", "0.001", "1.20",
    ]  # fmt: skip


def test_exact_row_has_the_units():
    assert row_of(printed(make_record()), "exact")[3:5] == ["20.0 ms", "3.0 MiB"]


def test_bias_is_called_out():
    text = printed(make_record(make_method(), make_rows(max_abs_z=math.inf, unbiased=False)))
    assert row_of(text, "cotangent rows 0.5")[-1] == "inf BIASED"


def test_unknown_prediction_is_a_dash_and_one_seed_has_no_deviation():
    text = printed(
        make_record(make_method(), make_rows(predicted_relative_variance=None, accuracies=(0.9,)), seeds=(0,))
    )
    row = row_of(text, "cotangent rows 0.5")
    assert (row[2], row[5]) == ("90.0", "–")
    assert "1 seed" in text


def test_legend_states_draws_and_band():
    text = printed(make_record(make_method(), make_rows(band=6.9), make_bits(band=7.3)))
    assert "over 256 fixed draws; up to 6.9 – 7.3 is what chance" in text


def test_numbers_stay_whole_on_a_narrow_terminal():
    assert "97.5 ± 1.0" in printed(make_record(), width=110)


def test_wider_network_is_told_apart():
    text = printed(make_record())
    assert "Timed only: wide network; exact 200 ms" in text
    assert "step time ÷ exact: cotangent rows 0.5 0.75, stored 4 bits 1.10" in text
