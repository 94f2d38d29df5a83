"""p and the proposal m seen in the latent space of the flow, and Hamiltonian moves there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...targets.target import Target
from ...targets.values import check_finite
from ..estimate.evaluate import in_blocks, value_and_grad
from ..estimate.quantities import resample
from .necks import Walk
from .proposal import DefensiveProposal

# mean acceptance to which steps are tuned, as is usual in HMC (Hoffman & Gelman 2014): lower, and moves are refused
# where p is curved; higher, and they cost gradients
ACCEPTANCE = 0.8
# of a trajectory, in sd: a little more than a quarter of a normal's period, where a move forgets its start; and
# leapfrog steps at most, so that a step size that is too small costs reach rather than time
LENGTH, MOST_LEAPS = 1.8, 12


@dataclass(frozen=True, eq=False)
class Particles:
    """z (N, dim) with x = f(z), log m(x) and log p(x); z is NaN where the flow's inverse did not converge at x."""

    z: Tensor
    x: Tensor
    log_m: Tensor
    log_p: Tensor

    def __getitem__(self, index: Tensor) -> Particles:
        return Particles(self.z[index], self.x[index], self.log_m[index], self.log_p[index])

    def updated(self, index: Tensor, others: Particles) -> Particles:
        """The particles with ``others`` in place of those at index."""
        return Particles(*(a.index_copy(0, index, getattr(others, name)) for name, a in vars(self).items()))


class LatentPath:
    """γ_b = m^(1−b) p^b on R^D, seen in the flow's latent space: γ_b(f(z)) |det df/dz|.

    There the flow has straightened p, and log p, log m and their gradients need the flow in its forward direction only:
    log m = log(s₁ q₀(z) + s₂ t₄(z) + s₃ t₅(f(z)) |det df/dz|) − log|det df/dz|, with m's shares s.
    walk: rounds of moves of scales, for a p with a neck that Hamiltonian moves do not walk down.
    """

    def __init__(self, proposal: DefensiveProposal, target: Target, walk: Walk | None = None):
        self.proposal, self.target, self.base, self.walk = proposal, target, proposal.flow.base, walk
        self.bijection = proposal.flow().bijection

    def log_prob(self, z: Tensor, b: float) -> Tensor:
        """log γ_b(f(z)) + log|det df/dz| of z (N, dim), as (N,)."""
        x, logdet = self.bijection.forward_and_logdet(z)
        log_p = self.target.log_prob(x)
        return log_p + logdet if b == 1 else (1 - b) * self._log_m(z, x, logdet) + b * log_p + logdet

    def at(self, z: Tensor) -> Particles:
        """The particles at finite z (N, dim)."""

        def columns(rows: Tensor) -> Tensor:
            x, logdet = self.bijection.forward_and_logdet(rows)
            return torch.cat([x, torch.stack([self._log_m(rows, x, logdet), self.target.log_prob(x)], -1)], -1)

        values = in_blocks(columns, z)
        return Particles(z, values[:, :-2], values[:, -2], values[:, -1])

    def draw(self, count: int) -> tuple[Particles, int]:
        """Particles from m, of each component as many as it should have on average, and how many had log p NaN or +inf.

        ``DefensiveProposal.draw`` rounds these numbers, which would bias Ẑ.
        """
        modes = self.proposal.components
        *of_flow, near_modes = self.proposal.shares
        shares = torch.cat([modes.weights.new_tensor(of_flow), near_modes * modes.weights])
        component = resample(shares.log(), count)
        n_flow, n_heavy = (int((component == k).sum()) for k in (0, 1))
        near = component[component > 1] - 2
        heavy = self.proposal.heavy
        z = torch.cat([self.base.transform(self.base.noise((n_flow,))), heavy.transform(heavy.noise((n_heavy,)))])
        noise = modes.noise((len(near),))
        noise[:, -1] = near
        moved = modes.transform(noise)
        z = torch.cat([z, in_blocks(lambda rows: self.bijection.inverse_and_logdet(rows)[0], moved)])
        drawn = self.at(z.nan_to_num())
        failed = (~z.isfinite().all(-1)).nonzero()[:, 0]
        if len(failed):
            drawn.z[failed], drawn.x[failed] = math.nan, moved[failed - n_flow - n_heavy]
            drawn.log_m[failed] = math.log(near_modes) + modes.log_prob(drawn.x[failed])
            drawn.log_p[failed] = in_blocks(self.target.log_prob, drawn.x[failed])
        log_p, skipped = check_finite(drawn.log_p, drawn.x, self.target)
        return dataclasses.replace(drawn, log_p=log_p), skipped

    def _log_m(self, z: Tensor, x: Tensor, logdet: Tensor) -> Tensor:
        log_q, log_heavy = (base.log_prob(z) - logdet for base in (self.base, self.proposal.heavy))
        return self.proposal.mixture(log_q, log_heavy, self.proposal.components.log_prob(x))


@dataclass(eq=False)
class Rung:
    """A temperature b with its HMC kernel: leapfrog steps of size ``step`` in the frame z = A u, A Aᵀ the covariance.

    log_prob: log γ_b of z (N, dim), as (N,).
    """

    b: float
    tril: Tensor
    step: float
    log_prob: Callable[[Tensor], Tensor]

    @property
    def leaps(self) -> int:
        return min(max(round(LENGTH / self.step), 1), MOST_LEAPS)

    def move(self, z: Tensor) -> tuple[Tensor, float]:
        """One transition of the rows of z (N, dim) that leaves γ_b as it is, and the mean acceptance probability.

        Each row has a step size of its own, between a half of ``step`` and all of it, so that no orbit closes.
        """
        step = self.step * (0.5 + 0.5 * torch.rand(len(z), 1, dtype=z.dtype, device=z.device))
        velocity = torch.randn_like(z)
        before, grad = value_and_grad(self, z)
        start, energy = z, before - 0.5 * velocity.square().sum(-1)
        for _ in range(self.leaps):
            velocity = velocity + 0.5 * step * (grad @ self.tril)
            z = z + step * (velocity @ self.tril.mT)
            value, grad = value_and_grad(self, z)
            velocity = velocity + 0.5 * step * (grad @ self.tril)
        change = (value - 0.5 * velocity.square().sum(-1) - energy).nan_to_num(nan=-math.inf)
        # a point without a gradient counts as density 0: as none is entered, none may be left
        accepted = (change > torch.rand_like(change).log()) & (before > -math.inf)
        return torch.where(accepted[:, None], z, start), float(change.clamp_max(0.0).exp().mean())


def move(rung: Rung, path: LatentPath, particles: Particles) -> tuple[Particles, float]:
    """One transition of all particles but those without z, which stay, and the mean acceptance probability."""
    free = particles.z.isfinite().all(-1).nonzero()[:, 0]
    if not len(free):
        return particles, 1.0
    z, rate = rung.move(particles.z[free])
    moved = path.at(z)
    return particles.updated(free, moved), rate
