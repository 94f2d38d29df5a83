"""Independence chains on weighted draws: Metropolis and i-SIR kernels, and how far their states are from the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from ...arguments import whole

# times lag + latest time, by when simulated pairs of chains must have met: others leave no bound
LATEST = 10

# (weights of the proposals (R, N), of the states (R,), uniforms (R, 2)) -> the proposal moved to (R,), −1 for none
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def metropolis(proposed: Tensor, state: Tensor, u: Tensor) -> Tensor:
    """Independence Metropolis: accept the one proposal with probability min(1, w'/w)."""
    return torch.where(u[:, 0] * state <= proposed[:, 0], 0, -1)


def isir(proposed: Tensor, state: Tensor, u: Tensor) -> Tensor:
    """Iterated sampling importance resampling: one of N proposals and the state, by their weights.

    Andrieu, Lee & Vihola (2018), Uniform ergodicity of the iterated conditional SMC.
    """
    cumulative = proposed.cumsum(1)
    total = cumulative[:, -1]
    chosen = torch.searchsorted(cumulative, (u[:, 1] * total)[:, None])[:, 0].clamp_max(proposed.shape[1] - 1)
    return torch.where(u[:, 0] * (total + state) < total, chosen, -1)


def independence_chains(log_w: Tensor, kernel: Kernel) -> Tensor:
    """States of chains that take their proposals in the order of log_w (C, T, N): positions (C, T) in their T·N ones.

    The first proposal of all is the state at time 0; a step at time t takes the N proposals of block t.
    """
    chains, steps, batch = log_w.shape
    w = _scaled(log_w)
    u = torch.rand(steps, chains, 2, dtype=w.dtype, device=w.device)
    at = torch.zeros(chains, dtype=torch.long, device=w.device)
    state, states = w[:, 0, 0], [at]
    for t in range(1, steps):
        moved = kernel(w[:, t], state, u[t])
        at = torch.where(moved < 0, at, t * batch + moved)
        state = torch.where(moved < 0, state, w[:, t].gather(1, moved.clamp_min(0)[:, None])[:, 0])
        states.append(at)
    return torch.stack(states, 1)


def total_variation_bound(
    log_w: Tensor,
    lag: int,
    times: Sequence[int] | Tensor,
    replicates: int = 1000,
    seed: int = 0,
    batch: int | None = None,
) -> Tensor:
    """Upper bounds of the total variation distance between an independence chain at some times and its target.

    ::

        |law of X_t − p|_TV ≤ E[max(0, ⌈(τ − L − t)/L⌉)],  τ = min{t > L: X_t = Y_{t−L}}

    for chains X and Y of the same law, from draws of the proposal, X ahead by the lag L, coupled by common proposals
    and a common uniform (Biswas, Jacob & Vanetti 2019). In Metropolis chains the larger weight M = max(w(X_L), w(Y_0))
    stays until they meet, for where it moves the smaller one moves too: so τ − L is geometric with success probability
    a(M) = E min(1, w'/M), and the expectation given M is r^t/(1 − r^L) with r = 1 − a(M). It is averaged over M.

    Parameters
    ----------
    log_w: log-weights (S,) of draws of the proposal, which stand for it: a weight larger than all of these is not seen.
    lag: L; the larger, the tighter. times: the t, from 0 on. replicates: pairs of chains. seed: of these.
    batch: N proposals a step, for i-SIR, whose pairs are simulated; None: Metropolis.

    Returns the bounds, one for each time; inf from i-SIR pairs that do not meet in time. Raises ValueError for
    arguments out of range.
    """
    for name, value in (("lag", lag), ("replicates", replicates), ("batch", 1 if batch is None else batch)):
        whole(name, value)
    if log_w.dim() != 1 or not bool((log_w > -math.inf).any()) or not bool((log_w < math.inf).all()):
        raise ValueError("log_w: expected log-weights (S,) below +inf with a finite one among them; drop other draws")
    times = torch.as_tensor(times, dtype=torch.float64).reshape(-1)
    w, generator = _scaled(log_w.double().cpu()), Generator().manual_seed(seed)
    kernel = metropolis if batch is None else isir
    x, y = _Draws(w, replicates, batch or 1, generator), _Draws(w, replicates, batch or 1, generator).state
    for _ in range(lag):
        x.step(kernel)
    if batch is not None:
        met = _meeting(x, y, LATEST * (int(times.max()) + lag))
        return ((met - times[:, None]) / lag).ceil().clamp_min(0).mean(1)
    a = _acceptance(w, torch.maximum(x.state, y))
    return ((1 - a) ** times[:, None] / -torch.expm1(lag * torch.log1p(-a))).mean(1)


class _Draws:
    """Weights of R states, from draws of the proposal, which steps by fresh proposals move."""

    def __init__(self, w: Tensor, replicates: int, batch: int, generator: Generator):
        self.w, self.shape, self.generator = w, (replicates, batch), generator
        self.state = self.draw()[:, 0]

    def draw(self) -> Tensor:
        return self.w[torch.randint(len(self.w), self.shape, generator=self.generator)]

    def step(self, kernel: Kernel, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Move the states; those of another set by the same proposals and uniforms, and whether both moved."""
        proposed = self.draw()
        u = torch.rand(len(self.state), 2, dtype=self.w.dtype, generator=self.generator)
        other = self.state if other is None else other
        a, b = kernel(proposed, self.state, u), kernel(proposed, other, u)
        self.state, other = (
            torch.where(move < 0, w, proposed.gather(1, move.clamp_min(0)[:, None])[:, 0])
            for move, w in ((a, self.state), (b, other))
        )
        return other, (a >= 0) & (b >= 0)


def _meeting(x: _Draws, y: Tensor, latest: int) -> Tensor:
    """τ − L (R,) of pairs of i-SIR chains, inf for those that have not met by then; chains that meet stay together."""
    met = torch.full((len(y),), math.inf, dtype=torch.float64)
    for t in range(1, latest + 1):
        y, both = x.step(isir, y)
        met[both & met.isinf()] = t
        if bool(met.isfinite().all()):
            break
    return met


def _acceptance(w: Tensor, level: Tensor) -> Tensor:
    """a(M) = mean over w' of min(1, w'/M) at each M of level (R,); 1 at M = 0, where all is accepted."""
    ordered = w.sort()[0]
    below = torch.searchsorted(ordered, level)
    sums = torch.cat([w.new_zeros(1), ordered.cumsum(0)])[below]
    return (torch.where(level > 0, sums / level, 0.0) + (len(w) - below)) / len(w)


def _scaled(log_w: Tensor) -> Tensor:
    """exp(log_w), the largest 1."""
    return (log_w - log_w.max()).exp()
