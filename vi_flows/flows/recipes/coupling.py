"""Flows of coupling layers: both directions in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ...arguments import whole
from ..bases import Base
from ..bijection import Layer
from ..conditioners.mlp import MLP
from ..distribution import Flow
from ..layers.coupling import Coupling, Split
from ..layers.linear import LU, Permutation
from ..parameters import Fixed, Parametric
from ..univariates.univariate import Univariate, affine
from .build import HIDDEN_WIDTHS, conditioned_affine, flow, recipe, spline_and_affine

__all__ = ["realnvp", "spline"]


@recipe
def realnvp(
    dim: int,
    context: int | None = None,
    *,
    layers: int = 6,
    hidden: Sequence[int] = HIDDEN_WIDTHS,
    mixing: str = "none",
    base: Base | None = None,
) -> Flow:
    """Affine coupling flow (Dinh et al. 2017); ``mixing`` as in :func:`spline`, which explains it."""
    return flow(coupling_layers(dim, context, layers, hidden, conditioned_affine, mixing), dim, base, context)


@recipe
def spline(
    dim: int,
    context: int | None = None,
    *,
    layers: int = 4,
    hidden: Sequence[int] = HIDDEN_WIDTHS,
    bins: int = 8,
    bound: float = 5.0,
    mixing: str = "lu",
    base: Base | None = None,
) -> Flow:
    """Neural spline flow by coupling (Durkan et al. 2019), both directions in one pass.

    The conditioner of each coupling gives a rational-quadratic spline followed by an affine map.

    Parameters
    ----------
    bins, bound: the spline's pieces on [−bound, bound]; it is the identity outside.
    mixing: the linear layer after each coupling: "lu", "permutation" (fixed random ones, undone at the end) or "none".
    """
    return flow(
        coupling_layers(dim, context, layers, hidden, partial(spline_and_affine, bins, bound), mixing),
        dim,
        base,
        context,
    )


def coupling_layers(
    dim: int, context: int | None, layers: int, hidden: Sequence[int], univariate: Callable[[], Univariate], mixing: str
) -> list[Layer]:
    """Couplings whose masks take the bits of the coordinate's index in turn: any two coordinates differ in some bit."""
    bits = max((dim - 1).bit_length(), 1)
    stack: list[Layer] = []
    order = torch.arange(dim)
    for i in range(whole("layers", layers)):
        bit = (i // 2) % bits
        split, each = Split([(j >> bit) % 2 == i % 2 for j in range(dim)] if dim > 1 else [True]), univariate()
        stack.append(Coupling(split, each, MLP(split.kept, split.changed, each.count, hidden, context)))
        if mixing == "lu":
            stack.append(Parametric(LU, dim, context))
        elif mixing == "permutation":
            index = torch.randperm(dim)
            stack.append(Fixed(Permutation, index=index))
            order = order[index]
        elif mixing != "none":
            raise ValueError(f'mixing: expected "lu", "permutation" or "none", got {mixing!r}')
    if mixing == "permutation":  # back in order, so that the whole starts near the identity
        stack.append(Fixed(Permutation, index=order.argsort()))
    return [*stack, Parametric(affine(), dim, context)]
