"""What all recipes share: their checks, their defaults, and the layers around their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from ...arguments import whole
from ..bases import Base, StandardNormal
from ..bijection import Layer
from ..distribution import Flow
from ..univariates.rational_quadratic import rational_quadratic
from ..univariates.univariate import Chain, Univariate, affine

HIDDEN_WIDTHS = (64, 64)
CONDITIONED_LOG_SCALE = 2.5  # bound of a conditioner's log-scale in one layer


def recipe(function: Callable[..., Flow]) -> Callable[..., Flow]:
    """A family that refuses a dim or context that is no positive integer."""

    @wraps(function)
    def checked(dim: int, context: int | None = None, **options: Any) -> Flow:
        whole("dim", dim)
        if context is not None:
            whole("context", context)
        return function(dim, context, **options)

    return checked


def flow(layers: Sequence[Layer], dim: int, base: Base | None, context: int | None) -> Flow:
    base = StandardNormal(dim) if base is None else base
    if base.dim != dim:
        raise ValueError(f"base: expected a base of dim {dim}, got one of dim {base.dim}")
    return Flow(layers, base, context)


def conditioned_affine() -> Univariate:
    return affine(CONDITIONED_LOG_SCALE)


def spline_and_affine(bins: int, bound: float) -> Univariate:
    if not bound > 0:
        raise ValueError(f"bound: expected a positive number, got {bound!r}")
    if whole("bins", bins) < 2:
        raise ValueError(f"bins: expected at least 2, got {bins}")
    # the affine moves and scales also what lies in the spline's identity tails: funnels and bananas need it
    return Chain(rational_quadratic(bins, float(bound)), conditioned_affine())
