"""Codecs compiled into single passes: the codes of one operation after the other, the same law, and no surprises."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cheapgrad
from cheapgrad import recipes
from cheapgrad.errors import BudgetError, FusingWarning
from cheapgrad.ops.activation import Activation
from cheapgrad.ops.stored_derivative import apply_derivative, store_derivative
from cheapgrad.sketch import DenseMatrix, Moment, Operands, StochasticRounding, fusing
from tests.sketch.enumeration import feed

ROWS, COLUMNS = 512, 64
LAST_DITHER = 1 - 2.0**-24


@pytest.fixture(autouse=True)
def _state(monkeypatch):
    """A process in which nothing failed yet."""
    monkeypatch.setattr(fusing, "_compiler", fusing._Compiler())
    torch.manual_seed(0)


@pytest.fixture
def count_compiled(monkeypatch):
    """Count calls of compiled functions, which run as they are."""
    calls = []

    def run(function, row_count, tensors, options):
        calls.append(function.__name__)
        return function(*tensors, **options)

    monkeypatch.setattr(fusing, "_run_compiled", run)
    return calls


def hard_values(dtype: torch.dtype) -> torch.Tensor:
    """Return groups without slack: constants, far offsets, tiny and huge spans, steps that are bfloat16 numbers."""
    matrix = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    matrix[0:16] = 1.001
    matrix[16:32] += 3000
    matrix[32:48] *= 1e-30
    matrix[48:64] *= 1e4 if dtype is torch.float16 else 1e30
    steps = torch.randint(128, 256, (448, 1)) * 2.0 ** torch.randint(-9, 0, (448, 1))
    matrix[64:] = torch.rand(448, COLUMNS, dtype=torch.float64) * steps
    matrix[64:, 0], matrix[64:, 1:40] = 0, 15 * steps
    return matrix.to(dtype)


def both_ways(codec: StochasticRounding, matrix: torch.Tensor):
    """Return kept tensors and decoded matrices, unfused and fused, of the same draws."""
    results = []
    for fused in (False, True):
        one = StochasticRounding(codec.bits, codec.group, fused)
        torch.manual_seed(1)
        kept = one.store(Operands(Moment.STORED, DenseMatrix(matrix)))
        results.append((kept, one.restore(kept, *matrix.shape, matrix.dtype).dense()))
    assert not fusing.why_unfused()
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (4, torch.float32),
        (4, torch.bfloat16),
        (4, torch.float16),
        (4, torch.float64),
        (8, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("dither", [None, LAST_DITHER])
def test_fused_codes_are_those_of_one_operation_after_the_other(bits, dtype, dither, monkeypatch):
    """Scales to the bit; an entry moves by at most a step, and differs only where a last bit decides."""
    matrix = hard_values(dtype)
    if dither is not None:
        feed(monkeypatch, torch.full((ROWS,), dither).numpy())
    (kept, plain), (fused_kept, fused) = both_ways(StochasticRounding(bits), matrix)
    assert torch.equal(kept[1], fused_kept[1])
    step = kept[1][:, 1:].double()
    # Half a unit of the last place for what the result is rounded to.
    slack = torch.finfo(dtype).eps * matrix.double().abs()
    assert ((fused.double() - matrix.double()).abs() <= step * (1 + 1e-4) + slack).all()
    differs = ~torch.isclose(plain.double(), fused.double(), rtol=1e-5, atol=0) & (step > 1e-35)
    assert differs.double().mean() <= (0.02 if dither is not None else 0.002)


@pytest.mark.slow
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_group_and_nowhere_else(value):
    matrix = torch.randn(ROWS, 128)
    clean = both_ways(StochasticRounding(4), matrix)[1][1]
    matrix[1, 70] = value
    (_, plain), (_, fused) = both_ways(StochasticRounding(4), matrix)
    assert not fused[1, 70].isfinite()
    assert torch.equal(plain.isfinite(), fused.isfinite())
    fused[1, 64:], clean[1, 64:] = 0, 0
    assert torch.equal(fused, clean)


def slope_errors(bits: int, draws: int, *, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean error of fused slopes of GELU over draws, and its standard error, as sums over 64 features."""
    x = torch.randn(256, COLUMNS) * 2
    activation, codec = Activation("gelu"), StochasticRounding(bits, fused=True)
    exact = activation.derivative(x.double(), x.double()).sum(1)
    sums = []
    for _ in range(draws):
        stored = store_derivative(x, x, activation, codec)
        sums.append(apply_derivative(stored, torch.ones_like(x)).double().sum(1) - exact + shift)
    stacked = torch.stack(sums)
    return stacked.mean(0), stacked.std(0) / draws**0.5


@pytest.mark.slow
def test_fused_slopes_are_unbiased_and_a_biased_twin_is_caught():
    """Five and a half standard errors: 256 sums, family 1e-5."""
    mean, error = slope_errors(2, 400)
    assert not fusing.why_unfused()
    assert float(error.mean()) < 0.05, "inconclusive"
    assert (mean.abs() < 5.5 * error + 1e-4).all()
    mean, error = slope_errors(2, 400, shift=0.5)
    assert (mean.abs() > 5.5 * error).any()


@pytest.mark.slow
def test_a_fused_model_has_the_gradients_of_an_unfused_one():
    """A transformer block with dropout; convolutions, batch norm and ReLU in place: the same up to last bits."""
    block = nn.TransformerEncoderLayer(64, 1, 256, activation="gelu", batch_first=True, dropout=0.1)
    images = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    for model, x in ((block, torch.randn(16, 32, 64)), (images, torch.randn(8, 8, 16, 16))):
        gradients = []
        for fused in (False, True):
            converted = copy.deepcopy(model)
            cheapgrad.approximate(converted, recipes.memory(4, fused=fused), skip_small=False)
            for _ in range(2):
                converted.zero_grad()
                torch.manual_seed(2)
                converted(x).square().mean().backward()
            gradients.append([parameter.grad for parameter in converted.parameters()])
        assert not fusing.why_unfused()
        for one, other in zip(*gradients, strict=True):
            assert (one - other).norm() <= 1e-3 * one.norm() + 1e-7


def test_a_compiler_that_fails_is_a_warning_and_a_line_and_nothing_else(monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no C++ compiler was found")

    fusing._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", fail)
    matrix = torch.randn(ROWS, COLUMNS)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    handle = cheapgrad.approximate(model, recipes.memory(4, fused=True))
    assert "unfused" not in str(handle)
    torch.manual_seed(1)
    plain = StochasticRounding(4).store(Operands(Moment.STORED, DenseMatrix(matrix)))
    torch.manual_seed(1)
    with pytest.warns(FusingWarning, match=r"compiling failed: OSError: no C\+\+ compiler was found; they run unfused"):
        kept = StochasticRounding(4, fused=True).store(Operands(Moment.STORED, DenseMatrix(matrix)))
    assert all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(512, 128)).sum().backward()
    assert "codecs of 3 layers were to be fused, but run unfused: OSError: no C++ compiler was found" in " ".join(
        str(handle).split()
    )


def test_an_error_of_the_function_itself_is_raised():
    def divide(rows, *, by):
        raise ZeroDivisionError(f"{by} is zero")

    with pytest.raises(ZeroDivisionError, match="0 is zero"):
        fusing.work_by_rows(divide, (torch.zeros(ROWS, COLUMNS),), fused=True, by=0)
    assert not fusing.why_unfused()


class Named(torch.Tensor):
    """A tensor of another class, whose operations its class may watch."""


def test_what_is_watched_or_small_is_not_compiled(count_compiled):
    codec, matrix = StochasticRounding(4, fused=True), torch.randn(ROWS, COLUMNS)

    def store(x):
        return codec.store(Operands(Moment.STORED, DenseMatrix(x)))

    store(matrix)
    assert count_compiled == ["encode_groups"]
    store(matrix[:8])
    store(matrix.as_subclass(Named))
    vmap(store, randomness="different")(matrix.expand(4, -1, -1))
    with FlopCounterMode(display=False):
        store(matrix)
    with torch.inference_mode():
        store(matrix)
    store(torch.empty(ROWS, COLUMNS, device="meta"))
    assert count_compiled == ["encode_groups"]


def test_without_being_asked_for_nothing_is_compiled(count_compiled):
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 128), nn.ReLU())
    cheapgrad.approximate(model, recipes.memory(4))
    model(torch.randn(512, 128)).sum().backward()
    assert count_compiled == []


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_fused_and_reverted_models_are_not(copy_of, count_compiled):
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 128), nn.ReLU())
    cheapgrad.approximate(model, recipes.memory(4, fused=True))
    twin = copy_of(model)
    twin(torch.randn(512, 128)).sum().backward()
    assert {"encode_groups", "encode_groups_twice", "_encode_slope", "_pull_back_slope", "_pack_branch"} < set(
        count_compiled
    )
    count_compiled.clear()
    handle = cheapgrad.convert.get_handle(twin)
    with handle.exact():
        twin(torch.randn(512, 128)).sum().backward()
    handle.revert()
    twin(torch.randn(512, 128)).sum().backward()
    assert count_compiled == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_saves_the_same_twice(use_reentrant, count_compiled):
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 128))
    cheapgrad.approximate(model, recipes.memory(4, fused=True))
    x = torch.randn(512, 128, requires_grad=True)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        torch.manual_seed(3)
        run(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert "encode_groups" in count_compiled
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_the_handle_says_how_codecs_run():
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    plain = " ".join(str(cheapgrad.approximate(copy.deepcopy(model), recipes.memory(4))).split())
    assert "codecs of 3 layers run unfused, one operation after the other: fused=True" in plain
    fused = str(cheapgrad.approximate(copy.deepcopy(model), recipes.memory(4, fused=True)))
    assert "unfused" not in fused


@pytest.mark.parametrize("fused", [1, None, "yes"])
def test_fused_is_true_or_false(fused):
    with pytest.raises(BudgetError, match=f"fused must be True or False, but got {fused!r}"):
        StochasticRounding(4, fused=fused)
