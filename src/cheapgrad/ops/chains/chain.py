"""The chain of a tensor: the row-wise stages that it was computed by, found on its autograd node."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._guards import refuse_forward_mode
from cheapgrad.ops.chains.chain_function import KEY, Layout, apply_last_stage
from cheapgrad.ops.chains.norm_stage import AbstractNormStage
from cheapgrad.ops.chains.rebuilding import Source, current_scope
from cheapgrad.ops.chains.stage import AbstractStage
from cheapgrad.ops.chains.tagging import Tag, may_tag, tagging
from cheapgrad.ops.chains.watching import Watch, is_observed
from cheapgrad.sketch import AbstractStrategy
from cheapgrad.sketch.transforms import is_inside_transform


@dataclass(frozen=True)
class Link:
    """One stage of a chain with its tensors.

    Attributes:
        stage: the operation.
        parameters: its parameters.
        record: what backward needs of its input.
        encoded: the same with a smaller record, to be used as soon as nobody can ask for the chain's output again.
        tag: lets a compiled graph compute the output again, or None.
    """

    stage: AbstractStage
    parameters: tuple[Tensor | None, ...]
    record: tuple[Tensor, ...]
    encoded: Link | None = None
    tag: Tag | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Chain:
    """How a tensor was computed, row by row, from `root`; found on the tensor's autograd node.

    Attributes:
        root: what stands for the input of the first stage in the graph, without holding it; see `stand_in`.
        links: the stages, in forward order.
        cotangent: the strategy that draws rows, or None as long as no stage asked for one.
        version: the tensor's version counter; another one means that the tensor was overwritten.
        passed: the tensors between root and output.
        is_linked: whether the output's own autograd nodes hold no more than the chain does, so that they may be kept.
        origin: tells whether two chains start from the same tensor; the same object if so.
    """

    root: Tensor
    links: tuple[Link, ...]
    cotangent: AbstractStrategy | None
    version: int
    passed: tuple[Watch, ...] = ()
    is_linked: bool = True
    origin: weakref.ref[Tensor] | None = None


class _StandIn(torch.autograd.Function):
    """An expanded zero in the place of a tensor, whose gradient is the tensor's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode("row-wise chain")


def stand_in(x: Tensor) -> Tensor:
    """Return what leads to `x` in the graph and has its shape, but holds none of its numbers.

    Chains outlive the tensors that they start from: where codes have taken the place of one, nobody may hold it.
    """
    return x if torch.compiler.is_compiling() or is_inside_transform() else _StandIn.apply(x)


class _Holder:
    """A chain that its own backward pass lets go of, so that no tensor outlives the graph."""

    def __init__(self, chain: Chain, output: Tensor) -> None:
        self.chain: Chain | None = chain
        self.watch = Watch(output)

    def release(self, *_: Any) -> None:
        """Let the chain go."""
        self.chain = None

    def settle(self) -> None:
        """Let go of the larger records."""
        if self.chain is not None:
            self.chain = settle(self.chain)


def _holder_of(node: Any) -> _Holder | None:
    return None if node is None else node.metadata.get(KEY)


def chain_of(x: Tensor) -> Chain | None:
    """Return the chain that `x` is the output of, or None; an overwritten or observed tensor has none.

    While a compiler only reads Python there are none: nobody can tell what a tensor was computed from.
    """
    if torch.compiler.is_dynamo_compiling():
        return None
    holder = _holder_of(x.grad_fn)
    if holder is None or holder.chain is None or holder.chain.version != x._version or is_observed(x):
        return None
    return holder.chain


def chain_of_node(node: Any) -> Chain | None:
    """Return the chain of the tensor that an autograd node made, or None."""
    holder = _holder_of(node)
    if holder is None or holder.chain is None or holder.watch.is_observed:
        return None
    return dataclasses.replace(holder.chain, passed=(*holder.chain.passed, holder.watch))


def settle(chain: Chain) -> Chain:
    """Return the chain with its smaller records: nobody will ask for its output again.

    The nodes that made the output hold the larger ones, so they may not be kept.
    """
    links = _settled(chain.links)
    is_linked = chain.is_linked and all(link.encoded is None for link in chain.links)
    return dataclasses.replace(chain, links=links, is_linked=is_linked)


def _settled(links: tuple[Link, ...]) -> tuple[Link, ...]:
    return tuple(link.encoded or link for link in links)


def untag(chain: Chain) -> None:
    """Let compiled graphs not compute the outputs inside a chain again: its backward pass needs none of them."""
    for link in chain.links:
        if link.tag is not None:
            link.tag.take_off()


def held_root(chain: Chain) -> Tensor | None:
    """Return the input of the first stage, if it is what the stage holds."""
    first = chain.links[0]
    return first.record[0] if first.stage.stored is None and first.record and not first.stage.keeps_output else None


def let_rebuild(output: Tensor, root: Tensor, links: tuple[Link, ...]) -> None:
    """Let other operations that save `output` keep the root that the links compute it from instead."""
    scope = current_scope()
    if scope is None or any(link.stage.multiplies for link in links[:-1]):
        return
    context = _autocast_of(output)

    def compute(root: Tensor) -> Tensor:
        value = root
        with context():
            for link in links:
                value = link.stage.forward(value, link.parameters)
        return value

    parameters = tuple(tensor for link in links for tensor in link.parameters if tensor is not None)

    def note_kept() -> None:
        for link in links:
            if link.stage.use is not None:
                link.stage.use.is_kept = True

    scope.register(output, Source(root, parameters, compute, note_kept))


def _autocast_of(tensor: Tensor) -> Callable[[], Any]:
    """Return a maker of contexts with the autocast that is on now."""
    device = tensor.device.type
    if device == "meta":
        return contextlib.nullcontext
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled=enabled)


def attach_chain(
    output: Tensor,
    root: Tensor,
    stage: AbstractStage,
    parameters: tuple[Tensor | None, ...],
    cotangent: AbstractStrategy | None,
    tag: Tag | None = None,
) -> None:
    """Say on a tensor that PyTorch computed, under a tag or none, that it is one stage away from `root`."""
    if not torch.compiler.is_dynamo_compiling():
        held = output if stage.keeps_output else root
        link = Link(stage, parameters, stage.record(held.detach(), parameters, is_rebuilt=False), tag=tag)
        _attach(output, Chain(stand_in(root), (link,), cotangent, output._version, origin=weakref.ref(root)))


def _attach(output: Tensor, chain: Chain) -> _Holder | None:
    node: Any = output.grad_fn
    if node is None:
        return None
    holder = _Holder(chain, output)
    node.metadata[KEY] = holder
    # Our own nodes release the chain themselves.
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        node.register_prehook(holder.release)
    return holder


def run_stage(
    x: Tensor,
    stage: AbstractStage,
    parameters: tuple[Tensor | None, ...],
    cotangent: AbstractStrategy | None,
    chain: Chain | None,
    tag: Tag | None = None,
) -> Tensor:
    """Return ``stage(x)``, whose backward pass goes through the whole chain that `x` is the output of.

    Args:
        x: input, shape ``[..., I]``.
        stage: the operation.
        parameters: its parameters.
        cotangent: strategy that draws rows of the chain's output, or None to leave it to the other stages.
        chain: the chain of `x`, or None to start one.
        tag: put on what computes the output, or None; see `tagging`.

    Returns:
        Shape ``[..., O]``, bit-identical to PyTorch's.
    """
    if chain is not None:
        untag(chain)
        chain = settle(chain) if chain.links[-1].stage.multiplies else chain
    links = chain.links if chain is not None else ()
    root = chain.root if chain is not None else stand_in(x)
    if cotangent is None and chain is not None:
        cotangent = chain.cotangent
    passed = (*chain.passed, Watch(x)) if chain is not None else ()
    is_linked = chain is not None and chain.is_linked and all(link.encoded is None for link in chain.links)
    value = x.detach()
    is_given = bool(links) and _rebuilds_for(links[-1], stage)
    stage = stage if is_given else stage.holding_output()
    with torch.no_grad():
        record = () if stage.keeps_output else stage.record(value, parameters, is_given)
    link = Link(stage, parameters, record, tag=tag)
    # A product may be asked for again, and stores what it takes for that; nothing else does.
    stored = (*(links if stage.multiplies else _settled(links)), link)
    links = (*(_settled(links) if record and stage.stored is not None else links), link)
    layout = _lay_out(stored, cotangent, x, passed)
    tensors = [tensor for link in stored for tensor in link.parameters]
    tensors += [tensor for link in stored for tensor in link.record]
    with tagging(tag):
        output = apply_last_stage(x if is_linked else value, root, layout, tensors)
    if not torch.compiler.is_dynamo_compiling():
        if stage.keeps_output:
            links = (*links[:-1], dataclasses.replace(link, record=(output.detach(),)))
        origin = chain.origin if chain is not None else weakref.ref(x)
        scope = current_scope()
        is_rebuilt = scope is not None or (stage.use is not None and may_tag())
        kept = _with_exact_root(links, value) if is_rebuilt else links
        holder = _attach(output, Chain(root, kept, cotangent, output._version, passed, origin=origin))
        if scope is not None and holder is not None and any(link.encoded is not None for link in kept):
            scope.call_at_end(holder.settle)
    return output


def _lay_out(
    links: tuple[Link, ...], cotangent: AbstractStrategy | None, x: Tensor, passed: tuple[Watch, ...]
) -> Layout:
    *counts, last = (len(link.record) for link in links)
    return Layout(
        stages=tuple(link.stage for link in links),
        parameter_counts=tuple(len(link.parameters) for link in links),
        record_counts=(*counts, 1 if links[-1].stage.keeps_output else last),
        cotangent=cotangent,
        examples=x.shape[0] if x.dim() > 1 else 1,
        passed=passed,
    )


def _rebuilds_for(before: Link, stage: AbstractStage) -> bool:
    """Tell whether a stage can do with what the one before rebuilds; decoded rows serve only what is linear in them."""
    is_exact = before.stage.stored is None and before.encoded is None
    return before.stage.rebuilds_output and (is_exact or stage.multiplies)


def _with_exact_root(links: tuple[Link, ...], x: Tensor) -> tuple[Link, ...]:
    """Return the links with the input itself as the record of an only stage that can compute its output again.

    Whoever keeps the output of the next linear layer may need it; otherwise the codes take its place.
    """
    first, *others = links
    if others or first.stage.stored is None or not isinstance(first.stage, AbstractNormStage):
        return links
    stage = dataclasses.replace(first.stage, stored=None)
    return (Link(stage, first.parameters, (x,), encoded=first),)
