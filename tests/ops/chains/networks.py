"""Networks of row-wise operations, their conversion, and selections that are chosen instead of drawn."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cheapgrad import Handle, Rule, approximate
from cheapgrad.sketch import RowSample
from cheapgrad.sketch._row_sampling import AbstractRowSampling
from cheapgrad.sketch.selection import Selection
from tests.oracles import row_wise_chain as oracle
from tests.oracles.activations import SLOPES

HALF = RowSample(keep=0.5)
FEATURES, HIDDEN, OUTPUTS = 6, 9, 5

#: Name and options, as in `tests.oracles.activations`, to the stock module.
ACTIVATIONS = {
    ("relu", ()): nn.ReLU(),
    ("gelu", ()): nn.GELU(),
    ("gelu", (("approximate", "tanh"),)): nn.GELU(approximate="tanh"),
    ("silu", ()): nn.SiLU(),
    ("mish", ()): nn.Mish(),
    ("hardswish", ()): nn.Hardswish(),
    ("tanh", ()): nn.Tanh(),
    ("sigmoid", ()): nn.Sigmoid(),
    ("softplus", ()): nn.Softplus(),
    ("softplus", (("beta", 2.0), ("threshold", 3.0))): nn.Softplus(2.0, 3.0),
    ("log_sigmoid", ()): nn.LogSigmoid(),
    ("elu", ()): nn.ELU(),
    ("elu", (("alpha", 1.7),)): nn.ELU(1.7),
    ("celu", ()): nn.CELU(),
    ("celu", (("alpha", 0.5),)): nn.CELU(0.5),
    ("selu", ()): nn.SELU(),
    ("leaky_relu", ()): nn.LeakyReLU(),
    ("leaky_relu", (("negative_slope", 0.3),)): nn.LeakyReLU(0.3),
    ("relu6", ()): nn.ReLU6(),
    ("hardtanh", ()): nn.Hardtanh(),
    ("hardtanh", (("min_val", -0.5), ("max_val", 2.0))): nn.Hardtanh(-0.5, 2.0),
    ("hardsigmoid", ()): nn.Hardsigmoid(),
    ("softsign", ()): nn.Softsign(),
    ("tanhshrink", ()): nn.Tanhshrink(),
    ("hardshrink", ()): nn.Hardshrink(),
    ("hardshrink", (("lambd", 1.2),)): nn.Hardshrink(1.2),
    ("softshrink", ()): nn.Softshrink(),
    ("softshrink", (("lambd", 0.0),)): nn.Softshrink(0.0),
    ("threshold", (("threshold", -0.5), ("value", 20.0))): nn.Threshold(-0.5, 20.0),
}
#: The functions that are recognised between converted layers.
RECOGNISED = [key for key in ACTIVATIONS if key[0] not in ("log_sigmoid", "softsign", "tanhshrink", "threshold")]


class Function(nn.Module):
    """Calls the function that a stock module calls: no module of its kind is there to be converted."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.__dict__["stock"] = stock

    def forward(self, x: Tensor) -> Tensor:
        """Return ``f(x)``."""
        return self.__dict__["stock"](x)


class Attention(nn.Module):
    """Attention whose projections are as wide as their input, and keep it anyway."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the heads' outputs side by side."""
        parts = self.project(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


def convert(model: nn.Module, cotangent: Any = HALF, **fields: Any) -> Handle:
    """Convert every layer of a model, however small."""
    return approximate(model, Rule("*", cotangent=cotangent, **fields), skip_small=False)


def draw_parameters(model: nn.Module) -> nn.Module:
    """Give every parameter random values, the norms' too, and return the model in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.double()


def oracle_of(model: nn.Sequential) -> list[oracle.Stage]:
    """Return the stages of the oracle that stand for a plain model."""
    stages: list[oracle.Stage] = []
    for module in model:
        parameters = [None if tensor is None else tensor.detach() for tensor in module._parameters.values()]
        if isinstance(module, nn.LayerNorm):
            stages.append(oracle.OracleNorm(*parameters, eps=module.eps))
        elif isinstance(module, nn.Linear):
            stages.append(oracle.OracleLinear(*parameters))
        else:
            stock = module.__dict__["stock"] if isinstance(module, Function) else module
            key = next(key for key, known in ACTIVATIONS.items() if repr(known) == repr(stock))
            stages.append(oracle.OracleActivation(copy.deepcopy(stock), SLOPES[key]))
    return stages


class Chosen:
    """A selection to use instead of drawing one, and what every draw was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, index: Sequence[int], weight: Sequence[float]) -> None:
        self.index = torch.as_tensor(index)
        self.weight = torch.as_tensor(weight, dtype=torch.float64)
        self.cotangents: list[Tensor] = []
        monkeypatch.setattr(
            AbstractRowSampling, "select", lambda strategy, operands, rows: self._select(operands, rows)
        )

    def _select(self, operands: Any, rows: int) -> Selection:
        self.cotangents.append(operands.cotangent())
        return Selection(self.index, self.weight, rows, may_repeat=len(set(self.index.tolist())) < len(self.index))

    def weight_N(self, rows: int) -> Tensor:
        """Return how much every row counts."""
        return torch.zeros(rows, dtype=torch.float64).index_add_(0, self.index, self.weight)


def choose_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every row with weight 1, through the code that samples."""

    def select(strategy, operands, rows):
        return Selection(torch.arange(rows), torch.ones(rows, dtype=torch.float64), rows)

    monkeypatch.setattr(AbstractRowSampling, "select", select)
