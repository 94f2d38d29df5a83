"""Pareto-smoothed importance sampling through ArviZ (Vehtari et al. 2024): the tail shape k̂ of the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

EVEN = 0.1  # spread of log w within which weights have no tail to speak of


def smooth(log_w: Tensor) -> tuple[Tensor, float]:
    """log_w (S,) -> Pareto-smoothed, normalised log-weights (S,) and k̂.

    Where no weight is 10 % above another the fitted shape is that of rounding and of training noise: they come back as
    they are, with k̂ = 0. Draws of weight 0 (log_w = −inf) stay so and take no part in the fit. k̂ is +inf if fewer than
    five weights are left.
    """
    alive = log_w > -math.inf
    count = int(alive.sum())
    out = torch.full_like(log_w, -math.inf)
    if count < 5:
        out[alive] = -math.log(max(count, 1))
        return out, math.inf
    kept = log_w[alive]
    if float(kept.max() - kept.min()) < EVEN:
        return log_w - log_w.logsumexp(0), 0.0
    with np.errstate(over="ignore"):  # in its search over shapes
        smoothed, khat = _psislw()(kept.detach().cpu().numpy())
    out[alive] = torch.as_tensor(smoothed).to(log_w)
    return out, float(khat)


def khat(log_w: Tensor) -> float:
    """k̂ of the weights: below 0.5 they have a variance, above 0.7 estimates from them are not to be trusted."""
    return smooth(log_w)[1]


def khat_upper(khat: float, draws: int) -> float:
    """Upper 90 % limit of k̂ from ``draws`` weights: k̂ + 1.28 (1 + k̂)/√M, M = min(S/5, 3√S) tail weights."""
    return khat + 1.28 * (1 + max(khat, -1.0)) / math.sqrt(min(0.2 * draws, 3 * math.sqrt(draws)))


def _psislw() -> Callable:
    with warnings.catch_warnings():  # ArviZ announces its next major version whenever it is imported
        warnings.simplefilter("ignore", FutureWarning)
        from arviz import psislw  # seconds, so only when first needed
    return psislw
