"""Models that are compiled, sharded or replicated: the order works, or the error names the right one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cheapgrad.errors import ConversionError, WrapperOrderError
from tests.convert.models import Network, convert, gradients, picture


@pytest.fixture
def process_group():
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


CONVERT_FIRST = r"convert first: handle = cheapgrad\.approximate\(model, \.\.\.\), then"


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_a_part(model):
    model.blocks[1].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda model: torch.compile(model, backend="eager"), "the model"),
        (lambda model: nn.Sequential(torch.compile(model, backend="eager")), "0"),
        (compile_in_place, "the model"),
        (compile_a_part, "blocks.1"),
    ],
)
def test_a_compiled_model_names_the_right_order(wrap, name):
    wrapped = wrap(Network())
    before = picture(wrapped)
    with pytest.raises(WrapperOrderError, match=rf"^{name} is compiled already .*{CONVERT_FIRST} torch\.compile"):
        convert(wrapped)
    assert picture(wrapped) == before


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_names_the_right_order():
    model = Network()
    fully_shard(model.blocks[0])
    with pytest.raises(WrapperOrderError, match=rf"^blocks.0 is sharded already .*{CONVERT_FIRST} fully_shard"):
        convert(model)
    assert type(model.head) is nn.Linear


@pytest.mark.usefixtures("process_group")
def test_converted_then_sharded_works():
    model, x = Network(), torch.randn(16, 32)
    handle = convert(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with handle.exact():
        model(x).sum().backward()
    handle.revert()
    assert type(model.blocks[0].fc1) is nn.Linear
    model(x).sum().backward()


@pytest.mark.usefixtures("process_group")
def test_a_layer_sharded_by_itself_cannot_be_reverted():
    model = Network()
    handle = convert(model)
    fully_shard(model.head)
    with pytest.raises(ConversionError, match=r"layer 'head' is a FSDPSketchedLinear now.*fully_shard"):
        handle.revert()
    assert type(model.blocks[0].fc1).__name__ == "SketchedLinear", "nothing is reverted by halves"


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_works_in_either_order():
    x = torch.randn(16, 32)
    for converted_first in (True, False):
        model = Network()
        if converted_first:
            handle = convert(model)
            wrapped = DistributedDataParallel(model)
        else:
            wrapped = DistributedDataParallel(model)
            handle = convert(wrapped)
        assert handle.rows[0].name == "blocks.0.fc1", "names are those of the model inside"
        wrapped(x).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert all(key.startswith("module.") for key in wrapped.state_dict())
        handle.revert()


def test_data_parallel_is_transparent():
    model = Network()
    wrapped = nn.DataParallel(model)
    handle = convert(wrapped)
    assert handle.model is model
    wrapped(torch.randn(16, 32)).sum().backward()
    replica = model.head._replicate_for_data_parallel()
    assert type(replica) is type(model.head)
    assert replica._cheapgrad is model.head._cheapgrad


def test_a_compiled_model_follows_exact_and_revert():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), torch.randn(32, 32)
    expected = gradients(model, x)
    handle = convert(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def error():
        found = [gradients(compiled, x, seed) for seed in range(2)]
        return max((one - two).abs().max() for pair in found for one, two in zip(pair, expected, strict=True))

    assert error() > 0.1
    with handle.exact():
        assert error() < 1e-4
    assert error() > 0.1
    rows = handle.predict(lambda: compiled(x).square().sum())
    assert all(row.relative_variance > 0 for row in rows if row.kind == "Linear")
    handle.revert()
    assert error() < 1e-4
