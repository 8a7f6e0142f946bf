"""Biased twins of what the recipes do, planted in the library."""

from __future__ import annotations

import dataclasses

import torch

from cheapgrad.ops.chains.norm_stage import LayerNormStage
from cheapgrad.sketch._row_sampling import AbstractRowSampling


def leave_weights_out(monkeypatch):
    """Count every row that is kept once, as if all had been kept."""
    select = AbstractRowSampling.select

    def unweighted(self, operands, rows):
        selection = select(self, operands, rows)
        return dataclasses.replace(selection, weight_K=torch.ones_like(selection.weight_K))

    monkeypatch.setattr(AbstractRowSampling, "select", unweighted)


def use_one_code_twice(monkeypatch):
    """Put the first code of a norm in the place of its second one."""
    record = LayerNormStage.record

    def one_code(self, x, parameters, is_rebuilt):
        rstd, *codes = record(self, x, parameters, is_rebuilt)
        half = codes[: len(codes) // 2]
        return (rstd, *half, *half)

    monkeypatch.setattr(LayerNormStage, "record", one_code)
