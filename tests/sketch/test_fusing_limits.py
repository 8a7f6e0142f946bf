"""When codecs are compiled, when not, and how that is said; nothing is optimised here, so that it takes no time."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor import cpp_builder
from torch.func import vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cheapgrad
from cheapgrad import recipes
from cheapgrad.errors import BudgetError, FusingWarning
from cheapgrad.ops.dropout import Dropping
from cheapgrad.sketch import DenseMatrix, Moment, Operands, StochasticRounding, _compiling, fusing

ROWS, COLUMNS = 512, 64
LOOK_FOR_COMPILER = _compiling._look_for_compiler


@pytest.fixture(autouse=True)
def _state(monkeypatch):
    """A process in which nothing was compiled and nothing failed yet, and a compiler that runs graphs as they are."""
    monkeypatch.setattr(fusing, "_versions", _compiling.Versions())
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(_compiling, "_look_for_compiler", lambda device_type: "")
    torch._dynamo.reset()
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


@pytest.fixture
def no_compiler(_state, monkeypatch):
    """A machine whose C++ compiler has another name."""
    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(_compiling, "_look_for_compiler", LOOK_FOR_COMPILER.__wrapped__)
    with inductor_config.patch("cpp.cxx", ("no-such-compiler",)):
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


def store(matrix: torch.Tensor, *, fused: bool = True) -> tuple[torch.Tensor, ...]:
    return StochasticRounding(4, fused=fused).store(Operands(Moment.STORED, DenseMatrix(matrix)))


def warnings_of(run, *arguments) -> list[str]:
    """Return what fusing warns of while something runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(*arguments)
    return [str(warning.message) for warning in caught if warning.category is FusingWarning]


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))


def scale(rows: torch.Tensor, *, by: float) -> tuple[torch.Tensor]:
    return (rows * by,)


def test_a_function_that_fails_is_named_and_all_others_stay_compiled(monkeypatch):
    compile_as_is, matrix = torch.compile, torch.randn(ROWS, COLUMNS)

    def fail_on_codes(function, **options):
        if "encode_groups" in function.__name__:
            raise OSError("the linker failed")
        return compile_as_is(function, **options)

    monkeypatch.setattr(torch, "compile", fail_on_codes)
    model = small_model()
    handle = cheapgrad.approximate(model, recipes.memory(4, fused=True))
    assert "unfused" not in str(handle)
    torch.manual_seed(1)
    plain = store(matrix, fused=False)
    torch.manual_seed(1)
    with pytest.warns(
        FusingWarning,
        match=r"no effect on encode_groups \(float32\[2d\], float32\[2d\], float32\[1d\], bits=4\): compiling "
        r"failed: OSError: the linker failed; unfused they are as correct",
    ):
        kept = store(matrix)
    assert all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(512, 128)).sum().backward()
    functions = {version.function.__name__: run for version, run in fusing._versions._compiled.items()}
    assert functions.pop("encode_groups") is None
    assert {"_encode_slope", "_pull_back_slope", "decode_groups"} <= set(functions)
    assert None not in functions.values()
    note = "codecs of 3 layers are to be fused; in this process run unfused: encode_groups (float32[2d], "
    assert note in " ".join(str(handle).split())


def test_types_ranks_and_autocast_do_not_add_up_to_the_compilers_limit():
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error", FusingWarning)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for shape in ((512, 64), (128, 128), (16, 32, 64)):
                for autocast in (False, True):
                    x = torch.randn(shape).to(dtype)
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        (result,) = fusing.work_by_rows(scale, (x,), fused=True, by=2.0)
                    assert torch.equal(result, x * 2.0)
    assert len(fusing._versions._compiled) == 16
    assert fusing.why_unfused() == ""


def test_shapes_that_reach_the_compilers_limit_cost_their_version_only():
    def cut(rows, *, by):
        return (rows[:, : [3, 5, 7, 11][rows.shape[1] % 4]] * by,)

    def run_widths():
        for width in (64, 65, 66, 67, 68, 69):
            x = torch.randn(512, width)
            (result,) = fusing.work_by_rows(cut, (x,), fused=True, by=1.0)
            assert torch.equal(result, cut(x, by=1.0)[0])

    fusing.work_by_rows(scale, (torch.ones(512, 64),), fused=True, by=2.0)
    with torch._dynamo.config.patch(recompile_limit=2):
        (message,) = warnings_of(run_widths)
    assert "no effect on cut (float32[2d], by=1.0): it was compiled anew until the compiler's limit" in message
    assert "recompile_limit = 2); do shapes change from step to step?" in message
    runs = {version.function.__name__: run for version, run in fusing._versions._compiled.items()}
    assert runs["cut"] is None
    assert runs["scale"] is not None


def test_an_option_that_changes_in_every_step_does_not_fill_the_memory():
    x = torch.randn(ROWS, COLUMNS)

    def run_steps():
        for step in range(40):
            (result,) = fusing.work_by_rows(scale, (x,), fused=True, by=float(step))
            assert torch.equal(result, x * float(step))

    (message,) = warnings_of(run_steps)
    assert "no effect on further versions of scale: 32 of it are compiled" in message
    assert len(fusing._versions._compiled) == 32


def test_a_chance_that_changes_in_every_step_is_compiled_once():
    x = torch.randn(ROWS, COLUMNS)
    for step in range(1, 10):
        dropping = Dropping(step / 10, fused=True)
        plain = Dropping(step / 10)
        packed = dropping.draw(x)
        assert torch.equal(dropping.scale(x, packed), plain.scale(x, packed))
    assert sorted(version.function.__name__ for version in fusing._versions._compiled) == ["_pack_mask", "_scale_kept"]


def test_without_a_compiler_the_conversion_says_so_and_steps_are_quiet(no_compiler):
    model = small_model()
    with pytest.warns(FusingWarning, match=r"all codecs on cpu: InvalidCxxCompiler: .*no-such-compiler") as caught:
        handle = cheapgrad.approximate(model, recipes.memory(4, fused=True))
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(512, 128)).sum().backward()
        cheapgrad.approximate(small_model(), recipes.memory(4))
    assert fusing._versions._compiled == {}
    assert "codecs of 3 layers are to be fused; in this process run unfused: all codecs on cpu: Invalid" in " ".join(
        str(handle).split()
    )
    with pytest.warns(FusingWarning, match="all codecs on cpu"):
        cheapgrad.approximate(small_model(), recipes.memory(4, fused=True))


def test_without_a_compiler_codecs_by_themselves_say_so_once(no_compiler):
    matrix = torch.randn(ROWS, COLUMNS)
    assert len(warnings_of(store, matrix)) == 1
    assert warnings_of(store, matrix) == []


def test_a_compiler_that_is_turned_off_is_named():
    with torch._dynamo.config.patch(disable=True), pytest.warns(FusingWarning, match="torch.compile is turned off"):
        cheapgrad.approximate(small_model(), recipes.memory(4, fused=True))


def test_a_device_that_nothing_is_compiled_for_is_named():
    assert "all codecs on mps: codecs are compiled for cpu and cuda only" in fusing.note_obstacle("mps")


def test_an_error_of_the_function_itself_is_raised():
    def divide(rows, *, by):
        raise ZeroDivisionError(f"{by} is zero")

    with pytest.raises(ZeroDivisionError, match="0 is zero"):
        fusing.work_by_rows(divide, (torch.zeros(ROWS, COLUMNS),), fused=True, by=0)
    assert not fusing.why_unfused()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_entries_are_counted_not_bytes(bits, count_compiled, monkeypatch):
    """16384 entries are compiled both ways, one row fewer are not; pieces are of as many entries both ways."""
    codec = StochasticRounding(bits, fused=True)
    for rows, expected in ((256, ["encode_groups", "decode_groups"]), (255, [])):
        matrix = torch.randn(rows, 64)
        kept = codec.store(Operands(Moment.STORED, DenseMatrix(matrix)))
        codec.restore(kept, rows, 64, torch.float32).dense()
        assert count_compiled == expected
        count_compiled.clear()
    sizes = []

    def decode(packed, scales, **options):
        sizes.append(packed.shape[0])
        return (torch.zeros(packed.shape[0], 64),)

    monkeypatch.setattr(fusing, "_PIECE", 64 * 64)
    monkeypatch.setattr("cheapgrad.sketch.stochastic_rounding.decode_groups", decode)
    codec.restore(kept, 255, 64, torch.float32).dense()
    assert sizes == [64, 64, 64, 63]


class Named(torch.Tensor):
    """A tensor of another class, whose operations its class may watch."""


def test_what_is_watched_or_small_is_not_compiled(count_compiled):
    matrix = torch.randn(ROWS, COLUMNS)
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
