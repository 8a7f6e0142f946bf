"""Tables, pictures, plain sentences and pages made from records; nothing here computes with tensors."""

from cheapgrad.reporting.page import render_page
from cheapgrad.reporting.record_files import RecordDirectory, RecordFile, RefusedFile, read_directory
from cheapgrad.reporting.records import DemoRecord, HeldRecord, MethodRecord, ModelRecord, StepRecord, TensorRecord
from cheapgrad.reporting.scatter import draw_scatter
from cheapgrad.reporting.table import print_tables
from cheapgrad.reporting.verdict import write_verdict

__all__ = [
    "DemoRecord",
    "HeldRecord",
    "MethodRecord",
    "ModelRecord",
    "RecordDirectory",
    "RecordFile",
    "RefusedFile",
    "StepRecord",
    "TensorRecord",
    "draw_scatter",
    "print_tables",
    "read_directory",
    "render_page",
    "write_verdict",
]
