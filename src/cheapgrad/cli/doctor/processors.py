"""Threads, processors and GPUs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cheapgrad.environment import BROKEN, NOTE, OK, Finding

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# Relative error of a product of small float32 matrices, TF32 included.
_TOLERANCE = 5e-3


def check_threads() -> Finding:
    """Compare torch's threads and the variables that set them with the processors that this process may use."""
    import torch

    threads, usable = torch.get_num_threads(), count_processors()
    asked = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    settings = "".join(f", {name}={value}" for name, value in asked.items())
    found = f"{threads} thread{'s' * (threads != 1)} on {usable} usable of {os.cpu_count()} processors{settings}"
    for name, value in asked.items():
        # OpenMP takes a list, one number for each level of nesting.
        if not all(part.strip().isdigit() and int(part) > 0 for part in value.split(",")):
            return Finding("threads", BROKEN, found, f"{name} must be a whole number of at least 1; set or unset it")
    if threads > usable:
        advice = f"threads wait for each other: set OMP_NUM_THREADS={usable}, or torch.set_num_threads({usable})"
        return Finding("threads", NOTE, found, advice)
    if threads < usable and not asked:
        advice = f"processors stand idle: torch.set_num_threads({usable}) may be faster"
        return Finding("threads", NOTE, found, advice)
    return Finding("threads", OK, found)


def count_processors() -> int:
    """Return how many processors this process may use: its affinity, and the quota of its container."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, _, period = _QUOTA.read_text(encoding="utf-8").strip().partition(" ")
        return max(1, min(usable, round(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):
        # No container, or one without a quota, which says "max".
        return usable


def check_cuda() -> Finding:
    """Multiply small matrices on every GPU, forward and backward, and compare with the processor."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return Finding("cuda", OK, "no GPU; everything runs on the processor")
        build = (
            "a build for processors only" if torch.version.cuda is None else f"a build for CUDA {torch.version.cuda}"
        )
        advice = "install the build of torch that fits the driver (nvidia-smi shows it)"
        return Finding("cuda", NOTE, f"there is a driver, but torch ({build}) sees no GPU", advice)
    names = []
    for number in range(torch.cuda.device_count()):
        names.append(torch.cuda.get_device_name(number))
        failure = _try_device(f"cuda:{number}")
        if failure:
            advice = "install the build of torch that fits the driver and the GPU"
            return Finding("cuda", BROKEN, f"GPU {number} ({names[-1]}): {failure}", advice)
    return Finding("cuda", OK, f"{', '.join(names)}; CUDA {torch.version.cuda}")


def _try_device(device: str) -> str:
    """Return what went wrong on a device, or an empty text."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 32, generator=generator)
    weight = torch.randn(16, 32, generator=generator)
    try:
        gradients = []
        for place in ("cpu", device):
            there = weight.to(place).requires_grad_()
            (rows.to(place) @ there.T).square().sum().backward()
            gradients.append(there.grad.cpu() if there.grad is not None else None)
        exact, found = gradients
        draws = []
        for _ in range(2):
            on_device = torch.Generator(device).manual_seed(0)
            draws.append(torch.rand(8, device=device, generator=on_device))
    except Exception as error:
        # Drivers fail in every way there is; whatever it is, the device is of no use.
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if exact is None or found is None or not (found - exact).norm() <= _TOLERANCE * exact.norm():
        return "a gradient is not that of the processor"
    return "" if torch.equal(*draws) else "equal seeds draw different numbers"
