"""Affine bijections: permutation, lower-triangular (whitening, full covariance) and LU."""

from __future__ import annotations

import torch
from torch import Tensor

from .bijection import Bijection

LOG_SCALE_BOUND = 10.0


def bounded(raw: Tensor, bound: float) -> Tensor:
    """bound · tanh(raw/bound): the identity near 0, within ±bound everywhere."""
    return bound * torch.tanh(raw / bound)


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix (\\*batch, m, n) times vector (\\*batch, n): one matrix product where the matrix has no batch."""
    if matrix.dim() == 2:
        return vector @ matrix.mT
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def solve_triangular(matrix: Tensor, vector: Tensor, upper: bool, unitriangular: bool = False) -> Tensor:
    """matrix⁻¹ vector for a triangular matrix, shapes as in :func:`matvec`."""
    if matrix.dim() == 2:
        return torch.linalg.solve_triangular(
            matrix.mT, vector.reshape(-1, vector.shape[-1]), upper=not upper, left=False, unitriangular=unitriangular
        ).reshape(vector.shape)
    return torch.linalg.solve_triangular(
        matrix, vector.unsqueeze(-1), upper=upper, unitriangular=unitriangular
    ).squeeze(-1)


class Permutation(Bijection):
    """x_i = z_{index_i}; log|det| = 0."""

    def __init__(self, index: Tensor):
        self.index = index

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z[..., self.index], z.new_zeros(z.shape[:-1])

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., self.index.argsort()], x.new_zeros(x.shape[:-1])


class LowerTriangular(Bijection):
    """x = L z + shift with L lower triangular of positive diagonal; log|det| = Σ log L_ii.

    Over a standard normal base this is the Gaussian of full covariance L Lᵀ.
    """

    def __init__(self, shift: Tensor, scale_tril: Tensor):
        self.shift, self.scale_tril = shift, scale_tril

    def logdet(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = matvec(self.scale_tril, z) + self.shift
        return x, self.logdet().expand(x.shape[:-1])

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = solve_triangular(self.scale_tril, x - self.shift, upper=False)
        return z, -self.logdet().expand(z.shape[:-1])


class FullAffine(LowerTriangular):
    """:class:`LowerTriangular` from raw tensors: L = strictly lower(raw)/√D + diag exp(bounded(log_diagonal))."""

    @staticmethod
    def start(dim: int) -> dict[str, Tensor]:
        return {"shift": torch.zeros(dim), "lower": torch.zeros(dim, dim), "log_diagonal": torch.zeros(dim)}

    def __init__(self, shift: Tensor, lower: Tensor, log_diagonal: Tensor):
        diagonal = bounded(log_diagonal, LOG_SCALE_BOUND).exp()
        super().__init__(shift, lower.tril(-1) * lower.shape[-1] ** -0.5 + torch.diag_embed(diagonal))


class LU(Bijection):
    """x = L U z + shift, L unit lower and U upper triangular; log|det| = Σ log U_ii (Kingma & Dhariwal 2018, sec. 3.2).

    The strict triangles of one raw matrix, over √D, hold L and U; the diagonal of U is exp(bounded(log_diagonal)).
    """

    @staticmethod
    def start(dim: int) -> dict[str, Tensor]:
        return {"shift": torch.zeros(dim), "triangles": torch.zeros(dim, dim), "log_diagonal": torch.zeros(dim)}

    def __init__(self, shift: Tensor, triangles: Tensor, log_diagonal: Tensor):
        log_diagonal = bounded(log_diagonal, LOG_SCALE_BOUND)
        identity = torch.eye(shift.shape[-1], dtype=shift.dtype, device=shift.device)
        triangles = triangles * shift.shape[-1] ** -0.5
        self.shift = shift
        self.lower = triangles.tril(-1) + identity
        self.upper = triangles.triu(1) + torch.diag_embed(log_diagonal.exp())
        self.logdet = log_diagonal.sum(-1)

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = matvec(self.lower @ self.upper, z) + self.shift
        return x, self.logdet.expand(x.shape[:-1])

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = solve_triangular(self.lower, x - self.shift, upper=False, unitriangular=True)
        z = solve_triangular(self.upper, z, upper=True)
        return z, -self.logdet.expand(z.shape[:-1])
