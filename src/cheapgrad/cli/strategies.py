"""From the text of an option to strategies, without running any of it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import cheapgrad
from cheapgrad import sketch
from cheapgrad.demo import Method
from cheapgrad.errors import StrategyTextError, UnknownNameError, nearest_match

_EXAMPLE = "write e.g. 'RowSample(keep=0.25)@cotangent'"
_MOMENTS = tuple(moment.value for moment in sketch.Moment)
_BASES = (sketch.AbstractStrategy, sketch.AbstractDesign, sketch.AbstractScore, sketch.AbstractProjection)


def parse_strategies(texts: Iterable[str]) -> tuple[Method, ...]:
    """Return the methods that texts such as ``'RowSample(keep=0.25)@cotangent'`` describe.

    Each text is a strategy with ``@stored`` or ``@cotangent`` behind it, or two of these with ``+`` between them. The
    text is parsed as a Python expression and never evaluated: only the public names of `cheapgrad.sketch`, numbers,
    None, True and False are understood.

    Args:
        texts: one for each method.

    Returns:
        One method for each text, those of the same kind in one family.

    Raises:
        StrategyTextError: a text is not of that form.
        UnknownNameError: a strategy, moment or parameter is not known; the message names the nearest one.
        BudgetError: a value is out of its range.
        PlacementError: a strategy has no meaning at that moment.

    >>> [method] = parse_strategies(["StochasticRounding(bits=4)@stored + RowSample(keep=0.5)@cotangent"])
    >>> method.stored.bits, method.cotangent.keep
    (4, 0.5)
    """
    methods: list[Method] = []
    for text in texts:
        label, strategies = _parse(text)
        family = " + ".join(f"{type(strategy).__name__}@{moment}" for moment, strategy in strategies.items())
        budget = sum(method.family == family for method in methods)
        methods.append(Method(label, family, strategies.get("stored"), strategies.get("cotangent"), budget))
    return tuple(methods)


def _parse(text: str) -> tuple[str, dict[str, sketch.AbstractStrategy]]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise StrategyTextError(f"cannot read the strategy {text!r}; {_EXAMPLE}") from error
    strategies: dict[str, sketch.AbstractStrategy] = {}
    for term in _split_sum(tree):
        moment, strategy = _read_term(term, text)
        if moment in strategies:
            raise StrategyTextError(f"{text!r} has two strategies for {moment}; give at most one for each moment")
        strategies[moment] = strategy
    # A rule knows which strategy has a meaning where.
    cheapgrad.Rule("*", stored=strategies.get("stored"), cotangent=strategies.get("cotangent"))
    return ast.unparse(tree).replace(" @ ", "@"), strategies


def _split_sum(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _split_sum(node.left)
        yield from _split_sum(node.right)
    else:
        yield node


def _read_term(node: ast.expr, text: str) -> tuple[str, sketch.AbstractStrategy]:
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and isinstance(node.right, ast.Name)):
        raise StrategyTextError(
            f"the strategy {text!r} does not say where it acts; put @stored or @cotangent behind it: {_EXAMPLE}"
        )
    moment = node.right.id
    if moment not in _MOMENTS:
        raise UnknownNameError(
            f"unknown moment {moment!r} in {text!r}; a strategy acts @{' or @'.join(_MOMENTS)}"
            f"{nearest_match(moment, _MOMENTS)}"
        )
    strategy = _build(node.left, text)
    if not isinstance(strategy, sketch.AbstractStrategy):
        raise StrategyTextError(f"{ast.unparse(node.left)!r} in {text!r} is no strategy; {_EXAMPLE}")
    return moment, strategy


def _build(node: ast.expr, text: str) -> Any:
    """Return the value of a number, or of a call of a known name on such values."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (bool, int, float))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = _build(node.operand, text)
        if value is not None:
            return -value
    if isinstance(node, ast.Name):
        _find_class(node.id, text)
        raise StrategyTextError(f"{node.id!r} in {text!r} lacks its parentheses; write {node.id}()")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call(_find_class(node.func.id, text), node, text)
    raise StrategyTextError(
        f"{ast.unparse(node)!r} in {text!r} is not understood: only numbers, None, True, False and names of "
        f"cheapgrad.sketch are; {_EXAMPLE}"
    )


def _find_class(name: str, text: str) -> type:
    known = {
        public: value
        for public in sketch.__all__
        if inspect.isclass(value := getattr(sketch, public))
        and issubclass(value, _BASES)
        and not inspect.isabstract(value)
    }
    if name not in known:
        strategies = [public for public, value in known.items() if issubclass(value, sketch.AbstractStrategy)]
        hint = nearest_match(name, known) or f"; strategies are {', '.join(strategies)}"
        raise UnknownNameError(f"unknown name {name!r} in {text!r}{hint}")
    return known[name]


def _call(found: type, node: ast.Call, text: str) -> Any:
    parameters = list(inspect.signature(found).parameters)
    for keyword in node.keywords:
        if keyword.arg not in parameters:
            raise UnknownNameError(
                f"{found.__name__} has no parameter {keyword.arg or '**'!r} (in {text!r}); it has "
                f"{', '.join(parameters) or 'none'}{nearest_match(keyword.arg or '', parameters)}"
            )
    positional = [_build(argument, text) for argument in node.args]
    named = {str(keyword.arg): _build(keyword.value, text) for keyword in node.keywords}
    try:
        inspect.signature(found).bind(*positional, **named)
    except TypeError as error:
        raise StrategyTextError(f"{ast.unparse(node)!r} in {text!r}: {error}; {_EXAMPLE}") from error
    return found(*positional, **named)
