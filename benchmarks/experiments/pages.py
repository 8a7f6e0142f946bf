"""Writes figures into the pages of the documentation, between the marks that say where."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.experiments.pictures import draw_task
from benchmarks.experiments.results import TaskResults, read_results
from benchmarks.experiments.tables import write_memory_choice, write_task, write_time_choice
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
        if each.environment:
            path = docs / "img" / f"experiments_{each.slug}.png"
            write_whole(path, draw_task(each))
            written.append(path.name)
    for name in _PAGES:
        text = (docs / name).read_text(encoding="utf-8")
        write_whole(docs / name, fill_page(text, results).encode())
        written.append(name)
    return written


def fill_page(text: str, results: list[TaskResults]) -> str:
    """Return a page with everything between its marks written anew.

    A mark is ``<!-- experiments: NAME -->`` before and ``<!-- end -->`` behind; known names are ``tasks``, ``time`` and
    ``memory``.

    Raises:
        KeyError: for a mark with another name.
    """
    writers = {
        "tasks": lambda: "\n".join(map(write_task, results)),
        "time": lambda: write_time_choice(results),
        "memory": lambda: write_memory_choice(results),
    }

    def fill(found: re.Match[str]) -> str:
        name = found.group(1)
        return f"<!-- experiments: {name} -->\n\n{writers[name]().strip() or _NOTHING}\n\n<!-- end -->"

    return re.sub(r"<!-- experiments: (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)
