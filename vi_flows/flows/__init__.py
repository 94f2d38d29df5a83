"""Normalizing flows: bijections with log-determinants in both directions, and the distributions they make.

The names here are what a flow of your own is written with; the families are in ``vf.recipes``.
"""

from .autoregressive import Autoregressive
from .bijection import Bijection, Compose, Inverse, Inverted, Layer
from .conditioner import Conditioner
from .coupling import Coupling, Split
from .distribution import Flow, FlowDistribution
from .masked import MaskedMLP
from .networks import MLP
from .parameters import Fixed, Parametric
from .univariate import Chain, Univariate, affine

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
