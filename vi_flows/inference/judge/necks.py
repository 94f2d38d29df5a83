"""Necks: whether draws reach where a scale is small and all that it spreads is narrow, by moving both together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ...targets import PyroModel, Target
from ..bounds import NECK_ERROR, NECK_MEAN, NECK_SHARE
from ..estimate.evaluate import log_density
from ..estimate.psis import resampling_weights
from ..estimate.quantities import resample
from ..estimate.weights import Weights
from .check import Check, Role
from .funnels import SCALES, Funnel, funnels

Walk = Callable[[Tensor, int], Tensor]
WALKED_DRAWS = 10_000  # draws that are moved: the share below a 5 % point is then certain to .003
EVALUATIONS = 240_000  # of the target, in each kind of coordinates: in fewer rounds a neck of fifty is walked in part
# of moves of every scale, at most: with 12, t-distributed means were claimed with .018 of the draws where .05 belong;
# and in a row in one kind of coordinates, for going to the others costs a run of the model (chosen, not measured)
NECK_ROUNDS, TURN = 24, 4


def necks(target: Target, draws: Weights) -> list[Check]:
    """Whether weighted draws stay as they are, in law, when scales move together with all that they spread.

    In the neck of a hierarchy, at a small scale, draws are missed by weights and by Hamiltonian moves alike. There the
    moves (τ, θ − μ) → c (τ, θ − μ) go, accepted with their Jacobian: for a Pyro model, moves of each scale alone in
    non-centred coordinates (and as written, where θ stays); for a density, and for what else is latent in a model (its
    factors, the noise of its data), :func:`funnels` tells what hangs on what.
    Draws of p keep their law, so a shift beyond noise, in the mean, the spread, or the share beyond the 5 % and 95 %
    points of the scale, says what has been missed. No check where nothing has a scale that varies.
    """
    x = draws.x[resample(resampling_weights(draws.log_w), WALKED_DRAWS)]
    charts = _charts(target, x)
    columns = [funnel.v for funnel in charts[-1].funnels]
    if not columns:
        return []
    y = _walk(charts, x, max(min(NECK_ROUNDS, EVALUATIONS // (WALKED_DRAWS * len(columns))), 2))
    return [_judged(charts[-1].target, columns, charts[-1].to(x), charts[-1].to(y))]


@dataclass(frozen=True, eq=False)
class Chart:
    """Coordinates in which moves are made: a target over them, maps from those of the draws and back, the moves, and
    the spread of each one's scale: half the width of its middle 68 %, by which steps are measured."""

    target: Target
    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    funnels: list[Funnel]
    spreads: list[float]

    @classmethod
    def of(cls, target: Target, to: Callable, back: Callable, funnels: list[Funnel], u: Tensor) -> Chart:
        """With the spreads at points u (N, dim), in the chart's coordinates."""
        middle = torch.tensor([0.16, 0.84]).to(u)
        spreads = [float(u[:, f.v].quantile(middle).diff()) / 2 for f in funnels]
        return cls(target, to, back, funnels, spreads)


def scale_moves(target: Target, draws: Weights) -> Walk | None:
    """The moves of :func:`necks`, rounds of them that leave p as it is, (x (N, dim), rounds) -> (N, dim), for chains
    and annealing; None where nothing has a scale that varies."""
    charts = _charts(target, draws.x[resample(resampling_weights(draws.log_w), WALKED_DRAWS)])
    return functools.partial(_walk, charts) if charts[-1].funnels else None


def _walk(charts: list[Chart], x: Tensor, rounds: int) -> Tensor:
    """x (N, dim) after that many rounds of moves in each chart, a few in one, then as many in the other."""
    for k in range(0, rounds, TURN):
        for chart in charts:
            x = chart.back(_walked(chart, chart.to(x), min(TURN, rounds - k)))
    return x


def _charts(target: Target, x: Tensor) -> list[Chart]:
    """Where to move: non-centred and as written for a model whose trace tells scales, else in its own coordinates."""
    if not (isinstance(target, PyroModel) and target.centrable):
        return [Chart.of(target, _stay, _stay, funnels(target, x, range(target.dim)), x)]
    columns = target.scales()[:SCALES]
    charts = []
    for degree in (0.0, 1.0):
        other = target.recentred({name: degree for name in target.centrable})
        to, back = functools.partial(target.translate, other=other), functools.partial(other.translate, other=target)
        charts.append((other, to, back, [Funnel(v) for v in columns], to(x)))
    untold = [i for s in target.sites if s.name not in target.centrable for i in range(s.start, s.stop)]
    written, *_, moved, u = charts[1]
    moved += funnels(written, u, [i for i in untold if i not in columns])[: SCALES - len(columns)]
    return [Chart.of(*chart) for chart in charts]


def _walked(chart: Chart, x: Tensor, rounds: int) -> Tensor:
    """x (N, dim) after Metropolis moves along each funnel, over Cauchy steps as long as the spread of its scale."""
    log_p = log_density(chart.target, x)
    for funnel, spread in rounds * list(zip(chart.funnels, chart.spreads, strict=True)):
        step = spread * torch.tan(math.pi * (torch.rand(len(x)).to(x) - 0.5))
        y, log_det = funnel.moved(x, step)
        moved = log_density(chart.target, y.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        usable = y.isfinite().all(-1) & (log_p > -math.inf)
        accepted = usable & (moved - log_p + log_det > torch.rand(len(x)).to(x).log())
        x, log_p = torch.where(accepted[:, None], y, x), torch.where(accepted, moved, log_p)
    return x


def _stay(x: Tensor) -> Tensor:
    return x


def _judged(target: Target, columns: list[int], draws: Tensor, moved: Tensor) -> Check:
    """The check on draws (N, dim) of target before and after their scales, in these columns, were moved."""
    before, after = draws[:, columns], moved[:, columns]
    low, high = before.quantile(torch.tensor([0.05, 0.95]).to(before), 0)
    centre, sd = before.mean(0), before.std(0)
    statistics, errors = [], []
    z = NormalDist().inv_cdf(1 - NECK_ERROR / (8 * len(columns)))
    for of, limit in (
        (lambda u: (u - centre) / sd, NECK_MEAN),
        (lambda u: ((u - centre) / sd).abs(), NECK_MEAN),
        (lambda u: (u < low).to(u.dtype), NECK_SHARE),
        (lambda u: (u > high).to(u.dtype), NECK_SHARE),
    ):
        h, g = of(before), of(after)
        shift, se = (g - h).mean(0), (g - h).std(0) / math.sqrt(len(h))
        offset = h - h.mean(0)
        correlation = (offset * (g - g.mean(0))).sum(0) / offset.square().sum(0)
        error = shift / (1 - correlation).clamp(1e-3, 1.0)  # moves that leave a correlation ρ mend 1 − ρ of an error
        noise = torch.where(shift == 0, 0.0, shift.abs() / (z * se))
        statistics.append(torch.minimum(noise, error.abs() / limit).nan_to_num(nan=math.inf, posinf=math.inf))
        errors.append(error)
    ratio = torch.stack(statistics)
    worst = int(ratio.argmax())
    k = worst % len(columns)
    statistic, name = float(ratio.amax()), target.coordinate_names()[columns[k]]
    said = f"moves of scales with all that they spread shift {name} by {statistic:.2f} times what is allowed"
    otherwise = _missing(target, name, columns[k], draws, down=float(errors[0][k]) < 0)
    return Check.of("necks", statistic, 1.0, said, otherwise, Role.NECK)


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
