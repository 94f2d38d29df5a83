"""Normalizing flows: bijections with log-determinants in both directions, and the distributions they make.

The names here are what a flow of your own is written with; the families are in ``vf.recipes``.
"""

from .bijection import Bijection, Compose, Inverse, Inverted, Layer
from .conditioners.conditioner import Conditioner
from .conditioners.masked import MaskedMLP
from .conditioners.mlp import MLP
from .distribution import Flow, FlowDistribution
from .layers.autoregressive import Autoregressive
from .layers.coupling import Coupling, Split
from .parameters import Fixed, Parametric
from .univariates.univariate import Chain, Univariate, affine

__all__ = [
    "MLP",
    "Autoregressive",
    "Bijection",
    "Chain",
    "Compose",
    "Conditioner",
    "Coupling",
    "Fixed",
    "Flow",
    "FlowDistribution",
    "Inverse",
    "Inverted",
    "Layer",
    "MaskedMLP",
    "Parametric",
    "Split",
    "Univariate",
    "affine",
]
