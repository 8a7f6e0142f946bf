"""Bias and variance of any random gradient, measured against the exact one."""

from cheapgrad.auditing.gradient_moments import GradientMoments, TensorMoments, measure_gradient_moments
from cheapgrad.auditing.student import student_band

__all__ = ["GradientMoments", "TensorMoments", "measure_gradient_moments", "student_band"]
