"""What every estimate of a spectrum returns: the value, how uncertain it is, and what it cost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScalarEstimate:
    """A random estimate of one number.

    Attributes:
        value: the estimate.
        standard_error: of the value, estimated from the draws; NaN where there is one draw.
        products: matrix-vector products that were made.
        method: the function that made it.
    """

    value: float
    standard_error: float
    products: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ScalarEstimate:
        """Return what `to_dict` was made from."""
        return cls(**data)

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.standard_error:.2g} ({self.products} products, {self.method})"


@dataclass(frozen=True)
class VectorEstimate:
    """A random estimate of a vector ``[P]``.

    Attributes:
        values: the estimate.
        standard_errors: of each entry.
        products: matrix-vector products that were made.
        method: the function that made it.
    """

    values: Tensor
    standard_errors: Tensor
    products: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; tensors become lists of float64."""
        return {
            "values": self.values.double().tolist(),
            "standard_errors": self.standard_errors.double().tolist(),
            "products": self.products,
            "method": self.method,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VectorEstimate:
        """Return what `to_dict` was made from, in float64."""
        tensors = {key: torch.tensor(data[key], dtype=torch.float64) for key in ("values", "standard_errors")}
        return cls(**tensors, products=data["products"], method=data["method"])


def summarize_draws(draws: Tensor, products: int, method: str) -> ScalarEstimate:
    """Return the mean of draws with its standard error."""
    draws = draws.double()
    error = float(draws.std() / math.sqrt(len(draws))) if len(draws) > 1 else math.nan
    return ScalarEstimate(float(draws.mean()), error, products, method)
