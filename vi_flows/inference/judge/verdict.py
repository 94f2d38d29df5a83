"""The verdict: a decision rule on importance weights."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from ...flows.distribution import Flow, exact
from ...running import Clock
from ...targets.target import Target
from ...targets.values import check_finite
from ..estimate.evaluate import in_blocks
from ..estimate.psis import khat
from ..estimate.weights import Weights, draw_seconds, effective_sample_size, log_mean, log_mean_se, mean_elbo
from ..locate.gaussian import Gaussians
from .check import Check, Role, Verdict, claimed
from .checks import holes, rounding, weight_checks
from .necks import necks
from .probing import local_moves, proper, symmetric_modes, unseen_basins
from .proposal import DefensiveProposal

REPEATS = 5  # sets of draws, whose k̂s tell their error: T_90 belongs to so many; reported, no claim hangs on it
# from the defensive proposal: ENDS_SE and MEDIAN_SE ask for an effective sample of 7,000, so that weights may be six
# times as uneven at first, and 23 times where draws are doubled; their number is chosen for its time
FIRST_DRAWS, MOST_DRAWS = 40_000, 160_000
# that these may take, from LEAST_DRAWS draws on: 0.4 and 0.5 GB, of which checks hold a few times as much
FIRST_NUMBERS, MOST_NUMBERS = 50_000_000, 64_000_000
LEAST_DRAWS = 10_000  # first draws: with fewer no estimate could be precise enough
# of the time left to a limit, that the first draws may take: checks and moves want the rest; and the fewest of them
# then, which can refuse but hardly claim. Chosen, not measured
QUARTER, HURRIED = 0.25, 1000
# draws that take as long as local moves and lines far out do, and as necks may: lower, and a limit of time is overrun;
# higher, and claims are refused for lack of time that there was
PROBED, NECKED = 80_000, 200_000
# said above DENSE_DIMS, where there are no waves: without it a claim would seem to have looked for modes
UNSOUGHT = "no further starts looked for other modes, in so many dimensions"
# what to do with the draws, for the statuses "corrected" and "reliable": the one sentence that most users read
LEADS = (
    "use weighted draws (the default of sample): they are resampled from the proposal",
    "the flow's draws and weights can be used as they are",
)
T_90 = 2.132  # Student t, 4 degrees of freedom, 95 % point: the interval of a mean of REPEATS k̂s


@dataclass(kw_only=True, eq=False)
class Judgement:
    """All that judging a flow yields: weights of q and of the defensive proposal, and what follows from them.

    skipped: how many draws had log p NaN or +inf, and count as weight 0; the other fields are Posterior's.
    """

    verdict: Verdict
    flow_draws: Tensor
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
    clock: Clock | None = None,
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
    - local moves: Hamiltonian moves leave weighted draws as they are; proper: lines through them have no mass far out;
      necks: moves of scales together with what they spread leave them as they are.

    All: reliable. All but the fourth: corrected, by resampling from m. Else: unreliable. ``attempt`` i, the i-th fit of
    one target to be judged, spends 2^(1−i) of the first one's error rate. Draws are doubled as long as that might mend
    what fails, and ``clock``, where it has a limit, leaves the time; no claim is made where it left too little.
    k̂ of q itself, its mean and spread over five sets of ``num_draws`` draws, is reported beside the verdict.
    """
    flow, clock = exact(flow), clock or Clock(None)
    each = 0.0 if clock.limit is None else draw_seconds(flow, target)  # drawn and evaluated, seconds
    proposal, pooled, flow_weights, skipped, checks = _weighed(
        DefensiveProposal(flow, modes), target, attempt, clock, each
    )
    verdict = Verdict.of(checks + _probed(proposal, target, pooled, checks, probes, clock, each), *LEADS)
    if verdict.status != "unreliable":
        verdict = verdict.because(symmetric_modes(target, proposal.modes))
        verdict = verdict.because("" if probes is not None and len(probes) else UNSOUGHT)
    log_weights, draws = flow_weights.log_w, flow_weights.x[:num_draws]
    lacking = REPEATS * num_draws - len(log_weights)
    if lacking > 0 and not _too_long(clock, each * lacking):
        more, n = _draw_flow(flow, target, lacking)
        log_weights, skipped = torch.cat([log_weights, more.log_w]), skipped + n
        draws = torch.cat([draws, more.x])[:num_draws] if len(draws) < num_draws else draws
    size = min(num_draws, len(log_weights) // REPEATS)
    khats = [khat(log_w) for log_w in log_weights[: REPEATS * size].split(size)]
    centre, spread = statistics.fmean(khats), statistics.stdev(khats) if all(map(math.isfinite, khats)) else math.nan
    half = T_90 * spread / math.sqrt(REPEATS)
    return Judgement(
        verdict=verdict,
        flow_draws=draws,
        log_weights=log_weights[: len(draws)],
        proposal=pooled,
        khat=centre,
        khat_interval=(centre - half, centre + half),
        khat_spread=spread,
        ess=effective_sample_size(log_weights[: len(draws)]),
        elbo=mean_elbo(log_weights),
        log_evidence=log_mean(pooled.log_w),
        log_evidence_se=_evidence_se(pooled, checks),
        skipped=skipped,
    )


def _weighed(
    proposal: DefensiveProposal, target: Target, attempt: int, clock: Clock, each: float
) -> tuple[DefensiveProposal, Weights, Weights, int, list[Check]]:
    """m, adapted where need be; draws of m and of q, doubled until they pass, cannot, or take too long (``each``
    seconds); how many were skipped; the checks."""
    most = min(MOST_DRAWS, MOST_NUMBERS // target.dim)
    first = count = max(min(FIRST_DRAWS, FIRST_NUMBERS // target.dim), LEAST_DRAWS)
    if clock.limit is not None:
        count = min(first, max(int(QUARTER * clock.left() / each), HURRIED))
    pooled, flow_weights, skipped = _draw(proposal, target, count)
    adapted = proposal.adapted(pooled.x, pooled.log_q, pooled.log_w)
    if adapted is not None:
        proposal = adapted
        pooled, flow_weights, skipped = _draw(proposal, target, count)
    while True:
        growth = 2.0 ** max(math.floor(math.log2(most / len(pooled.x))), 0)
        checks, mendable = weight_checks(target, pooled, flow_weights, attempt, growth)
        if claimed(checks) or not mendable or growth == 1:
            return proposal, pooled, flow_weights, skipped, checks
        if count < first or _too_long(clock, 3 * each * len(pooled.x)):  # as many more draws, and checks of them all
            return proposal, pooled, flow_weights, skipped, [*checks, _cut(f"{len(pooled.x)} draws were too few")]
        more, more_of_flow, n = _draw(proposal, target, len(pooled.x))
        pooled, flow_weights = _concatenate(pooled, more), _concatenate(flow_weights, more_of_flow)
        skipped += n


def _too_long(clock: Clock, seconds: float) -> bool:
    return clock.limit is not None and seconds > clock.left()


def cut_short(what: str) -> Check:
    """The check that fails where max_seconds ended a stage before its time."""
    return Check("time", 1.0, 1.0, False, f"{what}; give it more time", Role.TARGET)


def _cut(what: str) -> Check:
    return cut_short(f"judging was cut short by max_seconds: {what}")


def _probed(
    proposal: DefensiveProposal,
    target: Target,
    pooled: Weights,
    checks: list[Check],
    probes: Gaussians | None,
    clock: Clock,
    each: float,
) -> list[Check]:
    """The checks that ask the target anew; those that cost something only where all else passes."""
    probed = [rounding(target, pooled), *holes(target, pooled)]
    probed += [unseen_basins(proposal, target, pooled, probes)] if probes is not None and len(probes) else []
    if claimed(checks + probed):
        if _too_long(clock, PROBED * each):
            return [*probed, _cut("local moves, lines far out and necks were not looked at")]
        probed += [local_moves(proposal, target, pooled), proper(target, pooled, proposal.modes)]
        late = _too_long(clock, NECKED * each)
        probed += [_cut("necks were not looked at")] if late else necks(target, pooled)
    return probed


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


def _evidence_se(pooled: Weights, checks: list[Check]) -> float:
    """The Monte-Carlo error of log Ẑ, and with it half of the share of Z that weights beyond those drawn may carry.

    What they carry Ẑ lacks; what lies where m has next to no draws, a neck as thin as it is long, shows in neither.
    """
    tails = next(check.statistic for check in checks if check.name == "tails")
    return math.hypot(log_mean_se(pooled.log_w), min(tails, 1.0) / 2)
