"""Monotonic rational-quadratic splines with identity tails (Durkan et al. 2019)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..algebra import bounded
from ..bijection import Bijection, pulled_back
from .univariate import Univariate

LOG_BOUND = 3.0  # inner slopes are within e^±3, and
SMALLEST = 1e-3  # a piece at least this share of the interval: steeper stacks cannot be inverted


class RationalQuadratic(Bijection):
    """Durkan et al. 2019, eqs. 4-8: K rational-quadratic pieces on [−bound, bound], the identity outside it.

    raw (\\*batch, 3K − 1, dim) holds K widths, K heights (softmax) and K − 1 inner slopes (bounded exponential). The
    slope at both edges is exactly 1, so the map is once continuously differentiable on the whole line. Inside, knots
    lead and the batch is last, and the interval is [0, 1]: ``knots`` (2, K + 1, dim, \\*batch) in x and y, and
    ``slopes`` (K + 1, dim, \\*batch).
    """

    def __init__(self, raw: Tensor, bound: float):
        self.bound = bound
        raw = raw.movedim((-2, -1), (0, 1))
        bins = (len(raw) + 1) // 3
        sizes, slopes = raw.split([2 * bins, bins - 1])
        edge = torch.ones_like(raw[:1])
        self.slopes = torch.cat([edge, bounded(slopes, LOG_BOUND).exp(), edge])
        # sums of SMALLEST + (1 − K SMALLEST) softmax, as one product: its entries sum to 1
        like = {"dtype": raw.dtype, "device": raw.device}
        sums = torch.full((bins + 1, bins), 1 - bins * SMALLEST, **like).tril(-1)
        sums = sums + torch.linspace(0, bins * SMALLEST, bins + 1, **like).unsqueeze(-1)
        self.knots = (sums @ sizes.reshape(2, bins, -1).softmax(1)).view(2, bins + 1, *raw.shape[1:])

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_slopes = self.move(z, back=False)
        return x, log_slopes.sum(-1)

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_slopes = self.move(x, back=True)
        return z, -log_slopes.sum(-1)

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, log_slopes = self.move(z, back=False)
        (l_z,) = pulled_back((log_slopes,), (torch.ones_like(log_slopes),), z)
        return x, log_slopes.sum(-1), (score - l_z) * (-log_slopes.detach()).exp()

    def move(self, value: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        """f(value) or f⁻¹(value) (\\*batch, dim), and log f' (\\*batch, dim) at that pair."""
        value, knots, slopes = _aligned(value.movedim(-1, 0), self.knots, self.slopes)
        at = (value * (0.5 / self.bound) + 0.5).clamp(0, 1)
        index = (knots[int(back), 1:-1] <= at).sum(0)
        ends = torch.stack([index, index + 1])
        corners, slopes = knots.gather(1, ends.expand(2, -1, *value.shape)), slopes.gather(0, ends)
        moved, log_slope = (_solve if back else _evaluate)(at, corners, slopes)
        inside = value.abs() < self.bound
        moved = torch.where(inside, torch.add(value, moved - at, alpha=2 * self.bound), value)
        return moved.movedim(0, -1), torch.where(inside, log_slope, 0.0).movedim(0, -1)


def _aligned(value: Tensor, knots: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A value (dim, \\*batch), knots and slopes with the batch axes of all."""
    if value.shape == slopes.shape[1:]:
        return value, knots, slopes
    missing = slopes.dim() - 1 - value.dim()
    value = value.reshape(len(value), *[1] * missing, *value.shape[1:])
    knots = knots.reshape(*knots.shape[:3], *[1] * -missing, *knots.shape[3:])
    slopes = slopes.reshape(*slopes.shape[:2], *[1] * -missing, *slopes.shape[2:])
    shape = torch.broadcast_shapes(value.shape, slopes.shape[1:])
    return value.expand(shape), knots.expand(-1, -1, *shape), slopes.expand(-1, *shape)


def _evaluate(z: Tensor, corners: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """x = f(z) and log f'(z) between the corners (2, 2, \\*shape): their x and y, left and right, and slopes there."""
    (x0, y0), (width, height) = corners[:, 0].unbind(), (corners[:, 1] - corners[:, 0]).unbind()
    d0, d1 = slopes.unbind()
    s, t = height / width, (z - x0) / width
    r = 1 - t
    u = t * r
    bottom = torch.addcmul(s, torch.sub(d0 + d1, s, alpha=2), u)
    x = torch.addcdiv(y0, height * t * torch.addcmul(s * t, d0, r), bottom)
    return x, _log_slope(s, t, r, u, d0, d1, bottom)


def _solve(x: Tensor, corners: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """z = f⁻¹(x), the root t of a quadratic, and log f'(z), between corners as in :func:`_evaluate`."""
    (x0, y0), (width, height) = corners[:, 0].unbind(), (corners[:, 1] - corners[:, 0]).unbind()
    d0, d1 = slopes.unbind()
    s, rise = height / width, x - y0
    bend = torch.sub(d0 + d1, s, alpha=2)
    curvature = rise * bend
    a, b, c = torch.addcmul(curvature, height, s - d0), height * d0 - curvature, s * rise
    root = torch.addcmul(b * b, a, c, value=4).clamp_min(torch.finfo(b.dtype).tiny).sqrt()
    t = 2 * c / (b + root)
    r = 1 - t
    u = t * r
    return torch.addcmul(x0, width, t), _log_slope(s, t, r, u, d0, d1, torch.addcmul(s, bend, u))


def _log_slope(s: Tensor, t: Tensor, r: Tensor, u: Tensor, d0: Tensor, d1: Tensor, bottom: Tensor) -> Tensor:
    slope = torch.addcmul(torch.addcmul(d1 * (t * t), d0, r * r), s, u, value=2)
    return (slope * (s / bottom).square()).log()


def rational_quadratic(bins: int = 8, bound: float = 5.0) -> Univariate:
    """The rational-quadratic univariate of ``bins`` pieces on [−bound, bound]."""
    return Univariate(3 * bins - 1, partial(RationalQuadratic, bound=bound))
