"""What the records of one task say about each target that was set for the experiments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.experiments.analysis import (
    bytes_share,
    compare_rows,
    find_rival,
    list_distinct,
    measure_reach,
    metric_of,
    planning_share,
    steps_share,
    time_share,
)
from benchmarks.experiments.choices import list_faster, saves_time
from benchmarks.experiments.methods import FIRST_EXACT, SMALL_TOO
from benchmarks.experiments.predictions import Prediction, list_predictions
from benchmarks.experiments.results import Row, TaskResults
from benchmarks.experiments.statistics import Comparison, correct_for_many, summarise
from benchmarks.experiments.tables import name_row, say_difference, say_winner, write_number

_SIGNIFICANT = 0.05
_BEST_ACCURACY, _WORST_LOSS, _FASTER_BACKWARD = 98.0, 0.2, 2.0
_FASTER_STEP, _POINTS_BELOW, _WORST_COST = 1.4, 0.3, 0.75
_FEWER_BYTES = 4.0
_FASTER_TO_TARGET = 1.25
_PREDICTED_WITHIN = 0.15

# A setting is chosen on these data, and judged on the others.
_CHOSEN_ON, _JUDGED_ON = "validation_accuracy", "test_accuracy"


@dataclass(frozen=True)
class Finding:
    """What the records of one task say about a target.

    Attributes:
        is_reached: whether the target is reached.
        text: the figures.
        seeds: pairs that they rest on.
    """

    is_reached: bool
    text: str
    seeds: int


Judge = Callable[[TaskResults], Finding | None]
# The recipe as it is, and the ways to apply it.
_MEMORY_RECIPES = ("recipes.memory(4)", SMALL_TOO, FIRST_EXACT)
# Labels of methods of equal budget.
_DATA_DEPENDENT_AND_UNIFORM = (
    ("recipes.speed({})", "uniform masks, rows {}"),
    ("cotangent columns {} (data-dependent diagonal)", "uniform masks, columns {}"),
)
# A setting, and its time to the target by seed.
_Timed = tuple[Row, dict[int, float]]


def _list_settings(results: TaskResults) -> list[tuple[Row, float, Comparison]]:
    """Return unbiased methods of our own whose step time is known, with their difference to exact training."""
    found = []
    for row in list_distinct(results.rows):
        time, comparison = time_share(results, row), compare_rows(results, row, results.exact)
        if row is results.exact or row.is_biased or row.match_label or time is None or comparison is None:
            continue
        if row.omegas:
            found.append((row, time, comparison))
    return found


def judge_backward(results: TaskResults) -> Finding | None:
    """Judge accuracy and the time of the backward pass."""

    def meet(row: Row, figure: str) -> list[bool]:
        comparison = compare_rows(results, row, results.exact, figure)
        is_as_good = comparison is not None and comparison.mean >= -_WORST_LOSS
        return [_accuracy(row, figure) >= _BEST_ACCURACY, is_as_good, backward[name_row(row)] >= _FASTER_BACKWARD]

    settings = [(row, found) for row, _, found in _list_settings(results) if "backward_ratio" in (row.costs or {})]
    backward = {name_row(row): 1 / row.costs["backward_ratio"] for row, _ in settings if row.costs}
    if not settings:
        return None
    row, found = max(settings, key=lambda each: (sum(meet(each[0], _CHOSEN_ON)), backward[name_row(each[0])]))
    text = f"{_accuracy(row, _JUDGED_ON):.2f} %, {say_difference(results, found)}"
    text += f", backward {backward[name_row(row)]:.1f}× ({name_row(row)})"
    return Finding(all(meet(row, _JUDGED_ON)), text, found.pairs)


def _accuracy(row: Row, figure: str) -> float:
    return 100 * summarise(list(row.collect(figure).values()))[0]


def judge_speed(results: TaskResults) -> Finding | None:
    """Judge the time of a step, what it costs in accuracy, and the bound c (1 + ω)."""

    def cost(row: Row, time: float) -> float:
        return time * (1 + (row.worst_omega or 0.0))

    def meet(row: Row, time: float, figure: str) -> list[bool]:
        comparison = compare_rows(results, row, results.exact, figure)
        is_as_good = comparison is not None and comparison.mean >= -_POINTS_BELOW
        return [time <= 1 / _FASTER_STEP, is_as_good, cost(row, time) <= _WORST_COST]

    # Steps are judged, those among them that are exact included; what a plan takes before them is said.
    timed = [(row, steps_share(results, row), found) for row, _, found in _list_settings(results)]
    settings = [(row, time, found) for row, time, found in timed if time is not None]
    if not settings:
        return None
    faster = [each for each in settings if each[1] < 1]
    if not faster:
        row, time, found = min(settings, key=lambda each: each[1])
        return Finding(False, f"no setting is faster than exact ({name_row(row)}: {1 / time:.2f}×)", found.pairs)
    row, time, found = max(faster, key=lambda each: (sum(meet(each[0], each[1], _CHOSEN_ON)), -each[1]))
    planning = planning_share(results, row)
    beside = f", planning {write_number(planning)} of the time of exact training" if planning else ""
    text = f"{1 / time:.2f}×, {say_difference(results, found)}, c (1 + ω) ≤ {cost(row, time):.2f}"
    return Finding(all(meet(row, time, _JUDGED_ON)), f"{text} ({name_row(row)}{beside})", found.pairs)


def judge_memory(results: TaskResults) -> Finding | None:
    """Judge bytes held by the memory recipe, and what it costs.

    Where the recipe as it is holds too much, the way to apply it that holds the fewest bytes is judged: bytes are no
    matter of luck, so that nothing is chosen by what it is judged on.
    """
    rows = [row for label in _MEMORY_RECIPES if (row := results.find_row(label)) is not None]
    shares = [(row, share) for row in rows if (share := bytes_share(results, row)) is not None]
    if not shares:
        return None
    plain = next((each for each in shares if each[0].label == _MEMORY_RECIPES[0]), None)
    fewest = min(shares, key=lambda each: each[1])
    row, share = plain if plain is not None and plain[1] <= 1 / _FEWER_BYTES else fewest
    comparison = compare_rows(results, row, results.exact)
    if comparison is None:
        return None
    noise = _measure_seed_noise(results)
    loss = comparison.mean if results.is_text else -comparison.mean
    # Few seeds find no difference however large it is: the mean has to be small too. NaN, of one seed, is not.
    is_as_good = loss <= noise and say_winner(results, comparison) != "the one beside it"
    text = f"{1 / share:.1f}× fewer bytes, {say_difference(results, comparison)}, seed noise ± {noise:.3f}"
    if row.label != _MEMORY_RECIPES[0]:
        text += f" ({name_row(row)}; as it is {'not run' if plain is None else f'{1 / plain[1]:.1f}×'})"
    return Finding(is_as_good and share <= 1 / _FEWER_BYTES, text, comparison.pairs)


def _measure_seed_noise(results: TaskResults) -> float:
    """Return the standard deviation of exact training over its seeds, in points of accuracy or in loss."""
    scale = 1.0 if results.is_text else 100.0
    values = list(results.exact.collect(metric_of(results)).values())
    return scale * summarise(values)[1] if values else math.nan


def judge_time(results: TaskResults) -> Finding | None:
    """Judge the time to the target of exact training, by settings chosen on other seeds."""
    reaches = [(row, measure_reach(results, row)) for row, _, _ in _list_settings(results) if find_rival(results, row)]
    if not reaches:
        return None
    seeds = max((reach.seeds for _, reach in reaches), key=len)
    settings = [(row, reach.times) for row, reach in reaches if set(seeds) <= set(reach.seeds)]
    best = _choose_fastest(settings, seeds)
    if best is None:
        return Finding(False, "no setting reached it on every seed", len(seeds))
    time, row = time_chosen_elsewhere(settings, seeds), best[0]
    rival = find_rival(results, row)
    beside = None if rival is None else measure_reach(results, rival).time_ratio
    text = f"{1 / summarise(list(best[1].values()))[0]:.2f}× ({name_row(row)}; its smaller batch "
    text += "did not reach it on every seed), " if beside is None else f"{1 / beside:.2f}×), "
    text += f"{1 / time:.2f}×" if math.isfinite(time) else "not reached on every seed"
    return Finding(time <= 1 / _FASTER_TO_TARGET, text + " with the setting chosen on the other seeds", len(seeds))


def time_chosen_elsewhere(settings: Sequence[_Timed], seeds: Sequence[int]) -> float:
    """Return the mean over the seeds of the time of the setting that was the fastest on all the others.

    The fastest of several settings is a choice, and looks better than it is by what it was chosen by. A seed that knows
    nothing of the choice made for it has no such bias.

    Args:
        settings: each with its times by seed; a seed that is missing did not reach the target.
        seeds: at least 2; with one there is nothing to choose by, and the time is infinite.
    """
    judged = []
    for seed in seeds:
        chosen = _choose_fastest(settings, [other for other in seeds if other != seed])
        judged.append(math.inf if chosen is None else chosen[1].get(seed, math.inf))
    return summarise(judged)[0]


def _choose_fastest(settings: Sequence[_Timed], seeds: Sequence[int]) -> _Timed | None:
    """Return the setting with the least mean time on these seeds, of those that reached the target on all of them."""
    able = [each for each in settings if seeds and all(seed in each[1] for seed in seeds)]
    return min(able, key=lambda each: sum(each[1][seed] for seed in seeds), default=None)


def judge_frontier(results: TaskResults) -> Finding | None:
    """Judge the settings beside their smaller batches of equal time."""
    settings = list_faster(results)
    found: dict[str, Comparison] = {}
    for row in settings:
        rival = find_rival(results, row)
        # Beside a setting that saves no time stands exact training itself, which takes less.
        comparison = compare_rows(results, row, rival) if rival is not None and saves_time(results, row) else None
        if comparison is not None:
            found[name_row(row)] = comparison
    if not found:
        seeds = min((len(row.runs) for row in settings), default=0)
        return Finding(False, "no setting saves time", seeds) if settings else None
    # The best of several settings is a choice: its p-value answers for all of them.
    adjusted = correct_for_many({name: comparison.p_value for name, comparison in found.items()})
    sign = -1.0 if results.is_text else 1.0
    best = max(found, key=lambda name: (_wins(sign, adjusted[name], found[name]), sign * found[name].mean))
    text = f"{say_difference(results, found[best])}, p {write_number(adjusted[best], '{:.2g}')} ({best})"
    return Finding(_wins(sign, adjusted[best], found[best]), text, found[best].pairs)


def _wins(sign: float, p_value: float, comparison: Comparison) -> bool:
    return sign * comparison.mean > 0 and p_value < _SIGNIFICANT


def _find_uniform(results: TaskResults) -> list[tuple[Row, Row]]:
    """Return pairs of equal budget on one axis, the data-dependent sketch before the uniform one.

    The recipe samples no rows of a convolution; there the pairs are of columns.
    """
    pairs = []
    for row in results.rows:
        for ours, theirs in _DATA_DEPENDENT_AND_UNIFORM:
            other = results.find_row(theirs.format(row.budget))
            if row.label == ours.format(row.budget) and not row.is_tuned and row.runs and other and other.runs:
                pairs.append((row, other))
    return pairs


def _name(row: Row) -> str:
    return f"{row.budget} of the {'columns' if 'columns' in row.label else 'rows'}"


def judge_uniform_noise(results: TaskResults) -> Finding | None:
    """Judge the added variance of data-dependent sketches beside uniform ones."""
    pairs = [(row, other) for row, other in _find_uniform(results) if row.omegas and other.omegas]
    if not pairs:
        return None
    means = [(row, summarise(row.omegas)[0], summarise(other.omegas)[0]) for row, other in pairs]
    text = ", ".join(f"{ours:.2g} against {theirs:.2g} at {_name(row)}" for row, ours, theirs in means)
    return Finding(all(ours < theirs for _, ours, theirs in means), text, min(len(row.runs) for row, _ in pairs))


def judge_uniform_loss(results: TaskResults) -> Finding | None:
    """Judge the loss on test data of data-dependent sketches beside uniform ones."""
    compared = {_name(row): compare_rows(results, row, other, "test_loss") for row, other in _find_uniform(results)}
    found = {name: comparison for name, comparison in compared.items() if comparison is not None}
    if not found:
        return None
    # The best of several budgets is a choice too.
    adjusted = correct_for_many({name: comparison.p_value for name, comparison in found.items()})
    best = max(found, key=lambda name: (_wins(-1.0, adjusted[name], found[name]), -found[name].mean))
    comparison = found[best]
    is_known = comparison.low > 0 or comparison.high < 0
    side = ("lower" if comparison.mean < 0 else "higher") if is_known else "no difference found"
    text = (
        f"{comparison.mean:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}] ({side}, {comparison.pairs} seeds), p "
        f"{write_number(adjusted[best], '{:.2g}')} at {best}"
    )
    return Finding(_wins(-1.0, adjusted[best], comparison), text, comparison.pairs)


def judge_theory(results: TaskResults) -> Finding | None:
    """Judge the predicted number of steps to the target.

    A method that misses the target although it was predicted to reach it contradicts the prediction. One that was
    predicted to miss it says nothing, and neither do methods that add hardly any noise: one at least has to have been
    measured that was predicted to take longer by more than the error that is allowed.
    """
    ratios, telling, seeds = [], 0, []
    contradictions, unknown = [], []
    for row, _, found in _list_settings(results):
        reach = measure_reach(results, row)
        if reach.predicted is None:
            continue
        seeds.append(found.pairs)
        if reach.steps_ratio is not None:
            ratios.append(reach.steps_ratio / reach.predicted)
            telling += reach.predicted > 1 + _PREDICTED_WITHIN
            continue
        is_as_predicted = reach.predicted * (1 + _PREDICTED_WITHIN) >= reach.limit
        words = f"{name_row(row)} ({len(reach.ratios)} of {len(reach.seeds)}, predicted {reach.predicted:.2f})"
        (unknown if is_as_predicted else contradictions).append(words)
    if not seeds:
        return None
    parts = _say_ratios(ratios, telling)
    if contradictions:
        parts.append(f"target missed although within reach: {', '.join(contradictions)}")
    if unknown:
        parts.append(f"target missed as predicted, by how much not known: {', '.join(unknown)}")
    is_near = all(abs(ratio - 1) <= _PREDICTED_WITHIN for ratio in ratios)
    return Finding(is_near and telling > 0 and not contradictions, "; ".join(parts), min(seeds))


def _say_ratios(ratios: Sequence[float], telling: int) -> list[str]:
    if not ratios:
        return []
    methods = f"{len(ratios)} method" + "s" * (len(ratios) != 1)
    words = f"measured ÷ predicted {min(ratios):.2f} to {max(ratios):.2f}, {methods}"
    return [f"{words}, {telling} of them predicted to take over {100 * _PREDICTED_WITHIN:.0f} % longer"]


def judge_weighed_theory(results: TaskResults) -> Finding | None:
    """Judge the number of steps that noise in units of the optimizer's steps predicts by the bound."""
    return _judge_predictions(results, lambda each: each.predicted_adamw)


def judge_batches_theory(results: TaskResults) -> Finding | None:
    """Judge the number of steps of smaller batches of the task that have as much noise in those units.

    What smaller batches say of other smaller batches is no test of that.
    """
    return _judge_predictions(results, lambda each: None if each.row.match_label else each.predicted_batches)


def _judge_predictions(results: TaskResults, predict: Callable[[Prediction], float | None]) -> Finding | None:
    """Judge predicted numbers of steps against whole trainings.

    As for `judge_theory`, one method at least has to have been measured that was predicted to take longer by more than
    the error that is allowed, and smaller batches are no such methods. Beyond the end of the ruler nothing is known but
    that a prediction which lies well before it is wrong.
    """
    found = [
        (each, predicted)
        for each in list_predictions(results)
        if not each.row.is_biased and (predicted := predict(each)) is not None
    ]
    if not found:
        return None
    ratios, telling, contradictions, unknown = [], 0, [], 0
    for each, predicted in found:
        measured = each.measured
        if measured.ratio <= measured.longest:
            # Better than exact is what a ratio of 1 looks like with scatter.
            ratios.append(max(measured.ratio, 1.0) / predicted)
            telling += predicted > 1 + _PREDICTED_WITHIN and not each.row.match_label
        elif predicted * (1 + _PREDICTED_WITHIN) < measured.longest:
            contradictions.append(
                f"{name_row(each.row)} (predicted {predicted:.2f}, measured > {measured.longest:.2f})"
            )
        else:
            unknown += 1
    parts = _say_ratios(ratios, telling)
    if contradictions:
        parts.append(f"beyond the ruler although predicted within it: {', '.join(contradictions)}")
    if unknown:
        parts.append(f"{unknown} beyond the ruler, as predicted")
    is_near = all(abs(ratio - 1) <= _PREDICTED_WITHIN for ratio in ratios)
    seeds = min(each.measured.seeds for each, _ in found)
    return Finding(is_near and telling > 0 and not contradictions, "; ".join(parts), seeds)
