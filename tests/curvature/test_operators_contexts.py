"""Curvature of models as they come: converted, compiled, wrapped, checkpointed, and as nobody should give them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cheapgrad
from cheapgrad.curvature import (
    BatchReader,
    Draws,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    MonteCarloFisher,
    as_likelihood,
)
from cheapgrad.errors import (
    BatchError,
    BudgetError,
    LossError,
    ModelTypeError,
    OperandError,
    ShapeError,
    StochasticModelError,
    UnknownNameError,
    UnsupportedModelError,
)
from cheapgrad.exactness import forced_exact, is_forced_exact
from cheapgrad.sketch import RowSample, StochasticRounding
from tests.curvature.models import Case, make_case

EXACT = {"rtol": 1e-10, "atol": 1e-12}
SKETCH = cheapgrad.Rule("*", stored=StochasticRounding(bits=2), cotangent=RowSample(keep=0.5))


def _products(model: nn.Module, case: Case) -> list[torch.Tensor]:
    data = (case.inputs, case.targets)
    column = torch.linspace(-1, 1, sum(parameter.numel() for parameter in model.parameters()), dtype=torch.float64)
    return [kind(model, case.loss, data) @ column for kind in (Hessian, GaussNewton, EmpiricalFisher)] + [
        Hessian(model, case.loss, data).gradient(),
        MonteCarloFisher(model, nn.CrossEntropyLoss(), data) @ column,
        Hessian(model, case.loss, data).linearized() @ column,
    ]


@pytest.mark.parametrize("name", ["MLP", "CNN with groups", "attention"])
def test_converted_layers_are_exact(name: str) -> None:
    """In training mode, where they draw; 3-d inputs and attention included."""
    case = make_case(name)
    expected = _products(case.model, case)
    case.model.train()
    handle = cheapgrad.approximate(case.model, SKETCH, skip_small=False)
    assert any(row.status == "converted" for row in handle.rows)
    for product, truth in zip(_products(case.model, case), expected, strict=True):
        torch.testing.assert_close(product, truth, **EXACT)
    assert not is_forced_exact()
    # Outside, they draw again.
    draws = [
        torch.autograd.grad(case.loss(case.model(case.inputs), case.targets), handle.model.parameters()) for _ in "ab"
    ]
    assert any(not torch.equal(a, b) for a, b in zip(*draws, strict=True))


def test_forced_exactness_ends_with_an_exception_and_nests() -> None:
    with forced_exact():
        with pytest.raises(ValueError, match="inside"), forced_exact():
            raise ValueError("inside")
        assert is_forced_exact()
    assert not is_forced_exact()


def test_compiled_and_wrapped_models_are_looked_through() -> None:
    case = make_case("MLP")
    expected = _products(case.model, case)
    compiled = torch.compile(case.model, backend="aot_eager")
    inner = make_case("MLP").model
    inner[0] = torch.compile(inner[0], backend="aot_eager")  # a part of a model that is compiled
    for model in (compiled, nn.DataParallel(case.model), inner):
        for product, truth in zip(_products(model, case), expected, strict=True):
            torch.testing.assert_close(product, truth, **EXACT)


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("name", ["MLP", "CNN with groups"])
@pytest.mark.parametrize("kind", [Hessian, GaussNewton, EmpiricalFisher])
def test_checkpointed_models_are_exact_in_their_second_forward_too(kind: type[Any], name: str) -> None:
    case = make_case(name)
    size = sum(parameter.numel() for parameter in case.model.parameters())
    columns = torch.randn(size, 2, dtype=torch.float64)
    expected = kind(case.model, case.loss, (case.inputs, case.targets)) @ columns
    model = _Checkpointed(case.model).train()
    cheapgrad.approximate(model, SKETCH, skip_small=False)
    operator = kind(model, case.loss, (case.inputs, case.targets))
    for found in (operator, operator.linearized()):
        torch.testing.assert_close(found @ columns, expected, **EXACT)
        torch.testing.assert_close(found @ columns[:, 0], expected[:, 0], **EXACT)


class _Force(nn.Module):
    """The slope of an energy: its forward pass is a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.head = nn.Conv1d(1, 2, 2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.energy(x).tanh().sum(), x, create_graph=True)
        return self.head(slope.flatten(1))


def test_a_model_that_differentiates_in_its_forward_pass_is_differentiated_once_more() -> None:
    case, model = make_case("log_softmax inside"), _Force().double()
    loss, parameters = nn.CrossEntropyLoss(), list(model.parameters())
    gradients = torch.autograd.grad(loss(model(case.inputs), case.targets), parameters, create_graph=True)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    columns = torch.stack([torch.cat([part.flatten() for part in directions])] * 2, 1)
    product = torch.autograd.grad(gradients, parameters, directions)
    expected = torch.cat([part.flatten() for part in product])
    found = Hessian(model, loss, (case.inputs, case.targets)) @ columns
    torch.testing.assert_close(found, torch.stack([expected] * 2, 1), **EXACT)
    newton = GaussNewton(model, loss, (case.inputs, case.targets))
    torch.testing.assert_close((newton @ columns)[:, 0], newton @ columns[:, 0], **EXACT)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_single_precision_recurrent_layers_go_back_where_they_cannot_go_forward(kind: type[Any]) -> None:
    case = make_case("LSTM")
    column = torch.linspace(-1, 1, sum(p.numel() for p in case.model.parameters()), dtype=torch.float64)
    expected = kind(case.model, case.loss, (case.inputs, case.targets)) @ column
    product = kind(case.model.float(), case.loss, (case.inputs.float(), case.targets)) @ column.float()
    torch.testing.assert_close(product.double(), expected, rtol=1e-3, atol=1e-5)


def _mlp(*layers: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2)), (torch.randn(5, 3), torch.arange(5) % 2)


class _DrawsItself(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.Dropout(0.25), r"'1' is a Dropout with p=0\.25 in training mode.*model\.eval\(\)"),
        (nn.BatchNorm1d(4), "'1' is a BatchNorm1d that normalises by the batch"),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), "track_running_stats=True"),
        (_DrawsItself(), r"the forward pass of a Sequential draws random numbers"),
    ],
)
def test_layers_that_draw_or_mix_examples_are_named(layer: nn.Module, match: str) -> None:
    model, data = _mlp(layer)
    for kind in (Hessian, GaussNewton, EmpiricalFisher):
        with pytest.raises(StochasticModelError, match=match):
            kind(model, nn.CrossEntropyLoss(), data) @ torch.ones(26 + 8 * isinstance(layer, nn.BatchNorm1d))


def test_layers_that_draw_are_fine_in_eval_mode() -> None:
    model, data = _mlp(nn.BatchNorm1d(4), nn.Dropout(0.5))
    operator = Hessian(model.eval(), nn.CrossEntropyLoss(), data)
    before = [buffer.clone() for buffer in model.buffers()]
    assert (operator @ torch.ones(34)).isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class _OnceLayer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Once.apply(x)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_operations_without_the_derivative_are_named(kind: type[Any]) -> None:
    model, data = _mlp(_OnceLayer())
    with pytest.raises(UnsupportedModelError, match=r"cannot differentiate a Sequential.*once_differentiable"):
        kind(model, nn.CrossEntropyLoss(), data) @ torch.ones(26)
    above = kind(model, nn.CrossEntropyLoss(), data, parameters="2")
    assert (above @ torch.ones(10)).abs().max() > 0


class _OnceSquared(torch.autograd.Function):
    """A loss with a backward pass of its own: what comes to it is the constant one."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(outputs)
        return outputs.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (outputs,) = ctx.saved_tensors
        return 2 * outputs * grad / outputs.numel()


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_losses_without_the_derivative_are_named(kind: type[Any]) -> None:
    """PyTorch itself says nothing: the second derivative of the loss is zero, or all that is left is the model's."""
    model, data = _mlp()
    with pytest.raises(UnsupportedModelError, match="marked once_differentiable"):
        kind(model, lambda outputs, _: _OnceSquared.apply(outputs), data) @ torch.ones(26)
    # Where first derivatives are enough, it is fine.
    fisher = EmpiricalFisher(model, lambda outputs, _: _OnceSquared.apply(outputs), data)
    expected = EmpiricalFisher(model, lambda outputs, _: outputs.square().mean(), data)
    torch.testing.assert_close(fisher @ torch.ones(26), expected @ torch.ones(26))


def test_inputs_may_be_named_tuples() -> None:
    class Pair(NamedTuple):
        left: torch.Tensor
        right: torch.Tensor

    class Product(nn.Linear):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return super().forward(left * right)

    model, (x, y) = Product(3, 2), _mlp()[1]
    found = GaussNewton(model, nn.CrossEntropyLoss(), (Pair(x, x), y)) @ torch.ones(8)
    torch.testing.assert_close(found, GaussNewton(model, nn.CrossEntropyLoss(), ((x, x), y)) @ torch.ones(8))


def test_errors_of_the_model_itself_are_its_own() -> None:
    model, (x, y) = _mlp()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Hessian(model, nn.CrossEntropyLoss(), (x[:, :2], y)) @ torch.ones(26)


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], BatchError, "got an empty list"),
        (torch.ones(3), BatchError, r"a Tensor of shape \(3,\)"),
        (7, BatchError, "an int 7"),
        ([(1, 2, 3)], BatchError, "a tuple of 3"),
        (
            iter([(torch.ones(1, 3), torch.zeros(1).long())]),
            BatchError,
            "a list_iterator can be gone through once only",
        ),
        ((torch.ones(0, 3), torch.zeros(0).long()), BatchError, "batch 0 counts for 0 examples"),
        ((3.0, torch.zeros(2).long()), BatchError, "inputs of type float hold no tensor"),
    ],
)
def test_batches_of_no_known_form_are_named(batches: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Hessian(_mlp()[0], nn.CrossEntropyLoss(), batches)


def test_loaders_without_batches_are_named() -> None:
    model, (x, y) = _mlp()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, drop_last=True)
    with pytest.raises(BatchError, match="a DataLoader gave no batch"):
        Hessian(model, nn.CrossEntropyLoss(), loader) @ torch.ones(26)


def _unreduced(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "a CrossEntropyLoss with reduction='sum'"),
        ("mse", "but got a str"),
        (_unreduced, r"returned a tensor of shape \(5,\)"),
        (lambda outputs, targets: 1.0, r"returned 1\.0"),
        (lambda outputs, targets: outputs.detach().sum(), "batch 0 does not depend on 0.weight"),
    ],
)
def test_losses_that_do_not_fit_are_named(loss: Any, match: str) -> None:
    model, data = _mlp()
    with pytest.raises(LossError, match=match):
        Hessian(model, loss, data) @ torch.ones(26)


class _Pair(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


def test_outputs_that_are_no_tensor_are_named() -> None:
    data = (torch.randn(4, 3), torch.arange(4) % 2)
    loss = nn.CrossEntropyLoss()
    with pytest.raises(LossError, match="the model returned a tuple; pick it out with BatchReader"):
        GaussNewton(_Pair(3, 2), loss, data) @ torch.ones(8)
    reader = BatchReader(predict=lambda model, inputs: model(inputs)[0])
    assert (GaussNewton(_Pair(3, 2), loss, data, reader=reader) @ torch.ones(8, 2)).shape == (8, 2)
    with pytest.raises(LossError, match="examples along their first axis"):
        EmpiricalFisher(
            nn.Linear(3, 1), lambda f, y: f, data, reader=BatchReader(predict=lambda model, x: model(x).sum())
        ) @ torch.ones(4)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (nn.L1Loss(), "the loss L1Loss"),
        (nn.CrossEntropyLoss(weight=torch.ones(2)), "with weight"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)), "with pos_weight"),
        (nn.MSELoss(reduction="sum"), "MSELoss"),
    ],
)
def test_losses_without_a_distribution_are_named(loss: nn.Module, match: str) -> None:
    with pytest.raises(LossError, match=match):
        MonteCarloFisher(_mlp()[0], loss, _mlp()[1])
    with pytest.raises(BudgetError, match="count must be a whole number of at least 1, but got 0"):
        Draws(0)
    assert as_likelihood(nn.MSELoss())(torch.ones(2), torch.zeros(2)) == 1
    assert as_likelihood(nn.BCEWithLogitsLoss())(torch.zeros(2), torch.ones(2)) == pytest.approx(0.6931, abs=1e-4)


def test_parameters_that_do_not_fit_are_named() -> None:
    model, data = _mlp()
    loss = nn.CrossEntropyLoss()
    with pytest.raises(UnknownNameError, match=r"'0\.weights' with parameters; did you mean '0\.weight'"):
        Hessian(model, loss, data, parameters=["0.weights"])
    with pytest.raises(UnknownNameError, match=r"a tensor of shape \(2, 2\) is no parameter"):
        Hessian(model, loss, data, parameters=[torch.ones(2, 2)])
    with pytest.raises(UnsupportedModelError, match="with 0 parameters has none that require grad"):
        Hessian(nn.ReLU(), loss, data)
    with pytest.raises(UnsupportedModelError, match="has none that are selected"):
        Hessian(model, loss, data, parameters=[])
    model[0].double()
    with pytest.raises(OperandError, match=r"torch\.float32 on cpu, torch\.float64 on cpu"):
        Hessian(model, loss, data)
    with pytest.raises(ModelTypeError, match="function"):
        Hessian(_mlp, loss, data)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"a vector \[10\], but got a tensor of shape \(3,\)"):
        Hessian(model, loss, data, parameters="1").split(torch.ones(3))
