"""One training step as an audit sees it: seeded, run, and its gradients collected."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from cheapgrad.auditing._surroundings import evaluating, seed_all
from cheapgrad.convert.sketched_layer import SketchedLayer
from cheapgrad.errors import (
    AccumulationError,
    BackwardError,
    CheapgradError,
    ForwardError,
    LossError,
    ModelTypeError,
    ReferenceGradientError,
    check_finite_loss,
)
from cheapgrad.exactness import forced_exact

LossFunction = Callable[[Any, Any], Tensor]
Reference = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class DrawnGradient:
    """A gradient and the loss it belongs to.

    Attributes:
        tensors: one for each trainable parameter; zeros where the step left none.
        loss: as a number; None where only the gradient is known.
    """

    tensors: list[Tensor]
    loss: float | None


class Step:
    """The gradient of a loss on a batch, as it is and as it should be.

    Args:
        model: whose trainable parameters' gradients are compared.
        loss_fn: called with the model and the batch, returns a scalar.
        reference: None for the exact gradient by `forced_exact`; else called with the model and a batch, returns the
            gradient, or a loss to differentiate.
        accumulate: None for the gradient of the loss; else runs without arguments and leaves ``.grad``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        reference: Reference | None,
        accumulate: Callable[[], object] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelTypeError(f"model must be a torch.nn.Module, but got {model!r} of type {type(model).__name__}")
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not named:
            raise ModelTypeError(
                f"the {type(model).__name__} has no parameter that requires grad, so there is no gradient to audit"
            )
        self.model, self.loss_fn, self.reference = model, loss_fn, reference
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self._accumulate = accumulate

    @property
    def accumulates(self) -> bool:
        """Whether a loop leaves the gradient."""
        return self._accumulate is not None

    @property
    def is_converted(self) -> bool:
        """Whether a layer of the model is cheapgrad's."""
        return any(isinstance(module, SketchedLayer) for module in self.model.modules())

    def draw(self, batch: Any, seed: int) -> DrawnGradient:
        """Return the gradient as the step computes it."""
        seed_all(seed)
        self._clear()
        if self._accumulate is None:
            loss = self._backward(self.loss_fn, batch)
            return DrawnGradient(self._collect(), loss)
        before = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self._accumulate()
        except BaseException as error:
            self._put_back(before)
            if isinstance(error, CheapgradError) or not isinstance(error, Exception):
                raise
            raise AccumulationError(f"the loop raised {type(error).__name__}: {error}") from error
        self._check_parameters(before)
        if all(parameter.grad is None for parameter in self.parameters):
            raise AccumulationError(
                "the loop left no gradient in .grad of any trainable parameter; let it call backward on this very "
                "model, and leave out a zero_grad at its end"
            )
        return DrawnGradient(self._collect(), None)

    def draw_exact(self, batch: Any, seed: int) -> DrawnGradient:
        """Return the gradient as it should be, with the model's own random numbers of that seed."""
        seed_all(seed)
        self._clear()
        if self.reference is None:
            with exact_step():
                loss = self._backward(self.loss_fn, batch)
            return DrawnGradient(self._collect(), loss)
        made = _run_reference(self.reference, self.model, batch)
        if isinstance(made, Tensor):
            loss = self._backward(lambda model, batch: made, batch)
            return DrawnGradient(self._collect(), loss)
        self._clear()
        tensors = self._read(made)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise ReferenceGradientError("the reference returned a gradient that is not finite; look at the batch")
        return DrawnGradient(tensors, None)

    def evaluate(self, batch: Any, seed: int) -> DrawnGradient:
        """Return loss and gradient in evaluation mode, from the stock code of all converted layers.

        There are no tensors where there is no gradient in that mode, as of cuDNN's recurrent layers.
        """
        seed_all(seed)
        self._clear()
        with evaluating(self.model), exact_step():
            loss = self.loss_fn(self.model, batch)
            value = float(loss.detach())
            with contextlib.suppress(Exception):
                loss.backward()
                return DrawnGradient(self._collect(), value)
        self._clear()
        return DrawnGradient([], value)

    def _backward(self, loss_fn: LossFunction, batch: Any) -> float:
        versions = [parameter._version for parameter in self.parameters]
        try:
            loss = loss_fn(self.model, batch)
        except CheapgradError:
            raise
        except Exception as error:
            raise ForwardError(f"the loss function raised {type(error).__name__}: {error}") from error
        _check_loss(loss)
        value = float(loss.detach())
        check_finite_loss(value, "the batch", "audit")
        try:
            loss.backward()
        except CheapgradError:
            raise
        except Exception as error:
            raise BackwardError(f"the backward pass raised {type(error).__name__}: {error}") from error
        self._check_versions(versions)
        return value

    def _check_versions(self, versions: list[int]) -> None:
        changed = [
            name
            for name, parameter, version in zip(self.names, self.parameters, versions, strict=True)
            if parameter._version != version
        ]
        if changed:
            raise LossError(
                f"the loss function, or the backward pass, changed {len(changed)} parameters, the first one is "
                f"{changed[0]!r}: draws at different parameters cannot be compared; leave that out while auditing. "
                "Parameters were put back"
            )

    def _read(self, made: Any) -> list[Tensor]:
        """Return the tensors that a reference made, one for each parameter."""
        if isinstance(made, Mapping):
            missing = [name for name in self.names if name not in made]
            if missing:
                raise ReferenceGradientError(
                    f"the reference has no gradient for {missing[0]!r} ({len(missing)} of {len(self.names)} are "
                    "missing); return one for each trainable parameter, by name"
                )
            made = [made[name] for name in self.names]
        if not isinstance(made, Sequence) or len(made) != len(self.names):
            what = f"{len(made)} values" if isinstance(made, Sequence) else f"a {type(made).__name__}"
            raise ReferenceGradientError(
                f"the reference returned {what}, but the model has {len(self.names)} trainable parameters; return a "
                "loss to differentiate, a dictionary of gradients by name, or their list in the model's order"
            )
        return [
            torch.zeros_like(parameter) if gradient is None else as_dense(gradient.detach()).clone()
            for parameter, gradient in zip(self.parameters, made, strict=True)
        ]

    def _collect(self) -> list[Tensor]:
        gradients = [
            as_dense(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach())
            for parameter in self.parameters
        ]
        self._clear()
        return gradients

    def _clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def _check_parameters(self, before: list[Tensor]) -> None:
        """Put parameters back and say so if the loop changed them."""
        changed = [
            name
            for name, parameter, value in zip(self.names, self.parameters, before, strict=True)
            if not torch.equal(parameter.detach(), value)
        ]
        if changed:
            self._put_back(before)
            raise AccumulationError(
                f"the loop changed {len(changed)} parameters, the first one is {changed[0]!r}; leave out the "
                "optimizer's step. Parameters were put back; what the optimizer keeps of its steps was not"
            )

    def _put_back(self, before: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.copy_(value)


@contextlib.contextmanager
def exact_step() -> Iterator[None]:
    """Run the model's stock code, eagerly, and keep step with the seeds that its sketched layers take."""
    with forced_exact(in_step=True), torch.compiler.set_stance("force_eager"):
        yield


def _run_reference(reference: Reference, model: nn.Module, batch: Any) -> Any:
    try:
        return reference(model, batch)
    except CheapgradError:
        raise
    except Exception as error:
        raise ReferenceGradientError(f"the reference raised {type(error).__name__}: {error}") from error


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        _refuse(f"{loss!r} of type {type(loss).__name__}")
    if loss.numel() != 1:
        _refuse(f"a tensor of shape {tuple(loss.shape)}")
    if loss.is_complex():
        _refuse(f"a tensor of {loss.dtype}")
    if not loss.requires_grad:
        _refuse("a tensor that does not require grad")


def _refuse(what: str) -> NoReturn:
    raise LossError(
        f"the loss function must return a real scalar tensor that requires grad, but returned {what}; return e.g. "
        "cross_entropy(model(x), y), without backward and without .item()"
    )


def as_dense(gradient: Tensor) -> Tensor:
    """Return a plain tensor for a sparse or a sharded one."""
    if gradient.is_sparse:
        return gradient.to_dense()
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(gradient, distributed.DTensor):
        sharded: Any = gradient
        return sharded.full_tensor()
    return gradient
