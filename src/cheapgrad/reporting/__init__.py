"""Tables, pictures and plain sentences made from records; nothing here computes with tensors."""

from cheapgrad.reporting.records import DemoRecord, MethodRecord, ModelRecord, StepRecord
from cheapgrad.reporting.scatter import draw_scatter
from cheapgrad.reporting.table import print_tables
from cheapgrad.reporting.verdict import write_verdict

__all__ = ["DemoRecord", "MethodRecord", "ModelRecord", "StepRecord", "draw_scatter", "print_tables", "write_verdict"]
