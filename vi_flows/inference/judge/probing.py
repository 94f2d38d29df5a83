"""What the verdict asks of the target anew, beyond the weights: local moves, unseen basins, and lines far out."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import torch
from torch import Tensor

from ...flows.bases import Mixture
from ...targets.target import Target
from ...targets.values import show
from ..bounds import BASIN, FAR_SHARE, MARGIN, MOVE, MOVE_ERROR
from ..estimate.evaluate import in_blocks, log_density
from ..estimate.psis import resampling_weights
from ..estimate.quantities import flatten, resample, vary
from ..estimate.weights import Weights, log_mean
from ..locate.gaussian import Gaussians, Kind, Origin, spread_of
from ..locate.mixture import MODE_DF
from .check import Check, Role
from .latent import ACCEPTANCE, LENGTH, LatentPath, Rung
from .proposal import DefensiveProposal
from .propriety import combination, far_shares

# draws, whose mean is certain to .022 sd, a fifth of MOVE; how often each is moved: more goes further, at as many more
# gradients; the first leapfrog step, in sd, which acceptance then tunes. The last two are chosen, not measured
MOVED_DRAWS, TRANSITIONS, FIRST_STEP = 2000, 4, 0.6
LINES = 200  # in all, and at least 4 draws to a direction: with fewer, FAR_SHARE is decided by single draws
# along which lines go, drawn by chance among more, and the widest axes of a mode: what is improper along others only is
# not seen. Chosen for their time
COORDINATES, AXES = 50, 10
EACH = 256  # draws around a suspect, to tell its mass to about 1/16; with fewer, chance decides near BASIN
SHOWN_NUMBERS = 4  # in one sentence: for reading only
# in sd and in nats, within which two modes are each other's images. Chosen, not measured: larger, and a note is given
# of modes that are only alike; smaller, and optima that ended a little off hide a symmetry. No claim hangs on it
SYMMETRIC = 0.01


def local_moves(proposal: DefensiveProposal, target: Target, pooled: Weights) -> Check:
    """Whether weighted draws stay as they are, in law, under Hamiltonian Monte Carlo in the flow's latent space.

    Draws of p keep their law under moves that leave p as it is; so where the mean of h or of |h| shifts,
    h = (θ − mean)/sd of any quantity, draws of m have missed mass nearby. Moves that leave h with an autocorrelation ρ
    mend 1 − ρ of an error: |shift|/(1 − ρ) is below MOVE, or |shift| below its noise, z se of paired differences, z for
    an error of MOVE_ERROR in all 2Q of them together (Bonferroni). About MOVED_DRAWS · TRANSITIONS · 4 gradients.
    """
    x = pooled.x[resample(resampling_weights(pooled.log_w), MOVED_DRAWS)]
    path = LatentPath(proposal, target)
    z = in_blocks(lambda rows: path.bijection.inverse_and_logdet(rows)[0], x)
    free = z.isfinite().all(-1)
    x, z = x[free], z[free]
    gaussian = spread_of(z)
    if not len(gaussian):
        return Check("local moves", math.inf, 1.0, False, "draws have no covariance in the flow's latent space")
    rung = Rung(1.0, gaussian.scale_tril[0], FIRST_STEP, functools.partial(path.log_prob, b=1.0))
    for k in range(TRANSITIONS):
        z, rate = rung.move(z)
        rung.step = min(rung.step * math.exp((rate - ACCEPTANCE) * 2 / (1 + k / 3)), LENGTH)
    moved = in_blocks(lambda rows: path.bijection.forward_and_logdet(rows)[0], z)
    names, before = flatten(target.constrain(x))
    columns = vary(before)
    ratio, error = _shifts(before[:, columns], flatten(target.constrain(moved))[1][:, columns])
    worst = int(ratio.argmax())
    statistic, name = float(ratio[worst]), names[int(columns[worst % len(columns)])]
    which = "mean" if worst < len(columns) else "spread"
    sentence = f"Hamiltonian moves put the error of the {which} of {name} at {float(error[worst]):+.3f} sd"
    otherwise = f"{sentence}, more than chance would: mass nearby is missed"
    return Check.of("local moves", statistic, 1.0, f"{sentence} or noise", otherwise)


def _shifts(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """From h before to after (N, Q): shifts of the means of h and of |h|, as multiples of what is allowed (2Q,), and
    the errors, in sd, that they tell."""
    before, after = ((theta - before.mean(0)) / before.std(0) for theta in (before, after))
    before, after = (torch.cat([h, h.abs()], -1) for h in (before, after))
    shift, se = (after - before).mean(0), (after - before).std(0) / math.sqrt(len(before))
    offset = before - before.mean(0)
    correlation = (offset * (after - after.mean(0))).sum(0) / offset.square().sum(0)
    error = shift / (1 - correlation).clamp(1e-3, 1.0)
    z = NormalDist().inv_cdf(1 - MOVE_ERROR / (2 * before.shape[1]))
    noise = torch.where(shift == 0, 0.0, shift.abs() / (z * se))
    return torch.minimum(noise, error.abs() / MOVE).nan_to_num(nan=math.inf, posinf=math.inf), -error


def unseen_basins(proposal: DefensiveProposal, target: Target, pooled: Weights, probes: Gaussians) -> Check:
    """Whether fresh starts, the ends of whose paths are ``probes``, lead to mass that m does not cover.

    A probe at x is suspect if p(x)/m(x) is larger than any weight seen; draws of t₅ components g at the suspects tell
    whether ∫ p g/(g + m) = E_g[p/(g + m)], what m does not cover there, is less than a share BASIN of Ẑ. If none of n
    starts leads to more, the 95 % upper limit of the share of starts that do is 1 − 0.05^{1/n}.
    """
    x, n = probes.loc, probes.origin.count(Origin(Kind.FRESH))
    above = log_density(target, x) - proposal.log_prob(x) - float(pooled.log_w.max()) - MARGIN
    suspects = probes.pick((above > 0).nonzero()[:, 0].tolist())
    missed = _mass_besides(proposal, target, suspects, log_mean(pooled.log_w)) if len(suspects) else 0.0
    limit = 1 - 0.05 ** (1 / max(n, 1))
    said = f"{n} fresh starts found nothing else: missed basins hold less than {limit:.1%} of starts (95 %)"
    where = show(suspects.loc[-1], SHOWN_NUMBERS)[1:-1] if len(suspects) else ""
    otherwise = f"of {n} fresh starts some led to mass that no draw has seen, as near x = ({where})"
    return Check.of("unseen basins", missed, BASIN, said, otherwise, Role.CONDITION)


def _mass_besides(proposal: DefensiveProposal, target: Target, suspects: Gaussians, level: float) -> float:
    """∫ p g/(g + m) as a share of Ẑ = e^level, g the mixture of t components at the suspects."""
    near = Mixture(suspects.loc, suspects.scale_tril, df=MODE_DF, fixed=True)
    x = near.transform(near.noise((EACH * len(suspects),)))
    log_w = log_density(target, x) - torch.logaddexp(in_blocks(near.log_prob, x), proposal.log_prob(x))
    return math.exp(min(log_mean(log_w) - level, 0.0))


def symmetric_modes(target: Target, modes: Gaussians) -> str:
    """A sentence where modes are each other's images by permutations or sign flips of the coordinates, or ""."""
    log_p = in_blocks(target.log_prob, modes.loc)
    size, sd = modes.loc.abs().sort(-1).values, modes.scale_tril.square().sum(-1).mean(-1).sqrt()
    apart = (size[:, None] - size).abs().amax(-1) / sd
    same = (apart < SYMMETRIC) & ((log_p[:, None] - log_p).abs() < SYMMETRIC)
    count = int((same.sum(1) > 1).sum())
    if not count:
        return ""
    return f"{count} modes are permutations or sign flips of each other: labels or signs switch, averages say little"


def proper(target: Target, pooled: Weights, modes: Gaussians | None = None) -> Check:
    """Whether lines through weighted draws hold mass far out, where no draw went; along an improper direction all do.

    Lines along the coordinates and the widest axes of the first mode, whose curvature tells a combination that the data
    leave open to many digits. By Markov's inequality a proper density that has a share s of its mass that far out along
    a direction fails by it with a probability of at most s/FAR_SHARE.
    """
    x = pooled.x[resample(resampling_weights(pooled.log_w), MOVED_DRAWS)]
    axes = torch.randperm(target.dim)[:COORDINATES]
    reach = (pooled.x - x.mean(0)).abs().amax(0)
    steps, names = torch.diag(reach)[axes], target.coordinate_names()
    if modes is not None and len(modes):
        widest = torch.linalg.svd(modes.scale_tril[0])[0].mT[:AXES].to(x)
        steps = torch.cat([steps, ((pooled.x - x.mean(0)) @ widest.mT).abs().amax(0)[:, None] * widest])
    shares = far_shares(target, x[: max(LINES // len(steps), 4)], steps)
    worst = int(shares.argmax())
    step = steps[worst] / torch.linalg.vector_norm(steps[worst])
    share, name = float(shares[worst]), combination(step * step[step.abs().argmax()].sign(), names)
    sentence = f"lines through draws, along {name}, hold {share:.1%} of their mass far outside all draws"
    otherwise = f"{sentence}: the target looks improper there; give that parameter a proper prior"
    return Check.of("proper", share, FAR_SHARE, sentence, otherwise, Role.TARGET)
