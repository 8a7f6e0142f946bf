"""The six sentences."""

from __future__ import annotations

import math

import pytest

from cheapgrad.reporting import write_verdict
from tests.reporting.records import make_bits, make_method, make_record, make_rows


def test_six_sentences():
    bias, prediction, time, memory, batches, caution = write_verdict(make_record())
    assert "none found in 2 methods; the largest z is 4.5 where chance explains 7.0" in bias
    assert "5 % too long" in bias
    assert prediction == (
        "Prediction: measured variance is 1.00 times the predicted one for sketches of what is stored, 1.20 "
        "times the predicted one for sketches of the cotangent, whose noise also travels down to the layers below."
    )
    assert time == "Time: DigitsViT: cotangent rows 0.5 needs 0.75 of the exact step, 97.5 % right (exact 98.0 %)."
    assert memory == "Memory: DigitsViT: stored 4 bits holds 0.67 of the exact bytes, 98.0 % right (exact 98.0 %)."
    assert "c(1+ω) is 0.90 at best (cotangent rows 0.5), so where noise dominates it wins" in batches
    assert caution == (
        "Size: these networks are tiny, and drawing costs a fixed time per layer: in a wider one (wide network) a step "
        "takes, of the exact time, 0.75 with cotangent rows 0.5 and 1.10 with stored 4 bits."
    )


def test_bias_is_named():
    bias = write_verdict(make_record(make_method(), make_rows(unbiased=False, max_abs_z=math.inf)))[0]
    assert bias.startswith("Bias: FOUND in cotangent rows 0.5 (z = inf)")


def test_gains_bought_with_accuracy_do_not_count():
    losing = make_record(make_method(), make_rows(accuracies=(0.9, 0.9, 0.9)), make_bits(accuracies=(0.9, 0.9, 0.9)))
    _, _, time, memory, _, _ = write_verdict(losing)
    assert "no strategy is faster" in time
    assert "no strategy holds fewer bytes" in memory


@pytest.mark.parametrize(
    ("noise", "outcome"), [(0.2, "0.90 at best"), (0.33, "draws level"), (0.35, "draws level"), (3.0, "loses")]
)
def test_outcome_against_another_batch_is_said(noise, outcome):
    batches = write_verdict(make_record(make_method(), make_rows(noise_fraction=noise)))[4]
    assert outcome in batches


def test_time_saved_within_the_noise_is_none():
    time = write_verdict(make_record(make_method(), make_rows(step_time_fraction=0.98)))[2]
    assert "no strategy is faster" in time


def test_exact_alone():
    verdict = write_verdict(make_record(make_method()))
    assert len(verdict) == 6
    assert "nothing but the exact method" in verdict[0]
