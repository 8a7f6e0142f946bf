"""The choice among what costs and adds known amounts, beside an exhaustive search."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from cheapgrad.errors import UnreachableBudgetError
from cheapgrad.planning import choosing
from cheapgrad.planning.budget import read_limit
from cheapgrad.planning.choosing import Menu
from cheapgrad.planning.parts import Choice
from cheapgrad.planning.passed_down import Noise
from cheapgrad.sketch import Moment, RowSample, StochasticRounding

EXACT = 100.0
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)


def rows(layer: str, keep: float, share: float = 1.0, noise: float = 1.0) -> Choice:
    return Choice(
        (layer,), Moment.COTANGENT, RowSample(keep), 0.0, share * EXACT * (keep - 1), Noise(noise * (1 / keep - 1))
    )


def code(
    layers: tuple[str, ...], held: float, flops: float, noise: float, bits: int = 4, *, is_region: bool = False
) -> Choice:
    return Choice(layers, Moment.STORED, StochasticRounding(bits), held, flops, Noise(noise), is_region=is_region)


def make_menu(least_keep: float) -> Menu:
    """Return one block of one layer: its code of all saves more bytes, and computes 12 FLOPs again."""
    units = [[rows("a", keep) for keep in KEEPS if keep >= least_keep]]
    return Menu(
        units,
        [[code(("a",), -40.0, 0.0, 0.3)]],
        EXACT,
        EXACT,
        regions=[[code(("a",), -60.0, 12.0, 0.1, is_region=True)]],
    )


def choose(menu: Menu, **limits: str) -> tuple[Choice, ...]:
    return menu.within_costs({name: read_limit(name, text, EXACT, EXACT) for name, text in limits.items()})


def sums(choices: tuple[Choice, ...]) -> tuple[float, float, float]:
    held = EXACT + math.fsum(choice.bytes_change for choice in choices)
    flops = EXACT + math.fsum(choice.flops_change for choice in choices)
    return held, flops, math.fsum(choice.noise.total for choice in choices)


@pytest.mark.parametrize(
    ("least_keep", "limits", "flops", "is_region"),
    [
        (0.5, {"memory": "60 %", "flops": "82 %"}, 82.0, True),
        (0.7, {"memory": "60 %", "flops": "72 %"}, 70.0, False),
        (0.5, {"memory": "60 %"}, 112.0, True),
        (0.5, {"flops": "72 %"}, 70.0, False),
    ],
)
def test_rows_make_up_for_what_codes_of_blocks_compute_again(
    least_keep: float, limits: dict[str, str], flops: float, is_region: bool
) -> None:
    chosen = choose(make_menu(least_keep), **limits)
    assert sums(chosen)[1] == pytest.approx(flops)
    assert any(choice.is_region for choice in chosen) == is_region


def test_some_blocks_may_be_coded_and_others_not() -> None:
    # Two groups alone hold too much, two blocks alone compute too much.
    groups = [[code((layer,), -25.0, 0.0, 0.1)] for layer in "ab"]
    regions = [[code((layer,), -30.0, 12.0, 0.1, is_region=True)] for layer in "ab"]
    menu = Menu([[rows("a", keep) for keep in KEEPS if keep >= 0.7]], groups, EXACT, EXACT, regions=regions)
    assert sums(choose(menu, memory="46 %", flops="85 %"))[:2] == pytest.approx((45.0, 82.0))


def test_codes_without_a_block_may_cost_flops_too() -> None:
    menu = Menu([[rows("a", 0.9), rows("a", 0.8)]], [[code(("a",), -40.0, 12.0, 0.1)]], EXACT, EXACT)
    assert sums(choose(menu, memory="70 %", flops="93 %"))[:2] == pytest.approx((60.0, 92.0))
    with pytest.raises(UnreachableBudgetError, match="but not both"):
        choose(menu, memory="70 %", flops="85 %")


def random_menu(generator: random.Random) -> Menu:
    units = [[rows(unit, keep, 0.5, generator.uniform(0.5, 2)) for keep in (0.8, 0.6, 0.4)] for unit in "ab"]
    groups, regions = [], []
    for layer in "ab":
        groups.append([code((layer,), -generator.uniform(15, 25), 0.0, generator.uniform(0, 1)) for _ in range(2)])
        saved, flops = generator.uniform(26, 40), generator.uniform(4, 9)
        regions.append(
            [
                code((layer,), -saved, flops, generator.uniform(0, 0.5), 8, is_region=True),
                code((layer,), -saved - 5, flops, generator.uniform(0.5, 2), 4, is_region=True),
            ]
        )
    return Menu(units, groups, EXACT, EXACT, regions=regions)


def search_all(menu: Menu, memory: float, flops: float) -> float | None:
    """Return the least noise of all combinations, or None."""
    found = []
    codes = [[(), *((one,) for one in (*menu.stored[at], *menu.regions[at]))] for at in range(2)]
    for picked in itertools.product(*([None, *unit] for unit in menu.cotangent), *codes):
        choices = tuple(one for one in picked[:2] if one) + picked[2] + picked[3]
        held, counted, noise = sums(choices)
        if held <= memory and counted <= flops:
            found.append(noise)
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(10))
def test_two_budgets_equal_an_exhaustive_search(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    menu, ratios = random_menu(random.Random(seed)), []
    for memory, flops in itertools.product(range(21, 100, 10), range(51, 100, 10)):
        least = search_all(menu, memory, flops)
        limits = {"memory": f"{memory} %", "flops": f"{flops} %"}
        if least is None:
            with pytest.raises(UnreachableBudgetError):
                choose(menu, **limits)
            continue
        assert sums(choose(menu, **limits))[2] == pytest.approx(least)
        # As for many combinations: what can be kept is kept, at little more noise.
        with monkeypatch.context() as patch:
            patch.setattr(choosing, "_FEW_COMBINATIONS", 0)
            held, counted, noise = sums(choose(menu, **limits))
        assert held <= memory + 1e-9
        assert counted <= flops + 1e-9
        ratios.append(noise / least if least else 1.0)
    assert sum(ratios) / len(ratios) < 1.15
