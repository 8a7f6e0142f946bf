"""The page of the documentation says what the table says, and the table names what exists."""

from __future__ import annotations

import pytest
from torch import nn

from cheapgrad import errors
from cheapgrad.convert.kinds import KINDS
from tests.contexts.runners import RUNNERS
from tests.contexts.table import CONTEXTS, REFUSALS, ROWS
from tests.contexts.write_table import PAGE, render


def test_page_is_written_from_the_table():
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python -m tests.contexts.write_table"


def test_names_are_unique_and_every_context_has_a_runner():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {context.key for context in CONTEXTS} - set(RUNNERS) == {"ddp", "fsdp2"}


def test_every_kind_of_layer_is_in_every_context():
    built = {type(module) for row in ROWS for module in row.layer.model().modules()}
    # Of other libraries' modules, which run the same code, there are no stock ones to build.
    kinds = [kind for kind in KINDS if hasattr(nn, kind.name)]
    assert [kind.name for kind in kinds if not any(kind.accepts(cls) for cls in built)] == []
    families = {row.layer.family or row.layer.name for row in ROWS}
    for context in CONTEXTS:
        covered = {row.layer.family or row.layer.name for row in ROWS if context.covers(row)}
        assert covered == families, context.key


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.situation)
def test_refusals_are_named_errors(refusal):
    assert issubclass(getattr(errors, refusal.error), errors.CheapgradError)


def test_layers_are_stock_modules():
    assert all(isinstance(row.layer.build(), nn.Module) for row in ROWS)
