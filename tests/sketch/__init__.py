"""Tests of the sampling core."""
