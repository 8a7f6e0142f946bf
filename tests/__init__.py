"""The tests; import what they share as `tests.<module>`."""
