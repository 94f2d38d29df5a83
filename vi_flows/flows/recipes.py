"""The families, one short function each: ``recipes.NAME(dim, context=None, ...) -> Flow``.

All start near the identity, so that a fit begins at its base; all take a ``base`` (standard normal by default).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch

from ..arguments import whole
from .autoregressive import Autoregressive
from .bases import Base, StandardNormal
from .bijection import Inverted, Layer
from .coupling import Coupling, Split
from .distribution import Flow
from .linear import LU, FullAffine, Permutation
from .lowrank import HouseholderSylvester, OrthogonalSylvester, Planar, Radial, TriangularSylvester
from .masked import MaskedMLP
from .networks import MLP
from .parameters import Fixed, Parametric
from .splines import rational_quadratic
from .univariate import Chain, Univariate, affine

__all__ = [
    "diagonal",
    "gaussian",
    "iaf",
    "maf",
    "planar",
    "radial",
    "realnvp",
    "spline",
    "spline_autoregressive",
    "sylvester",
]

HIDDEN_WIDTHS = (64, 64)
CONDITIONED_LOG_SCALE = 2.5  # bound of a conditioner's log-scale in one layer


def _recipe(function: Callable[..., Flow]) -> Callable[..., Flow]:
    """A family that refuses a dim or context that is no positive integer."""

    @wraps(function)
    def checked(dim: int, context: int | None = None, **options: Any) -> Flow:
        whole("dim", dim)
        if context is not None:
            whole("context", context)
        return function(dim, context, **options)

    return checked


@_recipe
def diagonal(dim: int, context: int | None = None, *, base: Base | None = None) -> Flow:
    """The mean-field Gaussian: one elementwise affine layer."""
    return _flow([Parametric(affine(), dim, context)], dim, base, context)


@_recipe
def gaussian(dim: int, context: int | None = None, *, base: Base | None = None) -> Flow:
    """The Gaussian of full covariance: one lower-triangular affine layer."""
    return _flow([Parametric(FullAffine, dim, context)], dim, base, context)


@_recipe
def planar(dim: int, context: int | None = None, *, layers: int = 8, base: Base | None = None) -> Flow:
    """Planar flow (Rezende & Mohamed 2015), closed by an elementwise affine layer."""
    stack = Parametric(Planar, dim, context, layers=whole("layers", layers))
    return _flow([stack, Parametric(affine(), dim, context)], dim, base, context)


@_recipe
def radial(dim: int, context: int | None = None, *, layers: int = 8, base: Base | None = None) -> Flow:
    """Radial flow (Rezende & Mohamed 2015), closed by an elementwise affine layer."""
    stack = [Parametric(Radial, dim, context) for _ in range(whole("layers", layers))]
    return _flow([*stack, Parametric(affine(), dim, context)], dim, base, context)


@_recipe
def sylvester(
    dim: int,
    context: int | None = None,
    *,
    kind: str = "orthogonal",
    rank: int | None = None,
    layers: int = 4,
    reflections: int = 8,
    base: Base | None = None,
) -> Flow:
    """Sylvester flow (van den Berg et al. 2018), closed by an elementwise affine layer.

    Parameters
    ----------
    kind: "orthogonal" (Q by QR), "householder" (Q by ``reflections`` reflections) or "triangular" (Q = I and the
        reversal, alternating; rank = dim).
    rank: columns M <= dim of Q; by default min(dim, 8), or dim if triangular.
    """
    whole("layers", layers)
    rank = whole("rank", rank) if rank is not None else (dim if kind == "triangular" else min(dim, 8))
    if rank > dim or (kind == "triangular" and rank != dim):
        expected = f"{dim} (= dim) for a triangular Sylvester flow" if kind == "triangular" else f"at most dim = {dim}"
        raise ValueError(f"rank: expected {expected}, got {rank}")
    if dim == 1 and kind in ("orthogonal", "householder"):
        kind = "triangular"  # Q = ±1 has nothing to learn
    if kind == "orthogonal":
        stack = [Parametric(OrthogonalSylvester, dim, context, rank=rank) for _ in range(layers)]
    elif kind == "householder":
        options = {"rank": rank, "reflections": whole("reflections", reflections)}
        stack = [Parametric(HouseholderSylvester, dim, context, **options) for _ in range(layers)]
    elif kind == "triangular":
        stack = [Parametric(TriangularSylvester, dim, context, rank=rank, reverse=bool(i % 2)) for i in range(layers)]
    else:
        raise ValueError(f'kind: expected "orthogonal", "householder" or "triangular", got {kind!r}')
    return _flow([*stack, Parametric(affine(), dim, context)], dim, base, context)


@_recipe
def iaf(
    dim: int,
    context: int | None = None,
    *,
    layers: int = 4,
    hidden: Sequence[int] = HIDDEN_WIDTHS,
    base: Base | None = None,
) -> Flow:
    """Inverse autoregressive flow (Kingma et al. 2016): one pass to sample, a sweep over coordinates to score."""
    return _flow(_autoregressive(dim, context, layers, hidden, _conditioned_affine), dim, base, context)


@_recipe
def maf(
    dim: int,
    context: int | None = None,
    *,
    layers: int = 4,
    hidden: Sequence[int] = HIDDEN_WIDTHS,
    base: Base | None = None,
) -> Flow:
    """Masked autoregressive flow (Papamakarios et al. 2017), IAF's inverse: one pass to score, a sweep to sample."""
    stack = _autoregressive(dim, context, layers, hidden, _conditioned_affine)
    return _flow([Inverted(layer) for layer in stack], dim, base, context)


@_recipe
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
    return _flow(_coupling(dim, context, layers, hidden, _conditioned_affine, mixing), dim, base, context)


@_recipe
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
    return _flow(_coupling(dim, context, layers, hidden, partial(_spline, bins, bound), mixing), dim, base, context)


@_recipe
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
    return _flow(_autoregressive(dim, context, layers, hidden, partial(_spline, bins, bound)), dim, base, context)


def _flow(layers: Sequence[Layer], dim: int, base: Base | None, context: int | None) -> Flow:
    base = StandardNormal(dim) if base is None else base
    if base.dim != dim:
        raise ValueError(f"base: expected a base of dim {dim}, got one of dim {base.dim}")
    return Flow(layers, base, context)


def _autoregressive(
    dim: int, context: int | None, layers: int, hidden: Sequence[int], univariate: Callable[[], Univariate]
) -> list[Layer]:
    """Autoregressive layers in alternating order, each with a univariate of its own.

    Affine ones only scale gently, so an elementwise affine closes.
    """
    if dim == 1:  # no coordinate comes before: numbers of the context alone
        return _coupling(dim, context, layers, hidden, univariate, "none")
    orders = [range(dim) if i % 2 == 0 else range(dim - 1, -1, -1) for i in range(whole("layers", layers))]
    stack: list[Layer] = []
    for order in orders:
        each = univariate()
        stack.append(Autoregressive(each, MaskedMLP(order, each.count, hidden, context)))
    return [*stack, Parametric(affine(), dim, context)]


def _coupling(
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


def _conditioned_affine() -> Univariate:
    return affine(CONDITIONED_LOG_SCALE)


def _spline(bins: int, bound: float) -> Univariate:
    if not bound > 0:
        raise ValueError(f"bound: expected a positive number, got {bound!r}")
    if whole("bins", bins) < 2:
        raise ValueError(f"bins: expected at least 2, got {bins}")
    # the affine moves and scales also what lies in the spline's identity tails: funnels and bananas need it
    return Chain(rational_quadratic(bins, float(bound)), _conditioned_affine())
