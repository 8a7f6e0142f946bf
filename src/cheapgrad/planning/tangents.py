"""How the inputs of layers move when all parameters move a little: forward derivatives by differences."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert.kinds import kind_of
from cheapgrad.planning.capture import Call
from cheapgrad.planning.passes import Step

_SEED = 20240601
# Signs are drawn for the largest parameter and so many entries more; where a parameter's begin is drawn every time.
_SHIFTS = 1 << 16
# Where parameters are moved by different lengths, the longest one by so many times the usual share of its size.
_MOST_TIMES = 8.0


def push_forward(
    step: Step, batch: Any, calls: Sequence[Call], take: Callable[[Call, Tensor], None], probes: int, seed: int = 0
) -> None:
    """Move all parameters at random and report how the inputs of layers move.

    With z random signs for every parameter, times the factors of the step's units, and ``u = J z`` the derivative of a
    layer's input X along z, ``E_z ⟨u, R⟩² = ‖Jᵀ R‖²``: the squared norm of what R, seen as a gradient of X, becomes in
    the gradients of all parameters below, in these units. One forward pass serves all layers at once.

    Args:
        step: the training step.
        batch: the batch of the exact pass.
        calls: what was recorded in it; those whose input needs no gradient are passed over.
        take: called with a call and its u, in the shape of X, once for each probe.
        probes: how many z to draw.
        seed: another one gives other z.

    Law:
        u is a one-sided difference over a step of about 1e-3 of the parameters' size in single precision, of up to
        eight times as much for parameters with the largest factors and less for the others; its relative error is of
        that order. The squared norm is unbiased but for that; its relative standard error is at most
        ``√(2 / probes)``, and ``√(2 / (probes × r))`` for a noise R of effective rank r.
    """
    size = math.sqrt(
        sum(float(parameter.detach().double().square().sum()) for parameter in step.parameters)
        / max(1, sum(parameter.numel() for parameter in step.parameters))
    )
    dtypes = [call.input.dtype for call in calls if call.input.is_floating_point()]
    coarsest = max((torch.finfo(dtype).eps for dtype in dtypes), default=1e-7)
    length = _choose_length(step, coarsest**0.4, size or 1.0)
    by_order = {(call.layer, call.order): call for call in calls if call.wants_input}
    layers = {call.layer: call.module for call in by_order.values()}
    if not by_order:
        return
    with _Moving(step.parameters, step.units.factors, length, _SEED + 1000 * seed) as moving, torch.no_grad():
        for _ in range(probes):
            moving.move()
            with _watching(layers, lambda key, x: _report(by_order, key, x, length, take)):
                step.loss(batch)


def _choose_length(step: Step, share: float, size: float) -> float:
    """Return the length of a move of all parameters by signs: a share of their size, and not much more of any one's."""
    longest = _MOST_TIMES * share * size
    for parameter, factor in zip(step.parameters, step.units.factors, strict=True):
        if factor > 1 and parameter.numel():
            # One that is small is moved as far as the others are: shorter moves of all of them would be rounding.
            own = max(float(parameter.detach().double().square().mean().sqrt()), size)
            longest = min(longest, _MOST_TIMES * share * own / factor)
    return min(longest, share * size)


def _report(
    by_order: dict[tuple[str, int], Call],
    key: tuple[str, int],
    x: Tensor,
    length: float,
    take: Callable[[Call, Tensor], None],
) -> None:
    call = by_order.get(key)
    if call is not None:
        take(call, (x - call.input) / length)


class _Moving(contextlib.AbstractContextManager["_Moving"]):
    """Sets parameters to what they were plus random signs times a length; in the end to what they were, bit for bit.

    The signs of one probe are those of the probe before, shifted: drawn once, and still without correlations.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], factors: Sequence[float], length: float, seed: int) -> None:
        self._factors = factors
        self._parameters = [parameter.detach() for parameter in parameters]
        self._old = [parameter.clone() for parameter in self._parameters]
        self._generator = torch.Generator().manual_seed(seed)
        self._signs: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        largest = max(parameter.numel() for parameter in parameters)
        for parameter in parameters:
            key = parameter.device, parameter.dtype
            if key not in self._signs:
                coins = torch.randint(0, 2, (largest + _SHIFTS,), generator=self._generator, dtype=torch.int8)
                self._signs[key] = (coins.to(*key) * 2 - 1) * length

    def move(self) -> None:
        """Set the parameters to new values."""
        shifts = torch.randint(0, _SHIFTS, (len(self._old),), generator=self._generator).tolist()
        for parameter, old, shift, factor in zip(self._parameters, self._old, shifts, self._factors, strict=True):
            signs = self._signs[parameter.device, parameter.dtype][shift : shift + old.numel()]
            torch.add(old, signs.view(old.shape), alpha=factor, out=parameter)

    def __exit__(self, *_: object) -> None:
        """Put the old values back."""
        for parameter, old in zip(self._parameters, self._old, strict=True):
            parameter.copy_(old)


@contextlib.contextmanager
def _watching(layers: dict[str, nn.Module], see: Callable[[tuple[str, int], Tensor], None]) -> Iterator[None]:
    """Show the input of every call of the layers, with the layer's name and the number of the call."""
    counts = dict.fromkeys(layers, 0)

    def watch(name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kind = kind_of(type(module))
            x = args[0] if args else kwargs[kind.input_name if kind is not None else "input"]
            see((name, counts[name]), x)
            counts[name] += 1

        return enter

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
