"""Does `torch.compile` work, does it keep the draws of sketched layers, and can codecs be fused?"""

from __future__ import annotations

import subprocess
import sys

from cheapgrad.environment import BROKEN, OK, SKIPPED, Finding

BACKENDS = ("aot_eager", "inductor")
#: What is asked of this module's process to try fused codecs.
FUSING = "fused codecs"
_SECONDS = 240
_ADVICE = {
    "aot_eager": "use eager mode, or a version of torch that cheapgrad is tested with",
    "inductor": "install a C++ compiler (g++), or use eager mode",
    FUSING: "install a C++ compiler (g++), or leave out fused=True",
}
_FOUND = {FUSING: "codes of one pass are as those of many"}


def check_compile(backend: str, seconds: float = _SECONDS) -> Finding:
    """Compile a plain and a sketched layer, or codecs, in a process of its own.

    Args:
        backend: of `torch.compile`, or `FUSING`.
        seconds: how long it may take; compilers that wait for something would wait for ever.
    """
    name = name_of(backend)
    command = [sys.executable, "-m", "cheapgrad.cli.doctor.compiling", backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Finding(name, BROKEN, f"not done after {seconds:g} s", _ADVICE[backend])
    lines = [line for line in (done.stdout if done.returncode in {0, 1} else done.stderr).splitlines() if line.strip()]
    if done.returncode == 0:
        return Finding(name, OK, _FOUND.get(backend, "a plain and a sketched layer are as in eager mode"))
    return Finding(name, BROKEN, lines[-1] if lines else f"exit status {done.returncode}", _ADVICE[backend])


def skip_compile(backend: str) -> Finding:
    """Return that a backend was not tried."""
    return Finding(name_of(backend), SKIPPED, "not tried, as asked")


def name_of(backend: str) -> str:
    """Return what a check is called."""
    return backend if backend == FUSING else f"compile ({backend})"


def main(backend: str) -> int:
    """Try a backend in this process; print what is wrong and return 1, or return 0."""
    try:
        failure = _try_fused() if backend == FUSING else _try_plain(backend) or _try_sketched(backend)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    if failure:
        # One line: the last thing a compiler says is seldom the first that went wrong.
        print(" ".join(failure.split())[:300])
    return 1 if failure else 0


def _try_plain(backend: str) -> str:
    import torch

    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(layer(x)).square().sum()

    gradients = []
    for run in (step, torch.compile(step, backend=backend)):
        layer.zero_grad()
        run(x).backward()
        gradients.append(layer.weight.grad)
    exact, compiled = gradients
    return "" if torch.allclose(exact, compiled, rtol=1e-4, atol=1e-6) else "a compiled gradient is not the eager one"


def _try_sketched(backend: str) -> str:
    import torch

    from cheapgrad.cli.doctor.randomness import try_sketch

    compiled = {}

    def run(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        if layer not in compiled:
            compiled[layer] = torch.compile(layer, backend=backend)
        return compiled[layer](x)

    return try_sketch(run)


def _try_fused() -> str:
    import warnings

    import torch

    from cheapgrad.sketch import DenseMatrix, Moment, Operands, StochasticRounding, fusing

    matrix = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    decoded = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for fused in (False, True):
            codec = StochasticRounding(bits=4, fused=fused)
            torch.manual_seed(0)
            kept = codec.store(Operands(Moment.STORED, DenseMatrix(matrix)))
            decoded.append(codec.restore(kept, 512, 64, torch.float32).dense())
    if fusing.why_unfused():
        return fusing.why_unfused()
    # An entry that lies on the edge may be rounded the other way by the last bit.
    off = ((decoded[0] - decoded[1]).abs() > 1e-4).float().mean()
    return "" if off < 1e-3 else f"{off:.1%} of all entries are not those of unfused codecs"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
