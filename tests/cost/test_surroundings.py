"""What a scan does about its surroundings: hooks of others, code without autograd, compiled parts, unusual buffers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import cheapgrad
from cheapgrad.cost import cheap_gradient, measure_held_bytes
from cheapgrad.errors import FakeModelError
from tests.cost.models import Branches, Checkpointed
from tests.oracles.live_storages import LiveStorages

ROWS = 4


def count_with_torch(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["plain", "module", "method"])
def test_hooks_around_a_scan_are_not_taken_for_a_checkpoints(kind):
    model = Branches() if kind == "plain" else Checkpointed(kind, False)
    x = torch.randn(ROWS, 16, requires_grad=True)
    alone = cheapgrad.scan(model, x)
    with save_on_cpu():
        assert cheapgrad.scan(model, x) == alone
    assert alone.total.flops == count_with_torch(model, x)
    assert (alone.total.recompute_flops > 0) == (kind != "plain")


class Packed(nn.Module):
    """Keeps what its layers save in half of the bits, by hooks of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Tanh())

    def forward(self, x):
        with saved_tensors_hooks(lambda tensor: (tensor.bfloat16(),), lambda kept: kept[0].float()):
            return self.layers(x)


def test_bytes_held_by_hooks_of_the_model_are_counted_and_remarked_on():
    model, x = Packed(), torch.randn(ROWS, 16)
    with LiveStorages() as storages:
        loss = model(x).sum()
        alive = storages.live_bytes(without=[loss, x, *model.parameters()])
    report = cheapgrad.scan(model, x)
    # The batch, GELU's input and output, the copy of a weight, and tanh's output, in two bytes an entry.
    assert report.total.saved_bytes == alive == 2 * (ROWS * 16 + 2 * ROWS * 32 + 16 * 32 + ROWS * 16)
    assert report.row("layers.1").saved_bytes == 2 * ROWS * 32
    assert "hooks of the model's own" in report.remarks[0]
    held = measure_held_bytes(lambda: model(x).sum(), exclude=[model])
    assert held.total_bytes == alive
    assert all(storage.hidden for storage in held.storages)


def test_selective_checkpoints_are_remarked_on():
    def policy(context, operation, *args, **kwargs):
        keeps = operation is torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    class Selective(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())

        def forward(self, x):
            return checkpoint(
                self.block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
            )

    model, x = Selective(), torch.randn(ROWS, 8, requires_grad=True)
    report = cheapgrad.scan(model, x)
    # Both products are kept, so none of them runs again.
    assert (report.total.recompute_flops, report.total.flops) == (0, count_with_torch(model, x))
    assert "(selective ones)" in report.remarks[0]
    assert cheapgrad.scan(Checkpointed("module", False), torch.randn(ROWS, 16)).remarks == ()


class KeepsABranch(nn.Module):
    """Keeps a branch that does not lead to its output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        self.kept = self.layer(x).exp()
        return checkpoint(torch.tanh, self.layer(x), use_reentrant=False)


def test_bytes_held_by_checkpoints_and_by_other_graphs_are_told_apart():
    report = cheapgrad.scan(KeepsABranch(), torch.randn(ROWS, 8))
    saved = {(cost.module, cost.operation): cost.saved_bytes for cost in report.operations if cost.saved_bytes}
    one = ROWS * 8 * 4
    # The batch is held by the branch that came first, and so are the outputs of its exponential.
    assert saved == {("layer", "(elsewhere)"): one, ("", "(elsewhere)"): one, ("", "(checkpoint)"): one}


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent, None


class Teacher(nn.Module):
    """A custom function, and behind it a product that autograd does not see."""

    def __init__(self, mode):
        super().__init__()
        self.student = nn.Linear(8, 8)
        self.teacher = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(ROWS, ROWS, 3, padding=1))
        self.weight = torch.randn(8, 8)
        self.mode = mode

    def forward(self, x):
        y = Doubles.apply(self.student(x), self.weight)
        with self.mode():
            z = self.teacher(x).clone() @ self.weight
        return y * z.clone()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_code_without_autograd_is_counted_under_its_own_names(mode):
    x = torch.randn(ROWS, 8)
    report = cheapgrad.scan(Teacher(mode), x)
    product = 2 * ROWS * 8 * 8
    assert report.unknown == 0
    assert report.row("teacher.0").forward_flops == product
    assert report.row("teacher.1").forward_flops == 2 * ROWS * ROWS * 3 * 8
    of_model = {cost.operation: cost.forward_flops for cost in report.operations if cost.module == ""}
    assert (of_model["Doubles"], of_model["aten::mm"]) == (product, product)


def test_products_of_nested_tensors_are_counted():
    rows = [torch.randn(2, 8), torch.randn(3, 8)]
    batch = torch.nested.nested_tensor(rows, layout=torch.jagged)
    report = cheapgrad.scan(nn.Linear(8, 4), batch)
    assert (report.total.forward_flops, report.total.backward_flops) == (2 * 5 * 8 * 4, 2 * 5 * 8 * 4)
    assert report.unknown == 0


def test_reentrant_checkpoint_leaves_operations_their_names():
    principle = cheap_gradient(cheapgrad.scan(Checkpointed("module", True), torch.randn(ROWS, 16, requires_grad=True)))
    assert principle.unstated == ()
    assert principle.measured == principle.bound == 3


def compile_in_place(layer):
    layer.compile()
    return nn.Sequential(layer)


COMPILED = {
    "wrapped": torch.compile,
    "in place": compile_in_place,
    "inside": lambda layer: nn.Sequential(*[torch.compile(layer)]),
}


@pytest.mark.parametrize("how", COMPILED)
def test_compiled_parts_are_remarked_on(how):
    model = COMPILED[how](nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = cheapgrad.scan(model, torch.randn(ROWS, 8))
    assert report.total.flops == 4 * ROWS * 8 * 8
    assert report.remarks[0].startswith("compiled parts ran eagerly")


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("expanded", torch.ones(1).expand(8))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return self.layer(x) + self.expanded


def test_expanded_buffers_are_no_obstacle():
    model = Buffered()
    cheapgrad.scan(model, torch.randn(ROWS, 8))
    assert model.steps == 0


def test_lazy_modules_are_initialised_but_not_without_data():
    model, x = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()), torch.randn(ROWS, 8)
    with pytest.raises(FakeModelError, match=r"0\.weight has no shape before the model's first batch"):
        cheapgrad.scan(model, x, fake=True)
    assert cheapgrad.scan(model, x).total.forward_flops == 2 * ROWS * 8 * 4
    assert cheapgrad.scan(model, x, fake=True).total.parameters == 8 * 4 + 4 + 2 * 4


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_layers_that_ran_without_a_graph_are_remarked_on(wants_gradient):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(checkpoint(self.inner, x, use_reentrant=True))

    with warnings.catch_warnings():
        # PyTorch's own, which does not name the layer.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
        report = cheapgrad.scan(Model(), torch.randn(ROWS, 8, requires_grad=wants_gradient))
    assert (report.row("inner").backward_flops > 0) == wants_gradient
    if wants_gradient:
        assert report.remarks == ()
    else:
        [remark] = report.remarks
        assert remark.startswith("parameters of 'inner' (Linear) require a gradient and got none")


def test_both_kinds_of_checkpoint_hold_the_same_bytes():
    def model(use_reentrant):
        class Model(nn.Module):
            def forward(self, x):
                return checkpoint(torch.tanh, x, use_reentrant=use_reentrant)

        return Model()

    x = torch.randn(ROWS, 8, requires_grad=True)
    for use_reentrant in (False, True):
        # The states of random generators are left out, whoever keeps them.
        assert cheapgrad.scan(model(use_reentrant), x).total.saved_bytes == x.nbytes
        held = measure_held_bytes(lambda reentrant=use_reentrant: model(reentrant)(x))
        assert held.total_bytes == x.nbytes
