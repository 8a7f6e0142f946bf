"""Bias and variance of any random gradient, measured against the exact one."""

from cheapgrad.auditing.audit import audit, audit_step
from cheapgrad.auditing.gradient_moments import GradientMoments, TensorMoments, measure_gradient_moments
from cheapgrad.auditing.report import AuditReport, LayerAudit
from cheapgrad.auditing.student import student_band

__all__ = [
    "AuditReport",
    "GradientMoments",
    "LayerAudit",
    "TensorMoments",
    "audit",
    "audit_step",
    "measure_gradient_moments",
    "student_band",
]
