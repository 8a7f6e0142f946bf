"""Curvature matrices as linear operators."""

from cheapgrad.curvature.operators.abstract import AbstractOperator, MicroBatch
from cheapgrad.curvature.operators.batches import BatchReader
from cheapgrad.curvature.operators.data import AbstractDataOperator
from cheapgrad.curvature.operators.dense import DenseOperator
from cheapgrad.curvature.operators.empirical_fisher import EmpiricalFisher
from cheapgrad.curvature.operators.foreign import ForeignOperator, as_operator
from cheapgrad.curvature.operators.gauss_newton import GaussNewton
from cheapgrad.curvature.operators.hessian import Hessian
from cheapgrad.curvature.operators.likelihoods import (
    AbstractLikelihood,
    Bernoulli,
    Categorical,
    Gaussian,
    as_likelihood,
)
from cheapgrad.curvature.operators.mean import MeanOperator
from cheapgrad.curvature.operators.monte_carlo_fisher import Draws, MonteCarloFisher

__all__ = [
    "AbstractDataOperator",
    "AbstractLikelihood",
    "AbstractOperator",
    "BatchReader",
    "Bernoulli",
    "Categorical",
    "DenseOperator",
    "Draws",
    "EmpiricalFisher",
    "ForeignOperator",
    "GaussNewton",
    "Gaussian",
    "Hessian",
    "MeanOperator",
    "MicroBatch",
    "MonteCarloFisher",
    "as_likelihood",
    "as_operator",
]
