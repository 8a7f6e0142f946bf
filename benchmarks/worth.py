"""Is it worth it? Relative cost times one plus omega, against the smaller batch, which sits on one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# By width of the network that `benchmarks.step` times.
TARGETS = {384: 0.77, 768: 0.72}


def judge_worth(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield ``c (1 + omega)`` for every network and budget whose cost and noise were measured, the last time counting.

    A batch of a share q of the examples has exactly ``1 + omega = 1 / q`` where noise dominates; its row is its
    measured cost divided by q. The best budget of each network carries the target.
    """
    omegas = {record["method"]: record["omega"] for record in records if record["benchmark"] == "noise"}
    steps = list(
        {(record["width"], record["method"]): record for record in records if record["benchmark"] == "step"}.values()
    )
    for width in dict.fromkeys(record["width"] for record in steps):
        rows = [row for record in steps if record["width"] == width for row in _judge(record, omegas)]
        ours = [row["worth"] for row in rows if row["method"].startswith("recipes")]
        for row in rows:
            yield row | {"target_worth": TARGETS.get(width) if ours and row["worth"] == min(ours) else None}


def _judge(record: dict[str, Any], omegas: dict[str, float]) -> Iterator[dict[str, Any]]:
    kind, _, keep = record["method"].rpartition(" ")
    if kind not in {"recipes.speed", "batch x"}:
        return
    omega = 1 / float(keep) - 1 if kind == "batch x" else omegas.get(f"{kind}({keep.lstrip('0')})")
    if omega is None:
        return
    cost = record["relative_cost"]
    yield {
        "benchmark": "worth",
        "width": record["width"],
        "method": record["method"],
        "relative_cost": cost,
        "omega": omega,
        "worth": cost * (1 + omega),
    }
