"""What a measurement was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from cheapgrad._version import __version__

_PACKAGES = ("torch", "numpy", "scikit-learn", "matplotlib", "rich")


def describe_environment() -> dict[str, Any]:
    """Return versions and hardware, nothing that tells whose machine it is."""
    return {
        "cheapgrad": __version__,
        "python": platform.python_version(),
        **{package: _find_version(package) for package in _PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _find_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "dtype": "float32",
    }


def _find_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _find_processor() -> str:
    # `platform.processor` is empty or says no more than the architecture on most Linux systems.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
