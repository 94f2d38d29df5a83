"""Elementwise bijections whose raw parameters come as one tensor (\\*batch, count, dim); raw = 0 is the identity."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...arguments import whole
from ..algebra import LOG_SCALE_BOUND, bounded
from ..bijection import Bijection, Compose


class Univariate(nn.Module):
    """A family of elementwise bijections: ``count`` raw numbers for each coordinate make one.

    One with parameters of its own, which all coordinates share, is a subclass with its own :meth:`bind`. Its
    log-determinants are exact; estimates are for layers of their own.

    Parameters
    ----------
    count: raw numbers for each coordinate.
    build: raw (\\*batch, count, dim) -> the bijection; a function, which owns nothing.
    """

    def __init__(self, count: int, build: Callable[[Tensor], Bijection] | None = None):
        super().__init__()
        self.count, self.build = whole("count", count), build

    def bind(self) -> Callable[[Tensor], Bijection]:
        """The function from raw to the bijection, with the parameters as they are now, functional_call's included."""
        if self.build is None:
            raise TypeError(
                f"build: expected a function of raw numbers, got None; or {type(self).__name__} needs bind()"
            )
        return self.build

    def start(self, dim: int) -> dict[str, Tensor]:
        """The raw numbers of the identity; see :class:`Maths`."""
        return {"raw": torch.zeros(self.count, dim)}

    def forward(self, raw: Tensor) -> Bijection:
        """raw (\\*batch, count, dim) -> the bijection."""
        return self.bind()(raw)


class Affine(Bijection):
    """x = exp(s) z + t with s = bounded(raw_0), t = raw_1; log|det| = Σ s (Dinh et al. 2017; Kingma et al. 2016)."""

    def __init__(self, raw: Tensor, bound: float = LOG_SCALE_BOUND):
        log_scale, self.shift = raw.unbind(-2)
        self.log_scale = bounded(log_scale, bound)

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.addcmul(self.shift, z, self.log_scale.exp())
        return x, self.log_scale.expand(x.shape).sum(-1)

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = -self.log_scale
        z = (x - self.shift) * log_slope.exp()
        return z, log_slope.expand(z.shape).sum(-1)

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.forward_and_logdet(z), score * (-self.log_scale.detach()).exp()


def affine(bound: float = LOG_SCALE_BOUND) -> Univariate:
    """The affine univariate, its log-scale within ±bound."""
    return Univariate(2, partial(Affine, bound=bound))


class Chain(Univariate):
    """Univariates one after the other, the first applied first; each takes its own of the raw numbers."""

    def __init__(self, *univariates: Univariate):
        super().__init__(sum(u.count for u in univariates))
        self.univariates = nn.ModuleList(univariates)

    def bind(self) -> Callable[[Tensor], Bijection]:
        counts, builds = [u.count for u in self.univariates], [u.bind() for u in self.univariates]
        return lambda raw: Compose([build(part) for build, part in zip(builds, raw.split(counts, dim=-2), strict=True)])
