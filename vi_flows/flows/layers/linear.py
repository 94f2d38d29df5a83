"""Affine bijections: permutation, lower-triangular (whitening, full covariance) and LU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra import diagonal_scale, matvec, solve_triangular
from ..bijection import Bijection


class Permutation(Bijection):
    """x_i = z_{index_i}; log|det| = 0."""

    def __init__(self, index: Tensor):
        self.index = index

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z.index_select(-1, self.index), z.new_zeros(z.shape[:-1])

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.index.argsort()), x.new_zeros(x.shape[:-1])

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.forward_and_logdet(z), score.index_select(-1, self.index)


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

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score = solve_triangular(self.scale_tril.detach().mT, score, upper=True)
        return *self.forward_and_logdet(z), score


class FullAffine(LowerTriangular):
    """:class:`LowerTriangular` from one raw matrix: L = strictly lower(matrix)/√D + diag exp(bounded(diagonal))."""

    @staticmethod
    def start(dim: int) -> dict[str, Tensor]:
        return {"shift": torch.zeros(dim), "matrix": torch.zeros(dim, dim)}

    def __init__(self, shift: Tensor, matrix: Tensor):
        super().__init__(shift, matrix.tril(-1) * matrix.shape[-1] ** -0.5 + diagonal_scale(matrix)[0])


class LU(Bijection):
    """x = L U z + shift, L unit lower and U upper triangular; log|det| = Σ log U_ii (Kingma & Dhariwal 2018, sec. 3.2).

    One raw matrix holds both: its strict triangles, over √D, and the diagonal of U as exp(bounded(diagonal)).
    """

    @staticmethod
    def start(dim: int) -> dict[str, Tensor]:
        return {"shift": torch.zeros(dim), "matrix": torch.zeros(dim, dim)}

    def __init__(self, shift: Tensor, matrix: Tensor):
        diagonal, self.logdet = diagonal_scale(matrix)
        triangles = matrix * matrix.shape[-1] ** -0.5
        self.shift = shift
        self.lower = triangles.tril(-1) + torch.eye(shift.shape[-1], dtype=shift.dtype, device=shift.device)
        self.upper = triangles.triu(1) + diagonal

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = matvec(self.lower @ self.upper, z) + self.shift
        return x, self.logdet.expand(x.shape[:-1])

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = solve_triangular(self.lower, x - self.shift, upper=False, unitriangular=True)
        z = solve_triangular(self.upper, z, upper=True)
        return z, -self.logdet.expand(z.shape[:-1])

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score = solve_triangular(self.upper.detach().mT, score, upper=False)
        score = solve_triangular(self.lower.detach().mT, score, upper=True, unitriangular=True)
        return *self.forward_and_logdet(z), score
