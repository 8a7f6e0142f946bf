"""The output layer with cross-entropy against PyTorch, its law for sampled tokens, and what it holds."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import cheapgrad
from cheapgrad import linear_cross_entropy
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import (
    BudgetError,
    ForwardModeError,
    SecondDerivativeError,
    ShapeError,
    TargetError,
    UnknownNameError,
)
from cheapgrad.exactness import forced_exact
from cheapgrad.ops import cross_entropy
from cheapgrad.sketch.selection import Selection

CLASSES, FEATURES = 11, 5


def problem(*, bias=True, shape=(3, 7), dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(*shape, FEATURES, dtype=dtype)
    weight = torch.randn(CLASSES, FEATURES, dtype=dtype)
    targets = torch.randint(0, CLASSES, shape)
    targets.view(-1)[1] = -100
    return x, weight, torch.randn(CLASSES, dtype=dtype) if bias else None, targets


def reference(x, weight, targets, bias=None, **options):
    loss = functional.cross_entropy(
        functional.linear(x, weight, bias).reshape(-1, CLASSES), targets.reshape(-1), **options
    )
    return loss.view(targets.shape) if options.get("reduction") == "none" else loss


def value_and_gradients(function, tensors, cotangent=None):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves)
    loss.backward(torch.ones_like(loss) if cotangent is None else cotangent)
    return loss.detach(), tuple(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_pytorch(bias, reduction, smoothing, chunk, recompute):
    x, weight, bias_C, targets = problem(bias=bias)
    tensors = [tensor for tensor in (x, weight, bias_C) if tensor is not None]
    cotangent = torch.randn(targets.shape if reduction == "none" else (), dtype=torch.float64)

    def run(function, **options):
        return lambda x, weight, *bias: function(
            x, weight, targets, *bias, reduction=reduction, label_smoothing=smoothing, **options
        )

    ours = value_and_gradients(run(linear_cross_entropy, chunk=chunk, recompute=recompute), tensors, cotangent)
    stock = value_and_gradients(run(reference), tensors, cotangent)
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("recompute", [False, True])
def test_one_frozen_part_leaves_the_others_right(recompute):
    x, weight, bias, targets = problem()
    stock = value_and_gradients(lambda *t: reference(t[0], t[1], targets, t[2]), [x, weight, bias])[1]
    for wanted in range(3):
        leaves = [tensor.clone().requires_grad_(place == wanted) for place, tensor in enumerate((x, weight, bias))]
        loss = linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2], recompute=recompute)
        loss.backward()
        torch.testing.assert_close(leaves[wanted].grad, stock[wanted])
        assert sum(leaf.grad is not None for leaf in leaves) == 1


def test_another_ignore_index():
    x, weight, bias, targets = problem()
    targets = targets.masked_fill(targets == -100, 3)
    torch.testing.assert_close(
        linear_cross_entropy(x, weight, targets, bias, ignore_index=3),
        reference(x, weight, targets, bias, ignore_index=3),
    )


def test_a_batch_that_is_all_ignored_has_no_mean():
    x, weight, _, targets = problem()
    ignored = torch.full_like(targets, -100)
    assert linear_cross_entropy(x, weight, ignored).isnan()
    assert linear_cross_entropy(x, weight, ignored, reduction="sum") == 0


def weight_gradients(draws, **options):
    """Return many draws of the weight's gradient at once, and the exact one."""
    x, weight, _, targets = problem(bias=False, shape=(12,))
    x = x * torch.logspace(-1, 0.5, 12, dtype=x.dtype).unsqueeze(1)

    def loss(weight, x):
        return linear_cross_entropy(x, weight, targets, **options)

    many = vmap(grad(loss), in_dims=(0, None), randomness="different")(weight.expand(draws, -1, -1), x)
    return many, grad(functools.partial(reference_of_weight, x=x, targets=targets))(weight)


def reference_of_weight(weight, x, targets):
    return reference(x, weight, targets)


def largest_deviation(many, exact):
    """Return the largest deviation of the mean, in standard errors, and the largest standard error, relative."""
    error = many.std(0) / len(many) ** 0.5
    return float(((many.mean(0) - exact) / error).abs().max()), float(error.max() / exact.abs().max())


DRAWS = 20_000
# Bonferroni over the 55 entries of the gradient at a family error of 1e-6.
BOUND = 5.6


@pytest.mark.parametrize("recompute", [False, True])
def test_sampled_tokens_are_unbiased(recompute):
    many, exact = weight_gradients(DRAWS, keep=0.5, chunk=6, recompute=recompute)
    deviation, relative = largest_deviation(many, exact)
    assert deviation < BOUND
    assert relative < 0.01, "too few draws to tell"


@pytest.mark.parametrize("recompute", [False, True])
def test_a_biased_twin_is_caught(recompute, monkeypatch):
    drawn = cross_entropy._draw

    def forget_weights(*arguments):
        selection = drawn(*arguments)
        return Selection(selection.index_K, selection.weight_K * 0.9 + 0.1, selection.size)

    monkeypatch.setattr(cross_entropy, "_draw", forget_weights)
    many, exact = weight_gradients(DRAWS, keep=0.5, chunk=6, recompute=recompute)
    assert largest_deviation(many, exact)[0] > BOUND


def test_the_variance_is_that_of_the_law():
    many, exact = weight_gradients(DRAWS, keep=0.5, chunk=6)
    x, weight, _, targets = problem(bias=False, shape=(12,))
    x = x * torch.logspace(-1, 0.5, 12, dtype=x.dtype).unsqueeze(1)
    logits = (x @ weight.T).requires_grad_()
    (cotangent,) = torch.autograd.grad(functional.cross_entropy(logits, targets), logits)
    predicted = 0.0
    for part in (slice(0, 6), slice(6, 12)):
        atoms = (cotangent[part].unsqueeze(2) * x[part].unsqueeze(1)).flatten(1)
        scores = atoms.norm(dim=1)
        squares = scores.square()
        predicted += float(
            cross_entropy._DESIGN.variance(squares, scores, 3, lambda w, atoms=atoms: (w @ atoms).square().sum())
        )
    measured = float((many - exact).square().sum((1, 2)).mean())
    assert measured == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("recompute", [False, True])
def test_sampling_leaves_loss_input_and_bias_exact(recompute):
    x, weight, bias, targets = problem()
    ours = value_and_gradients(
        lambda *t: linear_cross_entropy(t[0], t[1], targets, t[2], keep=0.5, recompute=recompute), [x, weight, bias]
    )
    stock = value_and_gradients(lambda *t: reference(t[0], t[1], targets, t[2]), [x, weight, bias])
    torch.testing.assert_close((ours[0], ours[1][0], ours[1][2]), (stock[0], stock[1][0], stock[1][2]))
    assert not torch.allclose(ours[1][1], stock[1][1])


def test_full_budget_draws_nothing():
    x, weight, bias, targets = problem()
    state = torch.get_rng_state()
    linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets, bias, keep=1.0).backward()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("position", [0, 20])
def test_a_nan_is_never_sampled_away(position):
    x, weight, _, targets = problem(bias=False)
    x.view(-1, FEATURES)[position, 2] = float("nan")
    weight.requires_grad_()
    linear_cross_entropy(x, weight, targets, keep=0.2, chunk=7).backward()
    assert weight.grad.isnan().any()


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [(False, (64 * FEATURES + CLASSES * FEATURES) * 8), (True, 64 * FEATURES * 8 + 64 * 8)],
    ids=["gradients", "recompute"],
)
def test_held_bytes(recompute, expected):
    x, weight, _, targets = problem(bias=False, shape=(64,))
    x.requires_grad_(), weight.requires_grad_()
    held = measure_held_bytes(lambda: linear_cross_entropy(x, weight, targets, recompute=recompute), exclude=[weight])
    assert held.total_bytes == expected


def test_no_more_than_a_chunk_of_logits_exists_at_a_time():
    x, weight, _, targets = problem(bias=False, shape=(64,))
    x.requires_grad_(), weight.requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == CLASSES:
                    largest = max(largest, tensor.shape[0])
            return out

    with Watch():
        linear_cross_entropy(x, weight, targets, chunk=8).backward()
    assert largest == 8


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("keep", [None, 0.5])
def test_compiled(keep, recompute):
    x, weight, bias, targets = problem()
    function = torch.compile(
        lambda *t: linear_cross_entropy(t[0], t[1], targets, t[2], chunk=8, keep=keep, recompute=recompute),
        fullgraph=True,
        backend="aot_eager",
    )
    ours = value_and_gradients(function, [x, weight, bias])
    stock = value_and_gradients(lambda *t: reference(t[0], t[1], targets, t[2]), [x, weight, bias])
    torch.testing.assert_close((ours[0], ours[1][0], ours[1][2]), (stock[0], stock[1][0], stock[1][2]))
    assert torch.allclose(ours[1][1], stock[1][1]) == (keep is None)


@pytest.mark.parametrize("chunk", [8, 64])
def test_compiled_logits_are_not_kept_when_they_are_to_be_computed_again(chunk):
    tokens, features, classes = 64, 16, 512
    x, weight = torch.randn(tokens, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
    targets = torch.randint(0, classes, (tokens,))
    function = torch.compile(
        lambda x, weight: linear_cross_entropy(x, weight, targets, chunk=chunk, recompute=True),
        backend="aot_eager_decomp_partition",
    )
    function(x, weight)
    held = measure_held_bytes(lambda: function(x, weight), exclude=[x, weight, targets])
    assert held.total_bytes < 0.1 * tokens * classes * 4


def test_compiled_draws_are_made_once():
    # Every row of dW belongs to one token: what is drawn shows as one over its probability.
    tokens = 8
    weight, x = torch.zeros(tokens, tokens, requires_grad=True), torch.eye(tokens)
    function = torch.compile(
        lambda weight: linear_cross_entropy(x, weight, torch.arange(tokens), keep=0.5, reduction="sum"),
        fullgraph=True,
        backend="aot_eager",
    )
    (gradient,) = torch.autograd.grad(function(weight), weight)
    # Column n is token n's cotangent, weighted: all scores are equal, so weights are 2 or 0.
    factors = gradient.diagonal() / (1 / tokens - 1)
    assert sorted(factors.tolist()) == pytest.approx([0.0] * 4 + [2.0] * 4)
    torch.testing.assert_close(gradient, (torch.full((tokens, tokens), 1 / tokens) - torch.eye(tokens)) * factors)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("keep", [None, 0.5])
def test_checkpointed(keep, use_reentrant):
    x, weight, bias, targets = problem()

    def block(x, weight, bias):
        return functional.dropout(linear_cross_entropy(x.tanh(), weight, targets, bias, keep=keep).expand(50), 0.5)

    torch.manual_seed(1)
    plain = value_and_gradients(lambda *t: block(*t).sum(), [x, weight, bias])
    torch.manual_seed(1)
    ours = value_and_gradients(lambda *t: checkpoint(block, *t, use_reentrant=use_reentrant).sum(), [x, weight, bias])
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast(recompute):
    x, weight, bias, targets = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_gradients(
            lambda *t: linear_cross_entropy(t[0], t[1], targets, t[2], recompute=recompute), [x, weight, bias]
        )
        stock = value_and_gradients(lambda *t: reference(t[0], t[1], targets, t[2]), [x, weight, bias])
    assert ours[0].dtype == stock[0].dtype
    assert [part.dtype for part in ours[1]] == [part.dtype for part in stock[1]]
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-3)


def test_low_precision_parameters():
    x, weight, bias, targets = problem(dtype=torch.bfloat16)
    ours = value_and_gradients(lambda *t: linear_cross_entropy(t[0], t[1], targets, t[2]), [x, weight, bias])
    assert ours[0].dtype == torch.bfloat16
    assert all(part.dtype == torch.bfloat16 for part in ours[1])


@pytest.mark.parametrize("recompute", [False, True])
def test_second_derivatives_are_refused(recompute):
    x, weight, _, targets = problem(bias=False)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(
        linear_cross_entropy(x, weight, targets, recompute=recompute), weight, create_graph=True
    )
    with pytest.raises(SecondDerivativeError, match="linear layer with cross-entropy"):
        gradient.sum().backward()


def test_second_derivatives_are_right_where_exactness_is_forced():
    x, weight, _, targets = problem(bias=False)
    with forced_exact():
        ours = torch.autograd.functional.hessian(lambda w: linear_cross_entropy(x, w, targets, keep=0.5), weight)
    torch.testing.assert_close(ours, torch.autograd.functional.hessian(lambda w: reference(x, w, targets), weight))


def test_forward_mode_is_refused():
    x, weight, _, targets = problem(bias=False)
    with pytest.raises(ForwardModeError, match="linear layer with cross-entropy"):
        torch.func.jvp(lambda w: linear_cross_entropy(x, w, targets), (weight,), (weight,))


def test_per_example_gradients():
    x, weight, _, targets = problem(bias=False)
    ours = vmap(grad(lambda w, x, t: linear_cross_entropy(x, w, t, chunk=3)), (None, 0, 0))(weight, x, targets)
    stock = vmap(grad(lambda w, x, t: reference(x, w, t)), (None, 0, 0))(weight, x, targets)
    torch.testing.assert_close(ours, stock)


def test_no_rows():
    weight = torch.randn(CLASSES, FEATURES, requires_grad=True)
    loss = linear_cross_entropy(torch.zeros(0, FEATURES), weight, torch.zeros(0, dtype=torch.int64), reduction="sum")
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"targets": torch.full((3, 7), CLASSES)}, TargetError, f"there are {CLASSES} classes"),
        ({"targets": torch.full((3, 7), -1)}, TargetError, r"\[-1, -1\]"),
        ({"targets": torch.zeros(3, 7)}, TargetError, "torch.float32"),
        ({"targets": torch.zeros(7, 3, dtype=torch.int64)}, ShapeError, r"\(7, 3\)"),
        ({"weight": torch.zeros(CLASSES, 4)}, ShapeError, r"\(11, 4\)"),
        ({"bias": torch.zeros(4)}, ShapeError, r"\(4,\)"),
        ({"keep": 1.5}, BudgetError, "1.5"),
        ({"chunk": 0}, BudgetError, "0"),
        ({"label_smoothing": 2.0}, BudgetError, "2.0"),
        ({"reduction": "means"}, UnknownNameError, "mean"),
    ],
)
def test_bad_input(change, error, words):
    x, weight, bias, targets = problem(dtype=torch.float32)
    arguments = {"x": x, "weight": weight, "bias": bias, "targets": targets, **change}
    with pytest.raises(error, match=words):
        linear_cross_entropy(**arguments)


def test_the_public_name():
    assert cheapgrad.linear_cross_entropy is cross_entropy.linear_cross_entropy
