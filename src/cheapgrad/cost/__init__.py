"""What derivatives cost: FLOPs and bytes of forward, backward and recomputation, by module and by operation.

Everything here works on any PyTorch code; it knows nothing of sketches.
"""

from cheapgrad.cost.cheap_gradient import CheapGradient, OperationFactor, cheap_gradient
from cheapgrad.cost.comparison import CostComparison, ModuleChange, compare
from cheapgrad.cost.formulas import find_formula, register_formula
from cheapgrad.cost.forward_mode import (
    ForwardModeCost,
    ForwardModeMeasurement,
    measure_forward_mode,
    predict_forward_mode,
)
from cheapgrad.cost.held_bytes import HeldBytes, HeldStorage, measure_held_bytes
from cheapgrad.cost.peak_memory import PeakMemory, peak_memory
from cheapgrad.cost.report import CostReport, Figures, ModuleCost, OperationCost
from cheapgrad.cost.scan import scan

__all__ = [
    "CheapGradient",
    "CostComparison",
    "CostReport",
    "Figures",
    "ForwardModeCost",
    "ForwardModeMeasurement",
    "HeldBytes",
    "HeldStorage",
    "ModuleChange",
    "ModuleCost",
    "OperationCost",
    "OperationFactor",
    "PeakMemory",
    "cheap_gradient",
    "compare",
    "find_formula",
    "measure_forward_mode",
    "measure_held_bytes",
    "peak_memory",
    "predict_forward_mode",
    "register_formula",
    "scan",
]
