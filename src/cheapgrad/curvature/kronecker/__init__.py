"""Kronecker-factored curvature whose directions and magnitudes may come from different batches."""

from cheapgrad.curvature.kronecker.curvature import KroneckerBlock, KroneckerCurvature
from cheapgrad.curvature.kronecker.estimate import along_basis_of, ekfac, kfac
from cheapgrad.curvature.kronecker.fisher import AbstractFisher, EmpiricalFisher, ExactFisher, SampledFisher
from cheapgrad.curvature.kronecker.outputs import AbstractOutputs, CategoricalOutputs, GaussianOutputs
from cheapgrad.curvature.kronecker.problem import KroneckerOptions
from cheapgrad.curvature.kronecker.rows import WeightSharing

__all__ = [
    "AbstractFisher",
    "AbstractOutputs",
    "CategoricalOutputs",
    "EmpiricalFisher",
    "ExactFisher",
    "GaussianOutputs",
    "KroneckerBlock",
    "KroneckerCurvature",
    "KroneckerOptions",
    "SampledFisher",
    "WeightSharing",
    "along_basis_of",
    "ekfac",
    "kfac",
]
