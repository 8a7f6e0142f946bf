"""Variances of sums over stochastically rounded entries, where entries that share a draw are dependent."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapgrad.sketch.dither import van_der_corput
from cheapgrad.sketch.stochastic_rounding import StochasticRounding, rounding_steps

# Pairs of entries worked on at a time.
_PAIRS = 1 << 22


def variance_of_sums(codec: StochasticRounding, values_NI: Tensor, weight_NI: Tensor, part_NI: Tensor) -> Tensor:
    r"""Return the variance of weighted sums of decoded entries, one sum for each part of a matrix.

    Entry j goes up where ``frac(u + c_j) >= 1 - f_j``, an arc of length f_j on the circle of its draw u; two entries of
    one draw have ``Cov = s_i s_j (|arc_i and arc_j| - f_i f_j)``, entries of different draws none.

    Args:
        codec: the codec, with ``I >= codec.group`` or a row per draw otherwise, as it encodes.
        values_NI: what was encoded, ``[N, I]``.
        weight_NI: weights of the sums, ``[N, I]``.
        part_NI: which sum an entry belongs to, ``[N, I]``, integers.

    Returns:
        ``[parts]``, float64: ``sum_ij w_i w_j Cov(i, j)`` over the pairs of a part.

    >>> codec, values = StochasticRounding(bits=2, group=8), torch.linspace(0, 1, 16).view(2, 8)
    >>> alone = variance_of_sums(codec, values, torch.ones(2, 8), torch.arange(16).view(2, 8))
    >>> bool(torch.allclose(alone, codec.entry_variance(values).flatten()))
    True
    """
    rows, columns = values_NI.shape
    block = min(codec.group, columns)
    step_NI, up_NI = rounding_steps(values_NI, codec)
    missing = -rows * columns % block
    shift = torch.tensor(van_der_corput(block), dtype=torch.float64, device=values_NI.device)

    def in_blocks(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor.flatten(), (0, missing)).view(-1, block)

    up, scaled, part = in_blocks(up_NI), in_blocks(weight_NI.double() * step_NI), in_blocks(part_NI)
    start = (1 - up - shift) % 1
    variance = torch.zeros(int(part_NI.max()) + 1, dtype=torch.float64, device=values_NI.device)
    count = max(1, _PAIRS // block**2)
    for first in range(0, up.shape[0], count):
        piece = slice(first, first + count)
        pairs = _overlaps(start[piece], up[piece]) - up[piece].unsqueeze(2) * up[piece].unsqueeze(1)
        pairs.mul_(part[piece].unsqueeze(2) == part[piece].unsqueeze(1))
        share = scaled[piece] * (pairs * scaled[piece].unsqueeze(1)).sum(2)
        variance.index_add_(0, part[piece].flatten(), share.flatten())
    return variance.clamp_(min=0)


def _overlaps(start: Tensor, length: Tensor) -> Tensor:
    """Return the lengths of the overlaps of all pairs of arcs of a circle of length one, ``[blocks, L, L]``."""
    distance = (start.unsqueeze(1) - start.unsqueeze(2)) % 1
    own, other = length.unsqueeze(2), length.unsqueeze(1)
    direct = (torch.minimum(own, distance + other) - distance).clamp_(min=0)
    return direct + torch.minimum(own, distance + other - 1).clamp_(min=0)
