"""The defensive proposal that judges a flow: draws that reach where the flow itself does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..flows.bases import StudentT
from ..flows.distribution import Flow
from .gaussian import Gaussians, from_covariance
from .weights import in_blocks

SHARES = (0.8, 0.1, 0.1)  # of the flow, of the flow over a t base, of the t components
TAIL_DF, MODE_DF = 4.0, 5.0
ADAPT, MOST = 0.25, 0.8  # of p's mass: from where the components' shares are adapted, and their largest total share
MODE_SCALE = 1.5  # of a component's scale matrix over the inverse curvature


class DefensiveProposal:
    """m = 0.8 q + 0.1 q_t + 0.1 Σ_k t₅(loc_k, 1.5 Σ_k)/K: weights against m are at most 1.25 times those against q.

    q_t is the flow over a multivariate-t₄ base; the t₅ components sit at the modes that locating found, or, without
    any, at the moments of q (Hesterberg 1995 on defensive mixtures). Where q has missed modes, :meth:`adapted` gives
    their components the shares that they need; ``shares`` are those of q, q_t and the components, whose own are
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
        self.heavy = StudentT(flow.dim, TAIL_DF).to(dtype=flow.dtype, device=flow.device)
        self.t5 = StudentT(flow.dim, MODE_DF).to(dtype=flow.dtype, device=flow.device)
        self.modes = modes if modes is not None and len(modes) else self._moments()
        even = torch.full((len(self.modes),), 1 / len(self.modes), dtype=flow.dtype, device=flow.device)
        self.weights = even if weights is None else weights

    def _moments(self) -> Gaussians:
        with torch.no_grad():
            x = self.flow().rsample_and_log_prob((1000,))[0]
        covariance = torch.atleast_2d(torch.cov(x.mT))
        found, _ = from_covariance(x.mean(0)[None], covariance[None], "the moments of q")
        if not len(found):
            raise ValueError("flow: expected finite draws with a covariance, got none; lower lr=, or check the target")
        return found

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Stratified draws x (count, dim), log m and log q at them, and how many of them, the first, are draws of q.

        Draws of q and of q_t need no inverse.
        """
        n_modes, n_heavy = (round(share * count) for share in (self.shares[2], self.shares[1]))
        n_flow = count - n_modes - n_heavy
        base = self.flow.base
        z = torch.cat([base.transform(base.noise((n_flow,))), self.heavy.noise((n_heavy,))])
        pairs = in_blocks(lambda rows: torch.cat(_column(self.flow().bijection.forward_and_logdet(rows)), -1), z)
        x, logdet = pairs[:, :-1], pairs[:, -1]
        moved = self._mode_draws(n_modes)
        inverse = in_blocks(lambda rows: torch.cat(_column(self.flow().bijection.inverse_and_logdet(rows)), -1), moved)
        x = torch.cat([x, moved])
        z, logdet = torch.cat([z, inverse[:, :-1]]), torch.cat([-logdet, inverse[:, -1]])
        with torch.no_grad():
            log_q, log_heavy = self.flow.base.log_prob(z) + logdet, self.heavy.log_prob(z) + logdet
        # an inverse that did not converge far out says that the flow has no mass there
        log_q, log_heavy = (torch.nan_to_num(part, nan=-torch.inf) for part in (log_q, log_heavy))
        return x, self.mixture(log_q, log_heavy, x), log_q, n_flow

    def mixture(self, log_q: Tensor, log_heavy: Tensor, x: Tensor) -> Tensor:
        """log m at x, from the log densities of q and q_t there."""
        parts = zip((log_q, log_heavy, self.log_modes(x)), self.shares, strict=True)
        return torch.stack([part + math.log(share) for part, share in parts]).logsumexp(0)

    def adapted(self, x: Tensor, log_m: Tensor, log_w: Tensor) -> DefensiveProposal | None:
        """m with each t component's share moved to its share of p's mass, as weighted draws of m tell (Cappé et al.
        2008); None where the components together carry less than ``ADAPT`` of it, for q has that mass then.
        """
        w = (log_w - log_w.logsumexp(0)).exp()
        each = torch.stack([self._log_t5(x, k) for k in range(len(self.modes))], -1) - log_m.unsqueeze(-1)
        mass = self.shares[2] * self.weights * (w @ each.exp())
        total = float(mass.sum())
        if not total > ADAPT:
            return None
        share = min(total, MOST)
        rest = [(1 - share) * s / (SHARES[0] + SHARES[1]) for s in SHARES[:2]]
        weights = 0.8 * mass / total + 0.2 / len(mass)
        return DefensiveProposal(self.flow, self.modes, (*rest, share), weights)

    def _mode_draws(self, count: int) -> Tensor:
        at = (torch.arange(count, dtype=self.weights.dtype, device=self.flow.device) + 0.5) / max(count, 1)
        component = torch.searchsorted(self.weights.cumsum(0), at).clamp_max(len(self.modes) - 1)
        tril = MODE_SCALE**0.5 * self.modes.scale_tril[component]
        return self.modes.loc[component] + (tril @ self.t5.noise((count,)).unsqueeze(-1)).squeeze(-1)

    def log_modes(self, x: Tensor) -> Tensor:
        """log density of the mixture of t components."""
        each = torch.stack([self._log_t5(x, k) for k in range(len(self.modes))], -1)
        return (each + self.weights.log()).logsumexp(-1)

    def _log_t5(self, x: Tensor, k: int) -> Tensor:
        tril = MODE_SCALE**0.5 * self.modes.scale_tril[k]
        standard = torch.linalg.solve_triangular(tril, (x - self.modes.loc[k]).mT, upper=False).mT
        return self.t5.log_prob(standard) - tril.diagonal().log().sum()


def _column(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0], pair[1].unsqueeze(-1)
