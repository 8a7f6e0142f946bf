"""A choice of derivatives at kinks, put on everything that runs in a context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from cheapgrad.errors import ConventionError
from cheapgrad.kinks import max_pool
from cheapgrad.kinks._function_names import torch_name
from cheapgrad.kinks.max_pool import check_ties
from cheapgrad.kinks.relu import check_slope, relu
from cheapgrad.kinks.ties import Ties


@dataclass(frozen=True)
class Conventions:
    """What to return as the derivative at a kink; the defaults are torch's own.

    Args:
        relu: derivative of the rectifier at zero; finite.
        max_pool: who receives the cotangent of a window with several largest entries.

    Raises:
        ConventionError: a derivative that is not a finite number, or a rule that is not a member of `Ties`.

    >>> Conventions(relu=1.0)
    Conventions(relu=1.0, max_pool=<Ties.FIRST: 'first'>)
    """

    relu: float = 0.0
    max_pool: Ties = Ties.FIRST

    def __post_init__(self) -> None:
        object.__setattr__(self, "relu", check_slope(self.relu))
        check_ties(self.max_pool)


@contextmanager
def apply_conventions(conventions: Conventions) -> Iterator[Counter[str]]:
    """Let every ReLU and max-pooling that is called inside the context follow `conventions`.

    Modules (`nn.ReLU`, `nn.MaxPool2d`, adaptive ones), functions and methods of tensors, in place or not, whichever
    model they belong to. The choice is made in the forward pass; the backward pass may run outside. Forward values do
    not change.

    Args:
        conventions: the derivatives to use.

    Yields:
        How often each function was given its convention, by name: an empty counter says that nothing was touched.

    Law:
        Only rectifiers and max-pooling by these names: not `clamp`, `relu6`, `amax` nor `maximum`. Models under
        `torch.compile` are traced again inside the context, and follow. The context is left as it was entered, also
        after an exception; it holds for the thread that entered it.

    Raises:
        ConventionError: `conventions` is something else: a number, a dictionary, or the class itself.

    Example:
        >>> import torch
        >>> layer = torch.nn.ReLU()
        >>> x = torch.zeros(2, requires_grad=True)
        >>> with apply_conventions(Conventions(relu=1.0)) as calls:
        ...     y = layer(x)
        >>> y.sum().backward()
        >>> x.grad, calls["relu"]
        (tensor([1., 1.]), 1)
    """
    mode = _ConventionMode(check_convention(conventions))
    with mode:
        yield mode.calls


def check_convention(conventions: object) -> Conventions:
    """Return the conventions if that is what they are; raise `ConventionError` otherwise."""
    if not isinstance(conventions, Conventions):
        what = f"the class {conventions.__name__} itself" if isinstance(conventions, type) else repr(conventions)
        raise ConventionError(
            f"conventions must be made by kinks.Conventions, but got {what}; write e.g. kinks.Conventions(relu=1.0)"
        )
    return conventions


def check_conventions(pair: object) -> tuple[Conventions, Conventions]:
    """Return two conventions if that is what they are; raise `ConventionError` otherwise."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        what = f"{len(pair)} of them" if isinstance(pair, (tuple, list)) else type(pair).__name__
        raise ConventionError(
            f"two conventions are needed, but got {what}; write e.g. (Conventions(), Conventions(relu=1.0))"
        )
    return check_convention(pair[0]), check_convention(pair[1])


class _ConventionMode(TorchFunctionMode):
    """Put our functions in the place of torch's while it is active; inside ours, it is not."""

    def __init__(self, conventions: Conventions) -> None:
        super().__init__()
        self.conventions = conventions
        self.calls: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = torch_name(func)
        if name in {"relu", "relu_"}:
            self.calls["relu"] += 1
            return self._relu(*args, **kwargs, always_in_place=name == "relu_")
        pool = name.removesuffix("_with_indices")
        if pool not in _POOLS:
            return func(*args, **kwargs)
        self.calls[pool] += 1
        if name != pool:
            # These return the positions whatever they are told, and are told by keyword if at all.
            kwargs = {**kwargs, "return_indices": True}
        return _POOLS[pool](*args, **kwargs, ties=self.conventions.max_pool)

    def _relu(self, input: Tensor, inplace: bool = False, *, always_in_place: bool) -> Tensor:
        if not (inplace or always_in_place):
            return relu(input, self.conventions.relu)
        return input.copy_(relu(input, self.conventions.relu))


_POOLS: dict[str, Callable[..., Any]] = {
    name: getattr(max_pool, name)
    for name in (
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
    )
}
