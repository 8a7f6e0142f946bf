"""What is refused, by name, and that no hook stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cheapgrad.curvature.kronecker import (
    CategoricalOutputs,
    EmpiricalFisher,
    GaussianOutputs,
    KroneckerOptions,
    SampledFisher,
    ekfac,
    kfac,
)
from cheapgrad.curvature.operators.batches import BatchReader
from cheapgrad.errors import (
    BatchError,
    BudgetError,
    CheapgradError,
    LossError,
    ModelTypeError,
    NonFiniteCurvatureError,
    ShapeError,
    StochasticModelError,
    UnsupportedModelError,
)
from tests.curvature.kronecker.cases import Averaged


class Functional(nn.Module):
    """Calls ``function(module, x)`` with two linear layers at hand."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(3, 3), nn.Linear(3, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)  # type: ignore[operator]


class Scaled(nn.Linear):
    """A layer whose forward is not that of its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.mean()


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def _with_nan() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    return model


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].mean(1)


ROWS = (torch.ones(2, 3), torch.zeros(2, dtype=torch.long))
TOKENS = (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long))
MODELS = {
    "dropout": (
        nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.25)),
        ROWS,
        StochasticModelError,
        "'1' is a Dropout .*0.25",
    ),
    "functional dropout": (
        Functional(lambda m, x: functional.dropout(m.second(m.first(x)))),
        ROWS,
        StochasticModelError,
        "draws",
    ),
    "batch norm": (
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
        ROWS,
        StochasticModelError,
        "'1' is a BatchNorm1d",
    ),
    "unsupported layers": (
        nn.ModuleDict({"rnn": nn.LSTM(3, 3), "up": nn.ConvTranspose2d(3, 3, 3), "fine": nn.Linear(3, 3)}),
        ROWS,
        UnsupportedModelError,
        r"2 layers .*rnn \(LSTM\): no factors for its parameters bias_hh_l0.*up \(ConvTranspose2d\)",
    ),
    "attention": (
        Attentive(),
        (torch.ones(2, 3, 4), ROWS[1]),
        UnsupportedModelError,
        r"attention \(MultiheadAttention\)",
    ),
    "tied": (_tied(), ROWS, UnsupportedModelError, r"0 \(Linear\): shares a parameter with 2"),
    "max norm": (
        Averaged(nn.Embedding(4, 3, max_norm=1.5), axis=1),
        TOKENS,
        UnsupportedModelError,
        r"layers.0 \(Embedding\): max_norm=1.5",
    ),
    "scaled gradients": (
        Averaged(nn.Embedding(4, 3, scale_grad_by_freq=True), axis=1),
        TOKENS,
        UnsupportedModelError,
        r"layers.0 \(Embedding\): scale_grad_by_freq=True",
    ),
    "not called": (
        Functional(lambda m, x: functional.linear(m.first(x), m.second.weight, m.second.bias)),
        ROWS,
        UnsupportedModelError,
        r"second \(Linear\) was not called",
    ),
    "used elsewhere": (
        Functional(lambda m, x: functional.linear(m.second(m.first(x)), m.first.weight)),
        ROWS,
        UnsupportedModelError,
        "the gradient of 'weight' of layer 'first'",
    ),
    "own forward": (nn.Sequential(Scaled(3, 3)), ROWS, UnsupportedModelError, r"layer '0' \(Scaled\)"),
    "rows are not examples": (
        Functional(lambda m, x: m.second(m.first(x.repeat(2, 1)))[:2]),
        ROWS,
        ShapeError,
        r"layer 'first' \(Linear\) was called on a tensor of shape \(4, 3\) in a batch of 2",
    ),
    "not finite": (_with_nan(), ROWS, NonFiniteCurvatureError, "6 of 6 outputs"),
    "infinite factor": (
        nn.Sequential(nn.Linear(3, 3)),
        (1e30 * ROWS[0], ROWS[1]),
        NonFiniteCurvatureError,
        "layer '0'",
    ),
    "infinite slope": (
        Functional(lambda m, x: m.second((0 * m.first(x)).sqrt())),
        ROWS,
        NonFiniteCurvatureError,
        "layer 'first': .* entries of the gradient of 'weight'",
    ),
    "no tensor": (Functional(lambda m, x: {"logits": m.second(m.first(x))}), ROWS, LossError, "type dict"),
    "no class axis": (Functional(lambda m, x: m.second(m.first(x)).sum(1)), ROWS, LossError, r"shape \(2,\)"),
    "raises in the middle": (Functional(lambda m, x: m.second(m.first(x)[:, :2])), ROWS, RuntimeError, "shapes"),
}


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_hooks_with_kwargs) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("builder", [kfac, ekfac])
def test_models_that_have_no_factors_are_named_and_keep_no_hooks(name: str, builder: type) -> None:
    model, batch, error, match = MODELS[name]
    training = [module.training for module in model.modules()]
    with pytest.raises(error, match=match):
        builder(model, batch, CategoricalOutputs())
    assert _hooks(model) == 0
    assert [module.training for module in model.modules()] == training


def test_hooks_are_gone_after_success_and_inputs_may_come_by_keyword() -> None:
    model = Functional(lambda m, x: m.second(input=m.first(input=x)))
    by_name = kfac(model, ({"x": ROWS[0]}, ROWS[1]), CategoricalOutputs())
    assert _hooks(model) == 0
    torch.testing.assert_close(by_name.to_dense(), kfac(model, ROWS, CategoricalOutputs()).to_dense())


def test_a_reader_picks_the_logits_and_the_size() -> None:
    model = Functional(lambda m, x: m.second(m.first(x)))
    plain = kfac(model, ROWS, CategoricalOutputs())
    model.function = lambda m, x: {"logits": m.second(m.first(x))}
    reader = BatchReader(predict=lambda network, x: network(x)["logits"], size=lambda batch: 4.0)
    counted = kfac(model, ROWS, CategoricalOutputs(), options=KroneckerOptions(reader=reader))
    assert (plain.example_count, counted.example_count) == (2, 4)
    torch.testing.assert_close(counted.to_dense(), plain.to_dense() / 2)


def test_what_is_no_likelihood_model_or_batch_is_named() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ModelTypeError, match="got a str 'categorical'"):
        kfac(model, ROWS, "categorical")  # type: ignore[arg-type]
    with pytest.raises(ModelTypeError, match="got a function"):
        kfac(functional.relu, ROWS, CategoricalOutputs())  # type: ignore[arg-type]
    options = KroneckerOptions(reader=BatchReader(process_group="workers"))
    with pytest.raises(UnsupportedModelError, match="the reader has the group 'workers'"):
        kfac(model, ROWS, CategoricalOutputs(), options=options)
    with pytest.raises(BatchError, match="got a Tensor of shape"):
        kfac(model, ROWS[0], CategoricalOutputs())
    with pytest.raises(LossError, match=r"shape \(2,\), but got torch.float32 of shape \(2, 1\)"):
        kfac(
            model,
            (ROWS[0], torch.zeros(2, 1)),
            CategoricalOutputs(),
            options=KroneckerOptions(fisher=EmpiricalFisher()),
        )
    with pytest.raises(LossError, match=r"shape \(2, 3\), but got \(2,\)"):
        kfac(model, ROWS, GaussianOutputs(), options=KroneckerOptions(fisher=EmpiricalFisher()))
    with pytest.raises(BatchError, match="needs targets"):
        next(EmpiricalFisher().cotangents(ROWS[0], None, CategoricalOutputs()))
    with pytest.raises(LossError, match="got -1"):
        GaussianOutputs(-1.0)
    with pytest.raises(BudgetError, match="got 0"):
        SampledFisher(samples=0)
    assert issubclass(ShapeError, CheapgradError)
