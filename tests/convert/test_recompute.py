"""`Rule(recompute=True)`: what attention saves is computed again, exactly, and nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from cheapgrad import Rule, approximate, get_handle
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import OverwrittenError
from cheapgrad.sketch import RowSample, StochasticRounding

CODES = StochasticRounding(bits=4)


class Attention(nn.Module):
    """Pre-norm attention with one projection for queries, keys and values."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        parts = self.project(self.norm(x)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts)
        return x + self.out(mixed.transpose(1, 2).reshape(B, T, D))


class SeparateAttention(Attention):
    """The same with three projections, as most libraries write it."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__(width, heads)
        self.project = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        normed = self.norm(x)
        parts = [layer(normed).view(B, T, self.heads, -1).transpose(1, 2) for layer in self.project]
        mixed = functional.scaled_dot_product_attention(*parts)
        return x + self.out(mixed.transpose(1, 2).reshape(B, T, D))


def gradients(model, x):
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def convert(model, pattern="*", **fields):
    return approximate(model, Rule(pattern, recompute=True, **fields), skip_small=False)


def projections(name, module):
    return not name.startswith("out")


@pytest.mark.parametrize("build", [Attention, SeparateAttention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_projections_of_attention_stay_exact(build, dtype):
    # From the norm's input everything is computed again: no code is used, so that nothing is random.
    model, x = build().to(dtype), torch.randn(3, 16, 64, dtype=dtype)
    expected = gradients(model, x)
    convert(model, projections, stored=CODES)
    for found, wanted in zip(gradients(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5 if dtype is torch.float32 else 1e-12, atol=1e-5)


@pytest.mark.parametrize("build", [Attention, SeparateAttention])
def test_queries_keys_and_values_are_not_held(build):
    model, x = build(), torch.randn(3, 16, 64, requires_grad=True)
    approximate(model, Rule(stored=CODES), skip_small=False)

    def held():
        return measure_held_bytes(lambda: model(x).sum(), exclude=[x, *model.parameters()]).total_bytes

    without = held()
    get_handle(model).revert()
    convert(model, stored=CODES)
    rows = 3 * 16
    # Three tensors less; the norm's codes go as well, since its input (here the excluded x) is what they start from.
    assert without - held() >= 3 * rows * 64 * 4


def test_unbiased_with_rows_of_the_cotangent():
    torch.manual_seed(3)
    model, x = Attention().double(), torch.randn(2, 8, 64, dtype=torch.float64)
    expected = torch.cat([gradient.flatten() for gradient in gradients(model, x)])
    convert(model, stored=CODES, cotangent=RowSample(0.5))
    draws = torch.stack([torch.cat([part.flatten() for part in gradients(model, x)]) for _ in range(400)])
    directions = torch.randn(32, expected.numel(), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    along = (draws - expected) @ directions.T
    z = along.mean(0) / (along.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < 5.2


def test_exact_eval_and_revert_hold_no_hooks_back():
    model, x = Attention(), torch.randn(2, 8, 64)
    expected = gradients(model, x)
    handle = convert(model, stored=CODES)
    with handle.exact():
        assert all(torch.equal(one, two) for one, two in zip(gradients(model, x), expected, strict=True))
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    handle.revert()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called
    assert all(torch.equal(one, two) for one, two in zip(gradients(model, x), expected, strict=True))


def test_a_forward_that_raises_leaves_no_hook_behind():
    model = Attention()
    convert(model, stored=CODES)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 8, 63))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    gradients(model, torch.randn(2, 8, 64))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_recompute_too(duplicate):
    model, x = Attention(), torch.randn(2, 8, 64)
    expected = gradients(model, x)
    convert(model, projections, stored=CODES)
    for found, wanted in zip(gradients(duplicate(model), x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint(use_reentrant):
    model, x = Attention().double(), torch.randn(2, 8, 64, dtype=torch.float64)
    expected = gradients(model, x)
    convert(model, projections, stored=CODES)
    found = gradients(_Checkpointed(model, use_reentrant), x)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-10)


class _Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=self.use_reentrant)


def test_a_checkpoint_around_the_model_holds_its_input_only():
    model, x = Attention(), torch.randn(4, 32, 64, requires_grad=True)
    convert(model, stored=CODES)
    held = measure_held_bytes(
        lambda: checkpoint(model, x, use_reentrant=False).sum(), exclude=[x, *model.parameters()]
    ).total_bytes
    assert held < 4 * 32 * 64 * 4


def test_two_backward_passes_through_one_graph():
    model, x = Attention().double(), torch.randn(2, 8, 64, dtype=torch.float64)
    expected = gradients(model, x)[1:]
    convert(model, projections, stored=CODES)
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * wanted, rtol=1e-10, atol=1e-10)


def test_a_parameter_overwritten_before_backward_is_refused():
    model, x = Attention(), torch.randn(2, 8, 64)
    convert(model, projections, stored=CODES)
    loss = model(x).sum()
    with torch.no_grad():
        model.project.weight.mul_(2)
    with pytest.raises((OverwrittenError, RuntimeError), match=r"overwritten|modified by an inplace operation"):
        loss.backward()


def test_queries_overwritten_in_place_are_held():
    class Scaled(Attention):
        def forward(self, x: Tensor) -> Tensor:
            B, T, D = x.shape
            projected = self.project(self.norm(x))
            projected.mul_(0.5)
            parts = projected.view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
            return functional.scaled_dot_product_attention(*parts).sum((1, 2))

    model, x = Scaled().double(), torch.randn(2, 8, 64, dtype=torch.float64)
    model.out.requires_grad_(False)
    expected = gradients(model, x)
    convert(model, projections, stored=CODES)
    for found, wanted in zip(gradients(model, x), expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_compiled_graphs_take_the_hooks():
    torch._dynamo.reset()
    model, x = Attention(), torch.randn(2, 8, 64)
    convert(model, stored=StochasticRounding(8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_keeps_its_mask_in_a_checkpoint(use_reentrant):
    # What a layer draws depends on its neighbours, which a forward without gradients does not see.
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Dropout(0.5))
    convert(model, stored=StochasticRounding(8))
    x, masks = torch.randn(4, 64, requires_grad=True), []
    model[-1].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    for _ in range(2):
        # Otherwise the second pass ends before it comes to the dropout.
        with set_checkpoint_early_stop(enable=False):
            checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_codes_of_a_norm_that_attention_recomputes_from_are_made_once():
    model, x = Attention(), torch.randn(2, 8, 64)
    convert(model, stored=CODES)
    use = model.norm._cheapgrad.plan.root_use
    assert not use.is_kept
    gradients(model, x)
    assert use.is_kept
    feed_forward = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    convert(feed_forward, stored=CODES)
    gradients(feed_forward, x)
    assert not feed_forward[0]._cheapgrad.plan.root_use.is_kept


def test_a_block_in_a_checkpoint_saves_the_same_twice():
    # It is run again without the model around it.
    model, stock = Attention(), Attention()
    stock.load_state_dict(model.state_dict())

    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    head = nn.Linear(64, 64)
    converted = nn.Sequential(model, copy.deepcopy(head))
    convert(converted, stored=CODES)
    converted[0] = Checkpointed(model)
    reference = nn.Sequential(stock, head)
    x = torch.randn(2, 8, 64)
    for _ in range(2):
        mine = gradients(converted, x)
    theirs = gradients(reference, x)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.98
