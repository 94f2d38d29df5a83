"""A structured flow that begins as the Gaussian that locating found: where too many coordinates are scales in part for
their marginal to be sought, or Laplace's approximations would cost too much."""

from __future__ import annotations

import torch

from ...flows.distribution import Flow
from ...flows.structured import Features, StructuredLayer, monomials, structured
from ...targets.target import Target
from ..locate.gaussian import Gaussians
from .conditional import Conditional
from .locate import MOST_ENTRIES, POINTS, curvatures, degree_of
from .sparsity import influence, pattern

# influence of a move by an sd, from where a coordinate is one of the few: a Gaussian loses a quarter of it, in nats, so
# that less cannot be seen beside DIVERGENCE
LEAST_INFLUENCE = 0.1
# of these; beyond, what is far from normal is no matter of a few coordinates, and a spline flow does better
MOST_SCALES = 24
EXACT_RIDGE = 1e-6  # of a fit that is exact but for rounding: more would bend it


def around(target: Target, gaussian: Gaussians) -> Flow | None:
    """The Gaussian (one) as a structured flow, whose few are the coordinates that move the curvature of the others;
    None where there are none or too many, or where the others' precision does not factor sparsely.

    What training adds, over the 20 discriminations of an item response model say, is that scales, slopes and means of
    the many follow the few.
    """
    sd = torch.linalg.vector_norm(gaussian.scale_tril[0], dim=-1)
    curved, places = curvatures(target, gaussian.at(torch.randn(POINTS, target.dim).to(sd))[:, 0])
    if not curved:
        return None
    nonzero = pattern(curved)
    moved = torch.stack([influence(target, x, c, nonzero, sd) for x, c in zip(places, curved, strict=True)]).mean(0)
    few = (moved > LEAST_INFLUENCE).nonzero()[:, 0]
    if not 0 < len(few) <= MOST_SCALES:
        return None
    inside = Conditional(target, nonzero, few, sd)
    return _laid(inside, gaussian) if len(inside.graph.child) <= MOST_ENTRIES else None


def _laid(inside: Conditional, gaussian: Gaussians) -> Flow:
    """The flow that is N(loc, Σ) but for entries of Σ⁻¹ outside the pattern: means of the many are linear in the few,
    m(t) = loc + Σ_mf L⁻ᵀ t with L Lᵀ = Σ_ff, and their precision is that block of Σ⁻¹."""
    graph, tril = inside.graph, gaussian.scale_tril[0]
    few, many, scale = graph.few, graph.many, inside.unit
    precision = torch.cholesky_inverse(tril)[many][:, many] * scale * scale[:, None]
    entries = torch.where(inside.seen, precision[graph.child, graph.parent], 0.0)
    b, log_s = (part[0] for part in inside.factor(precision.diagonal()[None], entries[None]))
    covariance = tril @ tril.mT
    first = torch.linalg.cholesky(covariance[few][:, few])
    slope = torch.linalg.solve_triangular(first, covariance[few][:, many], upper=False) / scale
    unit = log_s.exp()
    features = Features(torch.tensor(monomials(len(few), degree_of(len(few)))))
    layer = StructuredLayer(graph, features, gaussian.loc[0, few], first, gaussian.loc[0, many], unit * scale)
    t = torch.randn(4 * len(features), len(few)).to(tril)
    b = (b * unit[graph.parent] / unit[graph.child]).expand(len(t), -1)
    shift = graph.residual(b, t @ slope / unit)
    layer.lay(t, shift, torch.zeros_like(shift), b, torch.ones_like(t[:, 0]), EXACT_RIDGE)
    return structured(layer)
