"""Locating in hundreds to thousands of dimensions: L-BFGS paths, Laplace, and Gaussian VI by averaged curvature.

What :mod:`initialise` does with a dense inverse Hessian for every path is done here with diagonals of low rank more;
dense matrices are kept of a few Gaussians only, and all curvature comes from blocks of gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...running import late
from ...targets.target import Target
from ..estimate.evaluate import log_density, value_and_grad
from ..estimate.weights import mean_elbo
from .ascent import CURVATURE, better_half, halved_until_higher, line_search
from .gaussian import Gaussians, Kind, Origin, clipped, distinct, from_covariance, join, usable

MEMORY = 12  # pairs (s, y) that L-BFGS remembers, the usual 3 to 20: each is two vectors of every path
LBFGS_ITERATIONS = 300  # of L-BFGS, at most: Newton's method goes on from where it ends
# iterations after which the worse half of the paths ends, down to so many: fewer end paths that would find other modes
LBFGS_PRUNE_EVERY, LBFGS_PATHS = 30, 4
NEWTON_ENDS = 2  # that Newton's method follows up, and modes at most: each is a dense matrix from 2D gradients a step
# of log-weights, below which a Gaussian is not improved: EVEN is three times as much; lower, and normals are travelled
# from
NORMAL_VARIANCE = 1e-4
# step of differenced gradients, in sd. Chosen, not measured: smaller, and rounding counts; larger, and skew does
DIFFERENCE = 1e-2
# about, that averaging curvature may take: fewer leave its noise in the Gaussian, more are most of a fit's time
CURVATURE_GRADIENTS = 160_000
# rounds to get to the mass, and of averaging there; moves of the mean in each; draws for one: fewer rounds end on the
# way, fewer draws leave noise. Chosen, not measured
TRAVEL, VI_ROUNDS, INNER, MEAN_DRAWS = 40, 6, 3, 1024
# by which Gaussians are compared, and what they gain as they travel: certain to 1/16 of the sd of log-weights
ELBO_DRAWS = 256
WORSE = 1.0  # nats that a round of travelling may lose by chance: where it loses more it ends
# by which Gaussians on a path are compared: each point of each path costs as many. Chosen, not measured
PATH_DRAWS = 16
TRAVELLING = 0.75  # rate: no sd more than doubles in a round, where at 1 a single bad curvature would do more
# sd, which the mean moves by in the end, by the noise of MEAN_DRAWS mostly, and at most in one step, where curvature
# misleads
ARRIVED, MOST_MEAN_SHIFT = 0.15, 2.0


@dataclass(frozen=True, eq=False)
class LowRank:
    """x = loc + sd ∘ (I + U diag(s) Uᵀ) ε: a Gaussian whose covariance is diagonal with r directions stretched.

    loc, sd (dim,), directions U (dim, r) orthonormal, stretch s (r,) > −1.
    """

    loc: Tensor
    sd: Tensor
    directions: Tensor
    stretch: Tensor

    def at(self, epsilon: Tensor) -> Tensor:
        return self.loc + self.sd * (epsilon + (epsilon @ self.directions * self.stretch) @ self.directions.mT)

    def elbo(self, target: Target, epsilon: Tensor) -> float:
        """E[log p − log q] + const over draws made of ε (n, dim); const is the same for all."""
        log_p = log_density(target, self.at(epsilon))
        return mean_elbo(log_p + epsilon.square().sum(-1) / 2) + float(self.sd.log().sum() + self.stretch.log1p().sum())

    def dense(self, kind: Kind) -> Gaussians:
        """The same as Gaussians with a triangular factor; none where that fails."""
        half = self.directions * ((1 + self.stretch).square() - 1)
        correlation = torch.eye(len(self.sd)).to(self.sd) + half @ self.directions.mT
        return from_covariance(self.loc[None], (self.sd[:, None] * correlation * self.sd)[None], kind)[0]


@dataclass(eq=False)
class LbfgsPaths:
    """N points x (N, dim) with log p (N,) and its gradient, the diagonals of L-BFGS (N, dim), and its pairs s, y
    (N, m, dim), the latest last, with 1/s·y (N, m), 0 for pairs that do not count."""

    x: Tensor
    value: Tensor
    grad: Tensor
    diagonal: Tensor
    s: Tensor
    y: Tensor
    rho: Tensor

    def pick(self, index: Tensor) -> LbfgsPaths:
        return LbfgsPaths(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def direction(self) -> Tensor:
        """H ∇log p by the two-loop recursion (Nocedal & Wright 2006, algorithm 7.4)."""
        v, alphas = self.grad, []
        for s, y, rho in reversed(list(zip(*map(lambda t: t.unbind(1), (self.s, self.y, self.rho)), strict=True))):
            alphas.append(rho[:, None] * (s * v).sum(-1, keepdim=True))
            v = v - alphas[-1] * y
        v = self.diagonal * v
        for s, y, rho in zip(*map(lambda t: t.unbind(1), (self.s, self.y, self.rho)), strict=True):
            v = v + (alphas.pop() - rho[:, None] * (y * v).sum(-1, keepdim=True)) * s
        return v

    def remember(self, s: Tensor, y: Tensor, curved: Tensor) -> None:
        """The pair (s, y) of each row that is curved; diagonals as in Pathfinder (Zhang et al. 2022, algorithm 3)."""
        a, sy = (self.diagonal * y * y).sum(-1, keepdim=True), (s * y).sum(-1, keepdim=True)
        c = (s * s / self.diagonal).sum(-1, keepdim=True)
        inverse = a / (sy * self.diagonal) + y * y / sy - a * s * s / (sy * c * self.diagonal.square())
        fine = curved & (inverse > 0).all(-1) & inverse.isfinite().all(-1)
        self.diagonal = torch.where(fine[:, None], 1 / inverse, self.diagonal)
        rho = torch.where(curved[:, None], 1 / sy, 0.0)
        for name, new in (("s", s), ("y", y)):
            setattr(self, name, torch.cat([getattr(self, name)[:, 1:], new[:, None]], 1))
        self.rho = torch.cat([self.rho[:, 1:], rho], 1)

    def gaussian(self, i: int) -> LowRank:
        """N(x + H∇log p, H) at row i, H = A + [A Y, S] C [A Y, S]ᵀ with A the diagonal (Byrd et al. 1994)."""
        known = self.rho[i] > 0
        s, y, sd = self.s[i][known].mT, self.y[i][known].mT, self.diagonal[i].sqrt()
        inner = s.mT @ y
        upper, eta = inner.triu(), torch.diag(inner.diagonal())
        inverse = torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)
        corner = inverse.mT @ (eta + y.mT @ (sd.square()[:, None] * y)) @ inverse
        middle = torch.cat([torch.cat([torch.zeros_like(inner), -inverse], 1), torch.cat([-inverse.mT, corner], 1)])
        q, r = torch.linalg.qr(torch.cat([sd[:, None] * y, s / sd[:, None]], 1))
        change = r @ middle @ r.mT
        eigenvalues, vectors = torch.linalg.eigh((change + change.mT) / 2)
        stretch = (1 + eigenvalues).clamp_min(1e-12).sqrt() - 1
        return LowRank(self.x[i] + self.pick(torch.tensor([i])).direction()[0], sd, q @ vectors, stretch)


def locate_large(target: Target, starts: Tensor) -> tuple[Gaussians, Gaussians]:
    """The best Gaussians found from starts (N, dim), and the Laplace approximations at distinct proper optima.

    L-BFGS from all starts; the best Gaussian on each path, diagonal + low rank (Pathfinder, Zhang et al. 2022); from
    the best ends Newton's method with whitened curvature, and Laplace; Gaussian VI from the best of all these.
    """
    ends, on_paths = lbfgs_paths(target, starts)
    if not on_paths:
        raise ValueError("log_prob: expected finite values near some start, got none; pass init= a point where p > 0")
    paths = join([g.dense(Kind.PATH) for g in on_paths])
    fronts = [ends.gaussian(i).dense(Kind.END) for i in range(min(NEWTON_ENDS, len(ends.x)))]
    optima = join([newton_laplace(target, front) for front in fronts if len(front)] or [paths.pick([])])
    optima = (
        optima.pick(distinct(optima, value_and_grad(target, optima.loc)[0], NEWTON_ENDS)) if len(optima) else optima
    )
    dim = starts.shape[1]
    standard = Gaussians(starts.new_zeros(1, dim), torch.eye(dim).to(starts)[None], (Origin(Kind.STANDARD),))
    found = join([standard, paths, optima])
    elbo = found.elbo(target, torch.randn(ELBO_DRAWS, dim).to(starts))
    best = found.pick([int(elbo.argmax())])
    if float(best.log_weights(target, torch.randn(ELBO_DRAWS, dim).to(starts)).var()) < NORMAL_VARIANCE:
        return best, optima
    # the best optimum too: its Gaussian may be poor, but lead to the mass, where a better one ends on a plateau
    routes = [travel(target, best)] + ([travel(target, optima.pick([0]))] if len(optima) else [])
    nearest = max(routes, key=lambda route: route[1])[0]
    return join([best, nearest, curvature_vi(target, nearest)]), optima


def lbfgs_paths(target: Target, starts: Tensor, tolerance: float = 1e-4) -> tuple[LbfgsPaths, list[LowRank]]:
    """Ends of L-BFGS ascent in lockstep, the highest first, and the Gaussians of the best ELBO on the LBFGS_PATHS best.

    A path stops as in :func:`ascent.bfgs_paths`, by the gain in nats that its quadratic model promises.
    """
    value, grad = value_and_grad(target, starts)
    norm = torch.linalg.vector_norm(grad, dim=-1, keepdim=True).clamp_min(1.0)
    empty = starts.new_zeros(len(starts), MEMORY, starts.shape[1])
    every = LbfgsPaths(starts, value, grad, (1 / norm).expand_as(starts), empty, empty, empty[..., 0])
    every = every.pick(value > -torch.inf)
    done: list[LbfgsPaths] = []
    best: dict[int, tuple[float, LowRank]] = {}
    epsilon = torch.randn(PATH_DRAWS, starts.shape[1]).to(starts)
    index, due = torch.arange(len(every.x)), 1.0
    for k in range(1, LBFGS_ITERATIONS + 1):
        going = _step(target, every, tolerance, first=k == 1)
        if k >= due or not bool(going.all()):
            due = max(k + 1, 1.2 * due) if k >= due else due
            _keep_best(target, every, index, epsilon, best)
        done.append(every.pick(~going))
        every, index = every.pick(going), index[going.cpu()]
        if not len(index) or late():
            break
        if k % LBFGS_PRUNE_EVERY == 0 and len(index) > LBFGS_PATHS:
            top = better_half(every.value, LBFGS_PATHS)
            every, index = every.pick(top), index[top.cpu()]
    done.append(every)
    ends = LbfgsPaths(*(torch.cat([getattr(p, name) for p in done]) for name in LbfgsPaths.__dataclass_fields__))
    ranked = sorted(best.values(), key=lambda pair: -pair[0])
    return ends.pick(ends.value.argsort(descending=True)), [g for _, g in ranked[:LBFGS_PATHS]]


def _step(target: Target, paths: LbfgsPaths, tolerance: float, first: bool) -> Tensor:
    """One L-BFGS iteration of all rows, in place; which go on."""
    direction = paths.direction()
    slope = (paths.grad * direction).sum(-1)
    x, value, grad, found = line_search(target, paths, direction, slope)
    s, y = x - paths.x, paths.grad - grad
    sy, yy = (s * y).sum(-1), (y * y).sum(-1)
    curved = found & (sy > CURVATURE * torch.linalg.vector_norm(s, dim=-1) * yy.sqrt())
    if first:
        scale = torch.where(curved, sy / yy.clamp_min(1e-300), 1.0)
        paths.diagonal = torch.where(curved[:, None], scale[:, None].expand_as(x), paths.diagonal)
    paths.remember(s, y, curved)
    paths.x, paths.value, paths.grad = x, value, grad
    return found & (slope / 2 > tolerance)


def _keep_best(
    target: Target, paths: LbfgsPaths, index: Tensor, epsilon: Tensor, best: dict[int, tuple[float, LowRank]]
) -> None:
    """For each path the Gaussian of the best ELBO so far."""
    for i, path in enumerate(index.tolist()):
        found = paths.gaussian(i)
        elbo = found.elbo(target, epsilon)
        if elbo > best.get(path, (-torch.inf,))[0]:
            best[path] = (elbo, found)


def whitened_curvature(target: Target, x: Tensor, tril: Tensor) -> Tensor:
    """−Lᵀ ∇²log p L, averaged over rows x (M, dim), by central differences of the gradient along L's columns.

    2 M dim gradients, a block at a time. Where one is not finite the curvature is taken to be that of N(·, L Lᵀ).
    """
    total = torch.zeros_like(tril)
    for point in x:
        sides = [_gradients(target, point + sign * DIFFERENCE * tril.mT) for sign in (1, -1)]
        row = (sides[1] - sides[0]) @ tril / (2 * DIFFERENCE)
        good = row.isfinite().all(-1, keepdim=True)
        total += torch.where(good, row, torch.eye(len(tril)).to(tril))
    return (total + total.mT) / (2 * len(x))


def _gradients(target: Target, x: Tensor) -> Tensor:
    """∇log p of rows x (N, dim), NaN where it or log p is not finite."""
    value, grad = value_and_grad(target, x)
    return torch.where((value > -torch.inf)[:, None], grad, torch.nan)


def newton_laplace(target: Target, start: Gaussians, iterations: int = 12, tolerance: float = 1e-6) -> Gaussians:
    """Damped Newton ascent from the centre of one Gaussian, in the frame of its factor, to N(x, (−∇²log p)⁻¹).

    Empty where the curvature at the end is not positive, as when p is unbounded. In the frame directions are
    V |Λ|⁻¹ Vᵀ g, so that saddles repel; steps are halved until log p rises.
    """
    x, tril, proper = start.loc[0], start.scale_tril[0], False
    for _ in range(iterations):
        value, grad = (t[0] for t in value_and_grad(target, x[None]))
        tril, proper = _reshaped(tril, whitened_curvature(target, x[None], tril))
        step = tril @ (tril.mT @ grad)
        if not bool(step.isfinite().all()) or float(grad @ step) / 2 < tolerance:
            break
        at, _, _, rose = halved_until_higher(target, x[None], value[None], grad[None], step[None])
        if not bool(rose):
            break
        x = at[0]
    good = proper and bool(usable(x[None], tril[None])[0])
    return Gaussians(x[None], tril[None], (Origin(Kind.LAPLACE),)).pick([0] if good else [])


def _reshaped(tril: Tensor, precision: Tensor) -> tuple[Tensor, bool]:
    """The triangular factor of L |P|⁻¹ Lᵀ, and whether P (dim, dim) is positive."""
    factor, info = torch.linalg.cholesky_ex(precision)
    positive = bool(info == 0)
    if positive:  # L P⁻¹ Lᵀ = (L C⁻ᵀ)(·)ᵀ
        half = torch.linalg.solve_triangular(factor.mT, tril, upper=True, left=False)
    else:
        eigenvalues, vectors = torch.linalg.eigh(precision)
        half = tril @ vectors * eigenvalues.abs().clamp_min(1e-6).rsqrt()
    upper = torch.linalg.qr(half.mT)[1]
    return (upper * upper.diagonal().sign().unsqueeze(-1)).mT, positive


def curvature_vi(target: Target, start: Gaussians) -> Gaussians:
    """Maximise the ELBO over all Gaussians, from one of them, at whose optimum

        E_q[∇log p] = 0,   Σ⁻¹ = −E_q[∇²log p]   (Opper & Archambeau 2009).

    VI_ROUNDS of moves of the mean and of the precision, at rates that fall so that they are averaged. The Hessian at a
    draw is far less noisy than its estimate by first derivatives, of which a matrix in many dimensions would take
    millions.
    """
    loc, tril = start.loc[0], start.scale_tril[0]
    pairs = max(CURVATURE_GRADIENTS // (VI_ROUNDS * 4 * len(loc)), 1)
    for k in range(VI_ROUNDS):
        if late():
            break
        loc, tril, _ = _round(target, loc, tril, 1 / (1 + k / 2), pairs)
    good = bool(usable(loc[None], tril[None])[0])
    return Gaussians(loc[None], tril[None], start.origin).refined() if good else start


def travel(target: Target, start: Gaussians) -> tuple[Gaussians, float]:
    """Rounds of nearly whole steps from one Gaussian, as long as its mean moves and its ELBO does not fall; and that.

    The optimum of p may lie far from its mass, as that of a hierarchy does.
    """
    epsilon = torch.randn(ELBO_DRAWS, start.loc.shape[1]).to(start.loc)
    at, elbo = start, float(start.elbo(target, epsilon)[0])
    for _ in range(TRAVEL):
        loc, tril, moved = _round(target, at.loc[0], at.scale_tril[0], TRAVELLING, pairs=0)
        trial = Gaussians(loc[None], tril[None], start.origin)
        reached = float(trial.elbo(target, epsilon)[0]) if bool(usable(trial.loc, trial.scale_tril)[0]) else -torch.inf
        if not reached > elbo - WORSE:
            break
        at, elbo = trial, reached
        if moved < ARRIVED or late():
            break
    return at, elbo


def _round(target: Target, loc: Tensor, tril: Tensor, rate: float, pairs: int) -> tuple[Tensor, Tensor, float]:
    """INNER moves of the mean, then one of the precision, by antithetic pairs of draws, or, with none, by one draw; and
    how far the mean has moved in its frame, at most, by the last of the moves."""
    for _ in range(INNER):
        shift = _mean_shift(target, loc, tril, rate)
        loc = loc + tril @ shift
    epsilon = torch.randn(max(pairs, 1), len(loc)).to(loc)
    epsilon = torch.cat([epsilon, -epsilon]) if pairs else epsilon
    curvature = whitened_curvature(target, loc + epsilon @ tril.mT, tril)
    if bool(curvature.isfinite().all()):
        for share in (rate, rate / 2, rate / 4, rate / 8):  # where the average is not positive, a part of the way to it
            precision = share * curvature
            precision.diagonal().add_(1 - share)
            moved, positive = _reshaped(tril, precision)
            if positive:
                return loc, moved, float(shift.abs().max())
    return loc, tril, float(shift.abs().max())


def _mean_shift(target: Target, loc: Tensor, tril: Tensor, rate: float) -> Tensor:
    """ρ E[Lᵀ∇log p + ε] over antithetic draws, at most MOST_MEAN_SHIFT in each coordinate; clipped as in
    gaussian_vi."""
    epsilon = torch.randn(MEAN_DRAWS // 2, len(loc)).to(loc)
    epsilon = torch.cat([epsilon, -epsilon])
    value, grad = value_and_grad(target, loc + epsilon @ tril.mT)
    residual = clipped(torch.where((value > -torch.inf)[:, None], grad @ tril + epsilon, 0.0))
    return (rate * residual.mean(0)).clamp(-MOST_MEAN_SHIFT, MOST_MEAN_SHIFT)
