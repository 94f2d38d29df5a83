"""The defensive proposal that judges a flow: draws that reach where the flow itself does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...flows.bases import Mixture
from ...flows.distribution import Flow
from ..estimate.evaluate import in_blocks
from ..locate.gaussian import Gaussians, Kind, from_covariance
from ..locate.mixture import MODE_DF

# of the flow, of the flow over a t base, of the t components: weights are at most 1.25 times those against q. A larger
# first share lets tails and missed modes decide by few draws, a smaller one wastes draws where q is right
SHARES = (0.8, 0.1, 0.1)
# of the tails of q_t. Chosen, not measured: higher, and a p with heavier tails than q has unbounded weights; lower, and
# draws go where p has next to no mass
HEAVY_DF = 4.0
# of p's mass: from where the components' shares are adapted (they are given .1, so that below it q has its modes), and
# their largest total share, with which weights are at most 5.7 times those against q. Chosen, not measured
ADAPT, MOST_MODE_SHARE = 0.15, 0.8
EVEN_SHARE = 0.2  # of the components' mass, dealt out evenly: a mode that few draws have seen is not starved by chance
MOMENT_DRAWS = 1000  # of q, whose moments stand for modes where none are known: they need be rough only
# of a component's scale matrix over the inverse curvature: p is often wider than its curvature at the top tells.
# Chosen, not measured: larger wastes draws, smaller leaves p's flanks to q alone
MODE_SCALE = 1.5


class DefensiveProposal:
    """m = 0.8 q + 0.1 q_t + 0.1 Σ_k t₅(loc_k, 1.5 Σ_k)/K: weights against m are at most 1.25 times those against q.

    q_t is the flow over its base with the tails of a t₄; the t₅ components sit at the modes that locating found, or,
    without any, at the moments of q (Hesterberg 1995 on defensive mixtures). Where q has missed modes, :meth:`adapted`
    gives their components the shares that they need; ``shares`` are those of q, q_t and the components, whose own are
    ``weights`` (K,), and weights against m are then at most 1/shares[0] times those against q.
    """

    def __init__(
        self,
        flow: Flow,
        modes: Gaussians | None,
        shares: tuple[float, float, float] = SHARES,
        weights: Tensor | None = None,
    ):
        self.flow, self.shares = flow, shares
        self.heavy = flow.base.heavy(HEAVY_DF)
        self.modes = modes if modes is not None and len(modes) else self._moments()
        tril = MODE_SCALE**0.5 * self.modes.scale_tril
        self.components = Mixture(self.modes.loc, tril, weights, MODE_DF, fixed=True)
        self.components.to(dtype=flow.dtype, device=flow.device)

    def _moments(self) -> Gaussians:
        with torch.no_grad():
            x = self.flow().rsample_and_log_prob((MOMENT_DRAWS,))[0]
        covariance = torch.atleast_2d(torch.cov(x.mT))
        gaussian, _ = from_covariance(x.mean(0)[None], covariance[None], Kind.FLOW)
        if not len(gaussian):
            raise ValueError("flow: expected finite draws with a covariance, got none; lower lr=, or check the target")
        return gaussian

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Stratified draws x (count, dim), log m and log q at them, and how many of them, the first, are draws of q.

        Draws of q and of q_t need no inverse.
        """
        n_modes, n_heavy = (round(share * count) for share in (self.shares[2], self.shares[1]))
        n_flow = count - n_modes - n_heavy
        base = self.flow.base
        z = torch.cat([b.transform(b.noise((n,))) for b, n in ((base, n_flow), (self.heavy, n_heavy))]).detach()
        pairs = in_blocks(lambda rows: torch.cat(_column(self.flow().bijection.forward_and_logdet(rows)), -1), z)
        x, logdet = pairs[:, :-1], pairs[:, -1]
        moved = self.components.transform(self.components.noise((n_modes,)))
        inverse = in_blocks(lambda rows: torch.cat(_column(self.flow().bijection.inverse_and_logdet(rows)), -1), moved)
        x = torch.cat([x, moved])
        z, logdet = torch.cat([z, inverse[:, :-1]]), torch.cat([-logdet, inverse[:, -1]])
        log_q, log_m = self._log_probs(x, z, logdet)
        return x, log_m, log_q, n_flow

    def log_prob(self, x: Tensor) -> Tensor:
        """log m at x (N, dim), as (N,)."""
        inverse = in_blocks(lambda rows: torch.cat(_column(self.flow().bijection.inverse_and_logdet(rows)), -1), x)
        return self._log_probs(x, inverse[:, :-1], inverse[:, -1])[1]

    def _log_probs(self, x: Tensor, z: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
        """log q and log m at x = f(z), with log|det dz/dx|."""
        log_q, log_heavy = (in_blocks(base.log_prob, z) + logdet for base in (self.flow.base, self.heavy))
        # an inverse that did not converge far out says that the flow has no mass there
        log_q, log_heavy = (torch.nan_to_num(part, nan=-torch.inf) for part in (log_q, log_heavy))
        return log_q, self.mixture(log_q, log_heavy, in_blocks(self.components.log_prob, x))

    def mixture(self, log_q: Tensor, log_heavy: Tensor, log_near: Tensor) -> Tensor:
        """log m from the log densities of q, q_t and the components."""
        parts = zip((log_q, log_heavy, log_near), self.shares, strict=True)
        return torch.stack([part + math.log(share) for part, share in parts]).logsumexp(0)

    def adapted(self, x: Tensor, log_m: Tensor, log_w: Tensor) -> DefensiveProposal | None:
        """m with each t component's share moved to its share of p's mass, as weighted draws of m tell (Cappé et al.
        2008); None where the components together carry less than ``ADAPT`` of it, for q has that mass then.
        """
        w = (log_w - log_w.logsumexp(0)).exp()
        mass = self.shares[2] * (w @ (in_blocks(self.components.log_each, x) - log_m.unsqueeze(-1)).exp())
        total = float(mass.sum())
        if not total > ADAPT:
            return None
        share = min(total, MOST_MODE_SHARE)
        rest = [(1 - share) * s / (SHARES[0] + SHARES[1]) for s in SHARES[:2]]
        weights = (1 - EVEN_SHARE) * mass / total + EVEN_SHARE / len(mass)
        return DefensiveProposal(self.flow, self.modes, (*rest, share), weights)


def _column(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0], pair[1].unsqueeze(-1)
