"""Bytes held and time of a step on whole networks: ours, checkpoints, the compiler's budget, and combinations.

Bytes and peaks are measured on one step, times interleaved. The process's own peak is measured in a process of its own
(``python -m benchmarks.whole_network NETWORK METHOD`` prints it).
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cheapgrad
from benchmarks.interleaved import time_interleaved
from benchmarks.networks import NETWORKS, Network, loss_of
from benchmarks.process_peak import measure_process_peak
from cheapgrad import recipes
from cheapgrad.cost import measure_held_bytes, peak_memory

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
_GRAPHS_PER_CODE = 128
_LONGEST_MESSAGE = 160


class Checkpointed(nn.Module):
    """A block that keeps its input only, and runs forward again in backward.

    Args:
        block: the block.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Return what the block returns."""
        return checkpoint(self.block, x, use_reentrant=False)


@dataclass(frozen=True)
class Method:
    """One way to train a network.

    Attributes:
        name: what tables call it.
        rules: what `cheapgrad.approximate` is given, if anything.
        checkpoints: whether every block is checkpointed.
        memory_budget: share for the compiler's activation memory budget; 1.0 compiles and leaves it alone, None does
            not compile.
        fused_loss: whether the output layer and the cross-entropy are one operation, where there is a large vocabulary.
    """

    name: str
    rules: tuple[cheapgrad.Rule, ...] = ()
    checkpoints: bool = False
    memory_budget: float | None = None
    fused_loss: bool = False

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model, set up."""
        model = copy.deepcopy(model)
        if self.rules:
            cheapgrad.approximate(model, self.rules)
        if self.checkpoints:
            model.blocks = nn.Sequential(*[Checkpointed(block) for block in model.blocks])  # type: ignore[union-attr]
        if self.memory_budget is not None:
            return _compile(model, self.memory_budget)
        return model

    @property
    def loss(self) -> Loss:
        """The loss of a model on a batch."""
        return fused_loss_of if self.fused_loss else loss_of


EXACT = Method("exact")
EAGER = (
    EXACT,
    Method("checkpoint each block", checkpoints=True),
    Method("recipes.memory(4)", recipes.memory(4)),
    Method("recipes.memory(4, fused)", recipes.memory(4, fused=True)),
    Method("recipes.memory(2)", recipes.memory(2)),
    Method("recipes.speed(.5)", recipes.speed(0.5)),
    Method("recipes.both(4, .5)", recipes.both(4, 0.5)),
    Method("recipes.both(4, .5, fused)", recipes.both(4, 0.5, fused=True)),
    Method("recipes.both(4, .25)", recipes.both(4, 0.25)),
    Method("checkpoint + recipes.speed(.5)", recipes.speed(0.5), checkpoints=True),
    Method("checkpoint + recipes.memory(4)", recipes.memory(4), checkpoints=True),
)
FUSED = (
    Method("linear_cross_entropy", fused_loss=True),
    Method("recipes.memory(4) + linear_cross_entropy", recipes.memory(4), fused_loss=True),
    Method("recipes.both(4, .5) + linear_cross_entropy", recipes.both(4, 0.5), fused_loss=True),
    Method("recipes.memory(4, fused) + linear_cross_entropy", recipes.memory(4, fused=True), fused_loss=True),
    Method("recipes.both(4, .5, fused) + linear_cross_entropy", recipes.both(4, 0.5, fused=True), fused_loss=True),
)
COMPILED = (
    Method("compiled", memory_budget=1.0),
    Method("compiled, budget .5", memory_budget=0.5),
    Method("compiled, budget .25", memory_budget=0.25),
    Method("compiled, recipes.memory(4)", recipes.memory(4), memory_budget=1.0),
    Method("compiled, recipes.memory(4), budget .25", recipes.memory(4), memory_budget=0.25),
    Method("compiled, recipes.both(4, .5)", recipes.both(4, 0.5), memory_budget=1.0),
)
FUSED_COMPILED = (
    Method("compiled, recipes.memory(4) + linear_cross_entropy", recipes.memory(4), memory_budget=1.0, fused_loss=True),
    Method(
        "compiled, recipes.both(4, .5) + linear_cross_entropy", recipes.both(4, 0.5), memory_budget=1.0, fused_loss=True
    ),
)


def _compile(model: nn.Module, budget: float) -> nn.Module:
    """Return the compiled model; what its graphs keep for backward is at most `budget` times what they keep by default.

    The backend is an object of this call, so that no other method's graphs are taken for this one's.
    """

    def backend(graph: Any, example_inputs: Any) -> Any:
        import torch._functorch.config as functorch_config
        from torch._inductor.compile_fx import compile_fx

        with functorch_config.patch(activation_memory_budget=budget):  # type: ignore[attr-defined]
            return compile_fx(graph, example_inputs)

    return torch.compile(model, backend=backend, dynamic=False)  # type: ignore[return-value]


def fused_loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a language model without its scores ever being held whole."""
    return model(inputs, labels)


def methods_for(network: Network, *, compiled: bool) -> tuple[Method, ...]:
    """Return what is measured on a network."""
    has_vocabulary = "language" in network.name
    eager = (*EAGER, *(FUSED if has_vocabulary else ()))
    return (*eager, *COMPILED, *(FUSED_COMPILED if has_vocabulary else ())) if compiled else eager


def measure_networks(
    *, rounds: int, compiled: bool, networks: Sequence[str] = (), methods: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield one record per network and method; of a method that fails, what it said in the place of numbers.

    Args:
        rounds: interleaved rounds per timing.
        compiled: whether compiled steps are measured too; it takes minutes.
        networks: parts of the names of the networks to measure; all if there are none.
        methods: the same for methods; exact steps are always measured, as the reference.
    """
    import torch._dynamo.config as dynamo_config

    for network in NETWORKS:
        if networks and not any(part in network.name for part in networks):
            continue
        chosen = methods_for(network, compiled=compiled)
        if methods:
            chosen = (EXACT, *(each for each in chosen[1:] if any(part in each.name for part in methods)))
        torch._dynamo.reset()
        # Copies of one model share their code, and every compiled method adds graphs to it.
        with dynamo_config.patch(recompile_limit=_GRAPHS_PER_CODE):  # type: ignore[attr-defined]
            yield from _measure_network(network, chosen, rounds)


@dataclass
class _Trial:
    """One method on one network: its step, and what was measured or what it failed with."""

    step: Callable[[], None] | None = None
    held_bytes: int = 0
    peak_bytes: int | None = None
    process_peak_bytes: int | None = None
    failure: str | None = None


def _try_method(method: Method, network: Network, original: nn.Module, batch: tuple[Tensor, Tensor]) -> _Trial:
    try:
        step, held_bytes = _make_step(method, original, batch)
        # The second step is like all that follow: what is kept may depend on what the first one showed.
        step()
        trial = _Trial(step, held_bytes())
        step()
        if method.memory_budget is None:
            trial.peak_bytes = peak_memory(step).peak_bytes
            trial.process_peak_bytes = _peak_of_process(network, method.name)
    except Exception as error:
        # Whatever it is: the rows of the other methods are still wanted.
        lines = str(error).strip().splitlines() or [""]
        return _Trial(failure=f"{type(error).__name__}: {lines[0][:_LONGEST_MESSAGE]}")
    return trial


def _measure_network(network: Network, methods: tuple[Method, ...], rounds: int) -> Iterator[dict[str, Any]]:
    original, batch = network.make(), network.make_batch()
    trials = {
        method: _try_method(method, network, original, batch)
        for method in track(methods, f"{network.name}: setting up", transient=True)
    }
    exact = trials.get(EXACT, _Trial())
    steps = {method.name: trial.step for method, trial in trials.items() if trial.step is not None}
    timings = {}
    if exact.step is not None:
        timings = time_interleaved(steps, reference=EXACT.name, rounds=rounds, label=network.name)
    for method, trial in trials.items():
        timing = timings.get(method.name)
        is_target = "memory(4)" in method.name and not method.checkpoints and method.memory_budget is None
        wanted = is_target and (method.fused_loss or "language" not in network.name)
        yield {
            "benchmark": "networks",
            "network": network.name,
            "method": method.name,
            "held_bytes": trial.held_bytes or None,
            "times_fewer": exact.held_bytes / trial.held_bytes if exact.held_bytes and trial.held_bytes else None,
            "target_times_fewer": network.target_ratio if wanted else None,
            "peak_bytes": trial.peak_bytes,
            "process_peak_bytes": trial.process_peak_bytes,
            "relative_cost": timing.ratio if timing else None,
            "spread": timing.spread if timing else None,
            "failure": trial.failure,
        }


def _make_step(
    method: Method, original: nn.Module, batch: tuple[Tensor, Tensor]
) -> tuple[Callable[[], None], Callable[[], int]]:
    """Return a training step, and what measures the bytes that its forward pass holds."""
    model = method.prepare(original)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        method.loss(model, *batch).backward()

    def held_bytes() -> int:
        return measure_held_bytes(lambda: method.loss(model, *batch), exclude=[model, *batch]).total_bytes

    return step, held_bytes


def _peak_of_process(network: Network, method: str) -> int:
    command = [sys.executable, "-m", "benchmarks.whole_network", network.name, method]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(network_name: str, method_name: str) -> None:
    """Print by how many bytes a step raises the peak of this process; the model and its gradients are there before."""
    network = next(network for network in NETWORKS if network.name == network_name)
    method = next(each for each in (*EAGER, *FUSED) if each.name == method_name)
    torch.manual_seed(0)
    step, _ = _make_step(method, network.make(), network.make_batch())
    print(measure_process_peak(step))


if __name__ == "__main__":
    main(*sys.argv[1:])
