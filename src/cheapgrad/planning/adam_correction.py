"""What added variance takes from Adam's steps, and how to give it back."""

from __future__ import annotations

import math

from cheapgrad.errors import ControlError


def adam_learning_rate_factor(noise: float, noise_share: float = 1.0) -> float:
    r"""Return the factor for Adam's learning rate under which sketched steps are as long as exact ones.

    Adam divides by the root of a running mean of squared gradients. With g the expected gradient, V the mini-batch
    variance and added variance ``ω V``, that mean is ``g² + (1 + ω) V`` in place of ``g² + V``: every step is shorter
    by ``sqrt(1 + ω ν)`` with ``ν = V / (g² + V)``, although the gradient itself is unbiased.

    Args:
        noise: ω ≥ 0, added variance ÷ mini-batch variance.
        noise_share: ν in [0, 1], the share of the mini-batch variance in the mean squared gradient; 1 where noise
            dominates, as it does for most coordinates after the first steps.

    Returns:
        ``sqrt(1 + ω ν)``, at least 1.

    **Law** Exact for the mean of the squared gradient where ω is alike in all coordinates; epsilon, and the noise of
    the running mean itself, are left out.

    Raises:
        ControlError: if a number is out of range.

    >>> round(adam_learning_rate_factor(0.05), 4)
    1.0247
    """
    if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise ControlError(f"noise must be a finite number of at least 0, but got {noise!r}")
    if isinstance(noise_share, bool) or not isinstance(noise_share, (int, float)) or not 0 <= noise_share <= 1:
        raise ControlError(f"noise_share must be in [0, 1], but got {noise_share!r}")
    return math.sqrt(1 + noise * noise_share)
