"""The benchmark of whole networks on a small one: bytes of every method, and a method that fails is a row."""

from __future__ import annotations

import pytest
import torch

from benchmarks import process_peak, whole_network
from benchmarks.networks import Network
from benchmarks.vision_transformer import VisionTransformer
from benchmarks.whole_network import EAGER, EXACT, Method

SMALL = Network(
    "small",
    lambda: VisionTransformer(64, 1),
    lambda: (torch.randn(2, 64, 48), torch.randint(0, 10, (2,))),
    target_ratio=2.0,
)


class Failing(Method):
    """A method that cannot be set up."""

    def prepare(self, model):
        raise RuntimeError("no such luck\nin detail")


@pytest.fixture(autouse=True)
def _no_process_of_its_own(monkeypatch):
    monkeypatch.setattr(whole_network, "_peak_of_process", lambda network, method: 1)


def records_of(*methods):
    return {record["method"]: record for record in whole_network._measure_network(SMALL, methods, rounds=2)}


def test_every_eager_method_has_its_bytes_and_a_failing_one_says_why():
    records = records_of(EXACT, Failing("doomed"), *EAGER[1:3])
    doomed = records.pop("doomed")
    assert doomed["failure"] == "RuntimeError: no such luck"
    assert all(
        value is None for key, value in doomed.items() if key not in ("benchmark", "network", "method", "failure")
    )
    assert all(record["failure"] is None for record in records.values())
    assert all(record["held_bytes"] and record["peak_bytes"] for record in records.values())
    assert records["recipes.memory(4)"]["times_fewer"] > 2


def test_without_an_exact_step_the_others_still_have_their_bytes():
    records = records_of(Failing("exact"), EAGER[2])
    # The failing one is another method of that name; the comparison has nothing to stand on.
    assert records["recipes.memory(4)"]["held_bytes"]
    assert records["recipes.memory(4)"]["times_fewer"] is None


@pytest.mark.slow
def test_compiled_methods_keep_to_budgets_of_their_own():
    torch._dynamo.reset()
    methods = [Method(f"budget {budget}", memory_budget=budget) for budget in (1.0, 0.25)]
    records = records_of(EXACT, *methods)
    assert [record["failure"] for record in records.values()] == [None] * 3
    # One graph taken for another would give equal numbers.
    whole, quarter = (records[method.name]["held_bytes"] for method in methods)
    assert whole > 1.5 * quarter


def test_peak_of_a_process_is_that_of_the_step_alone():
    sizes = iter((40, 40, 20))
    # The steps before do not count, nor what they freed.
    peak = process_peak.measure_process_peak(lambda: torch.ones(next(sizes), 1024, 256).sum())
    if not process_peak._FORGET.exists():
        pytest.skip("the kernel does not forget peaks here")
    assert 0.9 * 20 * 2**20 < peak < 1.3 * 20 * 2**20
