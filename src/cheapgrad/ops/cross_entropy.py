"""Cross-entropy together with the linear layer that makes its logits, which are never held whole."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import (
    BudgetError,
    ShapeError,
    TargetError,
    UnknownNameError,
    check_count,
    check_fraction,
    nearest_match,
)
from cheapgrad.exactness import is_forced_exact
from cheapgrad.ops._guards import differentiate_once, refuse_forward_mode
from cheapgrad.ops._token_losses import LossOptions, log_probabilities, logit_cotangents, token_losses
from cheapgrad.ops.linear import cast_for_autocast, may_need_grad
from cheapgrad.sketch import DenseMatrix, Moment, Operands, ProductNorm, random
from cheapgrad.sketch.budget import count_kept
from cheapgrad.sketch.designs import Systematic
from cheapgrad.sketch.selection import Selection
from cheapgrad.sketch.transforms import is_inside_transform, is_plain

_REDUCTIONS = ("mean", "sum", "none")
_NAME = "linear layer with cross-entropy"
# Made here, since compiled graphs make no strategies.
_SCORES, _DESIGN = ProductNorm(), Systematic()


@dataclass(frozen=True)
class _Wanted:
    """Which gradients are asked for."""

    input: bool
    weight: bool
    bias: bool


class _Gradients:
    """The gradients, as they are summed up chunk by chunk."""

    def __init__(self, weight_CI: Tensor, wanted: _Wanted, options: LossOptions) -> None:
        self._weight_CI = weight_CI
        self._wanted, self._options = wanted, options
        self._parts_NI: list[Tensor] = []
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def add(self, x_KI: Tensor, grad_KC: Tensor, weight_K: Tensor) -> None:
        """Take in a chunk: its input, the cotangents of its logits, and what each token counts.

        Tokens are weighted on the side of the features: the logits are read no more often than they must be.
        """
        if self._wanted.bias:
            part = grad_KC.mT @ weight_K
            self._bias = part if self._bias is None else self._bias + part
        dtype = self._weight_CI.dtype
        narrow_KC, column = grad_KC.to(dtype), weight_K.to(dtype).unsqueeze(1)
        if self._wanted.input:
            self._parts_NI.append((narrow_KC @ self._weight_CI) * column)
        if not self._wanted.weight:
            return
        weighted_KI = x_KI * column
        if self._options.keep is not None:
            selection = _draw(weighted_KI, narrow_KC, self._options.keep)
            narrow_KC, weighted_KI = selection.gather(narrow_KC, 0), selection.apply(weighted_KI, 0)
        wide = torch.promote_types(dtype, torch.float32)
        if self._weight is None:
            self._weight = (narrow_KC.mT @ weighted_KI).to(wide)
        elif is_inside_transform() or dtype != wide:
            self._weight = self._weight + narrow_KC.mT @ weighted_KI
        else:
            self._weight.addmm_(narrow_KC.mT, weighted_KI)

    def sums(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, weight and bias in their dtypes, None where they are not asked for."""
        dtype = self._weight_CI.dtype
        whole_NI = torch.cat(self._parts_NI) if self._wanted.input else None
        weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (self._weight, self._bias))
        return whole_NI, weight, bias


def _draw(x_KI: Tensor, grad_KC: Tensor, keep: float) -> Selection:
    """Draw tokens of a chunk by ``||x_n|| ||g_n||``, the best score for the weight's gradient alone."""
    scores_K = _SCORES.evaluate(Operands(Moment.COTANGENT, DenseMatrix(x_KI), grad_KC), 0)
    return _DESIGN.draw(scores_K, count_kept(keep, x_KI.shape[0]))


def _run(
    x_NI: Tensor,
    weight_CI: Tensor,
    bias_C: Tensor | None,
    targets_N: Tensor,
    options: LossOptions,
    weight_N: Tensor | None,
    wanted: _Wanted | None,
) -> tuple[Tensor, _Gradients | None]:
    """Return each token's loss, and the gradients of their sum weighted by `weight_N` where they are wanted."""
    gradients = None if wanted is None else _Gradients(weight_CI, wanted, options)
    losses = []
    for part in options.chunks(*x_NI.shape):
        log_KC = log_probabilities(x_NI[part], weight_CI, bias_C)
        losses.append(token_losses(log_KC, targets_N[part], options))
        if gradients is not None and weight_N is not None:
            gradients.add(x_NI[part], logit_cotangents(log_KC, targets_N[part], options), weight_N[part])
    return torch.cat(losses), gradients


def _reduce(losses_N: Tensor, targets_N: Tensor, options: LossOptions) -> Tensor:
    if options.reduction == "none":
        return losses_N
    total = losses_N.sum()
    return total if options.reduction == "sum" else total / (targets_N != options.ignore_index).sum()


class _GradientsInForward(torch.autograd.Function):
    """Forward forms the gradients chunk by chunk, while the logits are there; backward hands them out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x_NI: Tensor,
        weight_CI: Tensor,
        bias_C: Tensor | None,
        targets_N: Tensor,
        options: LossOptions,
        wanted: _Wanted,
        *ties: Tensor,
    ) -> tuple[Tensor, ...]:
        wide = torch.promote_types(x_NI.dtype, torch.float32)
        weight_N = options.token_weights(targets_N, wide)
        losses_N, gradients = _run(x_NI, weight_CI, bias_C, targets_N, options, weight_N, wanted)
        sums = () if gradients is None else tuple(part for part in gradients.sums() if part is not None)
        # Formally made from the draw, or the compiler may repeat it in backward.
        loss = random.anchor(_reduce(losses_N, targets_N, options), sums if options.keep is not None else ())
        return loss, *sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.wanted = inputs[5]
        ctx.save_for_backward(*inputs[6:], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *ignored: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ties = saved[: len(ctx.needs_input_grad) - 6]
        sums = list(saved[len(ties) :])
        # The usual cotangent of a loss; on a GPU nobody waits to see what it is.
        is_one = is_plain(grad) and float(grad) == 1
        gradients: list[Tensor | None] = []
        for is_wanted in (ctx.wanted.input, ctx.wanted.weight, ctx.wanted.bias):
            part = sums.pop(0) if is_wanted else None
            if part is not None and not is_one:
                part = part * grad.to(part.dtype)
            gradients.append(differentiate_once(part, _NAME, grad, *ties))
        return (*gradients, None, None, None, *[None for _ in ties])


class _LogitsAgain(torch.autograd.Function):
    """Forward keeps its arguments; backward computes the logits once more, chunk by chunk."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x_NI: Tensor, weight_CI: Tensor, bias_C: Tensor | None, targets_N: Tensor, options: LossOptions, wanted: _Wanted
    ) -> Tensor:
        losses_N, _ = _run(x_NI, weight_CI, bias_C, targets_N, options, None, None)
        return _reduce(losses_N, targets_N, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_NI, weight_CI, bias_C, targets_N, options, wanted = inputs
        ctx.options, ctx.wanted = options, wanted
        ctx.save_for_backward(x_NI, weight_CI, bias_C, targets_N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_CI, bias_C, targets_N = ctx.saved_tensors
        with torch.no_grad():
            wide = torch.promote_types(x_NI.dtype, torch.float32)
            weight_N = ctx.options.token_weights(targets_N, wide) * grad.to(wide)
            # Formally made from the cotangent, or a compiler keeps the logits of forward: the same products.
            x_NI = random.anchor(x_NI, (grad,))
            _, sums = _run(x_NI, weight_CI, bias_C, targets_N, ctx.options, weight_N, ctx.wanted)
        gradients = () if sums is None else sums.sums()
        outputs = [differentiate_once(part, _NAME, grad, x_NI, weight_CI) for part in gradients]
        return (*outputs, None, None, None)


class _EagerGradientsInForward(_GradientsInForward):
    """The same, refusing forward mode by name; compiled graphs take no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode(_NAME)


class _EagerLogitsAgain(_LogitsAgain):
    """The same, refusing forward mode by name."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode(_NAME)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    chunk: int | None = None,
    keep: float | None = None,
    recompute: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Return ``cross_entropy(x @ weight.T + bias, targets)`` without ever holding the logits of more than a chunk.

    For token n with logits ``z = x_n W.T + b``, target t and smoothing s, the loss is
    ``logsumexp(z) - (1 - s) z_t - s mean(z)``, and its gradient with z is ``softmax(z) - (1 - s) e_t - s / C``. By
    default the gradients of x, weight and bias are formed chunk by chunk in the forward pass, and nothing else is
    held for the backward pass.

    Args:
        x: what the output layer reads, shape ``[..., I]``, floating point.
        weight: of the output layer, shape ``[C, I]``.
        targets: classes, int64, in the shape of `x` without its last axis.
        bias: of the output layer, shape ``[C]``, or None.
        chunk: tokens worked on at a time; by default as many as have about two million logits.
        keep: share of the tokens of each chunk that the weight's gradient is made from, in (0, 1]; None for all. The
            gradients of `x` and `bias` are made from all tokens.
        recompute: hold `x` alone, and compute the logits again in backward: one product more, and no gradient is held.
        ignore_index: target of tokens that do not count.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"`` for the loss of each token (which
            implies `recompute`).
        label_smoothing: share of each target that is spread over all classes, in [0, 1].

    Returns:
        The loss, 0-dim; with ``reduction="none"`` in the shape of `targets`.

    **Law** Without `keep`, or with ``keep=1``: exact. With it the weight's gradient is made from rows drawn in each
    chunk with ``p_n = min(1, lambda ||g_n|| ||x_n||)``, g the gradient with the logits: bias 0, variance
    ``sum over chunks of sum_nm (p_nm / (p_n p_m) - 1) <g_n, g_m> <x_n, x_m>``; loss, dX and db stay exact. Held: dX and
    dW, with `recompute` x. Products cost ``6 N I C`` FLOPs, with `recompute` ``8 N I C``; `keep` takes
    ``2 (1 - keep) N I C`` off.

    Raises:
        ShapeError: for shapes that do not fit together.
        TargetError: for targets that are no int64, or (on a CPU, outside compiled graphs) no class.
        BudgetError: for a `chunk`, `keep` or `label_smoothing` out of its range.
        UnknownNameError: for another `reduction`.
        SecondDerivativeError: when a gradient through it is differentiated again.
        ForwardModeError: in forward-mode differentiation.

    >>> x, weight = torch.ones(3, 2, requires_grad=True), torch.zeros(4, 2)
    >>> linear_cross_entropy(x, weight, torch.tensor([0, 1, 3])).item()
    1.386
    """
    options = _check_options(chunk, keep, ignore_index, reduction, label_smoothing)
    _check_tensors(x, weight, targets, bias, ignore_index)
    if is_forced_exact() or targets.numel() == 0:
        logits_NC = torch.nn.functional.linear(x, weight, bias).reshape(-1, weight.shape[0])
        loss = torch.nn.functional.cross_entropy(
            logits_NC,
            targets.reshape(-1),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return loss if reduction != "none" else loss.view(targets.shape)
    # PyTorch computes losses in single precision under autocast, and otherwise in the dtype of the logits.
    result_dtype = torch.promote_types(x.dtype, torch.float32) if _is_autocast(x) else x.dtype
    x, weight, bias = cast_for_autocast(x, weight, bias)
    x_NI, targets_N = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    wanted = _Wanted(may_need_grad(x), may_need_grad(weight), bias is not None and may_need_grad(bias))
    is_differentiated = torch.is_grad_enabled() and (wanted.input or wanted.weight or wanted.bias)
    again = recompute or reduction == "none"
    if not is_differentiated:
        if options.keep is not None and not again:
            # It may be the first half of a reentrant checkpoint, whose second half draws.
            random.skip_stream(x)
        loss = _reduce(_run(x_NI, weight, bias, targets_N, options, None, None)[0], targets_N, options)
    else:
        function = _function(again)
        draws = options.keep is not None and not again
        with random.own_stream(x) if draws else contextlib.nullcontext():
            output = function.apply(
                x_NI, weight, bias, targets_N, options, wanted, *(() if again else _ties(x_NI, weight))
            )
        loss = output if again else output[0]
    return loss.to(result_dtype).view(targets.shape if reduction == "none" else ())


def _function(again: bool) -> type[torch.autograd.Function]:
    if torch.compiler.is_compiling():
        return _LogitsAgain if again else _GradientsInForward
    return _EagerLogitsAgain if again else _EagerGradientsInForward


def _ties(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return children of the tensors, of no bytes: they show where a second derivative is refused."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(tensor[:0].clone() for tensor in tensors)


def _is_autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _check_options(
    chunk: int | None, keep: float | None, ignore_index: int, reduction: str, label_smoothing: float
) -> LossOptions:
    if reduction not in _REDUCTIONS:
        raise UnknownNameError(
            f"unknown reduction {reduction!r}{nearest_match(str(reduction), _REDUCTIONS)} "
            f"(known: {', '.join(_REDUCTIONS)})"
        )
    if chunk is not None:
        check_count("chunk", chunk)
    if not 0 <= label_smoothing <= 1:
        raise BudgetError(f"label_smoothing must be in [0, 1], but got {label_smoothing!r}; try label_smoothing=0.1")
    if keep is not None:
        check_fraction("keep", keep)
    return LossOptions(chunk, ignore_index, reduction, label_smoothing, keep if keep != 1 else None)


def _check_tensors(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be [..., I] and [C, I]"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; for {weight.shape[0]} classes it must be [C]")
    if targets.dtype != torch.int64:
        raise TargetError(
            f"targets have dtype {targets.dtype}; they must be classes as int64 (probabilities are not covered: use "
            "torch.nn.functional.cross_entropy)"
        )
    if targets.shape != x.shape[:-1]:
        raise ShapeError(
            f"targets have shape {tuple(targets.shape)}, but x has shape {tuple(x.shape)}; there must be one target "
            "for each row of x"
        )
    if not is_plain(targets) or not targets.numel():
        return
    valid = targets[targets != ignore_index]
    if valid.numel() and not (int(valid.min()) >= 0 and int(valid.max()) < weight.shape[0]):
        raise TargetError(
            f"targets lie in [{int(valid.min())}, {int(valid.max())}], but there are {weight.shape[0]} classes; give "
            f"classes from 0 to {weight.shape[0] - 1}, or ignore_index={ignore_index} for tokens that do not count"
        )
