"""The demo: two small networks trained exactly, with another batch size, and with sketches, compared on everything."""

from cheapgrad.demo.methods import Method, make_default_methods
from cheapgrad.demo.models import DigitsMLP, DigitsViT
from cheapgrad.demo.run import DemoSettings, run_demo

__all__ = ["DemoSettings", "DigitsMLP", "DigitsViT", "Method", "make_default_methods", "run_demo"]
