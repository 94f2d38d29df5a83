"""Base distributions: noise that depends on no parameter, and a differentiable transform of it to z."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod

import torch
from torch import Size, Tensor, nn

from ..arguments import whole

FEW_COMPONENTS = 8  # components, up to which all of them are drawn from and one is taken


class Base(nn.Module, ABC):
    """A distribution of z on R^dim, drawn as ``transform(noise(shape))`` so that a step is pure in its noise."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = whole("dim", dim)
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

    def heavy(self, df: float) -> Base:
        """A base like this one with the tails of a t of ``df`` degrees of freedom, for proposals that reach further."""
        return StudentT(self.dim, df).to(self.anchor)

    @property
    def normals(self) -> int:
        """How many columns of the noise, the first, are standard normal: by stretching these a draw moves outwards."""
        return 0


class StandardNormal(Base):
    """N(0, I)."""

    def noise(self, shape: Size | tuple[int, ...]) -> Tensor:
        return torch.randn(*shape, self.dim, dtype=self.anchor.dtype, device=self.anchor.device)

    def log_prob(self, z: Tensor) -> Tensor:
        return _log_normal((z * z).sum(-1), self.dim)

    @property
    def normals(self) -> int:
        return self.dim


class StudentT(Base):
    """The multivariate t of ``df`` degrees of freedom, location 0 and scale matrix I: z = ε √(df/χ²)."""

    def __init__(self, dim: int, df: float = 4.0):
        super().__init__(dim)
        self.df = _degrees(df)

    def noise(self, shape: Size | tuple[int, ...]) -> Tensor:
        like = {"dtype": self.anchor.dtype, "device": self.anchor.device}
        return torch.randn(*shape, self.dim, **like) * _t_factor(shape, self.df, like)

    def log_prob(self, z: Tensor) -> Tensor:
        return _log_t((z * z).sum(-1), self.dim, self.df)

    def heavy(self, df: float) -> Base:
        return StudentT(self.dim, min(df, self.df)).to(self.anchor)


class Mixture(Base):
    """Σ_k w_k N(loc_k, L_k L_kᵀ) with fixed weights, or, with ``df``, of multivariate t components.

    Trained in each component's own frame: loc_k + L_k δ_k and L_k T_k, from δ = 0 and T = I. Noise is [ε, component];
    components are stratified over the draws, so that each has its share ± 1.

    Parameters
    ----------
    loc: (K, dim). scale: positive, broadcast to (K, dim), or lower-triangular factors (K, dim, dim).
    weights: (K,), positive; None for equal ones. df: degrees of freedom; None for normal components.
    fixed: without parameters, to be drawn from and scored only: the one way to have a mixture that stays as it is.
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor | float = 1.0,
        weights: Tensor | None = None,
        df: float | None = None,
        fixed: bool = False,
    ):
        if loc.dim() != 2:
            raise ValueError(f"loc: expected shape (components, dim), got {tuple(loc.shape)}; add a leading axis")
        super().__init__(loc.shape[1])
        scale = torch.as_tensor(scale, dtype=loc.dtype)
        if scale.dim() < 3:
            scale = torch.diag_embed(scale.expand(loc.shape))
        weights = (
            torch.ones(len(loc), dtype=loc.dtype) if weights is None else torch.as_tensor(weights, dtype=loc.dtype)
        )
        if weights.shape != loc.shape[:1] or not (weights > 0).all():
            raise ValueError(f"weights: expected {len(loc)} positive numbers, got {weights.tolist()}")
        if not (scale.diagonal(dim1=-2, dim2=-1) > 0).all():
            raise ValueError("scale: expected positive numbers only; take the standard deviation, not its logarithm")
        self.df = _degrees(df) if df is not None else None
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale_tril", scale.expand(*loc.shape, self.dim).clone())
        self.register_buffer("weights", weights / weights.sum())
        self.shift = None if fixed else nn.Parameter(torch.zeros_like(loc))
        self.log_scale = None if fixed else nn.Parameter(torch.zeros_like(loc))
        self.lower = None if fixed or self.dim == 1 else nn.Parameter(torch.zeros_like(self.scale_tril))

    def components(self) -> tuple[Tensor, Tensor]:
        """Locations (K, dim) and lower-triangular factors (K, dim, dim)."""
        if self.shift is None:
            return self.loc, self.scale_tril
        own = torch.diag_embed(self.log_scale.exp())
        own = own if self.lower is None else own + self.lower.tril(-1)
        return self.loc + (self.scale_tril @ self.shift.unsqueeze(-1)).squeeze(-1), self.scale_tril @ own

    def noise(self, shape: Size | tuple[int, ...]) -> Tensor:
        shape = Size(shape)
        like = {"dtype": self.loc.dtype, "device": self.loc.device}
        n = shape.numel()
        u = (torch.arange(n, **like) + torch.rand((), **like)) / max(n, 1)
        index = torch.searchsorted(self.weights.cumsum(0)[:-1].contiguous(), u)[torch.randperm(n, device=u.device)]
        epsilon = torch.randn(*shape, self.dim, **like)
        if self.df is not None:
            epsilon = epsilon * _t_factor(shape, self.df, like)
        return torch.cat([epsilon, index.reshape(*shape, 1).to(epsilon)], -1)

    def transform(self, noise: Tensor) -> Tensor:
        epsilon, index = noise[..., : self.dim], noise[..., self.dim].long()
        loc, tril = self.components()
        if len(loc) > FEW_COMPONENTS:
            return loc[index] + (tril[index] @ epsilon.unsqueeze(-1)).squeeze(-1)
        every = torch.einsum("kij,...j->...ki", tril, epsilon) + loc  # a factor for each draw would be dim² numbers
        return every.gather(-2, index[..., None, None].expand(*index.shape, 1, self.dim)).squeeze(-2)

    def log_prob(self, z: Tensor) -> Tensor:
        return self.log_each(z).logsumexp(-1)

    def log_each(self, z: Tensor) -> Tensor:
        """log(w_k times the density of component k) of z (\\*batch, dim) -> (\\*batch, K)."""
        loc, tril = self.components()
        offset = (z.unsqueeze(-2) - loc).reshape(-1, *loc.shape).movedim(0, -1)
        standard = torch.linalg.solve_triangular(tril, offset, upper=False)
        square = standard.square().sum(-2).mT.reshape(*z.shape[:-1], len(loc))
        each = _log_normal(square, self.dim) if self.df is None else _log_t(square, self.dim, self.df)
        return each - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + self.weights.log()

    def heavy(self, df: float) -> Base:
        heavier = copy.deepcopy(self)
        heavier.df = min(df, self.df or df)
        return heavier

    @property
    def normals(self) -> int:
        return self.dim if self.df is None else 0


def _degrees(df: float) -> float:
    if not df > 0:
        raise ValueError(f"df: expected a positive number of degrees of freedom, got {df!r}")
    return float(df)


def _t_factor(shape: Size | tuple[int, ...], df: float, like: dict) -> Tensor:
    """√(df/χ²) (\\*shape, 1), which makes normal noise multivariate t."""
    half = torch.full((*shape, 1), df / 2, **like)
    return (half / torch._standard_gamma(half)).sqrt()


def _log_normal(square: Tensor, dim: int) -> Tensor:
    """log N(z; 0, I) from ‖z‖²."""
    return -0.5 * square - 0.5 * dim * math.log(2 * math.pi)


def _log_t(square: Tensor, dim: int, df: float) -> Tensor:
    """log t_df(z; 0, I) from ‖z‖²."""
    half = (df + dim) / 2
    constant = math.lgamma(half) - math.lgamma(df / 2) - 0.5 * dim * math.log(df * math.pi)
    return constant - half * torch.log1p(square / df)
