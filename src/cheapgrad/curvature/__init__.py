"""Curvature of a network: products, spectra, and what is built on them.

Everything here takes any operator, ours or another library's: anything with a ``shape`` and ``@``. Kronecker factors
and the posteriors on them have packages of their own, `kronecker` and `laplace`: their Fisher matrices are chosen by
objects of the names that operators have here.
"""

from cheapgrad.curvature import kronecker, laplace
from cheapgrad.curvature.batch_sharpness import Sharpness, measure_batch_sharpness
from cheapgrad.curvature.bias_report import BiasReport, IndexBias, bias_report
from cheapgrad.curvature.bit_allocation import BitAllocation, LayerBits, allocate_bits, quantization_penalty
from cheapgrad.curvature.conjugate_gradient import (
    ConjugateGradientRun,
    ConjugateGradientSettings,
    Magnitudes,
    StopReason,
    run_conjugate_gradient,
)
from cheapgrad.curvature.cross_fitting import CrossFit, cross_fit
from cheapgrad.curvature.debiased_conjugate_gradient import (
    BatchQuadratic,
    DebiasedConjugateGradient,
    PathValues,
    debiased_conjugate_gradient,
    merge_quadratics,
)
from cheapgrad.curvature.directional_estimates import DirectionalEstimates, measure_curvature_along, measure_slope_along
from cheapgrad.curvature.finite_population import FinitePopulation
from cheapgrad.curvature.gauss_newton_step import gauss_newton_step, solve_gauss_newton
from cheapgrad.curvature.independence import check_disjoint, check_independent
from cheapgrad.curvature.inverse_correction import correct_inverse
from cheapgrad.curvature.inverse_fisher import InverseFisher, SlidingInverseFisher
from cheapgrad.curvature.leading_directions import find_leading_directions
from cheapgrad.curvature.newton import NewtonStep, debiased_newton_step
from cheapgrad.curvature.operators import (
    AbstractDataOperator,
    AbstractLikelihood,
    AbstractOperator,
    BatchReader,
    Bernoulli,
    Categorical,
    DenseOperator,
    Draws,
    EmpiricalFisher,
    ForeignOperator,
    Gaussian,
    GaussNewton,
    Hessian,
    MeanOperator,
    MicroBatch,
    MonteCarloFisher,
    as_likelihood,
    as_operator,
)
from cheapgrad.curvature.sensitivities import LayerSensitivity, measure_sensitivities
from cheapgrad.curvature.shrinkage import shrink_eigenvalues
from cheapgrad.curvature.spectra import (
    Eigenpairs,
    LanczosSettings,
    ScalarEstimate,
    SpectralDensity,
    VectorEstimate,
    bottom_eigenpairs,
    frobenius_norm,
    hutch_plus_plus,
    hutchinson_diagonal,
    hutchinson_trace,
    spectral_density,
    top_eigenpairs,
    top_singular_values,
    xdiag,
    xtrace,
)
from cheapgrad.curvature.split_sample import SplitSample, split_sample
from cheapgrad.curvature.split_size import SplitSize, choose_split
from cheapgrad.curvature.step_diagonals import estimate_gauss_newton_diagonal, estimate_hessian_diagonal

__all__ = [
    "AbstractDataOperator",
    "AbstractLikelihood",
    "AbstractOperator",
    "BatchQuadratic",
    "BatchReader",
    "Bernoulli",
    "BiasReport",
    "BitAllocation",
    "Categorical",
    "ConjugateGradientRun",
    "ConjugateGradientSettings",
    "CrossFit",
    "DebiasedConjugateGradient",
    "DenseOperator",
    "DirectionalEstimates",
    "Draws",
    "Eigenpairs",
    "EmpiricalFisher",
    "FinitePopulation",
    "ForeignOperator",
    "GaussNewton",
    "Gaussian",
    "Hessian",
    "IndexBias",
    "InverseFisher",
    "LanczosSettings",
    "LayerBits",
    "LayerSensitivity",
    "Magnitudes",
    "MeanOperator",
    "MicroBatch",
    "MonteCarloFisher",
    "NewtonStep",
    "PathValues",
    "ScalarEstimate",
    "Sharpness",
    "SlidingInverseFisher",
    "SpectralDensity",
    "SplitSample",
    "SplitSize",
    "StopReason",
    "VectorEstimate",
    "allocate_bits",
    "as_likelihood",
    "as_operator",
    "bias_report",
    "bottom_eigenpairs",
    "check_disjoint",
    "check_independent",
    "choose_split",
    "correct_inverse",
    "cross_fit",
    "debiased_conjugate_gradient",
    "debiased_newton_step",
    "estimate_gauss_newton_diagonal",
    "estimate_hessian_diagonal",
    "find_leading_directions",
    "frobenius_norm",
    "gauss_newton_step",
    "hutch_plus_plus",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "kronecker",
    "laplace",
    "measure_batch_sharpness",
    "measure_curvature_along",
    "measure_sensitivities",
    "measure_slope_along",
    "merge_quadratics",
    "quantization_penalty",
    "run_conjugate_gradient",
    "shrink_eigenvalues",
    "solve_gauss_newton",
    "spectral_density",
    "split_sample",
    "top_eigenpairs",
    "top_singular_values",
    "xdiag",
    "xtrace",
]
