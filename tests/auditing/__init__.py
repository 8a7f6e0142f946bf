"""Tests of the auditing room."""
