"""Tests of Kronecker factors."""
