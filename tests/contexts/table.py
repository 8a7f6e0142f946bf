"""The table: which layer with which strategies is tested in which context, and what is refused there.

`tests.contexts.test_table` runs every entry, `tests.contexts.write_table` writes `docs/compatibility.md` from the same
data. A new layer or strategy is a new row, a new context a new column.
"""

from __future__ import annotations

from dataclasses import dataclass

from cheapgrad.sketch import (
    ColumnSample,
    ElementMask,
    ExampleSample,
    FeatureSample,
    Hadamard,
    LowRank,
    OrderedPivotal,
    Pivotal,
    PredictedNorm,
    RowProjection,
    RowSample,
    StochasticRounding,
    Uniform,
)
from tests.contexts.layers import (
    BEHIND,
    COMPOSED,
    CONVOLUTION_2D,
    EXACT,
    FUNCTIONS,
    LINEAR,
    OTHER_CONVOLUTIONS,
    SEQUENCE,
    TRANSPOSED_LINEAR,
    LayerCase,
)
from tests.placements import PLACEMENTS, Placement

# Contexts for rows that share their code with another one.
_FEW = ("eager", "vmap", "autocast")


@dataclass(frozen=True)
class Row:
    """A layer with strategies.

    Attributes:
        layer: the layer.
        placement: the strategies.
        is_representative: whether it also runs where a run is dear: the optimising compiler and two processes.
        is_like_another: whether a row of its family runs everywhere and this one where nothing is compiled or copied.
    """

    layer: LayerCase
    placement: Placement
    is_representative: bool = False
    is_like_another: bool = False

    @property
    def name(self) -> str:
        """Layer and strategies."""
        return f"{self.layer.name}: {self.strategies}"

    @property
    def strategies(self) -> str:
        """The strategies as they are written in a rule; a function takes its options itself."""
        return "options of its own" if self.layer.stock is not None else self.placement.name

    @property
    def is_fused(self) -> bool:
        """Whether its codecs are compiled by themselves."""
        return isinstance(self.placement.stored, StochasticRounding) and self.placement.stored.fused

    @property
    def draws(self) -> bool:
        """Whether processes draw numbers of their own for it, beside the mask that a dropout draws as PyTorch does."""
        return self.layer.family not in EXACT


@dataclass(frozen=True)
class Context:
    """A way of running a model.

    Attributes:
        key: what the tests call it.
        title: what the table's head says.
        explanation: what is run.
        is_dear: whether it runs for representative rows only.
    """

    key: str
    title: str
    explanation: str
    is_dear: bool = False

    def covers(self, row: Row) -> bool:
        """Tell whether the row is tested in this context."""
        if self.key in dict(row.layer.lacks):
            return False
        if row.is_like_another:
            return self.key in _FEW
        return row.is_representative or not self.is_dear


@dataclass(frozen=True)
class Refusal:
    """A situation in which a named error is raised.

    Attributes:
        situation: what is asked for.
        error: the exception's name.
        remedy: what to do, as the message says.
    """

    situation: str
    error: str
    remedy: str


_REPRESENTATIVE = (
    Placement(cotangent=RowSample(0.5)),
    Placement(stored=FeatureSample(0.5)),
    Placement(stored=StochasticRounding(4), cotangent=RowSample(0.5)),
)

_SEQUENCE_ROWS = (
    Row(SEQUENCE, Placement(cotangent=ExampleSample(0.5))),
    Row(SEQUENCE, Placement(stored=ExampleSample(0.5))),
    Row(SEQUENCE, Placement(stored=RowSample(0.5, PredictedNorm())), is_representative=True),
    Row(SEQUENCE, Placement(stored=StochasticRounding(4), cotangent=RowSample(0.5))),
    Row(TRANSPOSED_LINEAR, Placement(cotangent=RowSample(0.5))),
    Row(TRANSPOSED_LINEAR, Placement(stored=RowSample(0.5), cotangent=ColumnSample(0.5))),
    Row(TRANSPOSED_LINEAR, Placement(stored=StochasticRounding(4), cotangent=RowSample(0.5)), is_representative=True),
)

_CONVOLUTION_PLACEMENTS = (
    Placement(cotangent=ExampleSample(0.5)),
    Placement(cotangent=RowSample(0.5)),
    Placement(cotangent=ColumnSample(0.5)),
    Placement(cotangent=ElementMask(1 / 64)),
    Placement(cotangent=RowProjection(0.5), selects=False),
    Placement(cotangent=LowRank(8), selects=False),
    Placement(stored=ExampleSample(0.5)),
    Placement(stored=RowSample(0.5)),
    Placement(stored=RowSample(0.5, PredictedNorm())),
    Placement(stored=FeatureSample(0.5)),
    Placement(stored=ElementMask(1 / 64)),
    Placement(stored=RowProjection(0.5, Hadamard()), selects=False),
    Placement(stored=LowRank(8), selects=False),
    Placement(stored=StochasticRounding(4)),
    Placement(stored=StochasticRounding(4), cotangent=ExampleSample(0.5)),
)

_WHOLE_EXAMPLES = Placement(stored=ExampleSample(0.5))

ROWS: tuple[Row, ...] = (
    *(Row(LINEAR, placement, placement in _REPRESENTATIVE) for placement in PLACEMENTS),
    # Of the identity's 1024 entries 32 are not zero: a budget of 16, by magnitude.
    Row(LINEAR, Placement(cotangent=ElementMask(1 / 64))),
    Row(LINEAR, Placement(stored=ElementMask(1 / 64))),
    # Indices of a large share are dearer to hold than the norms they were drawn from: a compiler may draw again.
    Row(LINEAR, Placement(stored=RowSample(0.9)), is_representative=True),
    Row(LINEAR, Placement(stored=FeatureSample(0.9, Uniform(), Pivotal()))),
    Row(LINEAR, Placement(stored=StochasticRounding(4, fused=True)), is_representative=True),
    *_SEQUENCE_ROWS,
    *(Row(CONVOLUTION_2D, placement, placement == _WHOLE_EXAMPLES) for placement in _CONVOLUTION_PLACEMENTS),
    *(
        Row(layer, placement, placement == _WHOLE_EXAMPLES)
        for layer in OTHER_CONVOLUTIONS
        for placement in (_WHOLE_EXAMPLES, Placement(stored=StochasticRounding(4), cotangent=ExampleSample(0.5)))
    ),
)

_CODES = Placement(stored=StochasticRounding(4), selects=False)
_FIRSTS = {case.family: case for case in reversed(BEHIND)}

ROWS += tuple(
    Row(
        case,
        _CODES,
        is_representative=_FIRSTS[case.family] is case,
        is_like_another=_FIRSTS[case.family] is not case,
    )
    for case in BEHIND
)

_BOTH = Placement(stored=StochasticRounding(4), cotangent=RowSample(0.5, design=OrderedPivotal()), selects=False)

ROWS += tuple(
    Row(case, placement, is_representative=placement == _BOTH)
    for case in COMPOSED
    for placement in (_CODES, _BOTH)
    if case.name != "Embedding"
)
ROWS += tuple(
    Row(case, Placement(cotangent=RowSample(0.5)), is_representative=True)
    for case in COMPOSED
    if case.name == "Embedding"
)
ROWS += tuple(Row(case, Placement(selects=False), is_representative=case in FUNCTIONS[-2:]) for case in FUNCTIONS)

CONTEXTS: tuple[Context, ...] = (
    Context("eager", "eager", "plain `backward()`"),
    Context("aot_eager", "compile, aot_eager", '`torch.compile(backend="aot_eager", fullgraph=True)`'),
    Context("inductor", "compile, inductor", "`torch.compile(fullgraph=True)`", is_dear=True),
    Context("checkpoint", "checkpoint", "`checkpoint(use_reentrant=False)`"),
    Context("reentrant", "checkpoint, reentrant", "`checkpoint(use_reentrant=True)`"),
    Context("vmap", "func.grad + vmap", '`vmap(grad(loss), randomness="different")`'),
    Context("autocast", "autocast bf16", "`torch.autocast(device, torch.bfloat16)`"),
    Context("deepcopy", "deepcopy", "`copy.deepcopy` of the converted model"),
    Context("pickle", "pickle", "`pickle.loads(pickle.dumps(model))` of the converted model"),
    Context("state_dict", "state_dict", "state_dict to and from a plain model"),
    Context("ddp", "DDP", "`DistributedDataParallel` on two gloo processes", is_dear=True),
    Context("fsdp2", "FSDP2", "`fully_shard` on two gloo processes", is_dear=True),
)

REFUSALS: tuple[Refusal, ...] = (
    Refusal("second derivative, eager", "SecondDerivativeError", "`with handle.exact():`"),
    Refusal("second derivative, func.grad of func.grad", "SecondDerivativeError", "`with handle.exact():`"),
    Refusal("second derivative through a checkpoint", "SecondDerivativeError", "`with handle.exact():`"),
    Refusal("forward mode, dual numbers", "ForwardModeError", "`with handle.exact():`"),
    Refusal("forward mode, func.jvp", "ForwardModeError", "`with handle.exact():`"),
    Refusal("conversion of a compiled model", "WrapperOrderError", "convert, then `torch.compile`"),
    Refusal("conversion of a sharded model", "WrapperOrderError", "convert, then `fully_shard`"),
    Refusal("revert of a layer that `fully_shard` was applied to by itself", "ConversionError", "shard its parent"),
)
