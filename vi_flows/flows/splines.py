"""Monotonic rational-quadratic splines with identity tails (Durkan et al. 2019)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .bijection import Bijection
from .linear import bounded
from .univariate import Univariate

LOG_BOUND = 3.0  # bins within e^±3 of one another, inner slopes within e^±3: steeper stacks cannot be inverted


class RationalQuadratic(Bijection):
    """Durkan et al. 2019, eqs. 4-8: K rational-quadratic pieces on [−bound, bound], the identity outside it.

    raw (\\*batch, 3K − 1, dim) holds K widths, K heights (softmax) and K − 1 inner slopes (exponential), all bounded.
    The slope at both edges is exactly 1, so the map is once continuously differentiable on the whole line. Inside,
    bins lead and the batch is last: (K, dim, \\*batch).
    """

    def __init__(self, raw: Tensor, bound: float):
        self.bound = bound
        exponentials = bounded(raw.movedim((-2, -1), (0, 1)), LOG_BOUND).exp()
        bins = (raw.shape[-2] + 1) // 3
        sizes, slopes = exponentials.split([2 * bins, bins - 1])
        edge = torch.ones_like(slopes[:1])
        self.slopes = torch.cat([edge, slopes, edge])
        below = torch.ones(bins + 1, bins, dtype=raw.dtype, device=raw.device).tril(-1)
        # where the bins end in x and y, (2, K + 1, dim, *batch), in units of the last: from 0 to a total
        self.ends = (below @ sizes.reshape(2, bins, -1)).view(2, bins + 1, *sizes.shape[1:])

    def bins(self, axis: int, value: Tensor) -> tuple[Tensor, ...]:
        """The bin of each value along ``axis`` (0: x, 1: y): its left x and y, width, height, slopes at both ends."""
        ends, slopes = _spread(self.ends, 2, value.shape), _spread(self.slopes, 1, value.shape)
        total = ends[:, -1]
        index = ((value / (2 * self.bound) + 0.5) * total[axis] >= ends[axis, 1:-1]).sum(0)
        both = torch.stack([index, index + 1])
        d0, d1 = slopes.gather(0, both).unbind()
        knots = 2 * self.bound * (ends.gather(1, both.expand(2, -1, *value.shape)) / total.unsqueeze(1) - 0.5)
        (x0, x1), (y0, y1) = (pair.unbind() for pair in knots.unbind())
        return x0, y0, x1 - x0, y1 - y0, d0, d1

    def inside(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """value (\\*batch, dim) in the layout (dim, \\*batch) of the knots, clamped, and where that changed nothing."""
        batch = torch.broadcast_shapes(value.shape[:-1], self.ends.shape[3:])
        value = value.expand(*batch, -1).movedim(-1, 0)
        return value.clamp(-self.bound, self.bound), value.abs() < self.bound

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        clamped, inside = self.inside(z)
        x0, y0, width, height, d0, d1 = self.bins(0, clamped)
        s, t = height / width, (clamped - x0) / width
        u = t * (1 - t)
        denominator = s + (d1 + d0 - 2 * s) * u
        x = y0 + height * (s * t * t + d0 * u) / denominator
        logdet = torch.where(inside, self.log_slope(s, t, u, d0, d1, denominator), 0.0).sum(0)
        return torch.where(inside.movedim(0, -1), x.movedim(0, -1), z), logdet

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        clamped, inside = self.inside(x)
        x0, y0, width, height, d0, d1 = self.bins(1, clamped)
        s, rise = height / width, clamped - y0
        curvature = rise * (d1 + d0 - 2 * s)
        a = height * (s - d0) + curvature
        b = height * d0 - curvature
        c = -s * rise
        t = -2 * c / (b + (b * b - 4 * a * c).clamp_min(torch.finfo(b.dtype).tiny).sqrt())
        u = t * (1 - t)
        denominator = s + (d1 + d0 - 2 * s) * u
        logdet = torch.where(inside, self.log_slope(s, t, u, d0, d1, denominator), 0.0).sum(0)
        return torch.where(inside.movedim(0, -1), (x0 + t * width).movedim(0, -1), x), -logdet

    @staticmethod
    def log_slope(s: Tensor, t: Tensor, u: Tensor, d0: Tensor, d1: Tensor, denominator: Tensor) -> Tensor:
        slope = d1 * t * t + 2 * s * u + d0 * (1 - t) ** 2
        return (slope * (s / denominator) ** 2).log()


def _spread(tensor: Tensor, lead: int, shape: torch.Size) -> Tensor:
    """(\\*lead, dim, \\*batch) expanded to (\\*lead, \\*shape) for a shape (dim, \\*more, \\*batch)."""
    missing = lead + len(shape) - tensor.dim()
    tensor = tensor.reshape(*tensor.shape[: lead + 1], *[1] * missing, *tensor.shape[lead + 1 :])
    return tensor.expand(*tensor.shape[:lead], *shape)


def rational_quadratic(bins: int = 8, bound: float = 5.0) -> Univariate:
    """The rational-quadratic univariate of ``bins`` pieces on [−bound, bound]."""
    return Univariate(3 * bins - 1, partial(RationalQuadratic, bound=bound))
