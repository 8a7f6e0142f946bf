"""A gradient that is the limit of gradients: kinks decided by the direction one leaves them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cheapgrad.errors import ForwardResultError, UndecidedKinkError
from cheapgrad.kinks._aten_kinks import find_kinks, is_not_counted, plain_name
from cheapgrad.kinks._decisions import Decisions, is_dual
from cheapgrad.kinks._directional_rules import find_rule
from cheapgrad.kinks._function_names import may_choose, torch_name
from cheapgrad.kinks._points import Point, check_pair


@dataclass(frozen=True)
class DirectionalGradient:
    """A limiting gradient and how it came about; see `directional_gradient`.

    Attributes:
        gradient: ``lim ∇f(xᵢ)``, in the form of the point: a tensor, or a tuple of tensors.
        value: f(x).
        derivative: the one-sided derivative ``lim (f(x + t d) − f(x)) / t`` for t from above; equals ``⟨gradient, d⟩``.
        decided: kinks met exactly at x at which a direction chose the side.
        undecided: kinks that neither d nor the second direction leaves to first order; with probability one none of
            them has a say in the gradient.
        forward_passes: 1, or 2 if d left some kink undecided and a second direction was needed.
        not_checked: what f called with values that depend on the point, and of which it is not known whether it stood
            at a kink; if it did, it followed torch. These are nonsmooth operations without a rule (``"cummax"``), and
            what a program may choose by unseen: ``"item"`` and other ways of values into Python, ``"detach"``, and
            functions that make whole numbers or truth values (``"isclose"``, ``"long"``). Empty if the law holds
            without reservation.
    """

    gradient: Tensor | tuple[Tensor, ...]
    value: float
    derivative: float
    decided: int
    undecided: int
    forward_passes: int
    not_checked: tuple[str, ...]


def directional_gradient(
    function: Callable[..., Tensor], point: Point, direction: Point, *, generator: torch.Generator | None = None
) -> DirectionalGradient:
    """Return a limiting gradient of f at x: that of the piece of f which one enters from x along d.

    Autodiff multiplies derivatives that were chosen kink by kink, and the product need not be a gradient of anything:
    for ``relu(x) - relu(-x)``, which is x, torch returns 0 at 0. Here all kinks are decided together, by what they do
    at ``x + t d`` for small t > 0, which the tangents of forward mode tell: of the entries that are equal at x the one
    with the larger tangent is the larger one. One reverse pass then differentiates the piece so selected.

    Args:
        function: takes the tensors of the point, returns a scalar tensor. Continuous near x, and the same whenever
            called; every operation needs torch's forward mode.
        point: a tensor, or a sequence of tensors, floating point.
        direction: the direction d, of the same form, shapes and dtypes; not zero. At ``d = 0`` nothing is decided.
        generator: draws the second direction.

    Returns:
        The gradient, the directional derivative, and how many kinks there were.

    Law:
        For piecewise differentiable f made of the operations below, ``gradient`` is a limiting gradient with
        probability one, hence a Clarke subgradient, and ``⟨gradient, d⟩`` is the one-sided derivative along d. Cost:
        one forward-mode pass (its graph is kept) and one reverse pass. Where d leaves a kink at rest (value and tangent
        both tied) there is a second forward-mode pass along a random direction e, and the limit is that along
        ``x + t d + t² e``; a kink at rest along d and e has gradient zero on either side, with probability one. Only
        kinks met exactly, in floating point, count: a sum that should be zero and is 1e-17 is not at one.

        Decided: relu, relu6, leaky_relu, prelu, elu, selu, hardtanh, hardswish, hardsigmoid, softshrink, threshold,
        abs, clamp, maximum, minimum, fmax, fmin, max, min, amax, amin, argmax, argmin, max-pooling of all kinds,
        l1_loss, and the comparisons of tensors that steer `torch.where` or Python's `if`. Whatever else f chooses by is
        not decided but named, in ``not_checked``: read that.

    Raises:
        DirectionError: point and direction do not fit, are not floating point or not finite, or the direction is zero.
        UndecidedKinkError: f meets exactly a kink or tie of another operation (sort, norm at 0, a rounding), a second
            run met other kinks, or the gradient is not finite.
        ForwardResultError: f does not return a scalar that depends on the point, or one that is not finite.

    Example:
        >>> def identity(x):
        ...     return (torch.relu(x) - torch.relu(-x)).sum()
        >>> x = torch.zeros(1, requires_grad=True)
        >>> torch.autograd.grad(identity(x), x)[0]
        tensor([0.])
        >>> directional_gradient(identity, torch.zeros(1), torch.ones(1)).gradient
        tensor([1.])

    References:
        Kakade and Lee, "Provably correct automatic subdifferentiation for qualified programs", NeurIPS 2018, for the
        question and a bound of 6 times the function; Khan and Barton's lexicographic derivatives use as many directions
        as there are inputs, where this uses two and leaves the rest to probability.
    """
    points, directions = check_pair(point, direction)
    states = _random_states(points)
    run = _Run(function, points, directions, None)
    passes = 1
    if run.decisions.undecided:
        second = [_normal_like(tensor, generator) for tensor in points]
        _restore_random_states(points, states)
        again = _Run(function, points, second, run.decisions)
        derivative, run, passes = run.derivative, again, 2
    else:
        derivative = run.derivative
    gradient = run.differentiate()
    return DirectionalGradient(
        gradient=gradient[0] if isinstance(point, Tensor) else gradient,
        value=run.value,
        derivative=derivative,
        decided=run.decisions.decided,
        undecided=run.decisions.undecided,
        forward_passes=passes,
        not_checked=tuple(sorted(run.not_checked)),
    )


class _Run:
    """One forward-mode pass, with its graph."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        points: Sequence[Tensor],
        directions: Sequence[Tensor],
        earlier: Decisions | None,
    ) -> None:
        self.decisions = Decisions(earlier)
        self.points = [tensor.detach().clone().requires_grad_() for tensor in points]
        guard = _Guard()
        with torch.enable_grad(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(self.points, directions, strict=True)]
            with guard, _DecidingMode(self.decisions, guard):
                result = function(*duals)
            self.output, tangent = _check_result(result)
        self.value = float(self.output.detach())
        self.derivative = 0.0 if tangent is None else float(tangent.detach())
        self.not_checked = guard.not_checked

    def differentiate(self) -> tuple[Tensor, ...]:
        """Return the gradient of the piece selected, by one reverse pass."""
        found = torch.autograd.grad(self.output, self.points, allow_unused=True)
        gradient = tuple(
            torch.zeros_like(tensor) if part is None else part for part, tensor in zip(found, self.points, strict=True)
        )
        bad = [place for place, part in enumerate(gradient) if not bool(torch.isfinite(part).all())]
        if bad:
            raise UndecidedKinkError(
                f"the gradient with respect to tensor {bad[0]} of the point is not finite: the function is not "
                "Lipschitz there (a square root at 0, a division by 0); move the point or add a small constant"
            )
        return gradient


class _DecidingMode(TorchFunctionMode):
    """Give each nonsmooth function its rule, where its arguments depend on the point."""

    def __init__(self, decisions: Decisions, guard: _Guard) -> None:
        super().__init__()
        self.decisions = decisions
        self.guard = guard

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = find_rule(torch_name(func))
        if not is_dual((*args, *kwargs.values())):
            return func(*args, **kwargs)
        if rule is None:
            result = func(*args, **kwargs)
            if may_choose(torch_name(func), result):
                self.guard.not_checked.add(torch_name(func).strip("_"))
            return result
        # The names that NumPy has for them.
        kwargs = {{"axis": "dim", "keepdims": "keepdim"}.get(name, name): value for name, value in kwargs.items()}
        # Inside a rule the kinks are known.
        with self.guard.suspended():
            result = rule(self.decisions, *args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


class _Guard(TorchDispatchMode):
    """Refuse a kink that is met exactly, depends on the point, and was not decided."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.watching = True
        self.not_checked: set[str] = set()

    def suspended(self) -> _Suspension:
        """Return a context in which nothing is refused."""
        return _Suspension(self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.watching and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            self._check(func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        operation = plain_name(func)
        if is_not_counted(func, args, kwargs):
            self.not_checked.add(operation)
        found = find_kinks(operation, args, kwargs)
        met = 0 if found is None else int(found.at_kink.sum())
        if met:
            raise UndecidedKinkError(
                f"{operation} is exactly at a kink or tie in {met} place(s), and has no rule that decides it by a "
                "direction; write it with relu, abs, maximum, max-pooling or torch.where on a comparison, or move the "
                "point"
            )


class _Suspension:
    """Switch a guard off, and back on to what it was."""

    def __init__(self, guard: _Guard) -> None:
        self.guard = guard

    def __enter__(self) -> None:
        self.before, self.guard.watching = self.guard.watching, False

    def __exit__(self, *_: object) -> None:
        self.guard.watching = self.before


def _check_result(result: object) -> tuple[Tensor, Tensor | None]:
    if not isinstance(result, Tensor):
        raise ForwardResultError(f"the function returned {type(result).__name__}; let it return a scalar tensor")
    if result.dim() != 0:
        raise ForwardResultError(
            f"the function returned shape {tuple(result.shape)}; let it return a scalar, e.g. .sum()"
        )
    if not bool(torch.isfinite(result)):
        raise ForwardResultError(
            f"the function returned {float(result.detach())} at the point, and has no derivative there; move the point "
            "to where it is finite"
        )
    output, tangent = forward_ad.unpack_dual(result)
    if not output.requires_grad:
        raise ForwardResultError(
            f"the function returned {float(output):g}, which does not depend on the point; let it use the tensors it "
            "is given, without .item() or .detach()"
        )
    return output, tangent


def _normal_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=generator)


def _random_states(points: Sequence[Tensor]) -> list[Tensor]:
    devices = sorted({tensor.device.index for tensor in points if tensor.device.type == "cuda"})
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _restore_random_states(points: Sequence[Tensor], states: Sequence[Tensor]) -> None:
    """Let what the function draws be drawn again."""
    devices = sorted({tensor.device.index for tensor in points if tensor.device.type == "cuda"})
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)
