"""The verdict: a decision rule on importance weights."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..flows.distribution import Flow
from ..targets.target import Target, check_finite
from .checks import Check, holes, of_weights, rounding
from .gaussian import Gaussians
from .probing import local_moves, proper, symmetric_modes, unseen_basins
from .proposal import DefensiveProposal
from .psis import khat
from .weights import Weights, effective_sample_size, in_blocks, log_mean, log_mean_se, mean_elbo

REPEATS = 5
FIRST, LAST = 40_000, 160_000  # draws from the defensive proposal
MOST_NUMBERS = 100_000_000  # that these draws, beyond the first, may take: 0.8 GB
CORRECTED = ("mass outside q", "divergence", "own draws")  # what resampling from the proposal mends
CAVEATS = ("sds",)  # what a claim leaves out, and says so
CONDITION = "unseen basins"  # what every claim is conditional on, and says
CARRIED = (CONDITION, "proper", "rounding", "holes")  # checks of a fit that hold for what is made of its draws, too
T_90 = 2.132  # Student t, 4 degrees of freedom, 95 % point


@dataclass(frozen=True)
class Verdict:
    """status is "reliable", "corrected" or "unreliable"; reasons are sentences; checks the steps behind them."""

    status: str
    reasons: tuple[str, ...]
    checks: tuple[Check, ...] = ()

    def because(self, reason: str) -> Verdict:
        """The same verdict with one more reason, before those of the checks; itself if that is empty."""
        return replace(self, reasons=(self.reasons[0], reason, *self.reasons[1:])) if reason else self


@dataclass(kw_only=True)
class Judgement:
    """All that judging a flow yields: weights of q and of the defensive proposal, and what follows from them.

    skipped: how many draws had log p NaN or +inf, and count as weight 0; the other fields are Posterior's.
    """

    verdict: Verdict
    draws: Tensor
    log_weights: Tensor
    proposal: Weights
    khat: float
    khat_interval: tuple[float, float]
    khat_spread: float
    ess: float
    elbo: float
    log_evidence: float
    log_evidence_se: float
    skipped: int = 0


def judge(
    flow: Flow,
    target: Target,
    modes: Gaussians | None = None,
    num_draws: int = 10_000,
    attempt: int = 1,
    probes: Gaussians | None = None,
) -> Judgement:
    """Freeze q and judge it by fresh draws of q and of the defensive proposal m, in the flow's precision.

    Where a first batch shows that q misses modes, m is adapted to them, once, and the judgement is by fresh draws of
    the adapted m. The rule asks, in this order:

    - tails: weights p/m beyond those drawn, as the tail of those drawn tells, carry less than 0.02 of the integral, and
      move no mean by 0.05 sd (psis.hidden, at the upper limit of k̂);
    - precision: standard errors of means below 0.025 sd, of the probabilities at the 5/50/95 % points below
      .003/.006/.003, a fifth of what would be wrong;
    - sds: log sds are certain to 0.1, else a claim says of which it is not made;
    - mass outside q: |log Ẑ_m − log Ẑ_q| + 2 se < 0.02; divergence: KL(q‖p) = log Ẑ_m − ELBO, + 2 se < 0.05; own draws:
      means of unweighted draws of q within 0.1 sd, and those probabilities within .015/.03/.015, of the weighted ones;
    - rounding: log p is told to .01 nats in the precision it is computed in; holes: where draws had no value, NaN or
      above values.BELIEVED, less than .002 of the mass can lie;
    - unseen basins: none of ``probes``, ends of paths from starts that m was not built from, holds mass unseen;
    - local moves: Hamiltonian moves leave weighted draws as they are; proper: lines through them have no mass far out.

    All: reliable. All but the fourth: corrected, by resampling from m. Else: unreliable. ``attempt`` i, the i-th fit of
    one target to be judged, spends 2^(1−i) of the first one's error rate.
    k̂ of q itself, its mean and spread over five sets of ``num_draws`` draws, is reported beside the verdict.
    """
    proposal, pooled, own, skipped, checks = _weighed(DefensiveProposal(flow, modes), target, attempt)
    verdict = _decide(checks + _probed(proposal, target, pooled, checks, probes))
    if verdict.status != "unreliable":
        verdict = verdict.because(symmetric_modes(target, proposal.modes))
    if len(own.x) < REPEATS * num_draws:
        more, n = _draw_flow(flow, target, REPEATS * num_draws - len(own.x))
        own, skipped = _concatenate(own, more), skipped + n
    khats = [khat(log_w) for log_w in own.log_w[: REPEATS * num_draws].split(num_draws)]
    centre, spread = statistics.fmean(khats), statistics.stdev(khats) if all(map(math.isfinite, khats)) else math.nan
    half = T_90 * spread / math.sqrt(REPEATS)
    log_weights = own.log_w[:num_draws]
    return Judgement(
        verdict=verdict,
        draws=own.x[:num_draws],
        log_weights=log_weights,
        proposal=pooled,
        khat=centre,
        khat_interval=(centre - half, centre + half),
        khat_spread=spread,
        ess=effective_sample_size(log_weights),
        elbo=mean_elbo(own.log_w),
        log_evidence=log_mean(pooled.log_w),
        log_evidence_se=_evidence_se(pooled, checks),
        skipped=skipped,
    )


def _weighed(
    proposal: DefensiveProposal, target: Target, attempt: int
) -> tuple[DefensiveProposal, Weights, Weights, int, list[Check]]:
    """m, adapted where need be; draws of m and of q, doubled until they pass; how many were skipped; the checks."""
    pooled, own, skipped = _draw(proposal, target, FIRST)
    better = proposal.adapted(pooled.x, pooled.log_q, pooled.log_w)
    if better is not None:
        proposal = better
        pooled, own, skipped = _draw(proposal, target, FIRST)
    while True:
        checks = of_weights(target, pooled, own, attempt)
        if 2 * len(pooled.x) > min(LAST, MOST_NUMBERS // target.dim) or _claimed(checks):
            return proposal, pooled, own, skipped, checks
        more, more_own, n = _draw(proposal, target, len(pooled.x))
        pooled, own, skipped = _concatenate(pooled, more), _concatenate(own, more_own), skipped + n


def _probed(
    proposal: DefensiveProposal, target: Target, pooled: Weights, checks: list[Check], probes: Gaussians | None
) -> list[Check]:
    """The checks that ask the target anew; those that cost something only where all else passes."""
    found = [rounding(target, pooled), *holes(target, pooled)]
    found += [unseen_basins(proposal, target, pooled, probes)] if probes is not None and len(probes) else []
    if _claimed(checks + found):
        found += [local_moves(proposal, target, pooled), proper(target, pooled)]
    return found


def _draw(proposal: DefensiveProposal, target: Target, count: int) -> tuple[Weights, Weights, int]:
    """Weighted draws of m; those among them that q made, weighted against q; how many were skipped."""
    x, log_m, log_q, n = proposal.draw(count)
    log_p, skipped = check_finite(in_blocks(target.log_prob, x), x, target)
    return Weights(x, log_m, log_p), Weights(x[:n], log_q[:n], log_p[:n]), skipped


def _draw_flow(flow: Flow, target: Target, count: int) -> tuple[Weights, int]:
    def draw(noise: Tensor) -> Tensor:
        x, log_q = flow().from_noise(noise)
        return torch.cat([x, log_q.unsqueeze(-1)], -1)

    drawn = in_blocks(draw, flow.base.noise((count,)))
    x, log_q = drawn[:, :-1], drawn[:, -1]
    log_p, skipped = check_finite(in_blocks(target.log_prob, x), x, target)
    return Weights(x, log_q, log_p), skipped


def _concatenate(a: Weights, b: Weights) -> Weights:
    return Weights(torch.cat([a.x, b.x]), torch.cat([a.log_q, b.log_q]), torch.cat([a.log_p, b.log_p]))


def _claimed(checks: list[Check]) -> bool:
    """Whether weighted draws are as they should be, but for what a claim leaves out."""
    return all(c.passed for c in checks if c.name not in (*CORRECTED, *CAVEATS))


def _evidence_se(pooled: Weights, checks: list[Check]) -> float:
    """The Monte-Carlo error of log Ẑ, and with it half of the share of Z that weights beyond those drawn may carry.

    What they carry Ẑ lacks; what lies where m has next to no draws, a neck as thin as it is long, shows in neither.
    """
    tails = next(check.statistic for check in checks if check.name == "tails")
    return math.hypot(log_mean_se(pooled.log_w), min(tails, 1.0) / 2)


def _decide(checks: list[Check]) -> Verdict:
    failed = [c for c in checks if not c.passed]
    if not _claimed(checks):
        status, lead = "unreliable", "do not rely on these draws"
    elif any(c.name in CORRECTED for c in failed):
        status, lead = "corrected", "use weighted draws (the default of sample): they are resampled from the proposal"
    else:
        status, lead = "reliable", "the flow's draws and weights can be used as they are"
    said = [c for c in checks if c.name == CONDITION and c.passed and status != "unreliable"]
    shown = [*failed, *said] if failed else checks
    return Verdict(status, (lead, *(c.sentence for c in shown)), tuple(checks))
