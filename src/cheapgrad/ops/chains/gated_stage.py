"""The inner half of a gated feed-forward as a stage: ``f(x V + c) * (x W + b)``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cheapgrad.ops.activation import Activation
from cheapgrad.ops.chains.activation_stage import ActivationStage
from cheapgrad.ops.chains.linear_stage import LinearStage
from cheapgrad.ops.chains.stage import AbstractOpenedStage, AbstractStage, KeptRows, Rebuild
from cheapgrad.sketch import AbstractStrategy, DenseMatrix, Moment, Operands


@dataclass(frozen=True)
class GatedStage(AbstractStage):
    """``h = a * u`` with ``a = f(g)``, where g and u are two linear maps of one input.

    With the cotangent c of h, ``du = c * a`` and ``dg = c * (u f'(g))``: linear in two tensors. A codec keeps one code
    of each; the layer that follows keeps one of h. No two codes are multiplied, so nothing has to be independent.

    Attributes:
        linear: how g and u are computed, and what is kept of x.
        activation: f, and whether its slope is read from its output.
        stored: codec for ``a`` and ``u f'(g)``, or None to keep g (or a) and u.
        input_count: how many tensors of the record stand for x.
    """

    linear: LinearStage
    activation: ActivationStage
    stored: AbstractStrategy | None = None
    input_count: int = 0

    @property
    def rebuilds_output(self) -> bool:
        """Yes, in two passes over the kept rows, where g and u are held; codes of h are kept by who follows."""
        return self.stored is None

    @property
    def multiplies(self) -> bool:
        """Yes: this is where sampled rows save time."""
        return True

    def forward(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Return the product."""
        gate = self.linear.forward(x, parameters[:2])
        return self.activation.forward(gate, ()) * self.linear.forward(x, parameters[2:])

    def record(self, x: Tensor, parameters: tuple[Tensor | None, ...], is_rebuilt: bool) -> tuple[Tensor, ...]:
        """Return what is kept of x, and what `hold` keeps."""
        gate, up = (self.linear.forward(x, part) for part in (parameters[:2], parameters[2:]))
        activated = self.activation.forward(gate, ())
        of_input = self.linear.record(x, parameters[:2], is_rebuilt)
        slope_from = activated if self.activation.keeps_output else gate
        by_slope = self.activation.activation.backward(up, slope_from, activated)
        return (*of_input, *self.hold(slope_from, activated, up, by_slope))

    def hold(self, slope_from: Tensor, activated: Tensor, up: Tensor, by_slope: Tensor | None) -> tuple[Tensor, ...]:
        """Return what backward needs of the inner tensors.

        Args:
            slope_from: g, or a where the slope is read from it.
            activated: a.
            up: u.
            by_slope: ``u f'(g)``, or an unbiased stand-in; needed for codes only.
        """
        if self.stored is None or by_slope is None:
            return slope_from, up
        return (*_encode(self.stored, activated), *_encode(self.stored, by_slope))

    def open(
        self,
        record: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
        rows: KeptRows,
        rebuild: Rebuild | None,
    ) -> AbstractOpenedStage:
        """Return the stage, with the inner tensors on the kept rows and a way to its input."""
        input_KI = self.linear.input_rows(record[: self.input_count], parameters, rows, rebuild)
        inner = record[self.input_count :]
        if self.stored is None:
            slope_from_KD, up_KD = (rows.take_visibly(tensor) for tensor in inner)
            return _OpenedGate(_ExactFactors(self.activation, slope_from_KD, up_KD), parameters, rows, input_KI)
        half, weight = len(inner) // 2, parameters[0]
        if weight is None:
            raise RuntimeError("a gated stage has weights")
        features, dtype = weight.shape[0], weight.dtype
        codes = (tuple(inner[:half]), tuple(inner[half:]))
        activated_KD, by_slope_KD = (rows.decode(self.stored, code, features, dtype) for code in codes)
        return _OpenedGate(_DecodedFactors(activated_KD, by_slope_KD), parameters, rows, input_KI)


def _encode(codec: AbstractStrategy, tensor: Tensor) -> tuple[Tensor, ...]:
    return codec.store(Operands(Moment.STORED, DenseMatrix(tensor.detach().reshape(-1, tensor.shape[-1]))))


class _ExactFactors:
    """Cotangents of g and u from g (or a) and u themselves."""

    def __init__(self, activation: ActivationStage, slope_from_KD: Tensor, up_KD: Tensor) -> None:
        self._activation: Activation = activation.activation
        self._slope_from_KD, self._up_KD = slope_from_KD, up_KD
        self._activated_KD = slope_from_KD if activation.keeps_output else self._activation.forward(slope_from_KD)

    def product(self) -> Tensor:
        """Return ``a * u``."""
        return self._activated_KD * self._up_KD

    def split(self, grad_KD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cotangents of g and u, as PyTorch computes them."""
        grad_KD = grad_KD.to(self._up_KD.dtype)
        of_gate_KD = self._activation.backward(grad_KD * self._up_KD, self._slope_from_KD, self._activated_KD)
        return of_gate_KD, grad_KD * self._activated_KD


class _DecodedFactors:
    """Cotangents of g and u from unbiased stand-ins for ``a`` and ``u f'(g)``."""

    def __init__(self, activated_KD: Tensor, by_slope_KD: Tensor) -> None:
        self._activated_KD, self._by_slope_KD = activated_KD, by_slope_KD

    def product(self) -> Tensor:
        """Refuse: what follows has codes of its own."""
        raise RuntimeError("codes of the factors' derivatives do not give the product")

    def split(self, grad_KD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cotangents of g and u."""
        grad_KD = grad_KD.to(self._activated_KD.dtype)
        return grad_KD * self._by_slope_KD, grad_KD * self._activated_KD


class _OpenedGate(AbstractOpenedStage):
    def __init__(
        self,
        factors: _ExactFactors | _DecodedFactors,
        parameters: tuple[Tensor | None, ...],
        rows: KeptRows,
        input_KI: Rebuild | None,
    ) -> None:
        self._factors = factors
        self._rows = rows
        self._weights = parameters[0], parameters[2]
        self._input_KI = input_KI

    def output(self) -> Tensor:
        """Return ``a * u`` on the kept rows."""
        return self._factors.product()

    def pull_back(self, grad_KO: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """Return the gradients of the input, which both linear maps read, and of weights and biases."""
        wants_input, *of_parameters = wanted
        # Decoded once, for both weights.
        wants_weights = any(of_parameters[::2])
        input_KI = self._input_KI() if wants_weights and self._input_KI is not None else None
        grad_input: Tensor | None = None
        gradients: list[Tensor | None] = []
        for place, grad_KD in enumerate(self._factors.split(grad_KO)):
            wants_weight, wants_bias = of_parameters[2 * place : 2 * place + 2]
            weight_DI = self._weights[place]
            if weight_DI is None:
                raise RuntimeError("a gated stage has weights")
            grad_KD = grad_KD.to(weight_DI.dtype)
            known_KI = input_KI if wants_weight else None
            gradients.append(None if known_KI is None else self._rows.contract(grad_KD, known_KI, weight_DI))
            gradients.append(grad_KD.sum(0) if wants_bias else None)
            if wants_input:
                part_KI = grad_KD @ weight_DI
                grad_input = part_KI if grad_input is None else grad_input.add_(part_KI)
        return grad_input, tuple(gradients)
