"""Pareto-smoothed importance sampling through ArviZ (Vehtari et al. 2024): the tail shape k̂ of the weights."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

SHORT = 0.01  # a shape below which a tail is treated as one of this shape: nearer 0 the formula is 0/0
# spread of log w within which weights have no tail to speak of: the shape fitted there is that of rounding and of
# training noise, and would refuse all but perfect fits
EVEN_SPREAD = 0.1


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
    finite = log_w[alive]
    if float(finite.max() - finite.min()) < EVEN_SPREAD:
        return log_w - log_w.logsumexp(0), 0.0
    smoothed, shape = _psislw(finite.detach().cpu().numpy())
    out[alive] = torch.as_tensor(smoothed).to(log_w)
    return out, shape


def khat(log_w: Tensor) -> float:
    """k̂ of the weights: below 0.5 they have a variance, above 0.7 estimates from them are not to be trusted."""
    return smooth(log_w)[1]


def khat_upper(khat: float, draws: int, multiple: float = 1.28) -> float:
    """Upper 90 % limit of k̂ from ``draws`` weights: k̂ + 1.28 (1 + k̂)/√M, M tail weights."""
    return khat + multiple * (1 + max(khat, -1.0)) / math.sqrt(tail_size(draws))


def hidden(log_w: Tensor, shape: float) -> float:
    """How much of Σ w is to be expected beyond the largest weights of log_w (S,), if their tail has this shape k.

    The M largest weights exceed the next one, u, by a generalised Pareto distribution of shape k and scale σ, the one
    that has their median. The mean over S draws of what lies beyond its 1 − 1/S quantile, which S draws reach about
    once, is::

        ∫₀^{1/S} Q(1 − t) dt · S = u + (σ/k) (M^k/(1 − k) − 1),     Q(1 − t) = u + (σ/k) ((tS/M)^{−k} − 1)

    in the units of Σ w: a share of the integral where w sum to 1. +inf for k ≥ 1, where the tail has no mean. For
    purely Pareto weights the share is S^{k−1}, and share < 0.1 the rule k < 1 − 1/log₁₀ S of Vehtari et al. 2024.
    """
    log_w = log_w[log_w > -math.inf]
    if shape >= 1 or len(log_w) < 5:
        return math.inf
    size, shape = math.ceil(tail_size(len(log_w))), max(shape, SHORT)
    *largest, threshold = log_w.topk(size + 1).values.exp().tolist()
    excess = statistics.median(largest) - threshold
    scale = shape * excess / (2**shape - 1)
    return threshold + scale / shape * (size**shape / (1 - shape) - 1)


def tail_size(draws: int) -> float:
    """M = min(S/5, 3√S), how many of the largest weights the generalised Pareto distribution is fitted to."""
    return min(0.2 * draws, 3 * math.sqrt(draws))


def resampling_weights(log_w: Tensor) -> Tensor:
    """Log-weights (S,) to resample by: Pareto-smoothed, or, from k̂ = 1 on, where the fit has no mean, as they are."""
    smoothed, shape = smooth(log_w)
    return smoothed if shape < 1 else log_w


def self_test(shapes: Sequence[float] = (0.3, 0.7, 1.0), draws: int = 10_000, repeats: int = 20) -> dict[float, float]:
    """Mean k̂ over repeats of weights w = 1 + (u^{−k} − 1)/k, u uniform, whose tail is generalised Pareto of shape k.

    Guards the bridge against other versions of ArviZ, some of which take −log w. Raises RuntimeError where a mean is
    off by 0.1 or more; its standard error is about 0.03.
    """
    generator = torch.Generator().manual_seed(0)
    means = {}
    for k in shapes:
        u = 1 - torch.rand(repeats, draws, dtype=torch.float64, generator=generator)
        log_w = torch.log1p((u**-k - 1) / k)
        means[k] = sum(khat(row) for row in log_w) / repeats
        if not abs(means[k] - k) < 0.1:
            version = import_arviz().__version__
            raise RuntimeError(
                f"arviz: expected k̂ {k} of weights with that tail, got {means[k]:.2f} from version {version}; "
                "install arviz>=0.20,<1"
            )
    return means


def import_arviz() -> ModuleType:
    """ArviZ, which takes seconds to import: so only when first needed."""
    with warnings.catch_warnings():  # it announces its next major version whenever it is imported
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def _psislw(log_w: np.ndarray) -> tuple[np.ndarray, float]:
    """Smoothed, normalised log-weights and k̂ of +log w; ArviZ 1.x takes −log w (in arviz_stats)."""
    with np.errstate(over="ignore"):  # in its search over shapes
        smoothed, shape = import_arviz().psislw(log_w)
    return smoothed, float(shape)
