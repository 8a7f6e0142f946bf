"""Kinds of layers that have Kronecker factors."""

from cheapgrad.curvature.kronecker.layers.abstract import AbstractLayer, Use
from cheapgrad.curvature.kronecker.layers.affine import ConvolutionLayer, LinearLayer
from cheapgrad.curvature.kronecker.layers.embedding import EmbeddingLayer
from cheapgrad.curvature.kronecker.layers.norm import NormLayer

LAYER_KINDS: tuple[type[AbstractLayer], ...] = (LinearLayer, ConvolutionLayer, EmbeddingLayer, NormLayer)
"""All kinds; a new kind is a new file and an entry here."""

__all__ = ["LAYER_KINDS", "AbstractLayer", "ConvolutionLayer", "EmbeddingLayer", "LinearLayer", "NormLayer", "Use"]
