"""Rules: which modules get which strategies."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from cheapgrad.errors import RuleError
from cheapgrad.sketch import AbstractStrategy, Moment

Pattern = str | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True, init=False)
class Rule:
    """Strategies for the modules that a pattern matches; later rules win over earlier ones.

    Args:
        pattern: a glob on module names (``"*"`` crosses dots), a module type, or a predicate
            ``(name, module) -> bool``.
        stored: what is kept of the input at forward time; None keeps it whole. The strategy for memory.
        cotangent: what is used of the cotangent at backward time; None uses all of it. The strategy for time.
        recompute: compute the output of a linear layer again in backward, exactly, for other operations that would keep
            it, such as attention its queries, keys and values.

    Raises:
        RuleError: if neither strategy is given, or the pattern is of another type.
        PlacementError: if a strategy has no meaning in its field; the message says why.

    >>> from cheapgrad.sketch import RowSample, StochasticRounding
    >>> Rule("blocks.*", stored=StochasticRounding(bits=4), cotangent=RowSample(keep=0.5)).pattern
    'blocks.*'
    """

    pattern: Pattern = "*"
    stored: AbstractStrategy | None = None
    cotangent: AbstractStrategy | None = None
    recompute: bool = False

    def __init__(
        self,
        pattern: Pattern = "*",
        *,
        stored: AbstractStrategy | None = None,
        cotangent: AbstractStrategy | None = None,
        recompute: bool = False,
    ) -> None:
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "stored", stored)
        object.__setattr__(self, "cotangent", cotangent)
        object.__setattr__(self, "recompute", recompute)
        self._validate()

    def _validate(self) -> None:
        if not isinstance(self.pattern, str) and not callable(self.pattern):
            raise RuleError(
                f"pattern must be a glob on module names, a module type or a predicate(name, module), "
                f"but got {self.pattern!r}"
            )
        if isinstance(self.pattern, nn.Module):
            raise RuleError(
                f"pattern is a module ({type(self.pattern).__name__}), not a description of one; give its name, "
                "its type, or a predicate such as lambda name, module: module is layer"
            )
        if isinstance(self.pattern, type) and not issubclass(self.pattern, nn.Module):
            raise RuleError(f"pattern {self.pattern.__name__!r} is a type, but not a torch.nn.Module type")
        if self.stored is None and self.cotangent is None:
            raise RuleError(
                f"the rule for {self.pattern!r} has neither stored= nor cotangent=; give at least one, "
                "e.g. cotangent=RowSample(keep=0.5)"
            )
        for moment, strategy in ((Moment.STORED, self.stored), (Moment.COTANGENT, self.cotangent)):
            if strategy is None:
                continue
            if not isinstance(strategy, AbstractStrategy):
                raise RuleError(
                    f"{moment.value} must be a strategy such as RowSample(keep=0.5), but got {strategy!r} of type "
                    f"{type(strategy).__name__}"
                )
            strategy.check_placement(moment)

    def matches(self, name: str, module: nn.Module) -> bool:
        """Tell whether the rule applies to the module of this name."""
        if isinstance(self.pattern, str):
            return fnmatch.fnmatchcase(name, self.pattern)
        if isinstance(self.pattern, type):
            return isinstance(module, self.pattern)
        return bool(self.pattern(name, module))
