"""Flows of autoregressive layers: one pass in one direction, a sweep over the coordinates in the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ...arguments import whole
from ..bases import Base
from ..bijection import Inverted, Layer
from ..conditioners.masked import MaskedMLP
from ..distribution import Flow
from ..layers.autoregressive import Autoregressive
from ..parameters import Parametric
from ..univariates.univariate import Univariate, affine
from .build import HIDDEN_WIDTHS, conditioned_affine, flow, recipe, spline_and_affine
from .coupling import coupling_layers

__all__ = ["iaf", "maf", "spline_autoregressive"]


@recipe
def iaf(
    dim: int,
    context: int | None = None,
    *,
    layers: int = 4,
    hidden: Sequence[int] = HIDDEN_WIDTHS,
    base: Base | None = None,
) -> Flow:
    """Inverse autoregressive flow (Kingma et al. 2016): one pass to sample, a sweep over coordinates to score."""
    return flow(autoregressive_layers(dim, context, layers, hidden, conditioned_affine), dim, base, context)


@recipe
def maf(
    dim: int,
    context: int | None = None,
    *,
    layers: int = 4,
    hidden: Sequence[int] = HIDDEN_WIDTHS,
    base: Base | None = None,
) -> Flow:
    """Masked autoregressive flow (Papamakarios et al. 2017), IAF's inverse: one pass to score, a sweep to sample."""
    stack = autoregressive_layers(dim, context, layers, hidden, conditioned_affine)
    return flow([Inverted(layer) for layer in stack], dim, base, context)


@recipe
def spline_autoregressive(
    dim: int,
    context: int | None = None,
    *,
    layers: int = 2,
    hidden: Sequence[int] = HIDDEN_WIDTHS,
    bins: int = 8,
    bound: float = 5.0,
    base: Base | None = None,
) -> Flow:
    """Neural spline flow with an autoregressive conditioner in the sampling direction (as IAF)."""
    return flow(
        autoregressive_layers(dim, context, layers, hidden, partial(spline_and_affine, bins, bound)), dim, base, context
    )


def autoregressive_layers(
    dim: int, context: int | None, layers: int, hidden: Sequence[int], univariate: Callable[[], Univariate]
) -> list[Layer]:
    """Autoregressive layers in alternating order, each with a univariate of its own.

    Affine ones only scale gently, so an elementwise affine closes.
    """
    if dim == 1:  # no coordinate comes before: numbers of the context alone
        return coupling_layers(dim, context, layers, hidden, univariate, "none")
    orders = [range(dim) if i % 2 == 0 else range(dim - 1, -1, -1) for i in range(whole("layers", layers))]
    stack: list[Layer] = []
    for order in orders:
        each = univariate()
        stack.append(Autoregressive(each, MaskedMLP(order, each.count, hidden, context)))
    return [*stack, Parametric(affine(), dim, context)]
