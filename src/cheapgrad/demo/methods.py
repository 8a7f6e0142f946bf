"""The ways of training that the demo compares."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

import cheapgrad
from cheapgrad.errors import CheapgradError
from cheapgrad.sketch import AbstractStrategy, ColumnSample, RowSample, StochasticRounding


@dataclass(frozen=True)
class Method:
    """One way of training: PyTorch's own gradient, on any batch size or recomputed, or a rule for all linear layers.

    Attributes:
        label: name for people.
        family: methods that differ by their budget only share it.
        stored: strategy for what is stored, or None.
        cotangent: strategy for the cotangent, or None.
        budget: position among the budgets of its family, from 0, the largest.
        batch_size: examples in a step, or None for the model's usual number.
        remark: what else the reader has to know.
        checkpointed: whether parts of the network are computed again during backward instead of held.
    """

    label: str
    family: str
    stored: AbstractStrategy | None = None
    cotangent: AbstractStrategy | None = None
    budget: int = 0
    batch_size: int | None = None
    remark: str = ""
    checkpointed: bool = False

    @property
    def kind(self) -> str:
        """``"strategy"``, ``"checkpoint"``, ``"batch"`` or ``"exact"``."""
        if self.stored is not None or self.cotangent is not None:
            return "strategy"
        if self.checkpointed:
            return "checkpoint"
        return "exact" if self.batch_size is None else "batch"

    def convert(self, model: nn.Module) -> cheapgrad.Handle | None:
        """Convert one of the demo's models in place; return the handle, or None where there is no strategy.

        Small layers are converted too: the networks of the demo have no others.
        """
        if self.kind == "checkpoint":
            model.checkpointed = True  # pyright: ignore[reportArgumentType] - modules take any attribute
        if self.kind != "strategy":
            return None
        return cheapgrad.approximate(
            model, cheapgrad.Rule(nn.Linear, stored=self.stored, cotangent=self.cotangent), skip_small=False
        )


EXACT = Method("exact", family="exact")
CHECKPOINT = Method(
    "checkpointing",
    family="checkpointing",
    checkpointed=True,
    remark="while a part is computed again, its bytes are held again",
)


def make_default_methods() -> tuple[Method, ...]:
    """Return the strategies that are compared unless others are asked for: four families at two budgets."""
    methods = []
    for budget, (keep, bits) in enumerate(((0.5, 4), (0.35, 2))):
        rows, columns = RowSample(keep=keep), ColumnSample(keep=keep)
        four_bits = StochasticRounding(bits=4)
        methods += [
            Method(f"cotangent rows {keep}", "cotangent rows", cotangent=rows, budget=budget),
            Method(f"cotangent columns {keep}", "cotangent columns", cotangent=columns, budget=budget),
            Method(f"stored {bits} bits", "stored bits", stored=StochasticRounding(bits=bits), budget=budget),
            Method(
                f"stored 4 bits + rows {keep}",
                "stored bits + cotangent rows",
                stored=four_bits,
                cotangent=rows,
                budget=budget,
            ),
        ]
    families = list(dict.fromkeys(method.family for method in methods))
    return tuple(sorted(methods, key=lambda method: families.index(method.family)))


def check_methods(methods: tuple[Method, ...], model: nn.Module, name: str) -> None:
    """Convert a copy of the model by every method, so that what does not fit is found before anything is trained."""
    for method in methods:
        try:
            method.convert(copy.deepcopy(model))
        except CheapgradError as error:
            raise type(error)(f"{method.label} does not fit {name}: {error}") from error
