"""What a measurement was made with, and whether that does what it should; needs no torch that works."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cheapgrad._version import __version__

OK, NOTE, BROKEN, SKIPPED = "ok", "note", "broken", "skipped"
_PACKAGES = ("torch", "numpy", "scikit-learn", "matplotlib", "rich")


def describe_environment() -> dict[str, Any]:
    """Return versions and hardware, nothing that tells whose machine it is."""
    import torch

    return {
        "cheapgrad": __version__,
        "python": platform.python_version(),
        **{package: _find_version(package) for package in _PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _find_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
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


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check.
        status: ``"ok"``; ``"note"`` for what works but costs time or is untested; ``"broken"``; ``"skipped"`` for what
            was not checked.
        found: what is there.
        advice: what to do; empty if nothing.
    """

    name: str
    status: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Examination:
    """Everything that `cheapgrad doctor` found.

    Attributes:
        findings: one for each check.
        environment: versions and hardware.
    """

    findings: tuple[Finding, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether nothing is broken."""
        return all(finding.status != BROKEN for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, marked as what it is."""
        findings = [asdict(finding) for finding in self.findings]
        environment = dict(self.environment)
        return {
            "kind": "cheapgrad.doctor",
            "version": 1,
            "healthy": self.healthy,
            "findings": findings,
            "environment": environment,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Examination:
        """Return what `to_dict` was called on."""
        return cls(tuple(Finding(**finding) for finding in data["findings"]), data.get("environment", {}))
