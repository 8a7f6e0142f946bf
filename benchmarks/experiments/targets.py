"""What the experiments were to show, and what they do show: a table from records alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.experiments.judges import (
    Finding,
    Judge,
    judge_backward,
    judge_batches_theory,
    judge_frontier,
    judge_memory,
    judge_speed,
    judge_theory,
    judge_time,
    judge_uniform_loss,
    judge_uniform_noise,
    judge_weighed_theory,
)
from benchmarks.experiments.results import KINDS, TaskResults
from benchmarks.experiments.tables import write_table

_SEEDS = 5


@dataclass(frozen=True)
class Target:
    """What was asked for before anything was run.

    Attributes:
        what: its name.
        asked: in words.
        judge: says what was found on a task.
        needed: on how many kinds of networks it has to be reached.
        kinds: of networks.
        part: of the name of a task that it is for.
    """

    what: str
    asked: str
    judge: Judge
    needed: int
    kinds: tuple[str, ...] = KINDS
    part: str = ""


_TARGETS = (
    Target(
        "MLP, width ≥ 1024",
        "accuracy ≥ 98.0 %, at most 0.2 points below exact, backward ≥ 2 times faster",
        judge_backward,
        1,
        ("MLP",),
        "wide",
    ),
    Target(
        "ViT and BagNet",
        "a step ≥ 1.4 times faster, at most 0.3 points below exact, c (1 + ω) ≤ 0.75 at every point",
        judge_speed,
        2,
        ("ViT", "BagNet"),
    ),
    Target(
        "memory recipe, 4 bits",
        "not worse than exact beyond doubt, nor by more than its seed noise; bytes held ≥ 4 times fewer, on all four",
        judge_memory,
        4,
    ),
    Target(
        "time to the target",
        "≥ 1.25 times faster than exact on two of four, the setting chosen on other seeds, beside the smaller batch",
        judge_time,
        2,
    ),
    Target(
        "equal-cost frontier",
        "better than the smaller batch of equal time (p < 0.05, by Holm over the settings) on two of four",
        judge_frontier,
        2,
    ),
    Target("data-dependent against uniform: ω", "lower at equal budget on all four", judge_uniform_noise, 4),
    Target("data-dependent against uniform: loss", "lower test loss (p < 0.05) on two of four", judge_uniform_loss, 2),
    Target(
        "theory",
        "steps to the target predicted within 15 % on all four, by methods that are predicted to take longer",
        judge_theory,
        4,
    ),
    Target(
        "theory, by whole trainings and noise in units of AdamW's steps",
        "the same, set later: see [noise and steps](#noise-and-steps)",
        judge_weighed_theory,
        4,
    ),
    Target(
        "theory, by smaller batches of the task that have as much noise in units of AdamW's steps",
        "the same, set last",
        judge_batches_theory,
        4,
    ),
)


def write_targets(all_results: Sequence[TaskResults]) -> str:
    """Return a table: what was asked for, what was found on each task, and whether that is enough."""
    tasks = [results for results in all_results if not results.is_quick and results.exact.runs]
    rows = []
    for target in _TARGETS:
        findings = _collect(tasks, target)
        found = "<br>".join(f"{name}: {finding.text}" for name, finding in findings) or "–"
        rows.append([target.what, target.asked, found, _say(findings, target)])
    return write_table(["what", "asked", "found", "state"], rows)


def _collect(tasks: Sequence[TaskResults], target: Target) -> list[tuple[str, Finding]]:
    """Return what is found on each task that the target is for, where something was run."""
    meant = [results for results in tasks if results.kind in target.kinds and target.part in results.task]
    found = [(results.task, target.judge(results)) for results in meant]
    return [(name, finding) for name, finding in found if finding is not None]


def _say(findings: Sequence[tuple[str, Finding]], target: Target) -> str:
    if not findings:
        return "not run"
    by_kind = {kind: [found.is_reached for name, found in findings if kind in name] for kind in target.kinds}
    judged = [states for states in by_kind.values() if states]
    # What is asked of all networks is asked of every task; elsewhere one task of a kind is enough.
    is_for_all = target.needed == len(target.kinds)
    reached = sum(all(states) if is_for_all else any(states) for states in judged)
    seeds = min(finding.seeds for _, finding in findings)
    few = f", with {seeds} seed{'s' * (seeds != 1)}" if seeds < _SEEDS else ""
    if reached >= target.needed:
        return f"reached{few}"
    # What is not run yet may still be enough, or may not.
    is_open = reached + len(target.kinds) - len(judged) >= target.needed
    return f"{'not run on all' if is_open else 'not reached'}: {reached} of {target.needed}{few}"
