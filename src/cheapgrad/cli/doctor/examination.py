"""All checks, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from cheapgrad.cli.doctor.compiling import BACKENDS, FUSING, check_compile, name_of, skip_compile
from cheapgrad.cli.doctor.packages import check_companions, check_extras, check_numpy, check_python, check_torch
from cheapgrad.cli.doctor.processors import check_cuda, check_threads
from cheapgrad.cli.doctor.randomness import check_generators, check_sketches
from cheapgrad.environment import BROKEN, Examination, Finding

Check = Callable[[], Finding]


def examine(*, compile_too: bool = True, on_finding: Callable[[Finding], object] = lambda finding: None) -> Examination:
    """Check the environment: packages, threads, GPUs, random numbers, compilers.

    Args:
        compile_too: whether to try `torch.compile` as well, which takes most of the time.
        on_finding: called with each finding as soon as it is there.

    Returns:
        One finding for each check; a check that itself fails finds something broken.
    """
    checks: list[tuple[str, Check]] = [
        ("python", check_python),
        ("torch", check_torch),
        ("companions of torch", check_companions),
        ("numpy", check_numpy),
        ("extras", check_extras),
        ("threads", check_threads),
        ("cuda", check_cuda),
        ("random generators", check_generators),
        ("sketched layers", check_sketches),
    ]
    compile_or_not = check_compile if compile_too else skip_compile
    checks += [(name_of(backend), partial(compile_or_not, backend)) for backend in (*BACKENDS, FUSING)]
    findings = []
    for name, check in checks:
        findings.append(_run(name, check))
        on_finding(findings[-1])
    return Examination(tuple(findings), _describe())


def _run(name: str, check: Check) -> Finding:
    try:
        return check()
    except Exception as error:
        return Finding(name, BROKEN, f"{type(error).__name__}: {error}", "reinstall torch and cheapgrad")


def _describe() -> dict[str, Any]:
    try:
        from cheapgrad.environment import describe_environment

        return describe_environment()
    except Exception as error:
        return {"not known": f"{type(error).__name__}: {error}"}
