"""Random hierarchies whose scale may be small, with answers by quadrature: as plain densities and as Pyro models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor

from ..running import seeded
from ..targets import PyroModel, Target
from ..targets.known import KnownDensity, cells, normal, uniform
from .synthetic import STREAM

MU_SD = torch.tensor(5.0, dtype=torch.float64)
FEWEST, MOST_GROUPS = 5, 50  # groups
LARGEST_SCALE = 2.0  # of the scale that makes the data, in sds of their noise
LOG_TAU = torch.linspace(-30.0, 15.0, 45_001, dtype=torch.float64)
SCALE_PRIORS: dict[str, Callable[[float], dist.Distribution]] = {
    "HalfNormal": lambda scale: dist.HalfNormal(scale),
    "HalfCauchy": lambda scale: dist.HalfCauchy(scale),
    "Exponential": lambda scale: dist.Exponential(1 / scale),
    "Gamma(2)": lambda scale: dist.Gamma(2.0, 2 / scale),
    "InverseGamma(2)": lambda scale: dist.InverseGamma(2.0, scale),
}


class Hierarchy(KnownDensity):
    r"""y_j ~ N(θ_j, s_j), θ_j ~ N(μ, τ), μ ~ N(0, 5), τ from a family of priors, over x = (μ, log τ, θ).

    Given τ all is normal, so one quadrature over log τ gives the evidence, which log_prob is divided by (log Z = 0),
    and exact draws. kind: "neck", fitted as this plain density, or "neck_model", fitted as :meth:`model`.
    """

    def __init__(self, y: Tensor, noise: Tensor, prior: str, scale: float, kind: str, seed: int) -> None:
        self.y, self.noise, self.kind, self.seed = y, noise, kind, seed
        self.scale_prior = SCALE_PRIORS[prior](torch.tensor(scale, dtype=torch.float64))
        self.log_tau = self._log_joint_of_tau()
        self.log_evidence = float(self.log_tau.logsumexp(0)) + math.log(float(LOG_TAU[1] - LOG_TAU[0]))
        words = f"{len(y)} groups, {prior} of scale {scale:.2f}"
        super().__init__(self._log_p, len(y) + 2, log_z=0.0, how=words, draw=self._draw)

    def target(self) -> Target:
        """What is fitted: this density, or the Pyro model, centred as it is written first."""
        return self if self.kind == "neck" else PyroModel(self.model)

    def log_z_of(self, log_evidence: float) -> float:
        """The log normaliser of this density that a fit's log evidence stands for."""
        return log_evidence if self.kind == "neck" else log_evidence - self.log_evidence

    def model(self) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, MU_SD))
        tau = pyro.sample("tau", self.scale_prior)
        with pyro.plate("groups", len(self.y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, self.noise), obs=self.y)

    @staticmethod
    def points(draws: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Draws of a fit as x (N, dim)."""
        if isinstance(draws, Tensor):
            return draws
        return torch.cat([draws["mu"][:, None], draws["tau"].log()[:, None], draws["theta"]], -1)

    def _log_p(self, x: Tensor) -> Tensor:
        mu, tau, theta = x[:, 0], x[:, 1].exp(), x[:, 2:]
        prior = dist.Normal(0.0, MU_SD).log_prob(mu) + self.scale_prior.log_prob(tau) + x[:, 1]
        effects = dist.Normal(mu[:, None], tau[:, None]).log_prob(theta).sum(-1)
        return prior + effects + dist.Normal(theta, self.noise).log_prob(self.y).sum(-1) - self.log_evidence

    def _given(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Precision and mean of μ given τ (n,), θ integrated out."""
        each = 1 / (tau[:, None].square() + self.noise.square())
        precision = each.sum(-1) + MU_SD**-2
        return precision, (each * self.y).sum(-1) / precision

    def _log_joint_of_tau(self) -> Tensor:
        """log p(y, log τ) over LOG_TAU, μ and θ integrated out."""
        tau = LOG_TAU.exp()
        precision, mean = self._given(tau)
        variance = tau[:, None].square() + self.noise.square()
        log_y = dist.Normal(0.0, variance.sqrt()).log_prob(self.y).sum(-1) + 0.5 * precision * mean.square()
        return log_y - 0.5 * precision.log() - MU_SD.log() + self.scale_prior.log_prob(tau) + LOG_TAU

    def _draw(self, n: int, generator: Generator) -> Tensor:
        step = float(LOG_TAU[1] - LOG_TAU[0])
        log_tau = LOG_TAU[cells(self.log_tau, n, generator)] + step * (uniform(n, generator) - 0.5)
        tau = log_tau.exp()
        precision, mean = self._given(tau)
        mu = mean + normal(n, 1, generator)[:, 0] / precision.sqrt()
        share = tau[:, None].square() / (tau[:, None].square() + self.noise.square())
        noise = normal(n, len(self.y), generator)
        theta = mu[:, None] + share * (self.y - mu[:, None]) + share.sqrt() * self.noise * noise
        return torch.cat([mu[:, None], log_tau[:, None], theta], -1)


def hierarchy(kind: str, seed: int) -> Hierarchy:
    """A random hierarchy, which depends on (kind, seed) alone: 5 to 50 groups, noise of sds .5 to 2, effects of sd 0 to
    2, any of five priors."""
    with seeded(STREAM * (seed + 1) + (kind == "neck")):
        groups = round(FEWEST * (MOST_GROUPS / FEWEST) ** float(torch.rand(())))
        prior = list(SCALE_PRIORS)[int(torch.randint(len(SCALE_PRIORS), ()))]
        scale, tau = 2 ** float(2 * torch.rand(()) - 1), LARGEST_SCALE * float(torch.rand(()))
        noise = 2 ** (2 * torch.rand(groups, dtype=torch.float64) - 1)
        y = float(torch.randn(())) + tau * torch.randn(groups, dtype=torch.float64)
        y = y + noise * torch.randn(groups, dtype=torch.float64)
    return Hierarchy(y, noise, prior, scale, kind, seed)
