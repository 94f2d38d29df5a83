"""Where locating starts: points around the origin or given ones, and further ones where optima do not explain p."""

from __future__ import annotations

import torch
from torch import Tensor

from ...flows.bases import Mixture
from ...targets.target import Target
from ..estimate.evaluate import in_blocks, log_density
from .gaussian import Gaussians, scale_of
from .mixture import MODE_DF

# of locating, and of each wave, in lockstep: one batched evaluation costs hardly more than a single one; with fewer,
# modes that attract few starts are missed
STARTS = 64
# times the spread of the optima, of candidates around them: larger looks further out, more thinly. Chosen, not measured
CANDIDATE_SPREAD = 1.5
WAVE_CANDIDATES = 2048  # of which half a wave is chosen: fewer miss narrow modes beside the optima
# times the spread of the optima, up to which a quarter of a wave begins: log-uniformly, so that more thins out what is
# near
FARTHEST_SPREADS = 30.0


def _wave(target: Target, optima: Gaussians) -> Tensor:
    """Starts (about STARTS, dim): a quarter as the first ones; a quarter far out, up to ``FARTHEST_SPREADS`` times the
    spread of the optima; the others where p is most above what the optima explain, a mixture of t components at them,
    among ``WAVE_CANDIDATES`` draws around them (cf. Raftery & Bao 2010)."""
    fresh = start_points(target, count=STARTS // 4, device=optima.loc.device)
    if not len(optima):
        return fresh
    like = {"dtype": fresh.dtype, "device": fresh.device}
    centre, offset = optima.loc.mean(0), optima.loc - optima.loc.mean(0)
    within = (optima.scale_tril @ optima.scale_tril.mT).mean(0)
    spread = scale_of(within + offset.mT @ offset / len(optima))
    scales = FARTHEST_SPREADS ** torch.rand(STARTS // 4, 1, **like)
    size = torch.linalg.vector_norm(spread, dim=-1)
    far = scales * torch.randn(len(scales), target.dim, **like)
    # in many dimensions starts in the span of the optima end at these: there they go to all sides
    far = centre + (far @ spread.mT if target.dim <= FEW_DIMS else far * size)
    noise = CANDIDATE_SPREAD * torch.randn(WAVE_CANDIDATES, target.dim, **like)
    around = centre + torch.cat([noise[::2] @ spread.mT, noise[1::2] * size])
    explained = Mixture(optima.loc, optima.scale_tril, df=MODE_DF, fixed=True)
    ratio = log_density(target, around) - in_blocks(explained.log_prob, around)
    best = ratio.argsort(descending=True)[: WAVE_CANDIDATES // 4]
    return torch.cat([fresh, far, around[best[torch.randperm(len(best))[: STARTS // 2]]]])


def start_points(
    target: Target, extra: Tensor | None = None, count: int = STARTS, device: torch.device | str | None = None
) -> Tensor:
    """Over-dispersed starts (about ``count``, dim), float64: ``extra``, prior draws of a model, uniform(−2, 2), and
    normals of sd 1 to 100."""
    if target.dim > MANY_DIMS:
        count //= 4  # dense inverse Hessians of every path are kept
    like = {"dtype": torch.float64, "device": device}
    parts = [] if extra is None else [extra]
    prior = target.prior
    if prior is not None:
        parts.append(prior(count // 4))
    left = max(count - sum(len(p) for p in parts), 2)
    parts.append(4 * torch.rand(left // 2, target.dim, **like) - 2)
    scales = torch.logspace(0, 2, left - left // 2, **like)[:, None]
    parts.append(scales * torch.randn(len(scales), target.dim, **like))
    points = torch.cat([p.to(**like) for p in parts])
    return points[points.isfinite().all(-1)]


FEW_DIMS = 20  # up to which many modes are looked for and kept: beyond, a mode is a Hessian, and waves cost too much
MANY_DIMS = 100  # up to which the first starts are STARTS; beyond, a quarter, whose paths are kept: dense matrices
# up to which paths keep dense inverse Hessians and "auto" trains: beyond, no flow tried gained .1 nats on the Gaussian
# in minutes
DENSE_DIMS = 300
