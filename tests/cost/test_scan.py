"""Who a scan says computes and holds what, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import cheapgrad
from cheapgrad.cost import CostReport, measure_held_bytes
from cheapgrad.errors import UnknownNameError
from cheapgrad.sketch import ColumnSample, LowRank, RowProjection, RowSample, StochasticRounding
from tests.cost.models import (
    Block,
    Branches,
    Checkpointed,
    ReturnsPair,
    Shared,
    TinyBert,
    make_batch,
    make_network,
)

ROWS = 4


def flops(row):
    return row.forward_flops, row.backward_flops, row.recompute_flops


def check_sums(report):
    """Own rows sum to the total, and so do the operations; inclusive figures of the model are the total's."""
    for figure in ("forward_flops", "backward_flops", "recompute_flops", "saved_bytes"):
        total = getattr(report.total, figure)
        assert sum(getattr(row, figure) for row in report.rows) == total
        assert sum(getattr(operation, figure) for operation in report.operations) == total
    assert sum(row.parameters for row in report.rows) == report.total.parameters


@pytest.mark.parametrize("needs_grad", [False, True])
def test_branches_that_share_an_input_are_told_apart(needs_grad):
    report = cheapgrad.scan(Branches(), torch.randn(ROWS, 16, requires_grad=needs_grad))
    product = 2 * ROWS * 16 * 32
    for name in ("first", "second"):
        assert flops(report.row(name)) == (product, (1 + needs_grad) * product, 0)
    assert flops(report.row("head")) == (2 * ROWS * 32 * 8, 4 * ROWS * 32 * 8, 0)
    check_sums(report)


def test_products_outside_of_layers_belong_to_their_module():
    report = cheapgrad.scan(nn.Sequential(Block(8), Block(8)), torch.randn(ROWS, 8))
    mixing, layer = 2 * ROWS * 8 * 8, 2 * ROWS * 8 * 16
    assert flops(report.row("0")) == (mixing, mixing, 0)
    assert flops(report.row("1")) == (mixing, 2 * mixing, 0)
    assert flops(report.row("1.up")) == (layer, 2 * layer, 0)
    inside = report.row("1").inclusive
    assert (inside.forward_flops, inside.backward_flops) == (mixing + 2 * layer, 2 * (mixing + 2 * layer))
    assert report.row("").inclusive == report.total
    check_sums(report)


def test_shared_modules_are_one_row_and_part_of_both_parents():
    report = cheapgrad.scan(Shared(), torch.randn(ROWS, 8, requires_grad=True))
    once = 2 * ROWS * (8 * 8 + 2 * 8 * 16)
    assert report.row("left.0").calls == 3
    assert report.row("left.0").inclusive.forward_flops == report.total.forward_flops == 3 * once
    assert report.row("left").inclusive.forward_flops == once
    assert report.row("right").inclusive.forward_flops == 2 * once
    assert report.row("right").inclusive.backward_flops == 4 * once
    assert report.total.parameters == report.row("right").inclusive.parameters
    check_sums(report)


# What a module, a method and operations alone compute again: not what nothing behind it needs, where it stops early.
FORWARD = {"block.0": 2 * ROWS * 16 * 32, "block.2": 2 * ROWS * 32 * 16}
MIXING = 2 * ROWS * 16 * 16


@pytest.mark.parametrize(
    ("kind", "use_reentrant", "again"),
    [
        ("module", False, {"block.0": FORWARD["block.0"], "block.2": 0, "": 0}),
        ("module", True, {**FORWARD, "": 0}),
        ("method", False, {**FORWARD, "": MIXING}),
        ("method", True, {**FORWARD, "": 2 * MIXING}),
        ("operations", False, {"": MIXING}),
        ("operations", True, {"": 2 * MIXING}),
    ],
)
@pytest.mark.parametrize("fake", [False, True])
def test_recomputation_of_checkpoints_is_told_apart(kind, use_reentrant, again, fake):
    model = Checkpointed(kind, use_reentrant)
    x = torch.randn(ROWS, 16, requires_grad=True)
    report = cheapgrad.scan(model, x, fake=fake)
    for name, recomputed in again.items():
        forward = {"": 0 if kind == "module" else 2 * MIXING, **FORWARD}[name]
        assert flops(report.row(name)) == (forward, 2 * forward, recomputed)
    assert flops(report.row("before")) == (MIXING, 2 * MIXING, 0)
    assert report.total.recompute_flops == sum(again.values())
    assert report.row("").inclusive.recompute_flops == sum(again.values())
    assert report.row("block").calls == (kind != "operations")
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert report.total.flops == counter.get_total_flops()
    check_sums(report)


def test_nested_checkpoints():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Checkpointed("module", False)
            self.last = nn.Linear(4, 4)

        def run(self, x):
            return torch.tanh(self.last(torch.tanh(self.inner(x))))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.run, x, use_reentrant=False)

    model, x = Nested(), torch.randn(ROWS, 16, requires_grad=True)
    report = cheapgrad.scan(model, x)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert report.total.flops == counter.get_total_flops()
    assert report.row("last").recompute_flops == 2 * ROWS * 4 * 4
    assert report.row("inner.block.0").backward_flops == 2 * FORWARD["block.0"]
    # Once for the outer checkpoint, and once more for the inner one.
    assert report.row("inner.block.0").recompute_flops == 2 * FORWARD["block.0"]
    check_sums(report)


def test_held_bytes_belong_to_the_operation_that_saved_them():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    report = cheapgrad.scan(model, torch.randn(32, 8))
    saved = {(cost.module, cost.operation): cost.saved_bytes for cost in report.operations}
    # ReLU saves its output, which is the next layer's input: the same storage, counted once, and with ReLU.
    assert saved == {("0", "aten::addmm"): 32 * 8 * 4, ("1", "aten::relu"): 32 * 16 * 4, ("2", "aten::addmm"): 0}


def test_backward_of_an_operation_stands_with_the_operation():
    report = cheapgrad.scan(nn.Linear(8, 4), torch.randn(32, 8, requires_grad=True))
    [cost] = report.operations
    assert (cost.operation, cost.calls) == ("aten::addmm", 1)
    assert (cost.forward_flops, cost.backward_flops) == (2 * 32 * 8 * 4, 4 * 32 * 8 * 4)


def test_loss_is_outside():
    head = torch.randn(4, 3, requires_grad=True)
    report = cheapgrad.scan(nn.Linear(8, 4), torch.randn(ROWS, 8), loss=lambda y: (y @ head).logsumexp(1).sum())
    assert flops(report.row("(outside)")) == (2 * ROWS * 4 * 3, 4 * ROWS * 4 * 3, 0)
    # The model's output and the logits; the sums over rows are saved by logsumexp.
    assert report.row("(outside)").saved_bytes >= ROWS * 4 * 4 + 4 * 3 * 4 + ROWS * 3 * 4
    assert head.grad is None
    check_sums(report)


def test_models_with_dictionaries_and_output_objects():
    model, batch = TinyBert(), make_batch()
    report = cheapgrad.scan(model, **batch)
    tokens, width = 4 * 6, 16
    projection = 2 * tokens * width * width
    for name in ("query", "key", "value", "output"):
        assert flops(report.row(f"layers.1.attention.{name}")) == (projection, 2 * projection, 0)
    scores = 2 * 4 * 2 * 6 * 6 * 8
    # The loss sees the first token only, but attention looks at all of them.
    assert report.row("layers.0.attention").forward_flops == 2 * scores
    assert report.row("").inclusive == report.total
    check_sums(report)
    as_tuple = cheapgrad.scan(model, return_dict=False, loss=lambda output: output[0], **batch)
    assert as_tuple.total == report.total
    assert as_tuple.row("classifier").forward_flops == 2 * 4 * width * 3
    without_labels = {name: value for name, value in batch.items() if name != "labels"}
    assert cheapgrad.scan(model, **without_labels).row("classifier").backward_flops == 4 * 4 * width * 3


def test_outputs_may_be_dataclasses():
    assert cheapgrad.scan(ReturnsPair(8, 4), torch.randn(ROWS, 8)).total.backward_flops == 2 * ROWS * 8 * 4


def test_report_describes_the_modules():
    model, picture = make_network()
    report = cheapgrad.scan(model, picture)
    row = report.row("0")
    assert (row.kind, row.calls, row.parameters, row.dtypes) == ("Conv2d", 1, 8 * 27 + 8, ("float32",))
    assert row.output_bytes == 4 * 8 * 16 * 16 * 4
    assert report.total.parameters == sum(parameter.numel() for parameter in model.parameters())
    # The maximum's places are held as eight-byte numbers.
    assert report.row("3").saved_bytes == 4 * 8 * 16 * 16 * 4 + 4 * 8 * 8 * 8 * 8
    check_sums(report)


def test_autocast_is_seen():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = cheapgrad.scan(model, torch.randn(32, 8))
    assert report.row("0").dtypes == ("bfloat16",)
    assert report.row("0").saved_bytes == 32 * 8 * 2
    # Here the weight's copy in low precision is held, since the input needs a gradient.
    assert report.row("2").saved_bytes == 16 * 4 * 2
    check_sums(report)


@pytest.mark.parametrize("strategy", [RowSample(keep=0.25), StochasticRounding(bits=4)], ids=repr)
def test_converted_models(strategy):
    # A softmax is no stage of a chain, which would be one operation of its last layer.
    model = nn.Sequential(nn.Linear(16, 32), nn.Softmax(1), nn.Linear(32, 8))
    handle = cheapgrad.approximate(model, cheapgrad.Rule("*", stored=strategy), skip_small=False)
    report = cheapgrad.scan(model, torch.randn(64, 16, requires_grad=True))
    # What the layers' laws predict is what was counted.
    converted = [record for record in handle.rows if record.status == "converted"]
    assert [record.name for record in converted] == ["0", "2"]
    for record in converted:
        row = report.row(record.name)
        assert (row.backward_flops, row.saved_bytes) == (record.backward_flops, record.saved_bytes)
    check_sums(report)


def test_compiled_models_run_eagerly():
    model = Branches()
    compiled = cheapgrad.scan(torch.compile(model), torch.randn(ROWS, 16))
    assert compiled.total == cheapgrad.scan(model, torch.randn(ROWS, 16)).total


def test_sharded_models():
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4))
    x = torch.randn(ROWS, 8)
    whole = cheapgrad.scan(model, x)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        sharded = cheapgrad.scan(model, x)
        assert [(row.name, row.figures, row.inclusive) for row in sharded.rows] == [
            (row.name, row.figures, row.inclusive) for row in whole.rows
        ]
        assert sharded.unknown == 0
        assert all(parameter.grad is None for parameter in model.parameters())
        model(x).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_model_without_gradients_is_said_to_have_none():
    report = cheapgrad.scan(nn.Linear(8, 4).requires_grad_(False), torch.randn(ROWS, 8))
    assert flops(report.total) == (2 * ROWS * 8 * 4, 0, 0)
    assert report.total.backward_per_forward == 0
    assert "there was no backward pass" in report.remarks[0]
    assert report.remarks[0] in str(report)


def test_scan_leaves_no_trace():
    model, picture = make_network()
    picture.requires_grad_()
    model(picture).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    of_picture = picture.grad.clone()
    hooked = []
    model[0].weight.register_post_accumulate_grad_hook(hooked.append)
    torch.manual_seed(7)
    cheapgrad.scan(model, picture)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert torch.equal(picture.grad, of_picture)
    assert hooked == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # The hook is back: an optimizer in the backward pass goes on.
    model(picture).sum().backward()
    assert len(hooked) == 1


def test_inputs_keep_their_graph():
    source = torch.randn(ROWS, 8, requires_grad=True)
    x = source.square()
    cheapgrad.scan(nn.Linear(8, 4), x)
    x.sum().backward()
    torch.testing.assert_close(source.grad, 2 * source)


def test_scan_turns_gradients_on():
    with torch.no_grad():
        assert cheapgrad.scan(nn.Linear(8, 4), torch.randn(ROWS, 8)).total.backward_flops == 2 * ROWS * 8 * 4


class Penalised(nn.Module):
    """A forward pass that runs a backward pass, which is differentiated in turn."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def penalise(self, x, layer):
        x = x.requires_grad_()
        output = torch.tanh(layer(x))
        [gradient] = torch.autograd.grad(output.sum(), x, create_graph=True)
        return output.sum() + gradient.square().sum()

    def forward(self, x):
        return self.penalise(x, self.layer)


def test_gradient_penalties_in_forward():
    model, x = Penalised(), torch.randn(ROWS, 8)
    with FlopCounterMode(display=False) as counter:
        # Without modules: torch's counter cannot follow a gradient that is taken inside of one.
        model.penalise(x, lambda x: functional.linear(x, model.layer.weight, model.layer.bias)).backward()
    report = cheapgrad.scan(model, x)
    assert report.total.flops == counter.get_total_flops()
    assert report.total.recompute_flops == 0
    assert report.row("layer").forward_flops == 2 * ROWS * 8 * 4
    # The product of the inner backward pass is a part of the forward pass.
    assert report.row("").forward_flops == 2 * ROWS * 8 * 4
    check_sums(report)


def test_report_survives_json():
    report = cheapgrad.scan(*make_network())
    assert CostReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_table_begins_with_what_holds_most():
    report = cheapgrad.scan(*make_network())
    rows = sorted(report.rows, key=lambda row: -row.saved_bytes)
    lines = [line.split() for line in report.table(top=2).splitlines()[4:]]
    assert [line[:2] for line in lines[:2]] == [[row.name, row.kind] for row in rows[:2]]
    assert "more modules" in report.table(top=2)
    assert "more modules" not in report.table(top=None)
    assert "native_batch_norm" in str(report)


def test_missing_row_is_named():
    report = cheapgrad.scan(Branches(), torch.randn(ROWS, 16))
    with pytest.raises(UnknownNameError, match="no row 'head_'; did you mean 'head'"):
        report.row("head_")


def test_same_mechanism_as_measure_held_bytes():
    model, picture = make_network()
    bert, batch = TinyBert(), make_batch()
    cases = [
        (model, (picture,), {}, lambda: model(picture)),
        (bert, (), batch, lambda: bert(**batch)),
        (Checkpointed("module", True), (torch.randn(ROWS, 16, requires_grad=True),), {}, None),
    ]
    for module, inputs, kwargs, forward in cases:
        run = forward or (lambda module=module, inputs=inputs: module(*inputs))
        held = measure_held_bytes(run, exclude=[module]).total_bytes
        assert cheapgrad.scan(module, *inputs, **kwargs).total.saved_bytes == held


def test_copies_scan_alike():
    model, picture = make_network()
    report = cheapgrad.scan(model, picture)
    assert cheapgrad.scan(copy.deepcopy(model), picture) == report


@pytest.mark.parametrize(
    "rule",
    [
        cheapgrad.Rule("*", stored=StochasticRounding(bits=2)),
        cheapgrad.Rule("*", cotangent=RowSample(keep=0.5)),
        cheapgrad.Rule("*", cotangent=ColumnSample(keep=0.5)),
        cheapgrad.Rule("*", stored=RowProjection(keep=0.5)),
        cheapgrad.Rule("*", cotangent=LowRank(rank=2)),
    ],
    ids=lambda rule: repr(rule.stored or rule.cotangent),
)
def test_no_sketched_layer_runs_anything_of_unknown_cost(rule):
    model = nn.Linear(16, 32)
    cheapgrad.approximate(model, rule, skip_small=False)
    report = cheapgrad.scan(model, torch.randn(64, 16, requires_grad=True))
    # A decomposition has no formula, and is said to have none.
    assert set(report.uncounted[: report.unknown]) <= {"aten::_linalg_svd", "aten::linalg_qr", "aten::_linalg_eigh"}
