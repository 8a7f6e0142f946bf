"""The choice among what costs and adds known amounts."""

from __future__ import annotations

from typing import Any

from cheapgrad.planning.budget import read_limit
from cheapgrad.planning.choosing import Menu
from cheapgrad.planning.parts import Choice
from cheapgrad.planning.passed_down import Noise
from cheapgrad.sketch import Moment, RowSample, StochasticRounding

EXACT = 100.0


def rows(keep: float) -> Choice:
    return Choice(("a",), Moment.COTANGENT, RowSample(keep), 0.0, EXACT * (keep - 1), Noise(1 / keep - 1))


def code(bytes_change: float, flops_change: float, noise: float, *, is_region: bool = False) -> Choice:
    strategy = StochasticRounding(4)
    return Choice(("a",), Moment.STORED, strategy, bytes_change, flops_change, Noise(noise), is_region=is_region)


def make_menu(least_keep: float) -> Menu:
    keeps = [keep for keep in (0.9, 0.8, 0.7, 0.6, 0.5) if keep >= least_keep]
    group, region = code(-40.0, 0.0, 0.3), code(-60.0, 12.0, 0.1, is_region=True)
    return Menu([[rows(keep) for keep in keeps]], [[group]], EXACT, EXACT, regions=[[region]])


def choose(menu: Menu, **limits: str) -> dict[str, Any]:
    chosen = menu.within_costs({name: read_limit(name, text, EXACT, EXACT) for name, text in limits.items()})
    flops = EXACT + sum(choice.flops_change for choice in chosen)
    keep = min((choice.strategy.keep for choice in chosen if isinstance(choice.strategy, RowSample)), default=1.0)
    return {"flops": flops, "keep": keep, "region": any(choice.is_region for choice in chosen)}


def test_rows_make_up_for_what_codes_of_blocks_compute_again() -> None:
    found = choose(make_menu(0.5), memory="60 %", flops="82 %")
    assert found == {"flops": 82.0, "keep": 0.7, "region": True}


def test_without_flops_to_spare_blocks_are_not_coded() -> None:
    found = choose(make_menu(0.7), memory="60 %", flops="72 %")
    assert found == {"flops": 70.0, "keep": 0.7, "region": False}


def test_without_a_budget_of_flops_rows_are_left_alone() -> None:
    assert choose(make_menu(0.5), memory="60 %") == {"flops": 112.0, "keep": 1.0, "region": True}
