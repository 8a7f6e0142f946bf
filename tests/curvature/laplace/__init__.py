"""Tests of the Laplace posterior."""
