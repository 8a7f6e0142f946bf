"""What derivatives cost: bytes held for the backward pass, measured on the whole network.

Everything here works on any PyTorch code; it knows nothing of sketches.
"""

from cheapgrad.cost.held_bytes import HeldBytes, HeldStorage, measure_held_bytes

__all__ = ["HeldBytes", "HeldStorage", "measure_held_bytes"]
