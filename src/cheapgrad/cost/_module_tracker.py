"""Which module runs, in which call, and which module made an autograd node."""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from cheapgrad.cost._autograd_state import next_node_number, running_node, running_pass, saving_hooks

# The modules that are being called, outermost first, as their numbers in the order of `named_modules`.
Path = tuple[int, ...]


class _Thread:
    """What one thread runs, and when it entered and left modules.

    Autograd numbers the nodes of a thread in the order of their creation. ``marks[i]`` is the number of the next node
    at the time of the i-th event, ``paths[i]`` what was running from then on. So the node with number q was made while
    ``paths[i]`` was running, with i the last event that has ``marks[i] <= q``.
    """

    def __init__(self) -> None:
        self.stack: list[Path] = []
        self.marks: list[int] = []
        self.paths: list[Path] = []

    def mark(self, path: Path, *, behind: int = 0) -> None:
        """Note that `path` runs from now on, or from `behind` nodes ago."""
        number = next_node_number() - behind
        self.marks.append(max(number, self.marks[-1]) if self.marks else number)
        self.paths.append(path)

    def owner(self, number: int) -> Path:
        position = bisect_right(self.marks, number) - 1
        return self.paths[position] if position >= 0 else ()


class ModuleTracker:
    """Follows the calls of a model's modules through its forward pass and through recomputations of it.

    Args:
        model: the model.

    Attributes:
        names: qualified name of every module.
        modules: the modules themselves.
        calls: number of calls in the forward pass, by module.
        in_backward: whether the forward pass is over.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        self.names = [name for name, _ in named]
        self.modules = [module for _, module in named]
        self.calls = [0] * len(named)
        self._failure: int | None = None
        self._exception: BaseException | None = None
        self._threads: dict[int, _Thread] = {}
        self._forward = self._thread()
        # The thread whose nodes a backward pass inside the backward pass (of a reentrant checkpoint) goes through.
        self._recomputing: _Thread | None = None
        self.in_backward = False
        # Numbers of the nodes before which a checkpoint was entered, and the path that entered it.
        self._checkpoints: list[int] = []
        self._checkpoint_paths: list[Path] = []
        self._graph_task = -1
        # The hooks for saved tensors that somebody has put around the whole scan.
        self._hooks_outside: Any = None

    @contextmanager
    def attached(self, on_output: Callable[[int, Any], None]) -> Iterator[None]:
        """Follow calls inside the context; `on_output` is called with a module's number and its output.

        The hooks are those for all modules: hooks on the modules themselves would keep some, such as PyTorch's encoder
        layers, from taking their fast paths.
        """
        numbers = {module: number for number, module in enumerate(self.modules)}

        def enter(module: nn.Module, args: Any) -> None:
            number = numbers.get(module)
            if number is not None:
                self._enter(number)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            number = numbers.get(module)
            if number is None:
                return
            self._leave(number)
            if not self.in_backward:
                on_output(number, output)

        entering = register_module_forward_pre_hook(enter)
        # Also where the module raises.
        leaving = register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            entering.remove()
            leaving.remove()

    def _thread(self) -> _Thread:
        identity = threading.get_ident()
        thread = self._threads.get(identity)
        if thread is None:
            thread = self._threads[identity] = _Thread()
        return thread

    def _enter(self, number: int) -> None:
        thread = self._thread()
        if self.in_backward:
            self._recomputing = thread
        else:
            self.calls[number] += 1
        path = (*self.path(), number)
        thread.stack.append(path)
        thread.mark(path)

    def _leave(self, number: int) -> None:
        error = sys.exc_info()[1]
        if error is not None and error is not self._exception:
            self._exception, self._failure = error, number
        thread = self._thread()
        while thread.stack and thread.stack.pop()[-1] != number:
            pass
        thread.mark(self.path())

    def describe(self, number: int) -> str:
        """Return a module's name and class, for messages."""
        return f"{self.names[number] or '(model)'!r} ({type(self.modules[number]).__name__})"

    def find_failure(self, error: BaseException) -> int | None:
        """Return the number of the innermost module that an exception left, or None if it left none."""
        return self._failure if error is self._exception else None

    def start_backward(self, checkpoints: list[tuple[int, Path]]) -> None:
        """Take note that the forward pass is over.

        Args:
            checkpoints: number of the next node, and path, at the entry of every checkpoint.
        """
        self.in_backward = True
        self._hooks_outside = saving_hooks()
        checkpoints = sorted(checkpoints)
        self._checkpoints = [number for number, _ in checkpoints]
        self._checkpoint_paths = [path for _, path in checkpoints]

    def path(self) -> Path:
        """Return what is running: modules of the forward pass, or what a checkpoint recomputes during backward."""
        stack = self._thread().stack
        if stack:
            return stack[-1]
        node = running_node() if self.in_backward else None
        return () if node is None else self._checkpoint_caller(node)

    def _checkpoint_caller(self, node: Any) -> Path:
        """Return the path that entered the checkpoint which is recomputed for `node`."""
        owner = self.owner(node)
        position = bisect_right(self._checkpoints, node._sequence_nr()) - 1
        # A reentrant checkpoint is a node itself. Of others, it is the last one entered before the node was made.
        if position < 0 or node.name() == "CheckpointFunctionBackward":
            return owner
        caller = self._checkpoint_paths[position]
        return caller if owner[: len(caller)] == caller else owner

    def owner(self, node: Any) -> Path:
        """Return the modules that were running when an autograd node was made."""
        is_inner = self._graph_task not in {-1, running_pass()}
        # The backward pass of a reentrant checkpoint goes through nodes that its recomputation made.
        thread = self._recomputing if is_inner and self._recomputing is not None else self._forward
        return thread.owner(node._sequence_nr())

    def note_recomputation(self) -> None:
        """Take note, during backward, of an operation that a checkpoint runs again."""
        thread = self._thread()
        self._note_pass()
        if thread.stack:
            return
        self._recomputing, path = thread, self.path()
        # The operation's own node is made already.
        if not thread.paths or thread.paths[-1] != path:
            thread.mark(path, behind=1)

    def is_recomputing(self) -> bool:
        """Tell, during backward, whether a checkpoint runs its forward pass again."""
        self._note_pass()
        # A checkpoint that is not reentrant recomputes under hooks of its own; ours are gone by then.
        return bool(self._thread().stack) or torch.is_grad_enabled() or saving_hooks() != self._hooks_outside

    def _note_pass(self) -> None:
        """Remember which backward pass is the outer one: the first that is seen."""
        if self._graph_task == -1:
            self._graph_task = running_pass()
