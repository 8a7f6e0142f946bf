"""Dependencies are pinned, the version is written once, and importing the package is cheap."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cheapgrad

ROOT = Path(__file__).parent.parent
MAX_IMPORT_SECONDS = 0.1


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _read_names(requirements: list[str]) -> set[str]:
    return {_normalise(match[0]) for line in requirements if (match := re.match(r"[A-Za-z0-9._-]+", line))}


def _direct_dependencies() -> set[str]:
    return _read_names(importlib.metadata.requires("cheapgrad") or []) - {"cheapgrad"}


def test_every_direct_dependency_is_pinned():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert _direct_dependencies() - _read_names(pins) == set()


def test_no_dependency_brings_torchvision():
    seen, to_visit = set(), _direct_dependencies()
    while to_visit:
        name = to_visit.pop()
        seen.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform or Python
            continue
        to_visit |= _read_names([line for line in requirements if "extra ==" not in line]) - seen
    assert "torch" in seen
    assert "torchvision" not in seen


def test_version_is_written_once():
    assert importlib.metadata.version("cheapgrad") == cheapgrad.__version__


@pytest.mark.slow
def test_import_adds_little_to_that_of_torch():
    # Processor time, and the best of three: a busy machine must not fail this test.
    program = (
        "import sys, time, torch; start = time.process_time(); import cheapgrad; "
        "print(time.process_time() - start, *({'matplotlib', 'sklearn', 'PIL', 'scipy'} & set(sys.modules)))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert min(float(seconds) for seconds, *_ in outputs) < MAX_IMPORT_SECONDS
    assert all(not extra_modules for _, *extra_modules in outputs), "an optional dependency is imported eagerly"
