"""Flows that bend space along a few directions: planar, radial, Sylvester. Each has an inverse."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..algebra import matvec, solve_triangular
from ..bijection import Bijection
from ..inversion import monotone_root, where_converged

INVERTIBLE_MARGIN = 1e-3  # from the edge of invertibility: tanh(10) · tanh(−10) is −1 in float32


def above_minus_one(raw: Tensor) -> Tensor:
    """softplus(raw + log(e^{1−ε} − 1)) − (1 − ε): increasing, 0 at 0, and greater than −1 + ε."""
    top = 1 - INVERTIBLE_MARGIN
    return softplus(raw + math.log(math.expm1(top))) - top


class TanhRecurrence(torch.autograd.Function):
    """h_k = tanh(s_k + Σ_{j<k} g_kj h_j) for k = 1..K: s (K, \\*batch), g (K, K, \\*batch or ones) -> h.

    The gradient is the same recurrence run backwards, a_k = (1 − h_k²) (dh_k + Σ_{j>k} g_jk a_j), ds = a, dg = a hᵀ
    (g is taken to be strictly lower): written out because autograd takes several small steps for each of these.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, g: Tensor) -> Tensor:
        h = []
        for k, column in enumerate(g.unbind(1)):
            h.append(torch.tanh(s[k]))
            s = torch.addcmul(s, column, h[k])  # rows up to k are not read again: slicing them off costs more
        return torch.stack(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        g, h = ctx.saved_tensors
        slope, row, a = (1 - h * h).unbind(), g.unbind(), []
        for k in reversed(range(len(h))):
            a.append(slope[k] * dh[k])
            dh = torch.addcmul(dh, row[k], a[-1])
        ds = torch.stack(a[::-1])
        if g.numel() == len(h) ** 2:
            return ds, (ds.reshape(len(h), -1) @ h.reshape(len(h), -1).mT).view(g.shape)
        return ds, (ds.unsqueeze(1) * h).sum_to_size(g.shape)


class Planar(Bijection):
    """K layers x = z + û tanh(wᵀz + b); log|det| = Σ log(1 + (1 − tanh²) wᵀû) (Rezende & Mohamed 2015, eqs. 10-12).

    û = u + (m(wᵀu) − wᵀu) w/‖w‖² with m > −1 and m(0) = 0, so the map is invertible, and the identity at u = 0.
    All layers together move z by Σ û_k h_k, and w_k sees of this only the numbers g_kj = w_kᵀû_j: W z is computed once,
    h_k = tanh(w_kᵀz + b_k + Σ_{j<k} g_kj h_j) is a recurrence of scalars, and Û takes h back.
    The inverse solves a + g_kk tanh(a + b_k) = w_kᵀx − Σ_{j>k} g_kj h_j for a, from the last layer to the first.
    """

    @staticmethod
    def start(dim: int, layers: int) -> dict[str, Tensor]:
        w = torch.randn(layers, dim)
        return {
            "u": torch.zeros(layers, dim),
            "w": w / torch.linalg.vector_norm(w, dim=-1, keepdim=True),
            "b": torch.zeros(layers),
        }

    def __init__(self, u: Tensor, w: Tensor, b: Tensor, layers: int):
        self.w, self.b, self.layers = w, b, layers
        wu = (w * u).sum(-1)
        self.wu_hat = above_minus_one(wu)  # the diagonal of g, rounding apart
        square = (w * w).sum(-1).clamp_min(torch.finfo(w.dtype).tiny)
        self.u_hat = torch.addcmul(u, ((self.wu_hat - wu) / square).unsqueeze(-1), w)
        self.g = w @ self.u_hat.mT

    @staticmethod
    def leading(g: Tensor, batch_dims: int) -> Tensor:
        """(\\*batch, K, K) -> (K, K, \\*batch), with ones for batch axes that it does not have."""
        return g.reshape(*[1] * (batch_dims + 2 - g.dim()), *g.shape).movedim((-2, -1), (0, 1))

    def step_and_logdet(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Σ û_k h_k and the log-determinant of the forward map."""
        h = h.movedim(0, -1)
        log_slopes = torch.log1p(torch.addcmul(self.wu_hat, h * h, self.wu_hat, value=-1))
        return matvec(self.u_hat.mT, h), log_slopes.sum(-1)

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        s = (matvec(self.w, z) + self.b).movedim(-1, 0)
        step, logdet = self.step_and_logdet(TanhRecurrence.apply(s, self.leading(self.g.tril(-1), s.dim() - 1)))
        return z + step, logdet

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The score is s − Wᵀt with (Λ⁻¹ + triu(G)ᵀ) t = Ûᵀs + e, Λ = diag(1 − h²), e = ∂ log|det|/∂h (Woodbury)."""
        s = (matvec(self.w, z) + self.b).movedim(-1, 0)
        h = TanhRecurrence.apply(s, self.leading(self.g.tril(-1), s.dim() - 1))
        step, logdet = self.step_and_logdet(h)
        with torch.no_grad():
            h = h.movedim(0, -1)
            slope = 1 - h * h
            gain = 1 / (1 + slope * self.wu_hat)
            right = slope * gain * (matvec(self.u_hat, score) - 2 * h * self.wu_hat * gain)
            t = solve_triangular((slope * gain).unsqueeze(-1) * self.g.mT, right, upper=False, unitriangular=True)
            score = score - matvec(self.w.mT, t)
        return z + step, logdet, score

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wx = matvec(self.w, x).movedim(-1, 0)
        g, h, converged = self.leading(self.g, wx.dim() - 1), [], torch.ones_like(wx[0], dtype=torch.bool)
        for k in reversed(range(self.layers)):
            a, ok = self.solve_layer(k, wx[k])
            h.append(torch.tanh(a + self.b[..., k]))
            converged = converged & ok
            wx = torch.addcmul(wx[:k], g[:k, k], h[-1], value=-1)
        step, logdet = self.step_and_logdet(torch.stack(h[::-1]))
        return x - step, where_converged(-logdet, converged)

    def solve_layer(self, k: int, y: Tensor) -> tuple[Tensor, Tensor]:
        """The root a of a + g_kk tanh(a + b_k) = y."""
        b, wu_hat = self.b[..., k], self.wu_hat[..., k]

        def f(a: Tensor) -> tuple[Tensor, Tensor]:
            tanh = torch.tanh(a + b)
            return a + wu_hat * tanh, 1 + wu_hat * (1 - tanh * tanh)

        return monotone_root(f, y, y - wu_hat.abs(), y + wu_hat.abs(), start=-b)


class Radial(Bijection):
    """x = z + β h (z − z₀), h = 1/(α + r), r = ‖z − z₀‖ (Rezende & Mohamed 2015, eq. 14).

    log|det| = (D − 1) log(1 + βh) + log(1 + βh − βrh²), α > 0 and β > −α. The inverse is the positive root of
    r² + (α + β − ρ) r − αρ = 0 with ρ = ‖x − z₀‖.
    """

    @staticmethod
    def start(dim: int) -> dict[str, Tensor]:
        return {"centre": torch.zeros(dim), "alpha": torch.full((), math.log(math.expm1(1))), "beta": torch.zeros(())}

    def __init__(self, centre: Tensor, alpha: Tensor, beta: Tensor):
        self.centre = centre
        self.alpha = INVERTIBLE_MARGIN + softplus(alpha)
        self.beta = self.alpha * above_minus_one(beta)

    def logdet(self, r: Tensor, dim: int) -> Tensor:
        beta_h = self.beta / (self.alpha + r)
        return (dim - 1) * torch.log1p(beta_h) + torch.log1p(beta_h * self.alpha / (self.alpha + r))

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        offset = z - self.centre
        r = torch.linalg.vector_norm(offset, dim=-1)
        x = z + (self.beta / (self.alpha + r)).unsqueeze(-1) * offset
        return x, self.logdet(r, z.shape[-1])

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """J is symmetric: its slope is 1 + βh − βrh² = 1 + αβh² along z − z₀ and 1 + βh across (Sherman & Morrison)."""
        with torch.no_grad():
            offset = z - self.centre
            r = torch.linalg.vector_norm(offset, dim=-1).clamp_min(torch.finfo(z.dtype).tiny)
            h = 1 / (self.alpha + r)
            bh = self.beta * h
            across, along = 1 + bh, 1 + bh * h * self.alpha
            logdet_slope = -bh * h * ((z.shape[-1] - 1) / across + 2 * h * self.alpha / along)
            radial = (bh * h * (offset * score).sum(-1) / across - logdet_slope) / along
            score = score / across.unsqueeze(-1) + radial.unsqueeze(-1) * (offset / r.unsqueeze(-1))
        return *self.forward_and_logdet(z), score

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        offset = x - self.centre
        rho = torch.linalg.vector_norm(offset, dim=-1)
        b = self.alpha + self.beta - rho
        root = (b * b + 4 * self.alpha * rho).sqrt()
        r = torch.where(b > 0, 2 * self.alpha * rho / (b.clamp_min(0) + root), (root - b) / 2)
        z = self.centre + offset / (1 + self.beta / (self.alpha + r)).unsqueeze(-1)
        return z, -self.logdet(r, x.shape[-1])


class Sylvester(Bijection):
    """x = z + Q R₁ tanh(R₂ Qᵀz + b), Q (D × M) orthonormal, R upper triangular (van den Berg et al. 2018, eq. 13).

    log|det| = Σ log(1 + tanh' r₁ᵢᵢ r₂ᵢᵢ), the diagonals bounded by 1 − ε so that r₁ᵢᵢ r₂ᵢᵢ > −1. One raw matrix
    holds both strict triangles, over √M, and r₁'s diagonal. The inverse finds v = Qᵀz from Qᵀx by back-substitution, a
    scalar root for each row.
    Subclasses say what Q is by :meth:`down` (Qᵀ·) and :meth:`up` (Q·).
    """

    @staticmethod
    def start(dim: int, rank: int) -> dict[str, Tensor]:
        return {
            "matrix": torch.zeros(rank, rank),
            "diagonal": torch.ones(rank),
            "b": torch.zeros(rank),
        }

    def __init__(self, matrix: Tensor, diagonal: Tensor, b: Tensor):
        self.d1 = (1 - INVERTIBLE_MARGIN) * torch.tanh(matrix.diagonal(dim1=-2, dim2=-1))
        self.d2 = (1 - INVERTIBLE_MARGIN) * torch.tanh(diagonal)
        triangles = matrix * matrix.shape[-1] ** -0.5
        self.r1 = triangles.triu(1) + torch.diag_embed(self.d1)
        self.r2 = triangles.mT.triu(1) + torch.diag_embed(self.d2)
        self.b = b

    @abstractmethod
    def down(self, z: Tensor) -> Tensor:
        """Qᵀz, (\\*batch, dim) -> (\\*batch, rank)."""

    @abstractmethod
    def up(self, v: Tensor) -> Tensor:
        """Q v, (\\*batch, rank) -> (\\*batch, dim)."""

    def hidden(self, v: Tensor) -> Tensor:
        """tanh(R₂ v + b) at v = Qᵀz."""
        return torch.tanh(matvec(self.r2, v) + self.b)

    def step_and_logdet(self, tanh: Tensor) -> tuple[Tensor, Tensor]:
        """R₁ tanh, and the log-determinant."""
        return matvec(self.r1, tanh), torch.log1p((1 - tanh * tanh) * (self.d1 * self.d2)).sum(-1)

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        step, logdet = self.step_and_logdet(self.hidden(self.down(z)))
        return z + self.up(step), logdet

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The score is s + Q (t − Qᵀs) with (I + R₂ᵀ Λ R₁ᵀ) t = Qᵀs − R₂ᵀ e, Λ = diag(1 − tanh²) (Woodbury)."""
        tanh = self.hidden(self.down(z))
        step, logdet = self.step_and_logdet(tanh)
        with torch.no_grad():
            slope, diagonal = 1 - tanh * tanh, self.d1 * self.d2
            e = -2 * tanh * slope * diagonal / (1 + slope * diagonal)  # ∂ log|det|/∂(R₂ v + b)
            down = self.down(score)
            lower = (self.r2.mT * slope.unsqueeze(-2)) @ self.r1.mT
            lower = lower + torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
            t = solve_triangular(lower, down - matvec(self.r2.mT, e), upper=False)
            score = score + self.up(t - down)
        return z + self.up(step), logdet, score

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v, converged = self.back_substitute(self.down(x))
        step, logdet = self.step_and_logdet(self.hidden(v))
        return x - self.up(step), where_converged(-logdet, converged)

    def back_substitute(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Solve v + R₁ tanh(R₂ v + b) = y, from the last row up."""
        rank = y.shape[-1]
        shape = torch.broadcast_shapes(y.shape, self.b.shape)
        inner, outer = self.b.expand(shape), y.expand(shape)  # what the rows solved so far leave of R₂ v + b and of y
        v, converged = [], torch.ones(shape[:-1], dtype=torch.bool, device=y.device)
        for i in reversed(range(rank)):
            root, ok = self.solve_row(i, inner[..., i], outer[..., i])
            tanh = torch.tanh(inner[..., i] + self.d2[..., i] * root)
            v.append(root)
            converged = converged & ok
            inner = inner[..., :i] + self.r2[..., :i, i] * root.unsqueeze(-1)
            outer = outer[..., :i] - self.r1[..., :i, i] * tanh.unsqueeze(-1)
        return torch.stack(v[::-1], -1), converged

    def solve_row(self, i: int, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        """The scalar root v of v + d₁ tanh(d₂ v + inner) = outer."""
        d1, d2 = self.d1[..., i], self.d2[..., i]

        def f(v: Tensor) -> tuple[Tensor, Tensor]:
            tanh = torch.tanh(d2 * v + inner)
            return v + d1 * tanh, 1 + d1 * d2 * (1 - tanh * tanh)

        inflection = -inner * d2 / (d2 * d2).clamp_min(torch.finfo(d2.dtype).tiny)
        return monotone_root(f, outer, outer - d1.abs(), outer + d1.abs(), start=inflection)


class OrthogonalSylvester(Sylvester):
    """Q from the QR decomposition of a raw D × M matrix, the signs fixed so that R has a positive diagonal."""

    @staticmethod
    def start(dim: int, rank: int) -> dict[str, Tensor]:
        return {"q": torch.linalg.qr(torch.randn(dim, rank))[0], **Sylvester.start(dim, rank)}

    def __init__(self, q: Tensor, matrix: Tensor, diagonal: Tensor, b: Tensor, rank: int):
        super().__init__(matrix, diagonal, b)
        orthonormal, r = torch.linalg.qr(q)
        self.q = orthonormal * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # continuous in q

    def down(self, z: Tensor) -> Tensor:
        return matvec(self.q.mT, z)

    def up(self, v: Tensor) -> Tensor:
        return matvec(self.q, v)


class HouseholderSylvester(Sylvester):
    """Q is the first M columns of a product of Householder reflections I − 2 vvᵀ/‖v‖², applied to vectors."""

    @staticmethod
    def start(dim: int, rank: int, reflections: int) -> dict[str, Tensor]:
        return {"v": torch.randn(reflections, dim), **Sylvester.start(dim, rank)}

    def __init__(self, v: Tensor, matrix: Tensor, diagonal: Tensor, b: Tensor, rank: int, reflections: int):
        super().__init__(matrix, diagonal, b)
        self.unit = (v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)).unbind(-2)
        self.rank = rank

    def down(self, z: Tensor) -> Tensor:
        for unit in self.unit:
            z = z - 2 * (z * unit).sum(-1, keepdim=True) * unit
        return z[..., : self.rank]

    def up(self, v: Tensor) -> Tensor:
        z = torch.nn.functional.pad(v, (0, self.unit[0].shape[-1] - self.rank))
        for unit in reversed(self.unit):
            z = z - 2 * (z * unit).sum(-1, keepdim=True) * unit
        return z


class TriangularSylvester(Sylvester):
    """Q is the identity, or the reversal of coordinates (alternate the two from layer to layer)."""

    @staticmethod
    def start(dim: int, rank: int, reverse: bool) -> dict[str, Tensor]:
        return Sylvester.start(dim, rank)

    def __init__(self, matrix: Tensor, diagonal: Tensor, b: Tensor, rank: int, reverse: bool = False):
        super().__init__(matrix, diagonal, b)
        self.reverse = reverse

    def down(self, z: Tensor) -> Tensor:
        return z.flip(-1) if self.reverse else z

    up = down
