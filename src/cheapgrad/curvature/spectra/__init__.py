"""Spectra of curvature matrices from their products: ends, density, trace, diagonal, norms."""

from cheapgrad.curvature.spectra.density import SpectralDensity, spectral_density
from cheapgrad.curvature.spectra.estimates import ScalarEstimate, VectorEstimate
from cheapgrad.curvature.spectra.exchangeable import xdiag, xtrace
from cheapgrad.curvature.spectra.hutch_plus_plus import hutch_plus_plus
from cheapgrad.curvature.spectra.hutchinson import frobenius_norm, hutchinson_diagonal, hutchinson_trace
from cheapgrad.curvature.spectra.lanczos import (
    Eigenpairs,
    LanczosSettings,
    bottom_eigenpairs,
    top_eigenpairs,
    top_singular_values,
)

__all__ = [
    "Eigenpairs",
    "LanczosSettings",
    "ScalarEstimate",
    "SpectralDensity",
    "VectorEstimate",
    "bottom_eigenpairs",
    "frobenius_norm",
    "hutch_plus_plus",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "spectral_density",
    "top_eigenpairs",
    "top_singular_values",
    "xdiag",
    "xtrace",
]
