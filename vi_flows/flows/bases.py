"""Base distributions: noise that depends on no parameter, and a differentiable transform of it to z."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Size, Tensor, nn


class Base(nn.Module, ABC):
    """A distribution of z on R^dim, drawn as ``transform(noise(shape))`` so that a step is pure in its noise."""

    def __init__(self, dim: int):
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim: expected a positive integer, got {dim!r}")
        self.dim = dim
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # says the dtype and device to draw in

    @abstractmethod
    def noise(self, shape: Size | tuple[int, ...]) -> Tensor:
        """Parameter-free noise (\\*shape, k) from the global generator."""

    def transform(self, noise: Tensor) -> Tensor:
        """noise (\\*shape, k) -> z (\\*shape, dim); the noise itself unless the base has parameters."""
        return noise

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log density of z (\\*batch, dim) -> (\\*batch)."""


class StandardNormal(Base):
    """N(0, I)."""

    def noise(self, shape: Size | tuple[int, ...]) -> Tensor:
        return torch.randn(*shape, self.dim, dtype=self.anchor.dtype, device=self.anchor.device)

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z * z).sum(-1) - 0.5 * self.dim * math.log(2 * math.pi)


class StudentT(Base):
    """The multivariate t of ``df`` degrees of freedom, location 0 and scale matrix I: z = ε √(df/χ²)."""

    def __init__(self, dim: int, df: float = 4.0):
        super().__init__(dim)
        if not df > 0:
            raise ValueError(f"df: expected a positive number of degrees of freedom, got {df!r}")
        self.df = float(df)

    def noise(self, shape: Size | tuple[int, ...]) -> Tensor:
        like = self.anchor
        normal = torch.randn(*shape, self.dim, dtype=like.dtype, device=like.device)
        half = torch.full((*shape, 1), self.df / 2, dtype=like.dtype, device=like.device)
        return normal * (half / torch._standard_gamma(half)).sqrt()

    def log_prob(self, z: Tensor) -> Tensor:
        half = (self.df + self.dim) / 2
        constant = math.lgamma(half) - math.lgamma(self.df / 2) - 0.5 * self.dim * math.log(self.df * math.pi)
        return constant - half * torch.log1p((z * z).sum(-1) / self.df)


class GaussianMixture(Base):
    """Σ_k w_k N(loc_k, diag(scale_k²)) with fixed weights; the locations and scales are parameters.

    Noise is [ε, one-hot component]; components are stratified over the draws, so that each has its share ± 1.

    Parameters
    ----------
    loc: (K, dim). scale: positive, broadcast to (K, dim). weights: (K,), positive; None for equal ones.
    """

    def __init__(self, loc: Tensor, scale: Tensor | float = 1.0, weights: Tensor | None = None):
        if loc.dim() != 2:
            raise ValueError(f"loc: expected shape (components, dim), got {tuple(loc.shape)}; add a leading axis")
        super().__init__(loc.shape[1])
        scale = torch.as_tensor(scale, dtype=loc.dtype).expand(loc.shape)
        weights = (
            torch.ones(len(loc), dtype=loc.dtype) if weights is None else torch.as_tensor(weights, dtype=loc.dtype)
        )
        if weights.shape != loc.shape[:1] or not (weights > 0).all():
            raise ValueError(f"weights: expected {len(loc)} positive numbers, got {weights.tolist()}")
        if not (scale > 0).all():
            raise ValueError("scale: expected positive numbers only; take the standard deviation, not its logarithm")
        self.loc, self.log_scale = nn.Parameter(loc.clone()), nn.Parameter(scale.log())
        self.register_buffer("weights", weights / weights.sum())

    def noise(self, shape: Size | tuple[int, ...]) -> Tensor:
        shape = Size(shape)
        like = {"dtype": self.loc.dtype, "device": self.loc.device}
        n = shape.numel()
        u = (torch.arange(n, **like) + torch.rand((), **like)) / max(n, 1)
        index = torch.searchsorted(self.weights.cumsum(0)[:-1].contiguous(), u)[torch.randperm(n, device=u.device)]
        one_hot = torch.nn.functional.one_hot(index.reshape(shape), len(self.weights)).to(u.dtype)
        return torch.cat([torch.randn(*shape, self.dim, **like), one_hot], -1)

    def transform(self, noise: Tensor) -> Tensor:
        epsilon, one_hot = noise[..., : self.dim], noise[..., self.dim :]
        return one_hot @ self.loc + (one_hot @ self.log_scale.exp()) * epsilon

    def log_prob(self, z: Tensor) -> Tensor:
        standard = (z.unsqueeze(-2) - self.loc) * (-self.log_scale).exp()
        each = -0.5 * (standard * standard).sum(-1) - self.log_scale.sum(-1) + self.weights.log()
        return each.logsumexp(-1) - 0.5 * self.dim * math.log(2 * math.pi)
