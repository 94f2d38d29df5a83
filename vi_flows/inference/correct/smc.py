"""Sequential Monte Carlo from the defensive proposal to the target: path, kernels, pilot run, runs."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..estimate.evaluate import in_blocks
from ..estimate.quantities import resample_along
from ..estimate.weights import effective_sample_size, log_mean
from ..judge.latent import ACCEPTANCE, LENGTH, LatentPath, Particles, Rung, move
from ..locate.gaussian import spread_of

PARTICLE_DRAWS = 10  # draws of m for each particle: they cost little, and many decide how the modes share the particles
# of the particles that have weight, kept by each step of the temperature: higher takes more temperatures, lower leaves
# few ancestors. Chosen, not measured
ESS_SHARE = 0.6
MOST_RUNGS = 200  # of a path: a proposal that needs more hardly reaches the target, and is refused
# HMC transitions at each temperature, and at the last one, whose states are all kept: fewer leave copies together,
# which errors over the runs then show. Chosen, not measured
SWEEPS, KEPT_SWEEPS = 3, 4
# transitions of the pilot at each temperature, in which the step size settles: fewer leave it where it began
TUNING = 10
# temperatures, from which on the last two tell how many are to come: sooner, a first small step would have annealing
# left out that would be done in time
TOLD = 3
GROWTH = 4.0  # of b before that, at most: with less, annealing is left out that would be done in time
# transitions before those that are kept, where scales are moved, and rounds of that after each: with half of both,
# draws from a Gaussian fitted to a centred hierarchy were .03 nats short of the end of its neck
SCALED_SWEEPS, WALK_ROUNDS = 8, 16


def pilot(
    path: LatentPath,
    count: int,
    most: int = MOST_RUNGS,
    replicates: int = 0,
    afford: Callable[[float], None] | None = None,
) -> list[Rung]:
    """At most so many temperatures, each as far from the last as an ESS of ESS_SHARE allows, with their kernels.

    afford: called after each move with the seconds that pilot and ``replicates`` runs will take, and free to raise.
    """
    forecast = Forecast(replicates, afford or (lambda seconds: None))
    particles, _ = path.draw(PARTICLE_DRAWS * count)
    forecast.drew()
    rungs, b, step = [], 0.0, 0.8 * path.base.dim**-0.25
    tril = torch.eye(path.base.dim, dtype=particles.x.dtype, device=particles.x.device)
    while b < 1:
        log_ratio = particles.log_p - particles.log_m
        if len(rungs) == most or not bool((log_ratio > -math.inf).any()):
            raise ValueError(
                "anneal: expected a proposal that reaches the target, got one without weight there; "
                "fit another flow=, or start near the mass with init="
            )
        last, b = b, next_temperature(b, log_ratio)
        particles = particles[resample_along((b - last) * log_ratio, particles.x, count)]
        z = particles.z[particles.z.isfinite().all(-1)]
        found = spread_of(z)
        tril = found.scale_tril[0] if len(found) else tril
        rung = Rung(b, tril, step, functools.partial(path.log_prob, b=b))
        left = min(_temperatures_left(last, b, len(rungs) + 1), most - len(rungs) - 1)
        for k in range(TUNING):
            particles, rate = move(rung, path, particles)
            rung.step = min(rung.step * math.exp((rate - ACCEPTANCE) * 2 / (1 + k / 3)), LENGTH)
            forecast.moved(k + 1, left)
        step = rung.step
        rungs.append(rung)
    if path.walk is not None:
        rescaled(path, particles)
        forecast.walked()
    return rungs


class Forecast:
    """The seconds that a pilot and ``replicates`` runs after it take, told to ``afford`` from what its moves took."""

    def __init__(self, replicates: int, afford: Callable[[float], None]):
        self.replicates, self.afford = replicates, afford
        self.began = self.last = time.monotonic()
        # seconds of the first draws, of moves at temperatures past, and here; of one move at the last of these past
        self.drawn = self.before = self.here = self.move = 0.0

    def drew(self) -> None:
        self.last = time.monotonic()
        self.drawn = self.last - self.began
        self.afford((1 + self.replicates) * self.drawn)

    def moved(self, k: int, temperatures: int) -> None:
        """After k moves at a temperature, that many temperatures before the last."""
        now = time.monotonic()
        self.here += now - self.last
        left = self.here / k * (TUNING * (1 + temperatures) - k)
        runs = self.drawn + SWEEPS / TUNING * (self.before + self.here + left)
        self.afford(now - self.began + left + self.replicates * runs)
        self.last = now
        if k == TUNING:
            self.before, self.here, self.move = self.before + self.here, 0.0, self.here / TUNING

    def walked(self) -> None:
        """After one walk of the scales, at the last temperature, of which each run makes several."""
        walk = time.monotonic() - self.last
        runs = self.drawn + SWEEPS / TUNING * self.before + (SCALED_SWEEPS + KEPT_SWEEPS) * (self.move + walk)
        self.afford(time.monotonic() - self.began + self.replicates * runs)


def _temperatures_left(last: float, b: float, count: int) -> int:
    """How many more to b = 1, if b goes on growing by the factor that it last grew by, or, early on, by GROWTH."""
    growth = GROWTH if count < TOLD else b / last
    return math.ceil(math.log(1 / b) / math.log(growth)) if growth > 1 else MOST_RUNGS


def next_temperature(b: float, log_ratio: Tensor) -> float:
    """The largest b' ≤ 1 at which the weights (p/m)^(b'−b) of equally weighted particles keep ESS_SHARE of the ESS."""
    alive = log_ratio[log_ratio > -math.inf]
    low, high = b, 1.0

    def good(to: float) -> bool:
        return effective_sample_size((to - b) * alive) >= ESS_SHARE * len(alive)

    if good(high):
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def rescaled(path: LatentPath, particles: Particles) -> Particles:
    """Particles of p after WALK_ROUNDS of moves of scales; those for which the flow's inverse then fails stay."""
    z = in_blocks(lambda rows: path.bijection.inverse_and_logdet(rows)[0], path.walk(particles.x, WALK_ROUNDS))
    free = z.isfinite().all(-1).nonzero()[:, 0]
    return particles.updated(free, path.at(z[free])) if len(free) else particles


@dataclass(frozen=True, eq=False)
class AnnealingRun:
    """One pass along a frozen schedule: log Ẑ, the draws of p that it ends with (M, dim), log p and log m there (M,),
    log-weights and mean acceptance probability of each step, and how many first draws were skipped.

    settling: log p − log m of as many states before those that are kept, where scales are moved.
    """

    log_z: float
    x: Tensor
    log_p: Tensor
    log_m: Tensor
    log_w: tuple[Tensor, ...]
    acceptance: tuple[float, ...]
    skipped: int
    settling: Tensor | None = None


def annealing_run(path: LatentPath, rungs: list[Rung], count: int) -> AnnealingRun:
    """One run of the frozen schedule: weight, resample systematically, move; draws are all states at b = 1."""
    particles, skipped = path.draw(PARTICLE_DRAWS * count)
    b, log_z, weights, acceptance, states = 0.0, 0.0, [], [], []
    for rung in rungs:
        log_w = (rung.b - b) * (particles.log_p - particles.log_m)
        b = rung.b
        log_z += log_mean(log_w)
        if log_z == -math.inf:  # an estimate like any other: without it their mean would be biased
            draws = particles.x[:count].repeat(KEPT_SWEEPS, 1)
            none = draws.new_full((len(draws),), -math.inf)
            return AnnealingRun(log_z, draws, none, none, (), (), skipped)
        weights.append(log_w)
        particles, rates, states = particles[resample_along(log_w, particles.x, count)], [], []
        scaled = path.walk is not None and b == 1
        for _ in range(SWEEPS if b < 1 else KEPT_SWEEPS + SCALED_SWEEPS * scaled):
            particles, rate = move(rung, path, particles)
            particles = rescaled(path, particles) if scaled else particles
            rates.append(rate)
            states.append(particles)
        acceptance.append(sum(rates) / len(rates))
    settling = (
        torch.cat([s.log_p - s.log_m for s in states[-2 * KEPT_SWEEPS : -KEPT_SWEEPS]])
        if path.walk is not None
        else None
    )
    x, log_p, log_m = (torch.cat([getattr(s, name) for s in states[-KEPT_SWEEPS:]]) for name in ("x", "log_p", "log_m"))
    return AnnealingRun(log_z, x, log_p, log_m, tuple(weights), tuple(acceptance), skipped, settling)
