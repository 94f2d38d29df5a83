"""Locating: where the mass of p is, and the Gaussian that whitens it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..targets.target import Target
from .gaussian import Gaussians, from_covariance, from_precision, gaussian_vi, join
from .optimise import Iterates, bfgs_paths, newton, value_and_grad
from .weights import mean_elbo

STARTS = 64
PATHS = 8  # of Pathfinder that are looked at closely
FEW_DIMS = 20  # up to which many modes are looked for and kept
WAVES = 4  # of starts around the optima found, as long as they find new ones
SAME_MODE = 1.0  # Mahalanobis distance, per square root of dim, below which two optima are one


@dataclass(frozen=True)
class Located:
    """What locating found.

    best: one Gaussian of the highest ELBO; elbo, variance: the mean and variance of its log-weights over 2,000 draws;
    modes: Gaussians at the distinct optima and path ends, for the defensive proposal; optima: how many distinct proper
    optima there are.
    """

    best: Gaussians
    elbo: float
    variance: float
    modes: Gaussians
    optima: int


def locate(target: Target, starts: Tensor) -> Located:
    """Pathfinder paths, Laplace and Gaussian VI from starts (N, dim); the best ELBO wins.

    Multi-path Pathfinder (Zhang et al. 2022) with dense BFGS; exact-Hessian Laplace at the distinct ends; natural-
    gradient Gaussian VI from the best three. The standard normal is always a candidate.
    """
    ends, record = bfgs_paths(target, starts)
    paths = pathfinder(target, record)
    reached, optima = laplace(target, ends)
    optima = _more_optima(target, optima)
    dim = starts.shape[1]
    eye = torch.eye(dim, dtype=starts.dtype, device=starts.device)
    standard = Gaussians(starts.new_zeros(1, dim), eye[None], ("the standard normal",))
    found = join([standard, paths, optima])
    epsilon = torch.randn(256, dim, dtype=starts.dtype, device=starts.device)
    elbo = found.elbo(target, epsilon)
    best = found.pick(distinct(found, elbo, limit=3))
    if not len(best):
        raise ValueError("log_prob: expected finite values near some start, got none; pass init= a point where p > 0")
    refined = _refine(target, best)
    final = join([best, refined])
    epsilon = torch.randn(2000, dim, dtype=starts.dtype, device=starts.device)
    winner = int(final.elbo(target, epsilon).argmax())
    best_w = final.pick([winner]).log_weights(target, epsilon)[:, 0]
    modes = _modes([optima, refined, reached, paths])
    return Located(
        final.pick([winner]), mean_elbo(best_w), float(best_w[best_w > -torch.inf].var()), modes, len(optima)
    )


def _more_optima(target: Target, optima: Gaussians) -> Gaussians:
    """The optima, with those that further starts find among and around them, wave by wave, while there are new ones."""
    dim = optima.loc.shape[1]
    for _ in range(WAVES if dim <= FEW_DIMS else 0):
        if len(optima) < 2:
            break
        spread = 1.5 * optima.loc.std(0) + optima.scale_tril.diagonal(dim1=-2, dim2=-1).mean(0)
        starts = optima.loc.mean(0) + spread * torch.randn(STARTS, dim, dtype=spread.dtype, device=spread.device)
        _, found = laplace(target, bfgs_paths(target, starts)[0])
        every = join([optima, found])
        kept = every.pick(distinct(every, value_and_grad(target, every.loc)[0], limit=modes_kept(dim)))
        if len(kept) <= len(optima):
            break
        optima = kept
    return optima


def modes_kept(dim: int) -> int:
    """How many modes are kept apart: each costs a Hessian, and a component of the defensive proposal."""
    return 64 if dim <= FEW_DIMS else 8


def _refine(target: Target, start: Gaussians) -> Gaussians:
    """Gaussian VI: a short one from each start, then a longer one from the best of these."""
    short = gaussian_vi(target, start, iterations=20)
    if not len(short):
        return short
    epsilon = torch.randn(512, start.loc.shape[1], dtype=start.loc.dtype, device=start.loc.device)
    best = int(short.elbo(target, epsilon).argmax())
    long = gaussian_vi(target, short.pick([best]), iterations=60)
    refined = [long, short.pick([i for i in range(len(short)) if i != best])]
    return join([g.named("Gaussian VI from {}") for g in refined])


def _modes(kinds: list[Gaussians]) -> Gaussians:
    """Distinct Gaussians of all kinds, the first ones first."""
    every = join(kinds)
    order = torch.arange(len(every), 0, -1, dtype=every.loc.dtype)
    return every.pick(distinct(every, order, limit=modes_kept(every.loc.shape[1])))


def start_points(
    target: Target, extra: Tensor | None = None, count: int = STARTS, device: torch.device | str | None = None
) -> Tensor:
    """Over-dispersed starts (about ``count``, dim), float64: ``extra``, prior draws of a model, uniform(−2, 2), and
    normals of sd 1 to 100."""
    if target.dim > 100:
        count //= 4  # dense inverse Hessians of every path are kept
    like = {"dtype": torch.float64, "device": device}
    parts = [] if extra is None else [extra]
    prior = getattr(target, "prior", None)
    if prior is not None:
        parts.append(prior(count // 4))
    left = max(count - sum(len(p) for p in parts), 2)
    parts.append(4 * torch.rand(left // 2, target.dim, **like) - 2)
    scales = torch.logspace(0, 2, left - left // 2, **like)[:, None]
    parts.append(scales * torch.randn(len(scales), target.dim, **like))
    points = torch.cat([p.to(**like) for p in parts])
    return points[points.isfinite().all(-1)]


def pathfinder(target: Target, record: Iterates, draws: int = 8, keep: int = PATHS) -> Gaussians:
    """The Gaussian N(x + H∇log p, H) of the best ELBO on each path, for the ``keep`` best paths."""
    loc = record.x + (record.inverse_hessian @ record.grad.unsqueeze(-1)).squeeze(-1)
    found, index = from_covariance(loc, record.inverse_hessian, "a Pathfinder path")
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


def laplace(target: Target, ends: Iterates) -> tuple[Gaussians, Gaussians]:
    """Gaussians at the distinct ends of the paths, by BFGS's inverse Hessians; and the Laplace approximations to which
    damped Newton steps lead from there, N(x, (−∇² log p)⁻¹), where that is positive."""
    rows, index = from_covariance(ends.x, ends.inverse_hessian, "the end of a path")
    limit = modes_kept(rows.loc.shape[1])
    order = distinct(rows, ends.value[index], limit)
    reached = rows.pick(order)
    if not order:
        return reached, reached
    x, value, hessian = newton(target, ends[index[order]])
    found, kept = from_precision(x, -hessian, "Laplace")
    return reached, found.pick(distinct(found, value[kept], limit))


def distinct(gaussians: Gaussians, score: Tensor, limit: int) -> list[int]:
    """Indices by falling score, without those whose centre is close to a better one in that one's metric."""
    kept: list[int] = []
    for i in score.argsort(descending=True).tolist():
        if len(kept) == limit or score[i] == -torch.inf:
            break
        far = True
        for j in kept:
            offset = (gaussians.loc[i] - gaussians.loc[j]).unsqueeze(-1)
            standard = torch.linalg.solve_triangular(gaussians.scale_tril[j], offset, upper=False)
            far &= float(standard.square().mean()) > SAME_MODE**2
        if far:
            kept.append(i)
    return kept
