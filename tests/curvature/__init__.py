"""Tests of curvature: operators, spectra, estimators, factors."""
