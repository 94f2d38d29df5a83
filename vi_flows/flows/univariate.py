"""Elementwise bijections whose raw parameters come as one tensor (\\*batch, count, dim); raw = 0 is the identity."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .bijection import Bijection, Compose
from .linear import LOG_SCALE_BOUND, bounded


class Univariate(NamedTuple):
    """What a conditioner needs to know: raw numbers per coordinate, and the bijection that they make."""

    count: int
    build: Callable[[Tensor], Bijection]

    def start(self, dim: int) -> dict[str, Tensor]:
        return {"raw": torch.zeros(self.count, dim)}

    def __call__(self, raw: Tensor) -> Bijection:
        return self.build(raw)


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


def chain(*univariates: Univariate) -> Univariate:
    """The univariates one after the other, the first applied first."""
    return Univariate(sum(u.count for u in univariates), partial(_chained, univariates))


def _chained(univariates: tuple[Univariate, ...], raw: Tensor) -> Bijection:
    parts = raw.split([u.count for u in univariates], dim=-2)
    return Compose([u(part) for u, part in zip(univariates, parts, strict=True)])
