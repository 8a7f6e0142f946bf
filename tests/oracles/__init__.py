"""Naive answers to compare with. Nothing here imports the package under test."""
