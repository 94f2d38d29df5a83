"""Several modes at once: a mixture of Gaussians that adapts to p by weighted draws of itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ...flows.bases import Mixture
from ...flows.layers.linear import LowerTriangular
from ...flows.parameters import Fixed
from ...running import late
from ...targets.target import Target
from ..estimate.evaluate import in_blocks, log_density
from ..estimate.weights import effective_sample_size
from .gaussian import Gaussians, Kind, Origin, join, scale_of

ADAPT_ROUNDS = 16  # of adapting, at most: births end at UNTIL, and what is left settles in a few rounds
# in each round: at least, and for each component, whose moments fewer draws would not tell. Chosen, not measured
ROUND_DRAWS, COMPONENT_DRAWS = 2000, 150
WEIGHT_DRAWS = 2000  # by which an adapted mixture is compared with the best Gaussian, as that is by as many
# of the t components that are drawn from at modes, here and in the defensive proposal, so that weights stay even:
# higher, and heavier tails of p have unbounded weights; lower, and draws go where p has next to no mass. Chosen, not
# measured
MODE_DF = 5.0
EVEN_MIXING = 0.05  # of the draws, dealt out evenly over the components: none starves by chance before it is adapted
MOST_COMPONENTS = 64  # as many as modes are kept in few dimensions: each costs its draws in every round
LIGHTEST = 12.0  # nats below the heaviest start, from where one is left out: e⁻¹² of the mass decides nothing
LEAST_MASS = 1e-4  # share of the mass, below which a component is dropped: a hundredth of BASIN
# times the mean weight, from where a draw lies in a part of p that the mixture misses. Chosen, not measured: higher
# leaves parts out, lower gives components to noise
EXCESS = 4.0
LEAST_EXCESS = 0.02  # share of the weight in such draws, below which no component is born: as UNSEEN
# new components in a round, and the round from which there are none, so that all are adapted in the end. Chosen, not
# measured
BIRTHS, UNTIL = 8, 10
ENOUGH_ESS = 0.98  # ESS as a share, at which adapting ends: log-weights then vary by .02, as GOOD asks
POOR_ROUNDS = 4  # rounds, after which it ends where the ESS is below dim: moments of so few draws lead nowhere, slowly


def adapt_mixture(target: Target, start: Gaussians, masses: Tensor) -> Mixture:
    """A mixture of Gaussians adapted to p from components at ``start``, of these log masses (K,).

    In rounds, draws of the mixture with t₅ components are weighted by p, and every component takes the weighted moments
    of its share of them: population Monte Carlo (Cappé et al. 2008), an EM step towards the least KL(p‖q). Where draws
    weigh ``EXCESS`` times the mean the mixture misses a part of p, and new components start there (as in Raftery & Bao
    2010).
    """
    heavy = [i for i in masses.argsort(descending=True).tolist() if masses[i] > masses.max() - LIGHTEST][
        :MOST_COMPONENTS
    ]
    found, weights = start.pick(heavy), masses[heavy].softmax(0)
    for k in range(ADAPT_ROUNDS):
        wide = Mixture(
            found.loc, found.scale_tril, (1 - EVEN_MIXING) * weights + EVEN_MIXING / len(weights), MODE_DF, fixed=True
        )
        x = wide.transform(wide.noise((max(ROUND_DRAWS, COMPONENT_DRAWS * len(found)),)))
        log_w = log_density(target, x) - in_blocks(wide.log_prob, x)
        w = log_w.softmax(0)
        if not bool(w.isfinite().all()):
            break
        of_each = in_blocks(Mixture(found.loc, found.scale_tril, weights, fixed=True).log_each, x).softmax(-1)
        found, weights = _moments(found, x, of_each * w[:, None])
        ess = effective_sample_size(log_w)
        if ess > ENOUGH_ESS * len(x) or (k + 1 >= POOR_ROUNDS and ess < target.dim) or late():
            break
        if k < UNTIL:
            found, weights = _with_births(found, weights, x, w, of_each)
    kept = weights > LEAST_MASS
    return Mixture(found.loc[kept], found.scale_tril[kept], weights[kept], fixed=True)


def whitened(mixture: Mixture) -> tuple[Mixture, Fixed]:
    """The mixture with mean 0 and covariance I, as a base, and the affine layer that takes it back."""
    w, offset = mixture.weights, mixture.loc - mixture.weights @ mixture.loc
    within = (w[:, None, None] * (mixture.scale_tril @ mixture.scale_tril.mT)).sum(0)
    tril = scale_of(within + offset.mT @ (w[:, None] * offset))
    loc = torch.linalg.solve_triangular(tril, offset.mT, upper=False).mT
    base = Mixture(loc, torch.linalg.solve_triangular(tril, mixture.scale_tril, upper=False), w)
    return base, Fixed(LowerTriangular, shift=mixture.weights @ mixture.loc, scale_tril=tril)


def log_weights_of(target: Target, mixture: Mixture, draws: int = WEIGHT_DRAWS) -> Tensor:
    """log p − log q of draws of a mixture q; −inf where log p is not a number."""
    with torch.no_grad():
        x = mixture.transform(mixture.noise((draws,)))
    return log_density(target, x) - in_blocks(mixture.log_prob, x)


def _moments(old: Gaussians, x: Tensor, share: Tensor) -> tuple[Gaussians, Tensor]:
    """Weights, means and covariances of the weighted draws x (S, dim) that each component has a share (S, K) of.

    Where few draws make them they are drawn towards the old ones, which count as 2 (dim + 2) draws.
    """
    dim, total = x.shape[1], share.sum(0)
    count = total.square() / share.square().sum(0).clamp_min(1e-300)
    trust = (count / (count + 2 * (dim + 2)))[:, None]
    of_each = share / total.clamp_min(1e-300)
    mean = of_each.mT @ x
    loc = (1 - trust) * old.loc + trust * mean
    offset = x - mean[:, None]
    covariance = torch.einsum("sk,ksi,ksj->kij", of_each, offset, offset)
    before = old.scale_tril @ old.scale_tril.mT
    tril, info = torch.linalg.cholesky_ex((1 - trust[..., None]) * before + trust[..., None] * covariance)
    tril = torch.where((info == 0)[:, None, None], tril, old.scale_tril)
    return Gaussians(loc, tril, old.origin), (total / total.sum()).clamp_min(1e-12)


def _with_births(found: Gaussians, weights: Tensor, x: Tensor, w: Tensor, of_each: Tensor) -> tuple[Gaussians, Tensor]:
    """The mixture with new components where draws x weigh too much, in the shape of the nearest one, half as wide."""
    excess = torch.where(w > EXCESS / len(w), w, 0.0)
    births = min(BIRTHS, MOST_COMPONENTS - len(found), int((excess > 0).sum()))
    if births < 1 or excess.sum() < LEAST_EXCESS:
        return found, weights
    at = torch.multinomial(excess, births)
    nearest = of_each[at].argmax(-1)
    born = Gaussians(x[at], found.scale_tril[nearest] / 2, (Origin(Kind.DRAW),) * births)
    mass = excess.sum() / births
    return join([found, born]), torch.cat([weights, mass.expand(births)]) / (1 + excess.sum())
