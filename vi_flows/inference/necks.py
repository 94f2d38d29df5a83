"""Necks: whether draws reach where a scale is small and all that it spreads is narrow, by moving both together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ..targets import PyroModel, Target
from .checks import Check
from .optimise import hessians, value_and_grad
from .propriety import coordinate_names
from .psis import resampling_weights
from .quantities import resample
from .weights import Weights, log_density

NECKS = "necks"  # the name of the check
MOVED = 10_000  # draws that are moved: the share below a 5 % point is then certain to .003
EVALUATIONS = 240_000  # of the target, in each kind of coordinates: in fewer rounds a neck of fifty is walked in part
ROUNDS, TURN = 24, 4  # at most, of moves of every scale; in a row, in one kind of coordinates
SCALES = 12  # that are moved, of the sites with the fewest entries first: the more, the fewer rounds
ERROR = 0.001  # of the check, over all quantities together
MEAN, SHARE = 0.07, 0.01  # by which a mean (in sd) and the share below a 5 % or above a 95 % point may be seen to be
# off: two thirds of what is wrong, for what is seen of it is certain to a fifth of that, and walks end short of all
STEP, AWAY = 0.05, 6  # in sd, of a scale, over which curvature is differenced; steps to where it is once more
FALLS = 0.3  # by how much, in the logarithm, curvature must change over an sd of a scale to be its child's
FLAT = 1e-3  # of the largest eigenvalue, from where a direction of the children hangs on the scale
EVERY = 150  # dimensions up to which every coordinate is looked at as a scale: each takes eight Hessians
CANDIDATES = 4  # that are looked at beyond
MOST_NUMBERS = 150**3  # of Hessians, eight for each coordinate that is looked at: 600 dimensions; beyond, none is
INDEFINITE = 0.05  # of the largest: more, of the other sign, is no normal's curvature, and does not grow as a scale's
SAMPLED, GROWS = 0.01, 0.5  # as FLAT, and the least growth of curvature, in the logarithm, where 500 draws tell them
EXPLAINS = 0.7  # the correlation from where such curvature makes a scale of a coordinate: less is by chance
ENDS = 20  # the share, 1 in so many, of draws at an end and in the middle of a scale that tell


@dataclass(frozen=True)
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


def necks(target: Target, draws: Weights) -> list[Check]:
    """Whether weighted draws stay as they are, in law, when scales move together with all that they spread.

    In the neck of a hierarchy, at a small scale, draws are missed by weights and by Hamiltonian moves alike. There the
    moves (τ, θ − μ) → c (τ, θ − μ) go, accepted with their Jacobian: for a Pyro model, moves of each scale alone in
    non-centred coordinates (and as written, where θ stays); for a density, and for what else is latent in a model (its
    factors, the noise of its data), :func:`funnels` tells what hangs on what.
    Draws of p keep their law, so a shift beyond noise, in the mean, the spread, or the share beyond the 5 % and 95 %
    points of the scale, says what has been missed. No check where nothing has a scale that varies.
    """
    x = draws.x[resample(resampling_weights(draws.log_w), MOVED)]
    charts = _charts(target, x)
    columns = [funnel.v for funnel in charts[-1].funnels]
    if not columns:
        return []
    there = charts[-1].to(x)
    y = x
    rounds = max(min(ROUNDS, EVALUATIONS // (MOVED * len(columns))), 2)
    for k in range(0, rounds, TURN):
        for chart in charts:
            y = chart.back(_walked(chart, chart.to(y), min(TURN, rounds - k)))
    return [_judged(charts[-1].target, columns, there, charts[-1].to(y))]


@dataclass(frozen=True)
class Chart:
    """Coordinates in which moves are made: a target over them, maps from those of the draws and back, the moves."""

    target: Target
    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    funnels: list[Funnel]


def _charts(target: Target, x: Tensor) -> list[Chart]:
    """Where to move: non-centred and as written for a model whose trace tells scales, else in its own coordinates."""
    if not (isinstance(target, PyroModel) and target.centrable):
        return [Chart(target, lambda rows: rows, lambda rows: rows, funnels(target, x, range(target.dim)))]
    columns = target.scales()[:SCALES]
    charts = []
    for degree in (0.0, 1.0):
        other = target.recentred({name: degree for name in target.centrable})
        to, back = (lambda rows, o=other: target.translate(rows, o)), (lambda rows, o=other: o.translate(rows, target))
        charts.append(Chart(other, to, back, [Funnel(v) for v in columns]))
    untold = [i for s in target.sites if s.name not in target.centrable for i in range(s.start, s.stop)]
    more = funnels(charts[1].target, charts[1].to(x), [i for i in untold if i not in columns])
    charts[1].funnels.extend(more[: SCALES - len(columns)])
    return charts


def _walked(chart: Chart, x: Tensor, rounds: int) -> Tensor:
    """x (N, dim) after Metropolis moves along each funnel, over Cauchy steps as long as the spread of its scale."""
    log_p = log_density(chart.target, x)
    for funnel in rounds * chart.funnels:
        column = x[:, funnel.v]
        low, high = column.quantile(torch.tensor([0.16, 0.84]).to(x))
        step = (high - low) / 2 * torch.tan(math.pi * (torch.rand(len(x)).to(x) - 0.5))
        y, log_det = funnel.moved(x, step)
        moved = log_density(chart.target, y.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        usable = y.isfinite().all(-1) & (log_p > -math.inf)
        accepted = usable & (moved - log_p + log_det > torch.rand(len(x)).to(x).log())
        x, log_p = torch.where(accepted[:, None], y, x), torch.where(accepted, moved, log_p)
    return x


def _judged(target: Target, columns: list[int], draws: Tensor, moved: Tensor) -> Check:
    """The check on draws (N, dim) of target before and after their scales, in these columns, were moved."""
    before, after = draws[:, columns], moved[:, columns]
    low, high = before.quantile(torch.tensor([0.05, 0.95]).to(before), 0)
    centre, sd = before.mean(0), before.std(0)
    statistics, errors = [], []
    z = NormalDist().inv_cdf(1 - ERROR / (8 * len(columns)))
    for of, limit in (
        (lambda u: (u - centre) / sd, MEAN),
        (lambda u: ((u - centre) / sd).abs(), MEAN),
        (lambda u: (u < low).to(u.dtype), SHARE),
        (lambda u: (u > high).to(u.dtype), SHARE),
    ):
        h, g = of(before), of(after)
        shift, se = (g - h).mean(0), (g - h).std(0) / math.sqrt(len(h))
        offset = h - h.mean(0)
        kept = (offset * (g - g.mean(0))).sum(0) / offset.square().sum(0)
        error = shift / (1 - kept).clamp(1e-3, 1.0)  # moves that leave a correlation ρ mend 1 − ρ of an error
        noise = torch.where(shift == 0, 0.0, shift.abs() / (z * se))
        statistics.append(torch.minimum(noise, error.abs() / limit).nan_to_num(nan=math.inf, posinf=math.inf))
        errors.append(error)
    ratio = torch.stack(statistics)
    worst = int(ratio.argmax())
    k = worst % len(columns)
    statistic, name = float(ratio.amax()), coordinate_names(target)[columns[k]]
    sentence = f"moves of scales with all that they spread shift {name} by {statistic:.2f} times what is allowed"
    if not statistic < 1:
        sentence = _missing(target, name, columns[k], draws, down=float(errors[0][k]) < 0)
    return Check(NECKS, statistic, 1.0, statistic < 1, sentence)


def _missing(target: Target, name: str, column: int, draws: Tensor, down: bool) -> str:
    """Which end of a scale is not seen, with the outermost draw there, and what to do."""
    row = draws[draws[:, column].argmin() if down else draws[:, column].argmax()]
    edge, end = float(row[column]), "at its low end" if down else "at its high end"
    value = target.constrain(row[None]).get(name.split("[")[0])
    if isinstance(target, PyroModel) and value.numel() == 1:
        edge, end = float(value), "toward 0" if down and float(value) > 0 else end
    remedy = "write it non-centred, or leave reparam=True" if isinstance(target, PyroModel) else "write it non-centred"
    return (
        f"the posterior of {name} is not seen to fall {end}: draws {'below' if down else 'above'} {edge:.2g} are "
        f"missing, where all that it scales is narrow; {remedy}"
    )


def funnels(target: Target, x: Tensor, among: Sequence[int]) -> list[Funnel]:
    r"""Scales among some coordinates, and what they spread, from the curvature at draws x (N, dim).

    A factor exp(−½ e^{−2b x_v} ‖A (x − c)‖²) makes ∂_v ∇² log p = 2b e^{−2b x_v} AᵀA and ∂_v ∇ log p = that times
    (x − c): so differences of Hessians and gradients along x_v, at draws where x_v is at its 5 % and 95 % points, give
    the directions that it scales, their centre and b, whatever else p has in it.
    """
    dim = x.shape[1]
    if dim < 2 or min(len(among), EVERY if dim <= EVERY else CANDIDATES) * dim**2 > MOST_NUMBERS:
        return []
    sd = x.std(0)
    if dim > EVERY:
        among = [v for v in _candidates(target, x, sd).tolist() if v in set(among)]
    if not among:
        return []
    order, rank = x[:, list(among)].argsort(0), len(x) // 20
    ends = x[order[[rank, len(x) - 1 - rank]].mT]  # (len(among), 2, dim)
    along = torch.diag(STEP * sd)[list(among), None]
    points = torch.stack([ends + k * along for k in (-1, 1, AWAY - 1, AWAY + 1)])
    flat = points.reshape(-1, dim)
    curvature = -(hessians(target, flat, sd.expand_as(flat)) * sd[:, None] * sd).reshape(*points.shape, dim)
    gradient = (value_and_grad(target, flat)[1] * sd).reshape(points.shape)
    found = [_funnel(v, ends[k] / sd, curvature[:, k], gradient[:, k], sd) for k, v in enumerate(among)]
    found = [f or _sampled_funnel(target, v, x / sd, sd) for f, v in zip(found, among, strict=True)]
    kept: list[Funnel] = []
    for funnel in sorted((f for f in found if f is not None), key=lambda f: -f.rank):
        if not any(funnel.scales(other.v) and other.scales(funnel.v) for other in kept):  # a child moves its scale, too
            kept.append(funnel)
    return kept[:SCALES]


def _candidates(target: Target, x: Tensor, sd: Tensor) -> Tensor:
    """Coordinates, at most CANDIDATES, that scale the most others: by how a product of the Hessian with one random
    vector, entry by entry, changes over a move of each by an sd, at the draw nearest the middle."""
    at = x[((x - x.median(0).values) / sd).square().sum(-1).argmin()]
    r = (2 * torch.randint(2, sd.shape, device=x.device) - 1) * sd
    points = torch.stack([at - torch.diag(sd) / 2, at + torch.diag(sd) / 2])
    sides = [value_and_grad(target, (points + k * STEP * r).reshape(-1, len(sd)))[1] for k in (-1, 1)]
    before, after = ((sides[1] - sides[0]).abs().clamp_min(1e-300).log()).reshape(points.shape)
    moved = ((after - before).abs() > FALLS).fill_diagonal_(False).sum(-1)
    best = moved.argsort(descending=True)[:CANDIDATES]
    return best[moved[best] > 1]


def _funnel(v: int, ends: Tensor, curvature: Tensor, gradient: Tensor, sd: Tensor) -> Funnel | None:
    """The funnel of coordinate v at whichever end curvature is greater, or None, all in units of sd.

    ends: (2, dim). curvature: (4, 2, dim, dim) and gradient: (4, 2, dim) of log p, each at one and the other side of
    the ends, and of points ``AWAY`` steps on.
    """
    end = int(curvature[:2].diagonal(dim1=-2, dim2=-1).abs().sum((0, -1)).nan_to_num(0.0).argmax())
    curvature, gradient = curvature[:, end], gradient[:, end]
    change, later = curvature[1] - curvature[0], curvature[3] - curvature[2]
    size = (curvature[1] + curvature[0]).diagonal().abs() / 2
    share = change.diagonal().abs() / (2 * STEP * size.clamp_min(1e-300))
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
    kept = eigenvalues > FLAT * eigenvalues[-1]
    scaled = vectors[:, kept]
    pull = (scaled.mT @ (gradient[1] - gradient[0])[children]) / eigenvalues[kept]
    centre = ends[end].clone()
    centre[children] += block.diagonal().sum().sign() * (scaled @ pull)
    projector = torch.zeros_like(curvature[0])
    projector[children[:, None], children] = scaled @ scaled.mT
    slope = -math.log(ratio) / (2 * AWAY * STEP)
    return Funnel(v, slope / float(sd[v]), centre * sd, projector * sd[:, None] / sd, int(kept.sum()))


def _sampled_funnel(target: Target, v: int, x: Tensor, sd: Tensor) -> Funnel | None:
    r"""The funnel of coordinate v by draws x (N, dim) in units of sd, where single curvatures do not tell: that of a
    Laplace prior is 0 but for its spikes, and that of Student's t has both signs.

    E[s sᵀ | x_v], with s = ∇ log p, is the mean curvature given x_v. What it grows by, from the middle of x_v to an
    end, gives the directions. A law f(A(x − c) e^{−b x_v}) e^{−b k x_v} has ∂_v log f = −b ((x − c)·s + k): regression
    gives b.
    """
    order, n = x[:, v].argsort(), len(x) // ENDS
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
    at, own = x[rows[end]], score[end]
    centre = at.median(0).values
    pull = (((at - centre)[:, children] @ scaled) * (own[:, children] @ scaled)).sum(-1)
    both = torch.stack([own[:, v], pull])
    slope, correlation = -float(torch.cov(both)[0, 1] / pull.var()), float(torch.corrcoef(both)[0, 1])
    if not (0 < abs(slope) < math.inf and abs(correlation) > EXPLAINS):
        return None
    projector = torch.zeros_like(curved[0])
    projector[children[:, None], children] = scaled @ scaled.mT
    return Funnel(v, slope / float(sd[v]), centre * sd, projector * sd[:, None] / sd, scaled.shape[1])
