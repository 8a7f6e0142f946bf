"""Every exception and warning of cheapgrad.

Each message says what came, what was allowed and what to do. All exceptions inherit from `CheapgradError` and from the
built-in exception a caller would expect, so that `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable

# Longer texts are not repeated in a message.
_SHORT = 60


class CheapgradError(Exception):
    """Base of every exception raised by cheapgrad."""


class BudgetError(CheapgradError, ValueError):
    """A budget (keep fraction, bits, rank, group size) lies outside its range."""


class PlacementError(CheapgradError, ValueError):
    """A strategy or score was put where it has no meaning; the message gives the reason."""


class RuleError(CheapgradError, ValueError):
    """A rule says nothing, or its pattern is not a glob, a module type or a predicate."""


class NoMatchError(CheapgradError, ValueError):
    """A rule's pattern matches no module; the message names the nearest module names."""


class UnknownNameError(CheapgradError, ValueError):
    """A name (of a strategy, a method, ...) is not known; the message names the nearest one."""


class StrategyTextError(CheapgradError, ValueError):
    """A text that should describe a strategy, such as an option of the command line, is not of the right form."""


class ModelTypeError(CheapgradError, TypeError):
    """Something that is not a `torch.nn.Module` was given where a model is expected."""


class WrapperOrderError(CheapgradError, RuntimeError):
    """The model is already compiled or sharded; the message gives the right order of calls."""


class ConversionError(CheapgradError, RuntimeError):
    """The model's state does not allow the call (already converted, already reverted)."""


class SecondDerivativeError(CheapgradError, RuntimeError):
    """A second derivative was taken through a sketched backward pass, where it would be biased."""


class OverwrittenError(CheapgradError, RuntimeError):
    """A tensor that backward needs was overwritten after the forward pass."""


class PassedOverError(CheapgradError, RuntimeError):
    """The gradient of an intermediate tensor was asked for after a row-wise chain had passed over it."""


class ForwardModeError(CheapgradError, NotImplementedError):
    """Forward-mode differentiation was asked of a sketched operation, which only sketches reverse mode."""


class ShapeError(CheapgradError, ValueError):
    """Tensors of shapes that do not fit together."""


class ForwardResultError(CheapgradError, TypeError):
    """A forward pass returned nothing that keeps its graph alive, so what it holds cannot be counted."""


class ForwardError(CheapgradError, RuntimeError):
    """A forward pass or a loss raised while it was measured; the message names the module, the cause is the error."""


class BackwardError(CheapgradError, RuntimeError):
    """A backward pass raised while it was measured; the cause is the original."""


class InputsError(CheapgradError, TypeError):
    """The inputs do not fit the signature of the model's forward."""


class MetaTensorError(CheapgradError, ValueError):
    """A tensor without data was given where a pass has to run on data."""


class FakeModelError(CheapgradError, RuntimeError):
    """A model cannot be copied without its data."""


class FormulaError(CheapgradError, ValueError):
    """A FLOP formula cannot be registered, or returned no number of FLOPs."""


class FactoryError(CheapgradError, ImportError):
    """What should make a model and its inputs cannot be imported, raised, or returned something else."""


class GradientDrawError(CheapgradError, ValueError):
    """The gradients drawn for an audit do not fit the exact gradient, or are not finite."""


class ReferenceGradientError(CheapgradError, ValueError):
    """What an audit should compare gradients with is itself random, or no gradient of the model."""


class NondeterministicForwardError(CheapgradError, RuntimeError):
    """A forward pass draws random numbers and no seed was given, or no seed governs them."""


class BatchOrderError(CheapgradError, ValueError):
    """The order of a batch's examples changes its loss, so that they are not examples of their own."""


class OptimizerStateError(CheapgradError, ValueError):
    """An optimizer keeps no second moments of a model's gradient, or none yet."""


class AccumulationError(CheapgradError, RuntimeError):
    """A loop that should leave accumulated gradients left none, or changed the parameters."""


class BiasedGradientError(CheapgradError, AssertionError):
    """A gradient that should be unbiased is not, or was measured too coarsely to tell."""


class ArgumentError(CheapgradError, TypeError):
    """An argument is of a kind that has no meaning there, such as a number in place of settings."""


class ProbabilityError(CheapgradError, ValueError):
    """Numbers that should be probabilities are none: negative, not finite, or not of sum one, such as logits."""


class OperatorError(CheapgradError, TypeError):
    """Something given as a curvature matrix is none: no shape or ``@``, not square, not symmetric, not real."""


class OperandError(CheapgradError, TypeError):
    """What an operator should multiply is no tensor, or has another dtype or device."""


class NonFiniteCurvatureError(CheapgradError, ArithmeticError):
    """A curvature product has entries that are infinite or not a number."""


class BatchError(CheapgradError, ValueError):
    """Data for curvature are of no known form: empty, readable once only, or without a number of examples."""


class LossError(CheapgradError, ValueError):
    """A loss does not fit what is asked for: no scalar, no mean over examples, an unknown likelihood."""


class TargetError(CheapgradError, ValueError):
    """Targets of a loss are no classes: of another dtype, or out of range."""


class StochasticModelError(CheapgradError, RuntimeError):
    """A layer draws or depends on the other examples (dropout, batch norm in training), so curvature is not defined."""


class StaleGraphError(CheapgradError, RuntimeError):
    """Parameters changed after a graph of them was held."""


class UnsupportedModelError(CheapgradError, NotImplementedError):
    """PyTorch has no derivative that a curvature product of this model needs; the message says what to do."""


class OverlapError(CheapgradError, ValueError):
    """Two batches that should be independent share examples."""


class SingularCurvatureError(CheapgradError, ArithmeticError):
    """A quadratic has no minimum: its curvature vanishes or is negative along a direction that matters."""


class OutputError(CheapgradError, OSError):
    """A result cannot be written where it was asked for."""


class RecordError(CheapgradError, ValueError):
    """A directory holds no record of a measurement, or one that is damaged; the message names the file."""


class ConventionError(CheapgradError, ValueError):
    """A derivative at a kink, or a rule for ties, that is not one."""


class DirectionError(CheapgradError, ValueError):
    """A point and a direction that do not fit, or a direction that decides nothing."""


class UndecidedKinkError(CheapgradError, RuntimeError):
    """A program stands exactly on a kink that no rule decides, so that its limiting gradient is not known."""


class TrialError(CheapgradError, RuntimeError):
    """Two runs of what should be one trial differ in more than the derivatives at kinks."""


class TheoryError(CheapgradError, ValueError):
    """A constant of a convergence model lies outside its range, or a target cannot be reached in it."""


class UnreachableBudgetError(BudgetError):
    """No plan keeps the budget, or two budgets contradict each other; the message names the nearest one in reach."""


class NondeterministicLossError(CheapgradError, RuntimeError):
    """The same batch gave two losses although torch's random state was the same, so nothing can be compared."""


class ControlError(CheapgradError, ValueError):
    """A controller was given a target out of range, has nothing to control, or measures nothing."""


class MissingExtraError(CheapgradError, ImportError):
    """An optional dependency is missing; the message names the pip extra that brings it."""


class NotConvergedWarning(UserWarning):
    """An iteration ran out of products; what it found is returned with its residuals."""


class NoEffectWarning(UserWarning):
    """A call had no effect on the model, for the reasons listed."""


class ControlWarning(UserWarning):
    """A controller's estimate may be off on this model, for the reason given."""


class PlanWarning(UserWarning):
    """A plan is carried out on a model that differs from the one it was made for, so that its figures may not hold."""


class FusingWarning(UserWarning):
    """Codecs were to be fused, and there is no compiler or it failed: what is named runs unfused."""


def nearest_match(name: str, candidates: Iterable[str]) -> str:
    """Return a hint such as ``"; did you mean 'fc1'?"``, or an empty string when nothing is close.

    >>> nearest_match("fc_1", ["fc1", "head"])
    "; did you mean 'fc1'?"
    """
    close = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.5)
    if not close:
        return ""
    return "; did you mean " + " or ".join(repr(candidate) for candidate in close) + "?"


def describe_value(value: object) -> str:
    """Return what a value is, in a few words: its type, and its shape or length instead of its entries.

    >>> describe_value(3), describe_value([1.0]), describe_value("kfac"), describe_value(dict)
    ('an int 3', 'a list of 1', "a str 'kfac'", 'the class dict')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    text = f"{'an' if kind[:1] in 'aeiouAEIO' else 'a'} {kind}"
    if isinstance(value, (bool, int, float, str, bytes)) and len(repr(value)) <= _SHORT:
        return f"{text} {value!r}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{text} of shape {tuple(shape)}"
    return f"{text} of {len(value)}" if isinstance(value, (list, tuple, dict, set)) else text


def check_instance(name: str, value: object, kinds: type | tuple[type, ...], advice: str = "") -> None:
    """Raise `ArgumentError` unless a value is of one of some kinds.

    Args:
        name: of the argument, as the caller wrote it.
        value: what came.
        kinds: what is allowed.
        advice: what to do, ends the message.

    Raises:
        ArgumentError: with what came and what is allowed.

    Example:
        >>> check_instance("seed", 3, int)
    """
    if isinstance(value, kinds):
        return
    allowed = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    raise ArgumentError(
        f"{name} must be of type {allowed}, but got {describe_value(value)}" + (f"; {advice}" if advice else "")
    )


def check_finite_loss(loss: float, batch: str, call: str) -> None:
    """Raise `LossError` if a loss is not finite.

    Args:
        loss: of the batch.
        batch: what the caller calls it.
        call: what is done with it, a verb.

    Raises:
        LossError: with the loss and what to do.

    Example:
        >>> check_finite_loss(0.5, "the batch", "audit")
    """
    if not math.isfinite(loss):
        raise LossError(
            f"the loss of {batch} is {loss}, so it has no gradient to compare noise with; look for such values in the "
            f"batch, or {call} before the model diverges"
        )


def check_number(name: str, value: object, above: float = -math.inf) -> float:
    """Return `value` as a float if it is a finite number larger than `above`; raise `BudgetError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or value <= above:
        allowed = "a finite number" + ("" if above == -math.inf else f" above {above:g}")
        raise BudgetError(
            f"{name} must be {allowed}, but got "
            f"{repr(value) if isinstance(value, numbers.Real) else describe_value(value)}"
        )
    return float(value)


def check_fraction(name: str, value: object) -> float:
    """Return `value` as a float if it is a number in (0, 1]; raise `BudgetError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BudgetError(
            f"{name} must be a number in (0, 1], but got {value!r} of type {type(value).__name__}; use e.g. {name}=0.5"
        )
    if math.isnan(value) or not 0 < value <= 1:
        raise BudgetError(
            f"{name} must be in (0, 1], but got {value!r}; use e.g. {name}=0.5, or {name}=1.0 for exact gradients"
        )
    return float(value)


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Return `value` if it is an int of at least `minimum`; raise `BudgetError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise BudgetError(f"{name} must be a whole number of at least {minimum}, but got {value!r}")
    return value
