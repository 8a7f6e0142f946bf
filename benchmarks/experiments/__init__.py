"""Experiments: networks trained by every method on real data, at equal cost, a record of each run behind every figure.

``python -m benchmarks.experiments`` runs what is declared in `tasks` and `methods` and has not been run yet; it may be
killed at any time and started again, also several times at once.
"""
