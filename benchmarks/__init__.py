"""Timings and noise measurements: compared interleaved in one process, reported as medians and ratios."""
