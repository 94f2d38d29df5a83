"""Named scalars of draws, their weighted moments and quantiles, and the Monte-Carlo errors of these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PROBABILITIES = (0.05, 0.5, 0.95)  # of the quantiles that a summary shows and a claim is about
SORTED_COLUMNS = 25  # whose orders are held in memory at once: 32 MB an array for the most draws of a verdict


def flatten(values: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """{"tau": (N,), "theta": (N, 8)} -> ["tau", "theta[0]", ...] and (N, Q) in float64; names as ArviZ writes them."""
    names, columns = [], []
    for name, value in values.items():
        shape = value.shape[1:]
        columns.append(value.detach().reshape(len(value), -1).double())
        if not shape:
            names.append(name)
        else:
            index = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)).tolist()
            names += [f"{name}[{','.join(map(str, i))}]" for i in index]
    return names, torch.cat(columns, -1) if len(columns) > 1 else columns[0]


@dataclass(frozen=True, eq=False)
class Estimates:
    """Self-normalised estimates of Q quantities with their standard errors; every field is (Q,) or (3, Q)."""

    mean: Tensor
    sd: Tensor
    quantiles: Tensor
    mean_se: Tensor
    log_sd_se: Tensor
    probability_se: Tensor


def estimate(theta: Tensor, log_w: Tensor) -> Estimates:
    """Weighted mean, sd and 5/50/95 % points of theta (S, Q) under exp(log_w) (S,).

    Standard errors by the delta method for self-normalised importance sampling: se² = Σ w̄² (h − E h)²; that of the
    sd is on the log scale, that of a quantile is of the probability below it. SORTED_COLUMNS quantities at a time.
    """
    parts = [_estimate(columns, log_w) for columns in theta.split(SORTED_COLUMNS, -1)]
    return Estimates(*(torch.cat([getattr(p, name) for p in parts], -1) for name in Estimates.__dataclass_fields__))


def _estimate(theta: Tensor, log_w: Tensor) -> Estimates:
    alive = carrying(log_w)  # draws of no weight may lie where a transform has overflowed
    w, theta = (log_w - log_w.logsumexp(0)).exp()[alive], theta[alive]
    mean = w @ theta
    offset = theta - mean
    variance = w @ offset.square()
    mean_se = (w.square() @ offset.square()).sqrt()
    log_sd_se = (w.square() @ (offset.square() - variance).square()).sqrt() / (2 * variance)
    ordered, order = theta.mT.contiguous().sort(-1)
    below, square = w[order].cumsum(-1), w.square()[order].cumsum(-1)
    quantiles, errors = [], []
    for p in PROBABILITIES:
        index = (below < p).sum(-1, keepdim=True).clamp_max(len(theta) - 1)
        point = ordered.gather(-1, index)
        last = torch.searchsorted(ordered, point, right=True) - 1  # of the draws that are equal to it
        share, squares = below.gather(-1, last), square.gather(-1, last)  # Σ w² (1 − P)² below, Σ w² P² above
        quantiles.append(point[:, 0])
        errors.append(((1 - 2 * share) * squares + share.square() * square[:, -1:]).clamp_min(0.0).sqrt()[:, 0])
    return Estimates(mean, variance.sqrt(), torch.stack(quantiles), mean_se, log_sd_se, torch.stack(errors))


def carrying(log_w: Tensor) -> Tensor:
    """Indices of the draws whose normalised weight is above 0 in floating point."""
    return ((log_w - log_w.logsumexp(0)).exp() > 0).nonzero()[:, 0]


def vary(theta: Tensor) -> Tensor:
    """Indices of the columns of theta that are not constant (a correlation matrix has constant ones)."""
    low, high = theta.amin(0), theta.amax(0)
    return ((high - low) > 1e-12 * torch.maximum(low.abs(), high.abs())).nonzero()[:, 0]


def resample(log_w: Tensor, n: int) -> Tensor:
    """n indices by systematic resampling from weights exp(log_w) (S,), in random order."""
    cumulative = (log_w - log_w.logsumexp(0)).exp().cumsum(0)
    u = (torch.arange(n, dtype=log_w.dtype, device=log_w.device) + torch.rand((), dtype=log_w.dtype).item()) / n
    index = torch.searchsorted(cumulative, u.clamp_max(float(cumulative[-1]))).clamp_max(len(log_w) - 1)
    return index[torch.randperm(n, device=index.device)]


def resample_along(log_w: Tensor, x: Tensor, count: int) -> Tensor:
    """Indices (count,) by systematic resampling along the widest direction of the weighted x (S, dim).

    Modes that lie apart in it so keep their shares to about 1/count, where in random order chance would add to them.
    """
    order = carrying(log_w)
    w = log_w[order].softmax(0)
    offset = x[order] - w @ x[order]
    standard = offset / (w @ offset.square()).sqrt().clamp_min(1e-300)
    if bool(standard.isfinite().all()):
        widest = torch.linalg.eigh(standard.mT @ (w[:, None] * standard))[1][:, -1]
        order = order[(standard @ widest).argsort()]
    return order[resample(log_w[order], count)]
