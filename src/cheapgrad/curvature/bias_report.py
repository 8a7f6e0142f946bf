"""How much a batch over-states the curvature along its own directions: a table and a picture."""

from __future__ import annotations

import dataclasses
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cheapgrad.curvature._confidence import check_level
from cheapgrad.curvature.split_sample import SplitSample, split_sample
from cheapgrad.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAME, _HELD_OUT = "#D55E00", "#0072B2"


@dataclass(frozen=True)
class IndexBias:
    """Curvature along one direction.

    Attributes:
        index: 0 for the leading direction.
        same_batch: on the batch that chose the direction: that batch's eigenvalue.
        held_out: on the other batch.
        corrected: `held_out`, with the correction for a finite population where its size was given.
        standard_error: of `corrected`; None where the second batch has one micro-batch only.
        low: lower end of the confidence interval of `corrected`; None if there is no standard error.
        high: upper end of it.
        overstatement: ``same_batch / corrected``; None where `corrected` is not positive.
        verdict: ``"too large"`` or ``"too small"`` where the same-batch value lies outside the interval that holds for
            all indices together, else ``"not seen"``.
    """

    index: int
    same_batch: float
    held_out: float
    corrected: float
    standard_error: float | None
    low: float | None
    high: float | None
    overstatement: float | None
    verdict: str


@dataclass(frozen=True)
class BiasReport:
    """What `bias_report` found.

    Attributes:
        rows: one for each direction, the leading one first.
        level: of each row's confidence interval; verdicts hold at this level for all rows together.
        micro_batches: of the second batch, over which standard errors were computed.
        population_size: examples in the data set, if the estimates were corrected for it.
    """

    rows: tuple[IndexBias, ...]
    level: float
    micro_batches: int
    population_size: int | None

    @property
    def overstatement(self) -> float | None:
        """Sum of same-batch over sum of corrected curvatures; None where the latter is not positive."""
        total = sum(row.corrected for row in self.rows)
        return sum(row.same_batch for row in self.rows) / total if total > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return dataclasses.asdict(self) | {"rows": [dataclasses.asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BiasReport:
        """Return what `to_dict` was made from."""
        rest = {name: value for name, value in data.items() if name != "rows"}
        return cls(rows=tuple(IndexBias(**row) for row in data["rows"]), **rest)

    def __str__(self) -> str:
        """Return the report as a table of text."""
        head = (
            "direction",
            "same batch",
            "held out",
            "corrected",
            f"{self.level:.0%} interval",
            "same ÷ corr.",
            "bias",
        )
        table = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        total = "not defined" if self.overstatement is None else f"{self.overstatement:.3g}"
        lines.append(f"all {len(self.rows)} directions: same batch ÷ corrected = {total}")
        if any(row.low is None for row in self.rows):
            lines.append("no intervals and no verdicts: the second batch has a single micro-batch")
        return "\n".join(lines)

    def draw(self) -> bytes:
        """Draw both curvatures against the index, and their ratio below.

        Returns:
            The picture as PNG data; bars are the confidence intervals of the corrected values.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        check_drawing()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        self._fill_curvatures(above)
        self._fill_ratios(below)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        return buffer.getvalue()

    def _fill_curvatures(self, panel: Axes) -> None:
        indices = [row.index for row in self.rows]
        values = [row.corrected for row in self.rows]
        same = [row.same_batch for row in self.rows]
        panel.plot(indices, same, "^", color=_SAME, label="same batch: its own eigenvalue")
        panel.plot(indices, values, "o", color=_HELD_OUT, label="another batch, same direction")
        if all(row.high is not None for row in self.rows):
            halves = [(row.high or 0.0) - row.corrected for row in self.rows]
            panel.errorbar(indices, values, yerr=halves, fmt="none", ecolor=_HELD_OUT, capsize=3, elinewidth=1)
        if min(same + values) > 0:
            panel.set_yscale("log")
        panel.set_ylabel("curvature along the direction")
        panel.set_title("Directions chosen by one batch", loc="left", fontsize=11)
        panel.legend(frameon=False)
        panel.grid(alpha=0.25)

    def _fill_ratios(self, panel: Axes) -> None:
        shown = [row for row in self.rows if row.overstatement is not None]
        panel.axhline(1, color="#999999", linewidth=1)
        panel.plot([row.index for row in shown], [row.overstatement or 0.0 for row in shown], "^", color=_SAME)
        for row in shown:
            if row.low is not None and row.high is not None and row.low > 0:
                ends = [row.same_batch / row.high, row.same_batch / row.low]
                panel.plot([row.index] * 2, ends, color=_SAME, linewidth=1)
        panel.set_ylabel("same ÷ corrected")
        panel.set_xlabel("direction, the leading one first")
        panel.grid(alpha=0.25)


def check_drawing() -> None:
    """Raise `MissingExtraError` if no picture can be drawn: before the work that it would show."""
    try:
        import matplotlib.figure  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise MissingExtraError(
            "drawing the picture needs matplotlib, which is not installed; run: pip install 'cheapgrad[report]'"
        ) from error


def bias_report(
    operator_a: Any,
    operator_b: Any,
    count: int,
    *,
    level: float = 0.95,
    population_size: int | None = None,
    largest: bool = True,
) -> BiasReport:
    """Measure, index by index, how much batch a over-states the curvature along its own leading directions.

    Args:
        operator_a: curvature of the batch that chooses directions: anything with ``shape`` and ``@``.
        operator_b: curvature of an independent batch; two or more micro-batches give confidence intervals.
        count: K directions, from 1 to the number of parameters.
        level: of the intervals, in (0, 1).
        population_size: examples in the data set, if the batches are disjoint draws from it without replacement.
        largest: the directions of largest curvature; else those of the smallest.

    Returns:
        A row for each direction; ``print(report)`` shows a table, `draw` a picture.

    Law:
        That of `split_sample`. Intervals are Student's over the micro-batches of b, given the directions. A verdict
        other than "not seen" appears anywhere with a probability of at most ``1 - level`` if the same-batch values
        are right (Bonferroni).

    Raises:
        BudgetError: if `count` or `level` is out of range.
        OverlapError: if the batches share micro-batches, or cannot be disjoint in the population.

    Example:
        >>> import torch
        >>> from cheapgrad.curvature import DenseOperator, MeanOperator
        >>> generator = torch.Generator().manual_seed(0)
        >>> parts = [rows.T @ rows / 50 for rows in torch.randn(20, 50, 30, generator=generator)]
        >>> report = bias_report(parts[0], MeanOperator([DenseOperator(part) for part in parts[1:]]), 2)
        >>> print(*(row.verdict for row in report.rows), sep=", ")
        too large, too large
    """
    check_level(level)
    sample = split_sample(operator_a, operator_b, count, population_size=population_size, largest=largest)
    return _judge(sample, level, population_size)


def _judge(sample: SplitSample, level: float, population_size: int | None) -> BiasReport:
    curvature = sample.curvature
    count = len(curvature.corrected)
    each, together = curvature.interval(level), curvature.interval(1 - (1 - level) / count)
    return BiasReport(
        rows=tuple(_make_row(sample, index, each, together) for index in range(count)),
        level=level,
        micro_batches=curvature.micro_batches,
        population_size=population_size,
    )


def _make_row(
    sample: SplitSample, index: int, each: tuple[Tensor, Tensor], together: tuple[Tensor, Tensor]
) -> IndexBias:
    same, corrected = float(sample.same_batch[index]), float(sample.corrected[index])
    error = float(sample.standard_error[index])
    verdict = "not seen"
    # Rounding is no bias, even where no uncertainty is left.
    slack = 1e-6 * abs(same)
    if same > float(together[1][index]) + slack:
        verdict = "too large"
    elif same < float(together[0][index]) - slack:
        verdict = "too small"
    known = not math.isnan(error)
    return IndexBias(
        index=index,
        same_batch=same,
        held_out=float(sample.held_out[index]),
        corrected=corrected,
        standard_error=error if known else None,
        low=float(each[0][index]) if known else None,
        high=float(each[1][index]) if known else None,
        overstatement=same / corrected if corrected > 0 else None,
        verdict=verdict,
    )


def _cells(row: IndexBias) -> tuple[str, ...]:
    interval = "" if row.low is None or row.high is None else f"{row.low:.4g} to {row.high:.4g}"
    return (
        str(row.index),
        f"{row.same_batch:.4g}",
        f"{row.held_out:.4g}",
        f"{row.corrected:.4g}",
        interval,
        "" if row.overstatement is None else f"{row.overstatement:.3g}",
        row.verdict,
    )
