"""The two moments at which a backward pass can be made cheaper."""

from __future__ import annotations

import enum


class Moment(enum.Enum):
    """When a strategy acts, and therefore what it can see.

    * ``STORED``: at forward time, on what is kept of the input X. Saves memory, cannot see the cotangent, and its
      variance does not compound with depth.
    * ``COTANGENT``: at backward time, on the cotangent G. Saves the products dX and dW, may look at G, and its variance
      compounds with depth.
    """

    STORED = "stored"
    COTANGENT = "cotangent"
