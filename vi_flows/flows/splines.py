"""Monotonic rational-quadratic splines with identity tails (Durkan et al. 2019)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from .bijection import Bijection
from .linear import bounded
from .univariate import Univariate

MIN_BIN = 1e-3  # of the interval, in width and in height
LOG_SIZE_BOUND = 3.0  # bins within e^±3 of one another and inner slopes within e^±4: steeper stacks cannot be inverted
LOG_SLOPE_BOUND = 4.0


class RationalQuadratic(Bijection):
    """Durkan et al. 2019, eqs. 4-8: K rational-quadratic pieces on [−bound, bound], the identity outside it.

    raw (\\*batch, 3K − 1, dim) holds K widths, K heights (bounded softmax) and K − 1 inner slopes (bounded exponential). The
    slope at both edges is exactly 1, so the map is once continuously differentiable on the whole line.
    """

    def __init__(self, raw: Tensor, bound: float):
        raw = raw.movedim(-2, 0)  # bins lead: a long contiguous last axis
        bins = (raw.shape[0] + 1) // 3
        self.bound = bound
        self.x = self.knots(raw[:bins])
        self.y = self.knots(raw[bins : 2 * bins])
        self.slopes = pad(bounded(raw[2 * bins :], LOG_SLOPE_BOUND).exp().movedim(0, -1), (1, 1), value=1.0).movedim(
            -1, 0
        )

    def knots(self, raw: Tensor) -> Tensor:
        """K raw sizes to the K + 1 knots, from −bound to bound exactly."""
        bins = raw.shape[0]
        sizes = MIN_BIN + (1 - bins * MIN_BIN) * bounded(raw, LOG_SIZE_BOUND).softmax(0)
        inner = self.bound * (2 * sizes[:-1].cumsum(0) - 1)
        edge = torch.full_like(raw[:1], self.bound)
        return torch.cat([-edge, inner, edge])

    def bin(self, knots: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The bin of each value by ``knots``: its left x and y, width, height, and the slopes at its two ends."""
        shape = torch.broadcast_shapes(knots.shape[1:], value.shape)
        index = (value >= knots[1:-1]).sum(0).expand(shape)
        ends = torch.stack([index, index + 1])
        (x0, x1), (y0, y1), (d0, d1) = (t.expand(-1, *shape).gather(0, ends) for t in (self.x, self.y, self.slopes))
        return x0, y0, x1 - x0, y1 - y0, d0, d1

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        inside = z.abs() < self.bound
        clamped = z.clamp(-self.bound, self.bound)
        x0, y0, width, height, d0, d1 = self.bin(self.x, clamped)
        s, t = height / width, (clamped - x0) / width
        u = t * (1 - t)
        denominator = s + (d1 + d0 - 2 * s) * u
        x = y0 + height * (s * t * t + d0 * u) / denominator
        logdet = self.log_slope(s, t, u, d0, d1, denominator)
        return torch.where(inside, x, z), torch.where(inside, logdet, 0.0).sum(-1)

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.abs() < self.bound
        clamped = x.clamp(-self.bound, self.bound)
        x0, y0, width, height, d0, d1 = self.bin(self.y, clamped)
        s, rise = height / width, (clamped - y0)
        curvature = rise * (d1 + d0 - 2 * s)
        a = height * (s - d0) + curvature
        b = height * d0 - curvature
        c = -s * rise
        t = -2 * c / (b + (b * b - 4 * a * c).clamp_min(torch.finfo(b.dtype).tiny).sqrt())
        u = t * (1 - t)
        denominator = s + (d1 + d0 - 2 * s) * u
        logdet = self.log_slope(s, t, u, d0, d1, denominator)
        z = x0 + t * width
        return torch.where(inside, z, x), -torch.where(inside, logdet, 0.0).sum(-1)

    @staticmethod
    def log_slope(s: Tensor, t: Tensor, u: Tensor, d0: Tensor, d1: Tensor, denominator: Tensor) -> Tensor:
        slope = d1 * t * t + 2 * s * u + d0 * (1 - t) ** 2
        return 2 * s.log() + slope.log() - 2 * denominator.log()


def rational_quadratic(bins: int = 8, bound: float = 5.0) -> Univariate:
    """The rational-quadratic univariate of ``bins`` pieces on [−bound, bound]."""
    return Univariate(3 * bins - 1, partial(RationalQuadratic, bound=bound))
