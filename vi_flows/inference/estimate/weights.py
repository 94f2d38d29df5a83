"""Importance weights: after q and p, everything is a function of log_w = log p(x) − log q(x)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...flows.distribution import Flow
from ...running import seconds_of
from ...targets.target import Target
from .evaluate import BLOCK_ROWS, in_blocks


@dataclass(frozen=True, eq=False)
class Weights:
    """Draws x (*shape, dim) with log_q and log_p (*shape)."""

    x: Tensor
    log_q: Tensor
    log_p: Tensor

    @property
    def log_w(self) -> Tensor:
        """log p(x) − log q(x)."""
        return self.log_p - self.log_q


def log_weights(q: Flow, target: Target, draws: int | Tensor, path: bool = False) -> Weights:
    """Reparametrised draws of a flow with their log-weights: training and diagnosis both get them here.

    Parameters
    ----------
    q: a flow without context.
    target: its ``log_prob`` maps (N, dim) to (N,).
    draws: how many, or base noise (*shape, k) to make them from.
    path: score x under q with the parameters held, so that only the path gradient of E[log w] is left
        (sticking the landing: Roeder, Wu & Duvenaud 2017; without an inverse: Vaitl et al. 2024); for the ELBO only.
    """
    noise = q.base.noise((draws,)) if isinstance(draws, int) else draws
    x, log_q = q().from_noise(noise, path)
    rows = x.reshape(-1, x.shape[-1])
    log_p = target.log_prob(rows)
    if rows.requires_grad:  # where log p is −inf or NaN its gradient, 0 · inf, may be NaN: such a draw has no say
        finite = log_p.detach().isfinite().unsqueeze(-1)
        rows.register_hook(lambda gradient: torch.where(finite, gradient, 0.0))
    return Weights(x, log_q, log_p.reshape(log_q.shape))


def log_mean(log_w: Tensor) -> float:
    """log Ẑ = log mean exp(log_w), the estimate of log Z."""
    return float(log_w.logsumexp(0) - math.log(len(log_w)))


def effective_sample_size(log_w: Tensor) -> float:
    """(Σ w)² / Σ w², between 1 and the number of draws (Kish)."""
    return float((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp())


def log_mean_se(log_w: Tensor) -> float:
    """Standard error of :func:`log_mean` by the delta method, √(1/ESS − 1/S)."""
    return math.sqrt(max(1 / effective_sample_size(log_w) - 1 / len(log_w), 0.0))


def mean_elbo(log_w: Tensor) -> float:
    """E_q[log w] over the draws where p > 0, plus the log of their share: the ELBO of q kept to the support of p."""
    finite = log_w[log_w > -math.inf]
    return float(finite.mean()) + math.log(len(finite) / len(log_w)) if len(finite) else -math.inf


def draw_seconds(flow: Flow, target: Target) -> float:
    """Seconds to draw from a flow and evaluate the target there, a draw."""
    noise = flow.base.noise((BLOCK_ROWS,))
    return seconds_of(lambda: in_blocks(lambda rows: log_weights(flow, target, rows).log_w, noise)) / BLOCK_ROWS
