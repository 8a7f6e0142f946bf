"""Steps that noise of a known size costs on a task, read off its exact trainings on smaller batches."""

from __future__ import annotations

from benchmarks.experiments.equivalent import measure_equivalent
from benchmarks.experiments.methods import SMALLER_BY
from benchmarks.experiments.results import Row, TaskResults
from cheapgrad.planning.batch_curve import BatchCurve


def list_smaller(results: TaskResults) -> list[Row]:
    """Return the rows that the curve is made of, as far as they were trained."""
    return [row for row in results.rows if row.match_by.startswith(SMALLER_BY) and row.runs and not row.is_tuned]


def read_batch_curve(results: TaskResults) -> BatchCurve | None:
    """Return the curve of a task; None without smaller batches whose steps are measured.

    A smaller batch that ends beyond the ruler says too little.
    """
    shares = {}
    for row in list_smaller(results):
        measured = measure_equivalent(results, row)
        share = row.declaration["batch_size"] / results.exact.declaration["batch_size"]
        if measured is not None and measured.ratio <= measured.longest and share < 1:
            shares[share] = measured.ratio
    return BatchCurve.from_shares(shares) if shares else None
