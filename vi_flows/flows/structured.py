"""A conditional Gaussian of sparse precision: many coordinates whose mean and precision follow those of few.

The many are a sparse linear recursion given the few: each is a shift, plus slopes times its few parents in a fixed
order, plus a scale times noise of its own. The Cholesky factor of the precision, with the sparsity of its symbolic
elimination, says who the parents are. Shifts, slopes and log scales are smooth functions of the few, and the noise is a
normal that is bent into a skewed or heavier one.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from ..arguments import whole
from .algebra import bounded, matvec, solve_triangular
from .bases import Base, StandardNormal, StudentT
from .bijection import Bijection, Layer, LeadingLayers, pulled_back
from .distribution import Flow
from .recipes import spline
from .recursion import Graph, taken

FEATURE_REACH = 3.0  # sd of the few, from where polynomials in them stay as they are: left alone they would run away
BOWL = (1.3545, 0.4065)  # mean and sd of √(1 + t²) under t ~ N(0, 1)
FEW_DF = 8.0  # of the few's base: log scales have exponential tails toward 0, which a normal's draws never reach
SPLINES = 4  # couplings over the few
LEAN, BEND = 1.0, 0.4  # bounds of the skewness and of the log of the tail's power in g
RATE = 0.2  # by which coefficients are multiplied: Adam moves all of them at one rate, and they are many
LOG_SCALE = 8.0  # bound of log s, in the coordinate's own unit: what a training step gone wrong may reach


class LeadingTails(StandardNormal):
    """N(0, I), whose heavier likeness has a t for its first ``count`` coordinates only.

    A t of hundreds of dimensions has hardly a draw where the normal has its own: all radii scale together.
    over: layers over the first coordinates alone, which the heavier likeness is not bent by: it is the law whose image
    under them is that t. Far out, where training has seen no draw, they may go anywhere.
    """

    def __init__(self, dim: int, count: int, df: float | None = None, over: LeadingLayers | None = None):
        super().__init__(dim)
        self.count, self.df = whole("count", count), df
        self.over = (over,)  # not a module of this base, but of the flow
        if self.count > dim:
            raise ValueError(f"count: expected at most dim = {dim}, got {count}")
        self.first: Base = StandardNormal(count) if df is None else StudentT(count, df)
        self.rest = StandardNormal(dim - count) if count < dim else None

    def _parts(self) -> list[Base]:
        return [self.first] if self.rest is None else [self.first, self.rest]

    def noise(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.cat([part.noise(shape) for part in self._parts()], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        if self.rest is None:
            return self.first.log_prob(z)
        return self.first.log_prob(z[..., : self.count]) + self.rest.log_prob(z[..., self.count :])

    def heavy(self, df: float) -> Base:
        plain = LeadingTails(self.dim, self.count, min(df, self.df or df)).to(self.anchor)
        return plain if self.over[0] is None else Straight(plain, self.over[0])

    @property
    def normals(self) -> int:
        return self.dim if self.df is None else 0


class Straight(Base):
    """The law of z whose image under ``over`` is ``image``."""

    def __init__(self, image: Base, over: Layer):
        super().__init__(image.dim)
        self.image, self.over = image.to(image.anchor), over
        self.to(image.anchor)

    def noise(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return self.over().inverse_and_logdet(self.image.noise(shape))[0].detach()

    def log_prob(self, z: Tensor) -> Tensor:
        t, logdet = self.over().forward_and_logdet(z)
        return self.image.log_prob(t) + logdet


def monomials(dim: int, degree: int) -> list[tuple[int, ...]]:
    """Exponents of all products of dim variables up to a total degree; the first has none."""
    every = [()]
    for k in range(1, degree + 1):
        every += list(itertools.combinations_with_replacement(range(dim), k))
    return [tuple(c.count(i) for i in range(dim)) for c in every]


class Features(nn.Module):
    """Smooth functions of t (\\*batch, d) -> twice (\\*batch, F), about orthonormal under t ~ N(0, I); the first is 1.

    The first F are products of Hermite polynomials of t bounded at FEATURE_REACH: far out they stay as they are. In the
    second F those of t and t² alone are t and √(1 + t²): far out these are linear, with a slope on either side, as the
    log of one scale is in that of another. exponents: (F, d) whole numbers, the degrees.
    """

    def __init__(self, exponents: Tensor):
        super().__init__()
        exponents = torch.as_tensor(exponents, dtype=torch.long)
        self.degree = int(exponents.max())
        width = max(int((exponents > 0).sum(-1).max()), 1)
        near, far = [], []
        for row in exponents.tolist():  # of each product its factors, as columns of the table below; column 0 is 1
            factors = [1 + i * self.degree + power - 1 for i, power in enumerate(row) if power]
            near.append(factors + [0] * (width - len(factors)))
            alone = len(factors) == 1 and sum(row) <= 2
            far.append([near[-1][0] + exponents.shape[1] * self.degree, *near[-1][1:]] if alone else near[-1])
        self.register_buffer("exponents", exponents)
        self.register_buffer("factors", torch.tensor([*near, *far], dtype=torch.long), False)

    def __len__(self) -> int:
        return len(self.exponents)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        near = bounded(t, FEATURE_REACH)
        powers = [torch.ones_like(t), near]
        for k in range(1, self.degree):  # He_{k+1} = t He_k − k He_{k−1}, each over √k!
            powers.append((near * powers[k] - math.sqrt(k) * powers[k - 1]) / math.sqrt(k + 1))
        far = [t, ((1 + t * t).sqrt() - BOWL[0]) / BOWL[1], *powers[3:]][: self.degree]
        columns = [torch.stack(each, -1).flatten(-2) for each in (powers[1 : self.degree + 1], far)]
        table = torch.cat([torch.ones_like(t[..., :1]), *columns], -1)
        found = table.index_select(-1, self.factors[:, 0])
        for k in range(1, self.factors.shape[1]):
            found = found * table.index_select(-1, self.factors[:, k])
        return found[..., : len(self)], found[..., len(self) :]


class Bent(Bijection):
    """g(z) = sinh((asinh z + a) p) − sinh(a p): skewed by a, with tails of the power p (Jones & Pewsey 2009)."""

    def __init__(self, lean: Tensor, bend: Tensor):
        self.lean, self.power = bounded(lean, LEAN), bounded(bend, BEND).exp()
        self.origin = torch.sinh(self.lean * self.power)

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, _, slope = self.bent(z)
        return x, slope.sum(-1)

    def bent(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g, sinh of the angle, and log g', each (\\*batch, n)."""
        sine = torch.sinh((torch.asinh(z) + self.lean) * self.power)
        slope = 0.5 * torch.log1p(sine * sine) + self.power.log() - 0.5 * torch.log1p(z * z)
        return sine - self.origin, sine, slope

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.origin
        z = torch.sinh(torch.asinh(x) / self.power - self.lean)
        slope = 0.5 * torch.log1p(z * z) - 0.5 * torch.log1p(x * x) - self.power.log()
        return z, slope.sum(-1)


class Structured(Bijection):
    """x from z = (t, z_1 … z_n): the few are loc + L t, the many, in their units, the recursion

        u_i = a_i + s_i c_i(t) + Σ_j (B_ij + s_i C_ij(t)) u_j + s_i g_i(z_i),

    with log s_i, c_i and C_ij linear in the features of t, those of log s in the second ones.

    Where a scale falls toward 0 so does s, and what is left, a and B, is constant: errors of c and C count in units of
    s, however small that is.
    """

    def __init__(self, layer: StructuredLayer):
        self.layer, self.graph, self.bent = layer, layer.graph, Bent(layer.lean, layer.bend)

    def _given(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The shift c, log s, and all of the slope."""
        near, far = self.layer.features(t)
        phi = RATE * near
        log_scale = bounded(RATE * far @ self.layer.log_scale, LOG_SCALE)
        slope = (phi @ self.layer.slope) * taken(log_scale.exp(), self.graph.child)
        return phi @ self.layer.shift, log_scale, self.layer.slope_at_0 + slope

    def _constant(self) -> Tensor:
        return self.layer.tril.diagonal().log().sum() + self.layer.unit.log().sum()

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet, *_ = self._forward(z)
        return x, logdet

    def _forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """x, log|det|, and what the score is made of: c + g, sinh of the angle, log g', log s, B and u in its unit."""
        few = len(self.graph.few)
        t, noise = z[..., :few], z[..., few:]
        shift, log_scale, slope = self._given(t)
        bent, sine, log_slope = self.bent.bent(noise)
        moved = shift + bent
        own = self.graph.solve(slope, self.layer.shift_at_0 + moved * log_scale.exp())
        u = self.layer.unit_loc + self.layer.unit * own
        x = torch.cat([self.layer.loc + matvec(self.layer.tril, t), u], -1).index_select(-1, self.graph.back)
        return x, (log_slope + log_scale).sum(-1) + self._constant(), moved, sine, log_slope, log_scale, slope, own

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the Bijection says. With v = J⁻ᵀ (score − ∇ log|det|) and r = (s g')⁻¹ times its argument for the many,

            v_u = (I − B)ᵀ r / unit,  v_few = L⁻ᵀ (its argument for the few − ∂/∂t rᵀ(s(t) (c(t) + g) + B(t) u)),

        c + g and u held: the recursion is not solved a second time.
        """
        x, logdet, *rest = self._forward(z)
        with torch.no_grad():
            moved, sine, log_slope, log_scale, slope, own = (part.detach() for part in rest)
            few, graph = len(self.graph.few), self.graph
            t, noise = z[..., :few].detach(), z[..., few:].detach()
            of_log_slope = self.bent.power * sine / (1 + sine * sine).sqrt() / (1 + noise * noise).sqrt()
            of_log_slope -= noise / (1 + noise * noise)
            r = (score[..., few:] - of_log_slope) * (-log_slope - log_scale).exp()
            of_many = graph.transposed(slope, r) / self.layer.unit
            of_few = score[..., :few] - self._of_few(t, r, moved, log_scale, slope, own)
            of_few = solve_triangular(self.layer.tril.mT, of_few, upper=True)
        return x, logdet, taken(torch.cat([of_few, of_many], -1), graph.back)

    def _of_few(self, t: Tensor, r: Tensor, moved: Tensor, log_scale: Tensor, slope: Tensor, own: Tensor) -> Tensor:
        """∂/∂t of Σ log s + rᵀ (s (c + g) + B u), by the gradients of c, log s and C."""
        graph, layer = self.graph, self.layer
        scaled = r * log_scale.exp()
        of_slope = taken(scaled, graph.child) * taken(own, graph.parent)  # of C
        products = taken(r, graph.child) * taken(own, graph.parent)
        of_log_scale = 1 + scaled * moved
        of_log_scale = of_log_scale.index_add(-1, graph.child, products * (slope - layer.slope_at_0))
        of_log_scale = of_log_scale * (1 - (log_scale / LOG_SCALE).square())
        of_near = RATE * (scaled @ layer.shift.mT + of_slope @ layer.slope.mT)
        of_far = RATE * of_log_scale @ layer.log_scale.mT
        with torch.enable_grad():
            held = t.requires_grad_()
            return pulled_back(layer.features(held), (of_near, of_far), held)[0]

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = solve_triangular(self.layer.tril, taken(x, self.graph.few) - self.layer.loc, upper=False)
        shift, log_scale, slope = self._given(t)
        u = (taken(x, self.graph.many) - self.layer.unit_loc) / self.layer.unit
        bent = (self.graph.residual(slope, u) - self.layer.shift_at_0) * (-log_scale).exp() - shift
        noise, logdet = self.bent.inverse_and_logdet(bent)
        return torch.cat([t, noise], -1), logdet - log_scale.sum(-1) - self._constant()


class StructuredLayer(Layer):
    """The layer of :class:`Structured`, the same for every context; it begins as u = unit_loc + unit · z.

    Parameters
    ----------
    graph, features: see there. loc (d,), tril (d, d): of the few, fixed. unit_loc, unit (n,): of the many, fixed, in
    the order of graph.many.
    """

    def __init__(self, graph: Graph, features: Features, loc: Tensor, tril: Tensor, unit_loc: Tensor, unit: Tensor):
        super().__init__()
        self.graph, self.features = graph, features
        for name, value in (("loc", loc), ("tril", tril), ("unit_loc", unit_loc), ("unit", unit)):
            self.register_buffer(name, value.clone())
        count, n, entries = len(features), len(graph.many), len(graph.child)
        shapes = {"shift": (count, n), "log_scale": (count, n), "slope": (count, entries)}
        for name, shape in (
            shapes | {"shift_at_0": (n,), "slope_at_0": (entries,), "lean": (n,), "bend": (n,)}
        ).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=loc.dtype, device=loc.device)))

    @torch.no_grad()
    def lay(self, t: Tensor, shift: Tensor, log_scale: Tensor, slope: Tensor, weight: Tensor, ridge: float) -> None:
        """Begin at the least-squares fit to a (N, n), log s (N, n) and B (N, E) at t (N, d), weighted (N,); of a and B
        in units of s. The ridge, as a share of the weights, is on all coefficients but those of 1."""
        phi, far = self.features(t)
        self.log_scale.copy_(laid(far, log_scale, weight, ridge) / RATE)
        scale = bounded(RATE * far @ self.log_scale, LOG_SCALE).exp()
        for own, at_0, value, unit in (
            (self.shift, self.shift_at_0, shift, scale),
            (self.slope, self.slope_at_0, slope, taken(scale, self.graph.child)),
        ):
            if value.shape[-1]:
                with_0 = torch.cat([phi.expand(value.shape[-1], -1, -1), 1 / unit.mT[..., None]], -1)
                found = laid(with_0, (value / unit).mT[..., None], weight, ridge)[..., 0].mT
                own.copy_(found[:-1] / RATE)
                at_0.copy_(found[-1])

    def forward(self, context: Tensor | None = None) -> Bijection:
        return Structured(self)


def laid(phi: Tensor, values: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """Coefficients (..., F, m) of features (..., N, F), the first of them 1, for values (..., N, m)."""
    weighted = phi * weight[:, None]
    size = ridge * weight.sum() * torch.ones(phi.shape[-1]).to(phi)
    size[0] = 1e-9 * weight.sum()
    return torch.linalg.solve(weighted.mT @ phi + torch.diag(size), weighted.mT @ values)


def structured(layer: StructuredLayer) -> Flow:
    """A spline flow over the few, and the layer over it; in the layer's precision."""
    few = len(layer.graph.few)
    first = spline(few, layers=SPLINES if few > 1 else 1).to(layer.loc)
    bent = LeadingLayers(first.layers, few)
    return Flow([bent, layer], LeadingTails(layer.graph.dim, few, FEW_DF, bent).to(layer.loc))


def rebuilt(state: dict[str, Tensor]) -> Flow:
    """The flow of :func:`structured` whose ``state_dict`` this is."""
    own = {name.removeprefix("layers.1."): value for name, value in state.items() if name.startswith("layers.1.")}
    graph = Graph(*(own[f"graph.{name}"] for name in ("few", "many", "child", "parent", "depth")))
    features = Features(own["features.exponents"])
    flow = structured(StructuredLayer(graph, features, *(own[name] for name in ("loc", "tril", "unit_loc", "unit"))))
    flow.load_state_dict(state)
    return flow
