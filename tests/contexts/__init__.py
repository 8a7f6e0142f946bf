"""Layers x strategies in the contexts that training code runs in: one table."""
