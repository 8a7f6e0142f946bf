"""Tests of conversion: rules, class swap, handle."""
