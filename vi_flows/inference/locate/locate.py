"""Locating: where the mass of p is, and the Gaussian that whitens it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...flows.bases import Mixture
from ...running import late
from ...targets.target import Target
from ..bounds import ENOUGH, NEGLIGIBLE, NO_MODE, SAME_MODE, WAVES, WORTH
from ..estimate.weights import mean_elbo
from .ascent import Iterates, bfgs_paths, newton
from .gaussian import (
    Gaussians,
    Kind,
    Origin,
    distinct,
    from_covariance,
    from_precision,
    gaussian_vi,
    improved,
    join,
)
from .large import locate_large
from .mixture import adapt_mixture, log_weights_of
from .points import DENSE_DIMS, FEW_DIMS, _wave

# of Pathfinder that are looked at closely: with fewer, the best Gaussian of a poor path wins by chance
PATHFINDER_PATHS = 8
# normals by which Gaussians are compared: at first, among those refined, and in the end, when variance and ELBO decide
# what is trained: the fewer, the more often the second best is taken
FIRST_NORMALS, REFINED_NORMALS, LAST_NORMALS = 256, 512, 2000
# iterations of Gaussian VI from each of the best, and then from the best of all: rates fall over these, so that fewer
# leave noise, which the ELBO shows; together they stand for 600 steps of Adam
SHORT_VI, LONG_VI = 20, 60
WAVE_ITERATIONS = 60  # of BFGS in a wave, for Newton's method does the rest
# modes that are kept apart, up to FEW_DIMS, DENSE_DIMS and beyond: each costs a Hessian and a component of the
# defensive proposal; with fewer, the lightest are left to the check of unseen basins
MODES_KEPT = (64, 8, 2)


@dataclass(frozen=True, eq=False)
class Located:
    """What locating found.

    best: one Gaussian of the highest ELBO; elbo, variance: the mean and variance of its log-weights over 2,000 draws;
    modes: Gaussians at the distinct optima and path ends, for the defensive proposal; optima: the Laplace
    approximations at the distinct proper optima, or their Gaussian VI where that is better; probes: where a last wave
    of starts ended, by which modes are checked to be complete; mixture: of Gaussians at several optima, where that may
    do better than ``best``, and the variance of its log-weights.
    """

    best: Gaussians
    elbo: float
    variance: float
    modes: Gaussians
    optima: Gaussians
    probes: Gaussians
    mixture: Mixture | None
    mixture_variance: float


def locate(target: Target, starts: Tensor) -> Located:
    """Pathfinder paths, Laplace and Gaussian VI from starts (N, dim); the best ELBO wins.

    Multi-path Pathfinder (Zhang et al. 2022) with dense BFGS; exact-Hessian Laplace at the distinct ends; natural-
    gradient Gaussian VI from the best three. The standard normal is always a candidate. Further waves of starts follow
    until one finds no optimum that matters; where several do, a mixture of Gaussians adapts to them. Above
    ``DENSE_DIMS`` dimensions :func:`locate_large` takes over.
    """
    if starts.shape[1] > DENSE_DIMS:
        return _located_large(target, starts)
    ends, record = bfgs_paths(target, starts)
    paths = pathfinder(target, record)
    reached, optima, masses = basins(target, ends)
    optima, masses, probes = _further(target, optima, masses)
    dim = starts.shape[1]
    eye = torch.eye(dim, dtype=starts.dtype, device=starts.device)
    standard = Gaussians(starts.new_zeros(1, dim), eye[None], (Origin(Kind.STANDARD),))
    found = join([standard, paths, optima])
    epsilon = torch.randn(FIRST_NORMALS, dim, dtype=starts.dtype, device=starts.device)
    elbo = found.elbo(target, epsilon)
    best = found.pick(distinct(found, elbo, limit=3))
    if not len(best):
        raise ValueError("log_prob: expected finite values near some start, got none; pass init= a point where p > 0")
    refined = _refine(target, best)
    final = join([best, refined])
    epsilon = torch.randn(LAST_NORMALS, dim, dtype=starts.dtype, device=starts.device)
    winner = int(final.elbo(target, epsilon).argmax())
    best_w = final.pick([winner]).log_weights(target, epsilon)[:, 0]
    mixture, mixture_variance = _mixture(target, optima, masses, mean_elbo(best_w))
    return Located(
        best=final.pick([winner]),
        elbo=mean_elbo(best_w),
        variance=float(best_w[best_w > -torch.inf].var()),
        modes=join([joined(optima, refined, reached, paths), *_components(mixture)]),
        optima=optima,
        probes=probes,
        mixture=mixture,
        mixture_variance=mixture_variance,
    )


def _located_large(target: Target, starts: Tensor) -> Located:
    """What :func:`locate_large` finds, without further starts and mixtures."""
    found, optima = locate_large(target, starts)
    log_w = found.log_weights(
        target, torch.randn(LAST_NORMALS, starts.shape[1], dtype=starts.dtype, device=starts.device)
    )
    elbos = [mean_elbo(column) for column in log_w.unbind(1)]
    winner = elbos.index(max(elbos))
    best_w, best = log_w[:, winner], found.pick([winner])
    return Located(
        best=best,
        elbo=elbos[winner],
        variance=float(best_w[best_w > -torch.inf].var()),
        modes=joined(best, optima),
        optima=optima,
        probes=optima.pick([]),
        mixture=None,
        mixture_variance=math.nan,
    )


def _further(target: Target, optima: Gaussians, masses: Tensor) -> tuple[Gaussians, Tensor, Gaussians]:
    """The optima, with those that further starts find, wave by wave, until one (``ENOUGH`` of several modes) finds none
    that matters; their masses; and where the last wave ended, which adds no optima, so that it tells how complete they
    are."""
    dim = optima.loc.shape[1]
    waves = int(WAVES if dim <= FEW_DIMS else WAVES // 2)
    probes, empty = optima.pick([]), 0
    for k in range(waves):
        ends, _ = bfgs_paths(target, _wave(target, optima), iterations=WAVE_ITERATIONS, prune=False)
        rows, index = from_covariance(ends.x, ends.inverse_hessian, Kind.FRESH)
        apart = [i for i, x in enumerate(rows.loc) if not len(optima) or optima.distance(x).amin() > SAME_MODE]
        _, new, new_masses = basins(target, ends[index[apart]])
        probes = join([rows, new])
        every, mass = join([optima, new]), torch.cat([masses, new_masses])
        kept = distinct(every, mass, limit=modes_kept(dim))
        matters = any(i >= len(optima) and mass[i] > mass.max() - NEGLIGIBLE for i in kept)
        empty = 0 if matters else empty + 1
        if late() or k == waves - 1 or empty == (ENOUGH if len(optima) > 1 else 1):
            break
        if matters:
            optima, masses = every.pick(kept), mass[kept]
    return optima, masses, probes


def _mixture(target: Target, optima: Gaussians, masses: Tensor, elbo: float) -> tuple[Mixture | None, float]:
    """A mixture adapted to the optima that have mass, if several do and its ELBO is about that of the best Gaussian or
    better; and the variance of its log-weights. (Where an optimum is a spike, its Gaussian may reach no point of p.)"""
    some = masses.isfinite().nonzero()[:, 0].tolist()
    if len(some) < 2:
        return None, math.nan
    mixture = adapt_mixture(target, optima.pick(some), masses[some])
    log_w = log_weights_of(target, mixture)
    if len(mixture.weights) < 2 or not mean_elbo(log_w) > elbo - WORTH:
        return None, math.nan
    return mixture, float(log_w[log_w > -torch.inf].var())


def _components(mixture: Mixture | None) -> list[Gaussians]:
    """The components of an adapted mixture: where a basin is bent, they cover it and the optima alone do not."""
    if mixture is None:
        return []
    return [Gaussians(mixture.loc, mixture.scale_tril, (Origin(Kind.ADAPTED),) * len(mixture.weights))]


def modes_kept(dim: int) -> int:
    """How many modes are kept apart: each costs a Hessian, and a component of the defensive proposal."""
    few, dense, beyond = MODES_KEPT
    return few if dim <= FEW_DIMS else dense if dim <= DENSE_DIMS else beyond


def _refine(target: Target, start: Gaussians) -> Gaussians:
    """Gaussian VI: a short one from each start, then a longer one from the best of these."""
    short = gaussian_vi(target, start, iterations=SHORT_VI)
    if not len(short):
        return short
    epsilon = torch.randn(REFINED_NORMALS, start.loc.shape[1], dtype=start.loc.dtype, device=start.loc.device)
    best = int(short.elbo(target, epsilon).argmax())
    long = gaussian_vi(target, short.pick([best]), iterations=LONG_VI)
    refined = [long, short.pick([i for i in range(len(short)) if i != best])]
    return join([g.refined() for g in refined])


def joined(*kinds: Gaussians) -> Gaussians:
    """Distinct Gaussians of all kinds, the first ones first."""
    every = join(list(kinds))
    order = torch.arange(len(every), 0, -1, dtype=every.loc.dtype)
    return every.pick(distinct(every, order, limit=modes_kept(every.loc.shape[1])))


def pathfinder(target: Target, record: Iterates, draws: int = 8, keep: int = PATHFINDER_PATHS) -> Gaussians:
    """The Gaussian N(x + H∇log p, H) of the best ELBO on each path, for the ``keep`` best paths."""
    loc = record.x + (record.inverse_hessian @ record.grad.unsqueeze(-1)).squeeze(-1)
    found, index = from_covariance(loc, record.inverse_hessian, Kind.PATH)
    if not len(found):
        return found
    epsilon = torch.randn(draws, loc.shape[1], dtype=loc.dtype, device=loc.device)
    elbo = found.elbo(target, epsilon)
    best: dict[int, int] = {}
    for i in elbo.argsort(descending=True).tolist():
        best.setdefault(int(record.path[index[i]]), i)
    chosen = found.pick(list(best.values())[: 4 * keep])
    again = chosen.elbo(target, torch.randn(8 * draws, loc.shape[1], dtype=loc.dtype, device=loc.device))
    return chosen.pick(again.argsort(descending=True)[:keep].tolist())


def basins(target: Target, ends: Iterates) -> tuple[Gaussians, Gaussians, Tensor]:
    """Gaussians at the distinct ends of the paths, by BFGS's inverse Hessians; at the optima to which damped Newton
    steps lead from there, N(x, (−∇² log p)⁻¹) where that is positive, or their Gaussian VI (an optimum may sit on a
    spike of its basin); and the log masses of the latter by their ELBO.

    All distinct ends are followed up, for on badly scaled targets paths end early, with curvatures far off.
    """
    rows, index = from_covariance(ends.x, ends.inverse_hessian, Kind.END)
    limit = modes_kept(rows.loc.shape[1])
    order = distinct(rows, ends.value[index], limit)
    reached = rows.pick(order)
    if not order:
        return reached, reached, ends.value[:0]
    x, value, hessian = newton(target, ends[index[order]])
    found, kept = from_precision(x, -hessian, Kind.LAPLACE)
    mass = value[kept] + found.logdet()
    optima = found.pick([i for i in distinct(found, value[kept], limit) if mass[i] > mass.max() - NO_MODE])
    return reached, *improved(target, optima)
