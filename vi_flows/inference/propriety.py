"""Whether p can be normalised: rays along which log p does not fall as a proper density must."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..targets.target import Target
from ..targets.values import as_computed
from .weights import in_blocks

DISTANCES = tuple(10.0**k for k in range(1, 13))
OFFSET = 0.3  # of the rays' origin: through a point of no symmetry, where a hierarchy's effects are not all equal
SLOPE = -1.0  # of log p in the logarithm of the distance: 1/distance has no finite integral
WITHIN = 200.0  # nats of the highest log p seen: a plateau below is where arithmetic was kept from overflowing
NAMED = 3
PER_DECADE = 4
LINE = torch.logspace(-6, 12, 18 * PER_DECADE + 1, dtype=torch.float64)  # distances on a line, in reaches of the draws
FAR = 10 ** (1 - 0.5 / PER_DECADE)  # from where they are far out: half-way between two of them


def slow_rays(target: Target) -> list[tuple[str, float]]:
    """Half-axes along which log p falls no faster than 1/distance, as far out as it is finite, and its slope there.

    slope = d log p / d log t at x = offset ± t eᵢ, between the last two of t = 10, 100, ..., 10¹² with finite log p,
    worst first. A ray only names a direction: along one of them a proper density can rise too.
    """
    dim = target.dim
    like = {"dtype": torch.float64, "device": getattr(target, "device", None)}
    origin = OFFSET * torch.randn(dim, **like)
    steps = torch.cat([torch.eye(dim, **like), -torch.eye(dim, **like)])
    points = origin + torch.tensor(DISTANCES, **like)[:, None, None] * steps
    log_p = in_blocks(lambda rows: as_computed(target, rows), points.reshape(-1, dim))
    log_p = log_p.reshape(len(DISTANCES), 2 * dim)
    names = coordinate_names(target)
    found = []
    floor = float(log_p[log_p < torch.inf].nan_to_num(-torch.inf).max()) - WITHIN if (log_p < torch.inf).any() else 0.0
    for i, values in enumerate(log_p.unbind(1)):
        slope = _last_slope(values, floor)
        if slope is not None and slope > SLOPE - 0.02:
            found.append((f"{'+' if i < dim else '−'}{names[i % dim]}", slope))
    return sorted(found, key=lambda pair: -pair[1])


def coordinate_names(target: Target) -> list[str]:
    """Names of the unconstrained coordinates."""
    named = getattr(target, "coordinate_names", None)
    return named() if named is not None else [f"x[{i}]" for i in range(target.dim)]


def far_shares(target: Target, x: Tensor, directions: Tensor) -> Tensor:
    """The share of ∫p(x + t d) dt that lies beyond |t| = FAR, averaged over rows x (J, dim), for directions (K, dim).

    Given draws x of p, its mean over x is the mass of p that lies further out than that along d, whatever p: the mean
    of a conditional probability. An improper p has it all out there. As t is logarithmic, lines of any width are seen;
    where log p is not finite they end.
    """
    t = torch.cat([-LINE, LINE]).to(x)
    shares = []
    for direction in directions:
        points = (x[:, None] + t[:, None] * direction).reshape(-1, x.shape[1])
        log_p = in_blocks(target.log_prob, points).reshape(len(x), len(t))
        log_p = torch.where(log_p.isfinite(), log_p, -torch.inf) + t.abs().log()
        share = (log_p[:, t.abs() > FAR].logsumexp(1) - log_p.logsumexp(1)).exp()
        shares.append(share.nan_to_num(0.0).mean())
    return torch.stack(shares)


def _last_slope(values: Tensor, floor: float) -> float | None:
    """The slope between the last two distances before log p ceases to be finite; None where it falls below floor."""
    bad = (~values.isfinite()).nonzero()[:, 0]
    end = int(bad[0]) if len(bad) else len(values)
    if end < 2 or values[end - 1] < floor or (len(bad) and values[end] == -torch.inf):
        return None
    return float(values[end - 1] - values[end - 2]) / math.log(10.0)


def improper(target: Target) -> str:
    """A sentence that names the directions in which the target looks improper, or ""."""
    rays = slow_rays(target)
    if not rays:
        return ""
    shown = ", ".join(name for name, _ in rays[:NAMED]) + (", ..." if len(rays) > NAMED else "")
    how = "keeps rising" if rays[0][1] > 0 else "falls no faster than 1/distance"
    return f"log p {how} along {shown}: the target looks improper there; give that parameter a proper prior"
