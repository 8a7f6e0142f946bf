"""Writes figures into the pages of the documentation, between the marks that say where."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.experiments.choices import write_memory_choice, write_situations, write_time_choice
from benchmarks.experiments.methods import list_published
from benchmarks.experiments.pictures import draw_predictions, draw_task, draw_theory
from benchmarks.experiments.predictions import list_predictions, write_predictions
from benchmarks.experiments.remedies import write_remedies
from benchmarks.experiments.results import TaskResults, read_results
from benchmarks.experiments.tables import write_task
from benchmarks.experiments.targets import write_targets
from cheapgrad.files import write_whole

_NOTHING = "No run has been recorded yet: `make experiments` makes the first ones."
_PAGES = ("evidence.md", "decide.md")


def write_pages(results_directory: Path, docs: Path) -> list[str]:
    """Write tables and pictures of all results into the pages, and return what was written.

    Args:
        results_directory: where `write_results` has left its files.
        docs: the directory of the pages, with ``evidence.md``, ``decide.md`` and ``img``.
    """
    results = read_results(results_directory)
    written = []
    for each in results:
        if each.exact.runs:
            path = docs / "img" / f"experiments_{each.slug}.png"
            write_whole(path, draw_task(each))
            written.append(path.name)
    if any(each.exact.runs for each in results):
        path = docs / "img" / "experiments_theory.png"
        write_whole(path, draw_theory(results))
        written.append(path.name)
    if any(list_predictions(each) for each in results):
        path = docs / "img" / "experiments_predictions.png"
        write_whole(path, draw_predictions(results))
        written.append(path.name)
    for name in _PAGES:
        text = (docs / name).read_text(encoding="utf-8")
        write_whole(docs / name, fill_page(text, results).encode())
        written.append(name)
    return written


def fill_page(text: str, results: list[TaskResults]) -> str:
    """Return a page with everything between its marks written anew.

    A mark is ``<!-- experiments: NAME -->`` before and ``<!-- end -->`` behind; known names are ``tasks``, ``targets``,
    ``predictions``, ``remedies``, ``published``, ``time``, ``memory`` and ``situations``.

    Raises:
        KeyError: for a mark with another name.
    """
    writers = {
        "tasks": lambda: "\n".join(map(write_task, results)),
        "time": lambda: write_time_choice(results),
        "memory": lambda: write_memory_choice(results),
        "situations": lambda: write_situations(results),
        "targets": lambda: write_targets(results),
        "predictions": lambda: write_predictions(results),
        "remedies": lambda: write_remedies(results),
        "published": _write_published,
    }

    def fill(found: re.Match[str]) -> str:
        name = found.group(1)
        return f"<!-- experiments: {name} -->\n\n{writers[name]().strip() or _NOTHING}\n\n<!-- end -->"

    return re.sub(r"<!-- experiments: (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def _write_published() -> str:
    return "\n".join(f"* {label}: {published}" for label, published in list_published())
