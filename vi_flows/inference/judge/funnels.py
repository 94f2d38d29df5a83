"""Funnels: scales among the coordinates of a density, and what they spread, read from curvature and scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...targets import Target
from ..estimate.evaluate import hessians, value_and_grad

SCALES = 12  # that are moved, of the sites with the fewest entries first: the more, the fewer rounds
# sd of a scale over which curvature is differenced, and steps to where it is once more. Chosen, not measured: smaller,
# and rounding counts; larger, and b is an average over what is not exponential
SCALE_STEP, AWAY = 0.05, 6
# by how much, in the logarithm, curvature must change over an sd of a scale to be its child's. Chosen, not measured:
# higher, and children stay behind, so that moves are refused; lower, and chance makes children
FALLS = 0.3
# of the largest eigenvalue, from where a direction of the children hangs on the scale. Chosen, not measured: lower, and
# rounding adds to the rank, by which moves are accepted; higher, and weakly held children stay behind
FLAT = 1e-3
ALL_SCALES_DIMS = 150  # dimensions up to which every coordinate is looked at as a scale: each takes eight Hessians
CANDIDATE_SCALES = 4  # that are looked at beyond, by eight Hessians each: a fifth scale is then not moved
HESSIAN_NUMBERS = 150**3  # of Hessians, eight for each coordinate that is looked at: 600 dimensions; beyond, none is
INDEFINITE = 0.05  # of the largest: more, of the other sign, is no normal's curvature, and does not grow as a scale's
# as FLAT, and the least growth of curvature, in the logarithm, where 500 draws tell them: lower, and chance makes
# children
SAMPLED, GROWS = 0.01, 0.5
EXPLAINS = 0.7  # the correlation from where such curvature makes a scale of a coordinate: less is by chance
# the share, 1 in so many, of draws at an end and in the middle of a scale that tell: its 5 % ends, as the check asks of
# these; of fewer, scores are too noisy
END_ONE_IN = 20


@dataclass(frozen=True, eq=False)
class Funnel:
    r"""A coordinate v with directions that it scales, and the move x_v + δ, centre + e^{bδ} (x − centre) along them.

    v: the coordinate. slope: b, of the log scale in x_v. centre: (dim,). projector: (dim, dim) onto the scaled
    directions, of that rank; None where only x_v moves.
    """

    v: int
    slope: float = 0.0
    centre: Tensor | None = None
    projector: Tensor | None = None
    rank: int = 0

    def scales(self, j: int) -> bool:
        """Whether coordinate j takes part in the directions that are scaled."""
        return self.projector is not None and bool(self.projector[j, j] != 0)

    def moved(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, dim) moved by δ (N,), and the log-determinant b δ rank (N,)."""
        y = x.clone()
        if self.projector is not None:
            y += torch.expm1(self.slope * delta)[:, None] * ((x - self.centre) @ self.projector.mT)
        y[:, self.v] += delta
        return y, self.slope * delta * self.rank


def funnels(target: Target, x: Tensor, among: Sequence[int]) -> list[Funnel]:
    r"""Scales among some coordinates, and what they spread, from the curvature at draws x (N, dim).

    A factor exp(−½ e^{−2b x_v} ‖A (x − c)‖²) makes ∂_v ∇² log p = 2b e^{−2b x_v} AᵀA and ∂_v ∇ log p = that times
    (x − c): so differences of Hessians and gradients along x_v, at draws where x_v is at its 5 % and 95 % points, give
    the directions that it scales, their centre and b, whatever else p has in it.
    """
    dim = x.shape[1]
    if (
        dim < 2
        or min(len(among), ALL_SCALES_DIMS if dim <= ALL_SCALES_DIMS else CANDIDATE_SCALES) * dim**2 > HESSIAN_NUMBERS
    ):
        return []
    sd = x.std(0)
    if dim > ALL_SCALES_DIMS:
        among = [v for v in _candidates(target, x, sd).tolist() if v in set(among)]
    if not among:
        return []
    order, rank = x[:, list(among)].argsort(0), len(x) // 20
    ends = x[order[[rank, len(x) - 1 - rank]].mT]  # (len(among), 2, dim)
    along = torch.diag(SCALE_STEP * sd)[list(among), None]
    points = torch.stack([ends + k * along for k in (-1, 1, AWAY - 1, AWAY + 1)])
    flat = points.reshape(-1, dim)
    curvature = -(hessians(target, flat, sd.expand_as(flat)) * sd[:, None] * sd).reshape(*points.shape, dim)
    gradient = (value_and_grad(target, flat)[1] * sd).reshape(points.shape)
    candidates = [_funnel(v, ends[k] / sd, curvature[:, k], gradient[:, k], sd) for k, v in enumerate(among)]
    candidates = [f or _sampled_funnel(target, v, x / sd, sd) for f, v in zip(candidates, among, strict=True)]
    chosen: list[Funnel] = []
    for funnel in sorted((f for f in candidates if f is not None), key=lambda f: -f.rank):
        # a child moves its scale, too
        if not any(funnel.scales(other.v) and other.scales(funnel.v) for other in chosen):
            chosen.append(funnel)
    return chosen[:SCALES]


def _candidates(target: Target, x: Tensor, sd: Tensor) -> Tensor:
    """Coordinates, at most CANDIDATE_SCALES, that scale the most others: by how a product of the Hessian with one
    random vector, entry by entry, changes over a move of each by an sd, at the draw nearest the middle."""
    at = x[((x - x.median(0).values) / sd).square().sum(-1).argmin()]
    r = (2 * torch.randint(2, sd.shape, device=x.device) - 1) * sd
    points = torch.stack([at - torch.diag(sd) / 2, at + torch.diag(sd) / 2])
    sides = [value_and_grad(target, (points + k * SCALE_STEP * r).reshape(-1, len(sd)))[1] for k in (-1, 1)]
    before, after = ((sides[1] - sides[0]).abs().clamp_min(1e-300).log()).reshape(points.shape)
    moved = ((after - before).abs() > FALLS).fill_diagonal_(False).sum(-1)
    best = moved.argsort(descending=True)[:CANDIDATE_SCALES]
    return best[moved[best] > 1]


def _funnel(v: int, ends: Tensor, curvature: Tensor, gradient: Tensor, sd: Tensor) -> Funnel | None:
    """The funnel of coordinate v with the most directions, by the curvature at one end or the other, or None.

    Other scales differ between the ends: where one of them narrows the same children, it hides v. All in units of sd.
    ends: (2, dim). curvature: (4, 2, dim, dim) and gradient: (4, 2, dim) of log p, each at one and the other side of
    the ends, and of points ``AWAY`` steps on.
    """
    by_end = [_funnel_at(v, ends[k], curvature[:, k], gradient[:, k], sd) for k in range(len(ends))]
    return max((f for f in by_end if f is not None), key=lambda f: f.rank, default=None)


def _funnel_at(v: int, end: Tensor, curvature: Tensor, gradient: Tensor, sd: Tensor) -> Funnel | None:
    """The same by one end (dim,), with curvature (4, dim, dim) and gradient (4, dim) there."""
    change, later = curvature[1] - curvature[0], curvature[3] - curvature[2]
    size = (curvature[1] + curvature[0]).diagonal().abs() / 2
    share = change.diagonal().abs() / (2 * SCALE_STEP * size.clamp_min(1e-300))
    share[v] = 0.0
    children = (share > FALLS).nonzero()[:, 0]
    if not len(children) or not bool(curvature.isfinite().all() and gradient.isfinite().all()):
        return None
    block, after = change[children][:, children], later[children][:, children]
    ratio = float(after.diagonal().sum() / block.diagonal().sum())
    if not 0 < ratio < math.inf or ratio == 1:
        return None
    eigenvalues, vectors = torch.linalg.eigh(block * block.diagonal().sum().sign())
    if float(eigenvalues[0]) < -INDEFINITE * float(eigenvalues[-1]):
        return None
    spread = eigenvalues > FLAT * eigenvalues[-1]
    scaled = vectors[:, spread]
    pull = (scaled.mT @ (gradient[1] - gradient[0])[children]) / eigenvalues[spread]
    centre = end.clone()
    centre[children] += block.diagonal().sum().sign() * (scaled @ pull)
    projector = torch.zeros_like(curvature[0])
    projector[children[:, None], children] = scaled @ scaled.mT
    slope = -math.log(ratio) / (2 * AWAY * SCALE_STEP)
    return Funnel(v, slope / float(sd[v]), centre * sd, projector * sd[:, None] / sd, int(spread.sum()))


def _sampled_funnel(target: Target, v: int, x: Tensor, sd: Tensor) -> Funnel | None:
    r"""The funnel of coordinate v by draws x (N, dim) in units of sd, where single curvatures do not tell: that of a
    Laplace prior is 0 but for its spikes, and that of Student's t has both signs.

    E[s sᵀ | x_v], with s = ∇ log p, is the mean curvature given x_v. What it grows by, from the middle of x_v to an
    end, gives the directions. A law f(A(x − c) e^{−b x_v}) e^{−b k x_v} has ∂_v log f = −b ((x − c)·s + k): regression
    gives b.
    """
    order, n = x[:, v].argsort(), len(x) // END_ONE_IN
    rows = torch.stack([order[n : 2 * n], order[len(x) // 2 :][:n], order.flip(0)[n : 2 * n]])  # without the outermost:
    # their scores are of another size, and beside them the centre is off
    score = (value_and_grad(target, (x[rows] * sd).reshape(-1, x.shape[1]))[1] * sd).reshape(*rows.shape, -1)
    curved = score.mT @ score / n  # (3, dim, dim)
    growth = (curved.diagonal(dim1=1, dim2=2).log() - curved[1].diagonal().log()).nan_to_num(0.0, 0.0, 0.0)
    growth[:, v] = 0.0
    end = int((growth > GROWS).sum(-1).argmax())
    children = (growth[end] > GROWS).nonzero()[:, 0]
    if not len(children):
        return None
    eigenvalues, vectors = torch.linalg.eigh((curved[end] - curved[1])[children][:, children])
    scaled = vectors[:, eigenvalues > SAMPLED * eigenvalues[-1]]
    at, end_score = x[rows[end]], score[end]
    centre = at.median(0).values
    pull = (((at - centre)[:, children] @ scaled) * (end_score[:, children] @ scaled)).sum(-1)
    both = torch.stack([end_score[:, v], pull])
    slope, correlation = -float(torch.cov(both)[0, 1] / pull.var()), float(torch.corrcoef(both)[0, 1])
    if not (0 < abs(slope) < math.inf and abs(correlation) > EXPLAINS):
        return None
    projector = torch.zeros_like(curved[0])
    projector[children[:, None], children] = scaled @ scaled.mT
    return Funnel(v, slope / float(sd[v]), centre * sd, projector * sd[:, None] / sd, scaled.shape[1])
