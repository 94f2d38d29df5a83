"""The verdict: a decision rule on importance weights."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..flows.distribution import Flow
from ..targets.target import Target, check_finite
from .gaussian import Gaussians
from .proposal import DefensiveProposal
from .psis import khat, khat_upper, smooth
from .quantities import PROBABILITIES, Estimates, carrying, estimate, flatten, vary
from .weights import Weights, effective_sample_size, in_blocks, log_mean, log_mean_se, mean_elbo

REPEATS = 5
FIRST, LAST = 40_000, 160_000  # draws from the defensive proposal
KHAT_BOUND = 0.7
MEAN_SE, LOG_SD_SE, PROBABILITY_SE = 0.025, 0.025, 0.0025
MISSING_MASS = 0.02
DIVERGENCE = 0.05  # nats; a missed correlation of .3 costs as much
OWN = 20_000  # draws of q that are compared with the weighted ones, unweighted
SHIFT, SHIFTS = 0.1, (0.015, 0.03, 0.015)  # by which their means (in sd) and probabilities may differ
CORRECTED = ("mass outside q", "divergence", "own draws")  # what resampling from the proposal mends
TAILED = 50  # quantities whose own tails are fitted: those with the largest single contributions
T_90 = 2.132  # Student t, 4 degrees of freedom, 95 % point


@dataclass(frozen=True)
class Check:
    """One step of the rule: passed if statistic < bound; sentence says it in words."""

    name: str
    statistic: float
    bound: float
    passed: bool
    sentence: str


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


def judge(flow: Flow, target: Target, modes: Gaussians | None = None, num_draws: int = 10_000) -> Judgement:
    """Freeze q and judge it by fresh draws of q and of the defensive proposal m, in the flow's precision.

    Where a first batch shows that q misses modes, m is adapted to them, once, and the judgement is by fresh draws of
    the adapted m.

    Tails: the upper limits of k̂ of w = p/m, and of w·|θ| and w·θ² of the reported quantities (standardised), are
    below 0.7. Precision: standard errors of means, log sds and probabilities at the 5/50/95 % points. Mass outside q:
    |log Ẑ_m − log Ẑ_q| + 2 se < 0.02. Divergence: KL(q‖p) = log Ẑ_m − ELBO, + 2 se < 0.05. Own draws: means of
    unweighted draws of q within 0.1 sd, and probabilities below the 5/50/95 % points within .015/.03/.015, of the
    weighted ones. All: reliable; the first two: corrected (by resampling from m).
    k̂ of q itself, its mean and spread over five sets of ``num_draws`` draws, is reported beside the verdict.
    """
    proposal = DefensiveProposal(flow, modes)
    pooled, own, skipped = _draw(proposal, target, FIRST)
    better = proposal.adapted(pooled.x, pooled.log_q, pooled.log_w)
    if better is not None:
        proposal = better
        pooled, own, skipped = _draw(proposal, target, FIRST)
    while True:
        checks = _checks(target, pooled, own)
        if len(pooled.x) >= LAST or all(c.passed for c in checks if c.name not in CORRECTED):
            break
        more, more_own, n = _draw(proposal, target, len(pooled.x))
        pooled, own, skipped = _concatenate(pooled, more), _concatenate(own, more_own), skipped + n
    if len(own.x) < REPEATS * num_draws:
        more, n = _draw_flow(flow, target, REPEATS * num_draws - len(own.x))
        own, skipped = _concatenate(own, more), skipped + n
    khats = [khat(log_w) for log_w in own.log_w[: REPEATS * num_draws].split(num_draws)]
    centre, spread = statistics.fmean(khats), statistics.stdev(khats) if all(map(math.isfinite, khats)) else math.nan
    half = T_90 * spread / math.sqrt(REPEATS)
    log_weights = own.log_w[:num_draws]
    return Judgement(
        verdict=_decide(checks),
        draws=own.x[:num_draws],
        log_weights=log_weights,
        proposal=pooled,
        khat=centre,
        khat_interval=(centre - half, centre + half),
        khat_spread=spread,
        ess=effective_sample_size(log_weights),
        elbo=mean_elbo(own.log_w),
        log_evidence=log_mean(pooled.log_w),
        log_evidence_se=log_mean_se(pooled.log_w),
        skipped=skipped,
    )


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


def _checks(target: Target, pooled: Weights, own: Weights) -> list[Check]:
    log_w = pooled.log_w
    alive = carrying(log_w)  # elsewhere the model may fail or overflow, and its quantities be NaN or infinite
    names, theta = flatten(target.constrain(pooled.x[alive]))
    columns = vary(theta)
    if len(alive) < 5 or not len(columns):
        return [
            Check("tails", math.inf, KHAT_BOUND, False, "a few draws carry all the weight: the target may be improper")
        ]
    names, theta = [names[i] for i in columns.tolist()], theta[:, columns]
    values = estimate(theta, log_w[alive])
    quantities = [_quantity_tails(names, theta, values, log_w[alive]), precision(names, values)]
    mine = flatten(target.constrain(own.x[:OWN]))[1][:, columns]
    own_fit = [_mass(log_w, own.log_w), _divergence(log_w, own.log_w), _own_draws(names, mine, values)]
    return [_tails(log_w), *quantities, *own_fit]


def _tails(log_w: Tensor) -> Check:
    value = khat(log_w)
    upper = khat_upper(value, len(log_w))
    passed = upper < KHAT_BOUND
    sentence = f"k̂ of the weights against the defensive proposal is {value:.2f} (upper limit {upper:.2f}"
    sentence += ")" if passed else f", not below {KHAT_BOUND}): a few draws carry the estimates"
    return Check("tails", upper, KHAT_BOUND, passed, sentence)


def _quantity_tails(names: list[str], theta: Tensor, values: Estimates, log_w: Tensor) -> Check:
    """The largest upper k̂ of w·|θ| and w·θ², θ standardised, over the quantities most led by single draws."""
    log_h = ((theta - values.mean) / values.sd).abs().log()
    contribution = log_w[:, None] + 2 * log_h
    lead = (contribution.amax(0) - contribution.logsumexp(0)).argsort(descending=True)[:TAILED].tolist()
    worst, where = -math.inf, ""
    for i in lead:
        for power in (1, 2):
            upper = khat_upper(smooth(log_w + power * log_h[:, i])[1], len(log_w))
            if upper > worst:
                worst, where = upper, f"the {'mean' if power == 1 else 'variance'} of {names[i]}"
    passed = worst < KHAT_BOUND
    sentence = f"the heaviest tail among reported quantities is that of {where} (upper k̂ {worst:.2f}"
    sentence += ")" if passed else f", not below {KHAT_BOUND})"
    return Check("tails of quantities", worst, KHAT_BOUND, passed, sentence)


def precision(names: list[str], values: Estimates) -> Check:
    """The largest standard error as a multiple of what is asked for."""
    kinds = {
        "the mean": values.mean_se / values.sd / MEAN_SE,
        "the sd": values.log_sd_se / LOG_SD_SE,
        "a quantile": values.probability_se.amax(0) / PROBABILITY_SE,
    }
    kind, ratio = max(kinds.items(), key=lambda item: float(item[1].nan_to_num(math.inf).max()))
    ratio = ratio.nan_to_num(math.inf)
    worst, name = float(ratio.max()), names[int(ratio.argmax())]
    passed = worst < 1
    sentence = f"the least precise estimate, {kind} of {name}, has {worst:.2f} times the standard error asked for"
    return Check("precision", worst, 1.0, passed, sentence)


def _mass(log_w: Tensor, log_w_q: Tensor) -> Check:
    difference = log_mean(log_w) - log_mean(log_w_q)
    statistic = abs(difference) + 2 * math.hypot(log_mean_se(log_w), log_mean_se(log_w_q))
    passed = statistic < MISSING_MASS
    sentence = f"log Ẑ by the defensive proposal and by q differ by {difference:+.4f} (with 2 se: {statistic:.4f}"
    sentence += (
        ")" if passed else f", not below {MISSING_MASS}): q misses mass, or its own weights are too uneven to tell"
    )
    return Check("mass outside q", statistic, MISSING_MASS, passed, sentence)


def _divergence(log_w: Tensor, log_w_q: Tensor) -> Check:
    """KL(q‖p): what q has wrong in all quantities together, dependence among them included."""
    finite = log_w_q[log_w_q > -math.inf]
    spread = float(finite.std()) if len(finite) > 1 else math.inf
    gap = log_mean(log_w) - mean_elbo(log_w_q)
    statistic = gap + 2 * math.hypot(spread / math.sqrt(len(log_w_q)), log_mean_se(log_w))
    passed = statistic < DIVERGENCE
    sentence = f"KL(q‖p), the gap of the ELBO, is {gap:.3f} (with 2 se: {statistic:.3f}"
    sentence += ")" if passed else f", not below {DIVERGENCE})"
    return Check("divergence", statistic, DIVERGENCE, passed, sentence)


def _own_draws(names: list[str], theta: Tensor, values: Estimates) -> Check:
    """The largest difference between q's unweighted draws and the estimates, as a multiple of what is allowed."""
    theta = theta[theta.isfinite().all(-1)]
    mean = (theta.mean(0) - values.mean).abs() / values.sd / SHIFT
    below = (theta[:, None] <= values.quantiles).to(theta.dtype).mean(0)
    off = (below - torch.tensor(PROBABILITIES).to(below)[:, None]).abs() / torch.tensor(SHIFTS).to(below)[:, None]
    ratio = torch.maximum(mean, off.amax(0)).nan_to_num(math.inf)
    worst, name = float(ratio.max()), names[int(ratio.argmax())]
    passed = worst < 1
    sentence = f"draws of q, unweighted, differ most in {name}, by {worst:.2f} times what is allowed"
    return Check("own draws", worst, 1.0, passed, sentence)


def _decide(checks: list[Check]) -> Verdict:
    failed = [c for c in checks if not c.passed]
    if not failed:
        status, lead = "reliable", "the flow's draws and weights can be used as they are"
    elif all(c.name in CORRECTED for c in failed):
        status, lead = "corrected", "use weighted draws (the default of sample): they are resampled from the proposal"
    else:
        status, lead = "unreliable", "do not rely on these draws"
    shown = failed or checks
    return Verdict(status, (lead, *(c.sentence for c in shown)), tuple(checks))
