"""Scales outside, Gaussian inside: locating and the first flow where many coordinates are nearly Gaussian given few."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...flows.bases import Mixture
from ...flows.distribution import Flow
from ...flows.structured import Features, StructuredLayer, monomials, structured
from ...running import late
from ...targets.target import Target
from ..estimate.evaluate import in_blocks, log_density, value_and_grad
from ..estimate.weights import effective_sample_size, log_weights
from ..locate.ascent import bfgs_paths
from ..locate.gaussian import Gaussians, Kind, Origin, from_covariance, scale_of
from ..locate.points import start_points
from .conditional import Conditional
from .sparsity import PATTERN_STEP, curvature, influence, pattern

# at which curvature is looked at: with fewer, an entry that is 0 by chance, or a scale, is missed; each costs D
# gradients
POINTS = 6
LEAST_DIM = 30  # below which flows of all coordinates do as well: looking for the few would only cost time
INFLUENCE_MOVE = 0.3  # of each coordinate: about what a scale is known to, on the log scale
# influence of such a move, from where a coordinate belongs to the few. Chosen, not measured: higher, and a scale stays
# among the many, whose Gaussian then has no neck; lower, and MOST_FEW are found too soon
MOVES_MANY = 0.5
MOST_FEW = 8  # with more, the many are not Gaussian given these: a horseshoe's 60 local scales cost 130 s in vain
PROBES = 24  # for a precision: with 40 Laplace's approximations of an item response model took two minutes, in vain
# variance of a start's log-weights, up to which it is not laid anew: weighted draws of the few may be unlucky (varying
# slopes: 26, where other seeds have .2 to .4), and what training makes of that is refused; and how often it is laid
WELL, TRIES = 3.0, 2
MOST_ENTRIES = 45_000  # of the factor, as of 300 dense coordinates: more take memory at each of hundreds of draws
FEATURES = 36  # of polynomials in the few, at most, above degree 1: more are fitted to noise, by more solves
MOST_DEGREE = 5  # of these: higher ones run away between the points. Chosen, not measured
# of BFGS over the few, and its iterations: each evaluation solves for the many, and Newton's method does the rest; more
# starts find more modes of the few. Chosen for their time
FEW_STARTS, PATH_STEPS = 10, 40
# for each of the few, in so many rounds, of a t of so many degrees of freedom: moments of fewer are unlucky more often,
# and normal tails would leave a skew one out. Chosen, not measured
MARGINAL_DRAWS, MARGINAL_ROUNDS, MARGINAL_DF = 40, 3, 5.0
# over the few; sd over which curvature is differenced, wide enough to be that of the mass, not of its top; and of the
# longest step, for far out the quadratic promises too much
NEWTON_STEPS, DIFFERENCE_SDS, LONGEST_STEP = 12, 0.5, 4.0
# of Newton's method over the many, at most, and solutions that are remembered as starts: fewer of these cost steps
SOLVE_STEPS, REMEMBERED = 25, 2000
ETA_STEP = 1e-3  # of differences over the few. Chosen, not measured: smaller, and what solves leave open counts
# of antithetic draws of the many, at each of the few, in Gaussian VI: functions are laid through hundreds of these, so
# that noise averages out. Chosen, not measured
VI_PAIRS = 4
# times the few's sds, of the points through which functions of them are laid, in turn: a neck lies far out, where
# functions of the middle alone would run away; the middle, where most mass is, gets half of the points
LAID_SPREADS = (1.25, 1.25, 2.0, 4.0)
# power of the marginal density by which these points weigh, and their least weight: at 1 only the middle would count,
# at 0 points beyond all mass as much as it. Chosen, not measured
TEMPER, LEAST_WEIGHT = 0.25, 1e-4
RIDGE = 1e-3  # of the features' coefficients, as a share of the points: less follows noise, more flattens functions
EXTREME_SD = 1e6  # by curvature, of a unit, at most: a flat coordinate would overflow
START_DRAWS = 400  # on which a start is looked at: the quartiles of as many log-weights tell PAYS and WELL apart
FRESH_STARTS = 12  # from which other modes of the many are looked for: a basin of 22 % of starts is missed in 1 of 20


@dataclass(frozen=True, eq=False)
class FewAndMany:
    """The many given the few, and values of the few (N, d) to start from."""

    inside: Conditional
    starts: Tensor


def split(target: Target, points: Tensor) -> FewAndMany | None:
    """Which coordinates move the curvature of many, and how the others hang together; None where none do, or where the
    others' precision does not factor sparsely.

    Looked at twice: at points by chance, then where the others are at their best given the few found first, for a
    coordinate may matter only where no mass is. Where ``MOST_FEW`` still do, and more than these did, few are not all.
    """
    curved, places = curvatures(target, points)
    if not curved:
        return None
    nonzero = pattern(curved)
    usual = torch.stack([curvature.diagonal().abs() for curvature in curved]).median(0).values
    unit = usual.clamp(EXTREME_SD**-2, EXTREME_SD**2).rsqrt()
    indices = torch.arange(target.dim)
    moved = _influences(target, places, curved, nonzero, indices)
    first = _most(moved, indices)
    inside = Conditional(target, nonzero, first, unit) if len(first) else None
    if inside is None or len(inside.graph.child) > MOST_ENTRIES:
        return None
    eta = torch.stack(places)[:, first]
    best = inside.points(eta, inside.laplace(eta, eta.new_zeros(len(eta), inside.n), SOLVE_STEPS)[0])
    curved, places = curvatures(target, best)
    few = _most(_influences(target, places, curved, nonzero, first), first) if curved else first
    if len(few) == MOST_FEW and int((moved > MOVES_MANY).sum()) > MOST_FEW:
        return None
    few = few if len(few) else moved.argmax()[None]
    return FewAndMany(
        inside if len(few) == len(first) else Conditional(target, nonzero, few, unit), torch.stack(places)[:, few]
    )


def curvatures(target: Target, points: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The curvatures at the first POINTS of the points at which all is finite, and these."""
    curved, places = [], []
    for x in points:
        matrix = curvature(target, x, torch.full_like(x, PATTERN_STEP))
        if bool(matrix.isfinite().all()):
            curved.append(matrix)
            places.append(x)
        if len(curved) == POINTS:
            break
    return curved, places


def _influences(target: Target, points: list[Tensor], matrices: list[Tensor], nonzero: Tensor, among: Tensor) -> Tensor:
    """(dim,), 0 for all but some indices."""
    step = torch.full_like(points[0], INFLUENCE_MOVE)
    each = [influence(target, x, curved, nonzero, step, among) for x, curved in zip(points, matrices, strict=True)]
    return torch.stack(each).mean(0)


def _most(moved: Tensor, among: Tensor) -> Tensor:
    """Those of some indices, in order, that move the curvature of others by more than MOVES_MANY: MOST_FEW at most."""
    top = among[moved[among].argsort(descending=True)][:MOST_FEW]
    return top[moved[top] > MOVES_MANY].sort().values


class Marginal(Target):
    """log p(η) of the few, by Laplace's approximation of the many given them (Rue, Martino & Chopin 2009):

        log p(m, η) + ½ n log 2π − ½ log|P|,  m the maximum of p(·, η) and P the precision there,

    with a differenced gradient. What was solved is remembered: a solution begins at that of the nearest η.
    """

    def __init__(self, conditional: Conditional):
        self.conditional, self.dim = conditional, len(conditional.graph.few)
        self.eta = conditional.unit.new_zeros(0, self.dim)
        self.u = conditional.unit.new_zeros(0, conditional.n)

    def nearest(self, eta: Tensor) -> Tensor:
        if not len(self.eta):
            return eta.new_zeros(len(eta), self.conditional.n)
        return self.u[torch.cdist(eta, self.eta).argmin(-1)]

    def solve(self, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """m (K, n), and P as (b, log_s)."""
        u, b, log_s = self.conditional.laplace(eta, self.nearest(eta), SOLVE_STEPS)
        good = u.isfinite().all(-1)
        self.eta = torch.cat([self.eta, eta[good]])[-REMEMBERED:]
        self.u = torch.cat([self.u, u[good]])[-REMEMBERED:]
        return u, b, log_s

    def value_and_grad(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        u, b, log_s = self.solve(eta)
        value = self.at(eta, u)
        grad = []
        for move in ETA_STEP * torch.eye(self.dim).to(eta):
            ahead, behind = (self.at(eta + v, self._followed(eta + v, u, b, log_s)) for v in (move, -move))
            grad.append((ahead - behind) / (2 * ETA_STEP))
        grad = torch.stack(grad, -1)
        good = value.isfinite() & grad.isfinite().all(-1)
        return torch.where(good, value, -torch.inf), torch.where(good[:, None], grad, 0.0)

    def _followed(self, eta: Tensor, u: Tensor, b: Tensor, log_s: Tensor) -> Tensor:
        """The maximum at a close η, to first order."""
        return u + self.conditional.newton_step(b, log_s, self.conditional.gradients(eta, u)[1])

    def at(self, eta: Tensor, u: Tensor) -> Tensor:
        inside = self.conditional
        log_s = inside.factor(*inside.precision(eta, u[:, None]))[1]
        scale = log_s.sum(-1) + inside.unit.log().sum() + 0.5 * inside.n * math.log(2 * math.pi)
        return inside.values(eta, u) + scale

    def log_prob(self, eta: Tensor) -> Tensor:
        if eta.requires_grad:
            return _Differenced.apply(eta, self)
        return self.at(eta, self.solve(eta)[0])


class _Differenced(torch.autograd.Function):
    """The marginal density, with its differenced gradient as the derivative."""

    @staticmethod
    def forward(ctx, eta, marginal):
        with torch.no_grad():
            value, grad = marginal.value_and_grad(eta)
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    def backward(ctx, of_value):
        return of_value[:, None] * ctx.saved_tensors[0], None


def locate_few(marginal: Marginal, starts: Tensor) -> Gaussians | None:
    """The Gaussian over the few: BFGS on their marginal, Newton steps from the best end, moments of weighted draws."""
    ends, _ = bfgs_paths(marginal, starts[:FEW_STARTS], iterations=PATH_STEPS, tolerance=1e-2)
    best = int(ends.value.nan_to_num(nan=-math.inf).argmax())
    if not bool(ends.value[best].isfinite()):
        return None
    top = _newton(marginal, ends.x[best], ends.inverse_hessian[best])
    return _weighted(marginal, top)


def _weighted(marginal: Marginal, start: Gaussians) -> Gaussians:
    """The moments of p(η), by rounds of weighted draws around one Gaussian with the tails of a t; no gradients."""
    at = start
    for _ in range(0 if late() else MARGINAL_ROUNDS):
        wide = Mixture(at.loc, at.scale_tril, df=MARGINAL_DF, fixed=True)
        eta = wide.transform(wide.noise((MARGINAL_DRAWS * marginal.dim,)))
        log_w = log_density(marginal, eta) - wide.log_prob(eta)
        w = log_w.softmax(0)
        if not bool(w.isfinite().all()) or effective_sample_size(log_w) < 4 * marginal.dim:
            break
        loc = w @ eta
        covariance = (w[:, None] * (eta - loc)).mT @ (eta - loc)
        at = Gaussians(loc[None], scale_of(covariance)[None], (Origin(Kind.FEW),))
    return at


def _newton(marginal: Marginal, eta: Tensor, covariance: Tensor) -> Gaussians:
    """Newton steps on the marginal from η (d,), in the frame of a covariance that they renew, to N(η, (−∇²)⁻¹).

    The curvature is differenced over half an sd either way: wide enough to be that of the mass, and not of its top.
    """
    tril = scale_of(covariance)
    for _ in range(NEWTON_STEPS):
        points = torch.cat([eta[None], eta + DIFFERENCE_SDS * tril.mT, eta - DIFFERENCE_SDS * tril.mT])
        value, grad = value_and_grad(marginal, points)
        inside = grad @ tril
        ahead, behind = inside[1:].split(len(eta))
        curved = (behind - ahead) / (2 * DIFFERENCE_SDS)
        each, vectors = torch.linalg.eigh((curved + curved.mT) / 2)
        size = each.abs().clamp(1e-2, 1e4)
        step = vectors @ ((vectors.mT @ inside[0]) / size)
        step = step / (step.abs().max() / LONGEST_STEP).clamp_min(1.0)
        trials = eta + torch.tensor([1.0, 0.3, 0.1]).to(eta)[:, None] * (tril @ step)
        reached, _ = value_and_grad(marginal, trials)
        if float(reached.max()) > float(value[0]):
            eta = trials[int(reached.argmax())]
        tril = scale_of(tril @ (vectors / size) @ vectors.mT @ tril.mT)
        if late() or (float(inside[0] @ step) < 0.02 and bool((each > 0.3).all() and (each < 3).all())):
            break
    return Gaussians(eta[None], tril[None], (Origin(Kind.NEWTON),))


def degree_of(dim: int) -> int:
    """The highest total degree of which polynomials in dim variables have at most FEATURES products."""
    return max((k for k in range(1, MOST_DEGREE + 1) if math.comb(dim + k, k) <= FEATURES), default=1)


def structured_flow(marginal: Marginal, few: Gaussians) -> Flow:
    """A flow over the few, and the many given them, laid through Gaussian VI at draws of the few."""
    inside, dim = marginal.conditional, marginal.dim
    loc, tril = few.loc[0], few.scale_tril[0]
    features = Features(torch.tensor(monomials(dim, degree_of(dim))))
    count = max(8 * len(features), 96)
    wide = torch.tensor(LAID_SPREADS).repeat(count // len(LAID_SPREADS) + 1)[:count, None]
    t = (wide * torch.randn(count, dim)).to(loc)
    t[0] = 0.0
    eta = loc + t @ tril.mT
    u, b, log_s = marginal.solve(eta)
    height = marginal.at(eta, u).nan_to_num(nan=-math.inf)
    weight = (TEMPER * (height - height.max())).exp().clamp_min(LEAST_WEIGHT)  # far out it matters where mass goes on
    u, b, log_s = inside.variational(eta, u, b, log_s, VI_PAIRS, 4)
    graph = inside.graph
    unit_loc, unit = u.median(0).values, log_s.median(0).values.exp()
    layer = StructuredLayer(graph, features, loc, tril, unit_loc * inside.unit, unit * inside.unit)
    good = torch.isfinite(u).all(-1)
    u, slope = ((u - unit_loc) / unit)[good], (b * (unit[graph.parent] / unit[graph.child]))[good]
    layer.lay(t[good], graph.residual(slope, u), (log_s - unit.log())[good], slope, weight[good], RIDGE)
    return structured(layer)


@dataclass(frozen=True, eq=False)
class Inside:
    """A structured flow, the robust variance of its log-weights, a Gaussian like it, and where fresh starts ended."""

    flow: Flow
    variance: float
    near: Gaussians
    probes: Gaussians


def locate_structured(target: Target, points: Tensor | None = None, asked: bool = True) -> Inside | None:
    """Split, locate the few, lay the many; None where there is no split, or no finite value near any start.

    points: (n, dim), to start from as well. asked: by the user; else None, too, where time is up before the many, and
    where their precision takes more than ``PROBES`` products to read.
    """

    def over() -> bool:
        return late() and not asked

    if target.dim < LEAST_DIM or over():
        return None
    with torch.no_grad():
        parts = split(target, start_points(target, points))
        if parts is None or over() or not (asked or int(parts.inside.probes[0].max()) < PROBES):
            return None
        marginal, tries = Marginal(parts.inside), []
        while len(tries) < TRIES and (not tries or tries[-1][0] > WELL):
            few = locate_few(marginal, parts.starts)
            if few is None or over():
                break
            flow = structured_flow(marginal, few)
            tries.append((spread_of_weights(flow, target), flow, few))
        if not tries:
            return None
        variance, flow, few = min(tries, key=lambda each: each[0])
        near = like(flow)
        return Inside(flow, variance, near, fresh_ends(target, parts.inside, few, near))


def spread_of_weights(flow: Flow, target: Target) -> float:
    """The variance of a normal with the quartiles of the log-weights: single draws in the tails, which training mends,
    do not decide."""
    log_w = in_blocks(lambda rows: log_weights(flow, target, rows).log_w, flow.base.noise((START_DRAWS,)))
    quartiles = log_w.nan_to_num(nan=-math.inf).quantile(torch.tensor([0.25, 0.75]).to(log_w))
    spread = float(quartiles[1] - quartiles[0]) / 1.349
    return spread**2 if math.isfinite(spread) else math.inf


def like(flow: Flow) -> Gaussians:
    """The Gaussian of the flow's derivative at the centre of its base: for proposals, and to tell modes apart."""
    eye = DIFFERENCE_SDS / 5 * torch.eye(flow.dim, dtype=flow.dtype)
    ahead, behind, centre = (
        in_blocks(lambda z: flow().bijection.forward_and_logdet(z)[0], z) for z in (eye, -eye, 0 * eye[:1])
    )
    rows = (ahead - behind) / (2 * DIFFERENCE_SDS / 5)
    return from_covariance(centre, (rows.mT @ rows)[None], Kind.STRUCTURED)[0]


def fresh_ends(target: Target, inside: Conditional, few: Gaussians, near: Gaussians) -> Gaussians:
    """Where Newton's method over the many leads from starts of their own, at draws of the few: other modes among the
    many would show."""
    if not len(near):
        return near
    points = start_points(target)[:FRESH_STARTS]
    eta = few.loc + torch.randn(len(points), few.loc.shape[1]).to(few.loc) @ few.scale_tril[0].mT
    u = points.index_select(-1, inside.graph.many) / inside.unit
    x = inside.points(eta, inside.laplace(eta, u, SOLVE_STEPS)[0])
    x = x[x.isfinite().all(-1)]
    return Gaussians(x, near.scale_tril.expand(len(x), -1, -1), (Origin(Kind.FRESH),) * len(x))
