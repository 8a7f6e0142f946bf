"""Do the installed packages fit each other?"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

from cheapgrad.environment import BROKEN, NOTE, OK, Finding

_OLDEST_PYTHON, _NEWEST_PYTHON = (3, 10), (3, 13)
_OLDEST_TORCH = (2, 6)
# Built against one version of torch each.
_COMPANIONS = ("torchvision", "torchaudio", "torchtext")
_EXTRAS = {"matplotlib": "report", "scikit-learn": "bench"}
_SECONDS = 120


def check_python() -> Finding:
    """Compare Python with the versions that cheapgrad is tested on."""
    version = sys.version_info[:2]
    tested = f"tested are {_dotted(_OLDEST_PYTHON)} to {_dotted(_NEWEST_PYTHON)}"
    status = OK if _OLDEST_PYTHON <= version <= _NEWEST_PYTHON else NOTE if version > _NEWEST_PYTHON else BROKEN
    advice = "" if status == OK else f"use a version that is tested: {tested}"
    return Finding("python", status, f"{_dotted(sys.version_info[:3])}; {tested}", advice)


def check_torch() -> Finding:
    """Import torch and compare its version with the oldest that is accepted."""
    try:
        import torch
    except Exception as error:
        return Finding(
            "torch",
            BROKEN,
            f"cannot be imported: {type(error).__name__}: {error}",
            "pip install -c constraints.txt torch",
        )
    version = str(torch.__version__)
    if _numbers(version)[:2] < _OLDEST_TORCH:
        return Finding(
            "torch", BROKEN, version, f"cheapgrad needs {_dotted(_OLDEST_TORCH)} or newer: pip install -U torch"
        )
    return Finding("torch", OK, version)


def check_companions() -> Finding:
    """Compare torchvision and its kin with the torch that they were built for, and import those that fit."""
    torch_version = find_version("torch")
    installed = {name: version for name in _COMPANIONS if (version := find_version(name)) is not None}
    if not installed or torch_version is None:
        return Finding("companions of torch", OK, "none is installed, and none is needed")
    for name, version in installed.items():
        wanted = _find_wanted_torch(name)
        if wanted is not None and _numbers(wanted) != _numbers(torch_version):
            found = f"{name} {version} was built for torch {wanted}, and torch is {torch_version}"
            return Finding("companions of torch", BROKEN, found, f"install the {name} of this torch, or uninstall it")
        here, there = _find_build(version), _find_build(torch_version)
        if here and there and here != there:
            found = f"{name} is a {here} build, and torch a {there} build"
            return Finding(
                "companions of torch", BROKEN, found, f"install the {there} build of {name}, or uninstall it"
            )
        failure = _try_import(name)
        if failure:
            found = f"{name} {version} cannot be imported: {failure}"
            return Finding("companions of torch", BROKEN, found, f"install the {name} of this torch, or uninstall it")
    listed = ", ".join(f"{name} {version}" for name, version in installed.items())
    return Finding("companions of torch", OK, f"{listed}: built for torch {torch_version}")


def check_numpy() -> Finding:
    """Send an array from torch to numpy and back."""
    try:
        import numpy
        import torch

        back = torch.from_numpy(torch.arange(3.0).numpy() + 1)
        works = back.tolist() == [1.0, 2.0, 3.0]
    except Exception as error:
        found = f"torch and numpy do not work together: {type(error).__name__}: {error}"
        return Finding("numpy", BROKEN, found, "install a numpy that this torch was built for")
    if not works:
        return Finding("numpy", BROKEN, f"an array came back as {back.tolist()}", "install numpy and torch anew")
    return Finding("numpy", OK, str(numpy.__version__))


def check_extras() -> Finding:
    """List the optional packages that are missing."""
    missing = {package: extra for package, extra in _EXTRAS.items() if find_version(package) is None}
    if not missing:
        return Finding("extras", OK, ", ".join(f"{package} {find_version(package)}" for package in _EXTRAS))
    advice = f"where they are wanted: pip install 'cheapgrad[{','.join(sorted(set(missing.values())))}]'"
    return Finding("extras", NOTE, f"not installed: {', '.join(missing)}", advice)


def find_version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_wanted_torch(package: str) -> str | None:
    """Return the version of torch that a package states to be built for, or None if it states none."""
    for requirement in importlib.metadata.requires(package) or ():
        match = re.match(r"torch\s*\(?==\s*([0-9][^\s;,)]*)", requirement)
        if match:
            return match[1]
    return None


def _find_build(version: str) -> str:
    """Return what a version is built for, such as ``"cpu"`` or ``"cu126"``; empty if it does not say."""
    return version.partition("+")[2]


def _try_import(name: str) -> str:
    """Import a package in a process of its own, and return what went wrong, or an empty text."""
    # A companion that does not fit registers half of its operators and spoils the process.
    command = [sys.executable, "-c", f"import torch, {name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"it took more than {_SECONDS} s"
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else f"exit status {done.returncode}") if done.returncode else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
