"""What stands beside every number: hardware, versions, commit and seed."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import cheapgrad


def describe_environment(seed: int) -> dict[str, Any]:
    """Return hardware, versions, commit and seed as JSON-able data."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cheapgrad": cheapgrad.__version__,
        "commit": _commit(),
        "seed": seed,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
