"""Gaussians N(loc, L Lᵀ), many at once, and their variational inference by natural gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from ...running import late
from ...targets.target import Target
from ..bounds import BETTER, SAME_MODE
from ..estimate.evaluate import log_density, value_and_grad
from ..estimate.weights import mean_elbo

PER_DIM = 4  # draws for each dimension, from where correlations are used: of fewer, a covariance is all but singular
# iterations of Gaussian VI from each optimum, and normals by which it is compared with that: BETTER nats show in few of
# either
IMPROVING, IMPROVING_NORMALS = 24, 256
# a Gaussian that reaches further is where an unbounded density ran away to: kept, its squares would overflow
EXTREME = 1e100


class Kind(str, Enum):
    """What a Gaussian was made from."""

    STANDARD = "the standard normal"
    PATH = "a Pathfinder path"
    END = "the end of a path"
    LAPLACE = "Laplace"
    FRESH = "a further start"
    ADAPTED = "the adapted mixture"
    DRAW = "a draw"
    DRAWS = "draws"
    FLOW = "the moments of q"
    GUIDE = "the guide"
    NEWTON = "Newton's method over the few"
    FEW = "weighted draws of the few"
    STRUCTURED = "scales outside, Gaussian inside"


class Origin(NamedTuple):
    """Where a Gaussian came from, and how often Gaussian VI has refined it since."""

    kind: Kind
    refined: int = 0

    def __str__(self) -> str:
        return "Gaussian VI from " * self.refined + self.kind.value


@dataclass(frozen=True, eq=False)
class Gaussians:
    """K Gaussians: loc (K, dim), scale_tril (K, dim, dim), and where each came from."""

    loc: Tensor
    scale_tril: Tensor
    origin: tuple[Origin, ...]

    def __len__(self) -> int:
        return len(self.loc)

    def pick(self, index: list[int]) -> Gaussians:
        return Gaussians(self.loc[index], self.scale_tril[index], tuple(self.origin[i] for i in index))

    def refined(self) -> Gaussians:
        """The same, said to come from Gaussian VI."""
        return Gaussians(self.loc, self.scale_tril, tuple(Origin(o.kind, o.refined + 1) for o in self.origin))

    def at(self, epsilon: Tensor) -> Tensor:
        """loc + L ε for standard normal ε (n, dim) -> (n, K, dim)."""
        return self.loc + torch.einsum("kij,nj->nki", self.scale_tril, epsilon)

    def logdet(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def distance(self, x: Tensor) -> Tensor:
        """Root mean square of L⁻¹(x − loc), for one x (dim,), to each (K,)."""
        offset = (x - self.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.scale_tril, offset, upper=False).square().mean((-2, -1)).sqrt()

    def log_weights(self, target: Target, epsilon: Tensor) -> Tensor:
        """log p − log q of each (n, K), over the same ε (n, dim) for all; −inf where log p is not a number."""
        x = self.at(epsilon)
        log_p = log_density(target, x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1])
        log_base = -0.5 * (epsilon * epsilon).sum(-1, keepdim=True) - 0.5 * x.shape[-1] * math.log(2 * math.pi)
        return log_p - log_base + self.logdet()

    def elbo(self, target: Target, epsilon: Tensor) -> Tensor:
        """E[log p − log q] of each (K,), kept to the support of p as in :func:`mean_elbo`."""
        return torch.tensor([mean_elbo(log_w) for log_w in self.log_weights(target, epsilon).unbind(1)]).to(epsilon)


def join(parts: list[Gaussians]) -> Gaussians:
    parts = [p for p in parts if len(p)] or parts[:1]
    origin = tuple(o for p in parts for o in p.origin)
    return Gaussians(torch.cat([p.loc for p in parts]), torch.cat([p.scale_tril for p in parts]), origin)


def from_covariance(loc: Tensor, covariance: Tensor, kind: Kind) -> tuple[Gaussians, Tensor]:
    """Those of the K Gaussians whose covariance (K, dim, dim) is finite and positive definite, and their indices."""
    tril, good = _factor(covariance)
    index = (good & usable(loc, tril)).nonzero()[:, 0]
    return Gaussians(loc[index], tril[index], (Origin(kind),) * len(index)), index


def spread_of(z: Tensor) -> Gaussians:
    """The Gaussian with the moments of draws z (N, dim), or none; without correlations where draws are too few."""
    few = len(z) < PER_DIM * z.shape[1]
    covariance = torch.diag(z.var(0)) if few else torch.atleast_2d(torch.cov(z.mT))
    return from_covariance(z.mean(0)[None], covariance[None], Kind.DRAWS)[0]


def from_precision(loc: Tensor, precision: Tensor, kind: Kind) -> tuple[Gaussians, Tensor]:
    """As :func:`from_covariance`, from precisions: the Laplace approximation at optima."""
    tril, good = _factor(precision)
    index = good.nonzero()[:, 0]
    some, kept = from_covariance(loc[index], torch.cholesky_inverse(tril[index]), kind)
    return some, index[kept]


def scale_of(covariance: Tensor) -> Tensor:
    """The Cholesky factor (dim, dim) of a covariance; that of its diagonal where rounding left it not positive."""
    tril, good = _factor(covariance[None])
    return tril[0] if bool(good) else torch.diag(covariance.diagonal().clamp_min(1e-300).sqrt())


def usable(loc: Tensor, tril: Tensor) -> Tensor:
    """Which of the K Gaussians (K,) lie, with their draws, in the range of floating point."""
    return (loc.abs() < EXTREME).all(-1) & (tril.abs() < EXTREME).all(-1).all(-1)


def _factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors (K, dim, dim) and which are good; by way of the correlations, whatever the scaling."""
    finite = matrix.isfinite().all(-1).all(-1)
    scale = matrix.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    standard = torch.where(finite[:, None, None], matrix / scale[:, :, None] / scale[:, None, :], 0.0)
    tril, info = torch.linalg.cholesky_ex(standard)
    return scale[:, :, None] * tril, finite & (info == 0)


def distinct(gaussians: Gaussians, score: Tensor, limit: int) -> list[int]:
    """Indices by falling score, without those whose centre is close to a better one in that one's metric."""
    kept: list[int] = []
    for i in score.argsort(descending=True).tolist():
        if len(kept) == limit or score[i] == -torch.inf:
            break
        if not kept or float(gaussians.pick(kept).distance(gaussians.loc[i]).amin()) > SAME_MODE:
            kept.append(i)
    return kept


def clipped(residual: Tensor) -> Tensor:
    """Residuals of draws (n, ..., dim), at most ten times as long as the median one: single draws may lie in a wall."""
    size = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
    return residual * (10 * size.median(0).values / size.clamp_min(1e-300)).clamp_max(1.0)


def gaussian_vi(target: Target, start: Gaussians, iterations: int, draws: int = 128) -> Gaussians:
    """Maximise the ELBO over all Gaussians, from each of K starts at once (Khan & Nielsen 2018, whitened).

    In the whitened frame x = loc + L ε, with g = Lᵀ∇log p(x), the residual r = g + ε is 0 for a Gaussian target of
    this very shape. Its moments are the natural gradient: precision ← I − ρ sym E[r εᵀ], loc ← loc + ρ L P⁻¹ E[r].
    Residuals are clipped at ten times their median norm, and a step moves no eigenvalue by more than a factor of 2.
    The rate decays as 1/k in the last three quarters, which averages the iterates. What runs away stays as it began.
    """
    loc, tril = start.loc, start.scale_tril
    dim = loc.shape[-1]
    draws = max(draws, 2 * dim)
    for k in range(iterations):
        if late():
            break
        rate = 1 / (2 + max(k - iterations // 4, 0) / 4)
        epsilon = torch.randn(draws // 2, dim, dtype=loc.dtype, device=loc.device)
        epsilon = torch.cat([epsilon, -epsilon])
        x = Gaussians(loc, tril, start.origin).at(epsilon)
        value, grad = value_and_grad(target, x.reshape(-1, dim))
        residual = torch.einsum("kji,nkj->nki", tril, grad.reshape(x.shape)) + epsilon[:, None]
        usual = (value > -torch.inf).reshape(x.shape[:-1])[..., None] & (residual.abs() < EXTREME)
        residual = clipped(torch.where(usual, residual, 0.0))
        curvature = torch.einsum("nki,nj->kij", residual, epsilon) / draws
        eigenvalues, vectors = torch.linalg.eigh(rate * (curvature + curvature.mT) / 2)
        precision = 1 - eigenvalues.clamp(-1.0, 0.5)
        shift = vectors @ (vectors.mT @ (rate * residual.mean(0)).unsqueeze(-1) / precision.unsqueeze(-1))
        shift = shift / torch.linalg.vector_norm(shift, dim=-2, keepdim=True).clamp_min(1.0)
        loc = loc + (tril @ shift).squeeze(-1)
        # L P⁻¹ Lᵀ = (L V P^{-1/2})(·)ᵀ, made triangular by QR
        half = tril @ vectors * precision.rsqrt().unsqueeze(-2)
        upper = torch.linalg.qr(half.mT)[1]
        tril = (upper * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).mT
    good = usable(loc, tril)[:, None]
    return Gaussians(
        torch.where(good, loc, start.loc), torch.where(good[..., None], tril, start.scale_tril), start.origin
    )


def improved(target: Target, start: Gaussians) -> tuple[Gaussians, Tensor]:
    """The starts, by their Gaussian VI where that has a better ELBO by ``BETTER``, and these ELBOs (K,).

    A start that is right as it is stays: VI would spread it over its neighbours.
    """
    if not len(start):
        return start, start.loc.new_zeros(0)
    refined = gaussian_vi(target, start, iterations=IMPROVING)
    epsilon = torch.randn(IMPROVING_NORMALS, start.loc.shape[1], dtype=start.loc.dtype, device=start.loc.device)
    before, after = start.elbo(target, epsilon), refined.elbo(target, epsilon)
    gains = after > before + BETTER
    every = join([start, refined.refined()])
    picked = [i + len(start) * int(gain) for i, gain in enumerate(gains)]
    return every.pick(picked), torch.where(gains, after, before)
