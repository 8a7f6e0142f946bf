"""Laws of what works row by row and keeps codes: activations, and norms over features."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapgrad.ops.activation import Activation
from cheapgrad.ops.stored_derivative import derivative_saved_bytes
from cheapgrad.sketch import LayerShape, LayerTensors, Moment, StochasticRounding, Variance
from cheapgrad.sketch.law import Law
from cheapgrad.sketch.rounding_covariance import variance_of_sums

_ROWS_DRAWN = (
    "rows are drawn too: they are drawn at the end of the chain, by a cotangent that is not known here, so that no "
    "formula of this operation's own tensors exists"
)


def slope_law(activation: Activation, codec: StochasticRounding) -> Law:
    """Return the law of an activation that keeps its slope in codes, or its branch in a bit.

    Its tensors are the input ``[N, I]`` and the cotangent of the output ``[N, I]``; there is no dW.

    Args:
        activation: which one.
        codec: tells the bits; a branch has one, whatever it says.

    >>> law = slope_law(Activation("relu"), StochasticRounding(4))
    >>> float(law.variance(torch.randn(2, 8), torch.randn(2, 8)).input)
    0.0
    """
    is_smooth = activation.slope_kind == "smooth"

    def variance(tensors: LayerTensors, moment: Moment) -> Variance:
        x, grad = tensors.stored_QNI.double(), tensors.cotangent_QNO.double()
        zero = torch.zeros((), dtype=torch.float64, device=x.device)
        if not is_smooth:
            return Variance(zero, zero)
        slope = activation.derivative(x, activation.forward(x))
        return Variance((grad.square() * activation.codec(codec.bits).entry_variance(slope)).sum(), zero)

    return Law(
        estimates="the slope of an activation, in few bits" if is_smooth else "the branch of an activation, in one bit",
        bias=0.0,
        formula="dX: Σ (s ∂L/∂y)² f(1 − f)" if is_smooth else "dX: 0",
        fails_when=f"entries of a row share draws: sums over a row have another variance; {_ROWS_DRAWN}",
        moments=(Moment.STORED,),
        _variance=variance,
        _flops=lambda shape, moment: 0.0,
        _saved_bytes=lambda shape, moment: float(derivative_saved_bytes(activation, codec, shape.rows, shape.inputs)),
    )


def norm_law(codec: StochasticRounding, eps: float, weight_I: Tensor | None, *, centred: bool) -> Law:
    r"""Return the law of a norm over the last axis that keeps two independent codes of ``x_hat``.

    Its tensors are the input ``[N, I]`` and the cotangent of the output ``[N, I]``; dW is the weight's gradient. With e
    and d the errors of the two codes, ``g = weight * grad``, ``m = mean(g x_hat)`` and ``V = Var mean(g d)`` for each
    row, and r the factor ``1 / sqrt(var + eps)``::

        E ||dx_hat - dx||**2 = sum_n r_n**2 ((m_n**2 + V_n) sum_i Var(e_ni) + V_n sum_i x_hat_ni**2)
        E ||dw_hat - dw||**2 = sum_ni grad_ni**2 Var(e_ni)

    exactly: V by `cheapgrad.sketch.rounding_covariance.variance_of_sums`, since neighbours share a draw.

    Args:
        codec: of both codes.
        eps: added to the variance, or to the mean square.
        weight_I: what the normalised rows are multiplied by, shape ``[I]``, or None.
        centred: whether the mean is taken off (`torch.nn.LayerNorm`) or not (root mean square norms).
    """

    def variance(tensors: LayerTensors, moment: Moment) -> Variance:
        x_NI, grad_NI = tensors.stored_QNI.double(), tensors.cotangent_QNO.double()
        rows, features = x_NI.shape
        centred_NI = x_NI - x_NI.mean(1, keepdim=True) if centred else x_NI
        root_N = (centred_NI.square().mean(1) + eps).rsqrt()
        x_hat_NI = centred_NI * root_N.unsqueeze(1)
        scaled_NI = grad_NI if weight_I is None else grad_NI * weight_I.detach().double()
        # What is encoded has the dtype of the rows, single precision at least.
        encoded_NI = x_hat_NI.to(torch.promote_types(tensors.stored_QNI.dtype, torch.float32))
        noise_NI = codec.entry_variance(encoded_NI)
        row_N = torch.arange(rows, device=x_NI.device).unsqueeze(1).expand(rows, features)
        of_mean_N = variance_of_sums(codec, encoded_NI, scaled_NI / features, row_N)
        along_N = (scaled_NI * x_hat_NI).mean(1)
        of_rows_N = (along_N**2 + of_mean_N) * noise_NI.sum(1) + of_mean_N * x_hat_NI.square().sum(1)
        of_weight = (grad_NI.square() * noise_NI).sum()
        return Variance((root_N**2 * of_rows_N).sum(), of_weight if weight_I is not None else of_weight * 0)

    return Law(
        estimates="the normalised rows, in two independent codes",
        bias=0.0,
        formula="dX: Σₙ rₙ²((mₙ² + Vₙ) Σᵢ Var eₙᵢ + Vₙ Σᵢ x̂ₙᵢ²);  dW: Σ (∂L/∂y)² Var e",
        fails_when=f"the input is kept for an attention that computes from it again (then dX and dW are exact); "
        f"{_ROWS_DRAWN}",
        moments=(Moment.STORED,),
        _variance=variance,
        _flops=lambda shape, moment: 0.0,
        _saved_bytes=lambda shape, moment: norm_codes_bytes(codec, shape.rows, shape.inputs, shape.element_bytes),
    )


def norm_codes_bytes(codec: StochasticRounding, rows: int, features: int, root_bytes: int) -> float:
    """Return the bytes that a norm over features holds: a factor per row and two codes.

    >>> norm_codes_bytes(StochasticRounding(4), 8, 64, 4)
    608.0
    """
    return rows * root_bytes + 2 * codec.law.saved_bytes(LayerShape(rows, features, features), Moment.STORED)
