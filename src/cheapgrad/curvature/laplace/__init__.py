"""Laplace posteriors over Kronecker-factored curvature, and the calibration of what they predict."""

from cheapgrad.curvature.laplace.calibration import expected_calibration_error, negative_log_likelihood
from cheapgrad.curvature.laplace.evidence import log_marginal_likelihood, sum_log_likelihood, tune_prior_precision
from cheapgrad.curvature.laplace.linearised import OutputDistribution, add_noise, predict_linearised
from cheapgrad.curvature.laplace.monte_carlo import sample_outputs
from cheapgrad.curvature.laplace.posterior import KroneckerLaplace, fit_laplace

__all__ = [
    "KroneckerLaplace",
    "OutputDistribution",
    "add_noise",
    "expected_calibration_error",
    "fit_laplace",
    "log_marginal_likelihood",
    "negative_log_likelihood",
    "predict_linearised",
    "sample_outputs",
    "sum_log_likelihood",
    "tune_prior_precision",
]
