"""Flows of layers of free tensors: Gaussians, planar, radial, Sylvester."""

from __future__ import annotations

from ...arguments import whole
from ..bases import Base
from ..distribution import Flow
from ..layers.linear import FullAffine
from ..layers.lowrank import HouseholderSylvester, OrthogonalSylvester, Planar, Radial, TriangularSylvester
from ..parameters import Parametric
from ..univariates.univariate import affine
from .build import flow, recipe

__all__ = ["diagonal", "gaussian", "planar", "radial", "sylvester"]


@recipe
def diagonal(dim: int, context: int | None = None, *, base: Base | None = None) -> Flow:
    """The mean-field Gaussian: one elementwise affine layer."""
    return flow([Parametric(affine(), dim, context)], dim, base, context)


@recipe
def gaussian(dim: int, context: int | None = None, *, base: Base | None = None) -> Flow:
    """The Gaussian of full covariance: one lower-triangular affine layer."""
    return flow([Parametric(FullAffine, dim, context)], dim, base, context)


@recipe
def planar(dim: int, context: int | None = None, *, layers: int = 8, base: Base | None = None) -> Flow:
    """Planar flow (Rezende & Mohamed 2015), closed by an elementwise affine layer."""
    stack = Parametric(Planar, dim, context, layers=whole("layers", layers))
    return flow([stack, Parametric(affine(), dim, context)], dim, base, context)


@recipe
def radial(dim: int, context: int | None = None, *, layers: int = 8, base: Base | None = None) -> Flow:
    """Radial flow (Rezende & Mohamed 2015), closed by an elementwise affine layer."""
    stack = [Parametric(Radial, dim, context) for _ in range(whole("layers", layers))]
    return flow([*stack, Parametric(affine(), dim, context)], dim, base, context)


@recipe
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
    return flow([*stack, Parametric(affine(), dim, context)], dim, base, context)
