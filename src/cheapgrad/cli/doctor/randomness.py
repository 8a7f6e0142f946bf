"""Do random numbers come as they should, in layers that draw them too?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cheapgrad.environment import BROKEN, OK, Finding

if TYPE_CHECKING:
    from torch import Tensor, nn

_ADVICE = "this torch does not keep random numbers apart as it should; install a version that cheapgrad is tested with"
_SIZE = 16


def check_generators() -> Finding:
    """Draw with equal and with different seeds, and after the state was put back."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, state, second = torch.rand(8), torch.get_rng_state(), torch.rand(8)
        torch.set_rng_state(state)
        again = torch.rand(8)
        torch.manual_seed(1)
        repeated = torch.rand(8)
        torch.manual_seed(2)
        other = torch.rand(8)
    failures = [
        failure
        for failure, happened in (
            ("equal seeds draw different numbers", not torch.equal(first, repeated)),
            ("different seeds draw equal numbers", torch.equal(first, other)),
            ("two draws are equal", torch.equal(first, second)),
            ("a state that was put back draws other numbers", not torch.equal(second, again)),
        )
        if happened
    ]
    if failures:
        return Finding("random generators", BROKEN, "; ".join(failures), _ADVICE)
    return Finding("random generators", OK, "seeds and states are kept, draws differ")


def check_sketches() -> Finding:
    """Draw the backward pass of a sketched layer: plainly, in a checkpoint and under autocast."""
    import torch
    from torch.utils.checkpoint import checkpoint

    ways: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
        "plain": lambda layer, x: layer(x),
        "checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
        "autocast": _run_autocast,
    }
    for name, run in ways.items():
        try:
            failure = try_sketch(run)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        if failure:
            return Finding("sketched layers", BROKEN, f"{name}: {failure}", _ADVICE)
    return Finding("sketched layers", OK, f"as they should be: {', '.join(ways)} (torch {torch.__version__})")


def try_sketch(run: Callable[[nn.Module, Tensor], Tensor]) -> str:
    """Draw the weight gradient of a sketched layer three times and return what is wrong with it, or an empty text.

    With the identity for input and a diagonal cotangent, the weight gradient is diagonal if and only if forward and
    backward selected the same rows.

    Args:
        run: calls a layer, in whatever way is to be tried.
    """
    import torch

    import cheapgrad
    from cheapgrad.sketch import RowSample

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = torch.nn.Linear(_SIZE, _SIZE, bias=False)
        model = torch.nn.Sequential(layer)
        cheapgrad.approximate(model, cheapgrad.Rule("0", stored=RowSample(keep=0.5)), skip_small=False)
        gradients = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            model.zero_grad()
            x = torch.eye(_SIZE).requires_grad_()
            run(model, x).backward(torch.diag(torch.arange(1.0, _SIZE + 1)))
            gradient = layer.weight.grad
            if gradient is None:
                return "there is no gradient"
            gradients.append(gradient.clone())
    first, repeated, other = gradients
    if not first.isfinite().all():
        return "the gradient is not finite"
    if (first - torch.diag(first.diagonal())).abs().max() > 0:
        return "forward and backward did not select the same rows, so the gradient is noise"
    if not torch.equal(first, repeated):
        return "equal seeds give different gradients"
    return "different seeds give equal gradients" if torch.equal(first, other) else ""


def _run_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    return output.float()
