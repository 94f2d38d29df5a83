"""Objectives, to be maximised: functions of the log-weights alone, particles on axis 0."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Objective = Callable[[Tensor], Tensor]


def elbo(log_w: Tensor) -> Tensor:
    """E_q[log w]: the evidence lower bound, log Z − KL(q‖p)."""
    return log_w.mean()


def iwae(log_w: Tensor) -> Tensor:
    """E log (1/K) Σ_k w_k over K particles on axis 0, averaged over the rest (Burda et al. 2016, eq. 8)."""
    return (log_w.logsumexp(0) - math.log(log_w.shape[0])).mean()


def renyi(log_w: Tensor, alpha: float) -> Tensor:
    """(1/(1−α)) log (1/K) Σ_k w_k^{1−α} on axis 0, averaged over the rest (Li & Turner 2016, eq. 8).

    α → 1 is the ELBO (taken there exactly), α = 0 the IWAE bound; α < 0 gives upper bounds. As an objective its order
    is fixed: ``functools.partial(renyi, alpha=0.5)``.
    """
    if alpha == 1:
        return elbo(log_w)
    return iwae((1 - alpha) * log_w) / (1 - alpha)
