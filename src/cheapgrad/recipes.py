"""Rules for a whole model in one word: less memory, less time, or both.

Every recipe is a tuple of rules, to be given to `cheapgrad.approximate` as it is, or with rules of your own behind it,
which win where they match.
"""

from __future__ import annotations

from cheapgrad.convert import Rule
from cheapgrad.sketch import OrderedPivotal, RowSample, StochasticRounding


def memory(bits: int = 4, *, fused: bool = False) -> tuple[Rule, ...]:
    """Return rules that hold fewer bytes for the backward pass.

    Whatever a backward pass is linear in is kept in `bits` bits, norms in two independent codes, branches and masks in
    one bit; what attention needs exactly (its queries, keys and values) is computed again from what is held anyway.

    Args:
        bits: 2, 4 or 8 for each number that is rounded.
        fused: compile what encodes and decodes, which takes seconds at the first step and a C++ compiler; see
            `cheapgrad.sketch.StochasticRounding`.

    Returns:
        One rule for all modules.

    Raises:
        BudgetError: if `bits` or `fused` is something else.

    >>> memory(bits=4)
    (Rule(pattern='*', stored=StochasticRounding(bits=4), cotangent=None, recompute=True),)
    """
    return (Rule("*", stored=StochasticRounding(bits, fused=fused), recompute=True),)


def speed(keep: float = 0.5) -> tuple[Rule, ...]:
    """Return rules that make the backward pass faster.

    Rows of the cotangent (one for each token) are drawn with chances in proportion to their norms, once for each chain
    of row-wise layers. Convolutions stay exact: there rows save no time, and whole examples add more variance than a
    smaller batch would (``docs/strategies/convolutions.md``). Rows are spread evenly over examples and positions
    (`OrderedPivotal`), which adds a fifth to a third less variance than a shuffled draw on a vision transformer
    (``docs/benchmarks.md``).

    Args:
        keep: the share of rows that is kept, in (0, 1].

    Returns:
        One rule for all modules.

    Raises:
        BudgetError: if `keep` is outside (0, 1].

    >>> speed(keep=0.5)
    (Rule(pattern='*', stored=None, cotangent=RowSample(keep=0.5, design=OrderedPivotal()), recompute=False),)
    """
    return (Rule("*", cotangent=_draw_rows(keep)),)


def both(bits: int = 4, keep: float = 0.5, *, fused: bool = False) -> tuple[Rule, ...]:
    """Return rules that hold as little as `memory` and drop as many rows as `speed`.

    Args:
        bits: as for `memory`.
        keep: as for `speed`.
        fused: as for `memory`.

    Returns:
        One rule for all modules.

    Raises:
        BudgetError: if `bits`, `keep` or `fused` is out of range.

    >>> both(bits=4, keep=0.5)
    (Rule(pattern='*', stored=StochasticRounding(bits=4), cotangent=RowSample(keep=0.5, design=OrderedPivotal()),
    recompute=True),)
    """
    codec = StochasticRounding(bits, fused=fused)
    return (Rule("*", stored=codec, cotangent=_draw_rows(keep), recompute=True),)


def _draw_rows(keep: float) -> RowSample:
    """Return a sample in which neighbours, tokens of one example, rarely come together."""
    return RowSample(keep, design=OrderedPivotal())
