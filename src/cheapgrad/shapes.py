"""Legend of the shape letters that tensor names carry as a suffix, such as ``grad_NO``.

==========  ==========================================================================================
letter      meaning
==========  ==========================================================================================
``B``       examples in the batch
``T``       tokens (or pixels) per example
``N``       rows: all examples x tokens, ``N = B * T``
``I``       input features (channels) of a layer
``O``       output features (channels) of a layer
``K``       kept rows, columns or features of a sketch
``R``       rank
``P``       parameters
``C``       classes
``Z``       kernel positions of a convolution (the product of its kernel sizes)
``Q``       groups of a grouped convolution
``D``       any feature axis, where it does not matter which
==========  ==========================================================================================
"""

from __future__ import annotations

LETTERS = {
    "B": "examples in the batch",
    "T": "tokens (or pixels) per example",
    "N": "rows: all examples x tokens",
    "I": "input features (channels)",
    "O": "output features (channels)",
    "K": "kept rows, columns or features of a sketch",
    "R": "rank",
    "P": "parameters",
    "C": "classes",
    "Z": "kernel positions of a convolution",
    "Q": "groups of a grouped convolution",
    "D": "any feature axis",
}
