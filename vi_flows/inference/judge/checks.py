"""What the verdict asks of importance weights: of those of the defensive proposal m, and of q's beside them."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from ...targets.target import Target
from ...targets.values import BELIEVED, as_computed, edges, precision_of, show
from ..bounds import (
    DIVERGENCE,
    ENDS_SE,
    ENDS_SHIFT,
    HEAVIEST,
    HIDDEN,
    LOG_SD,
    MEAN_SE,
    MEAN_UNSEEN,
    MEDIAN_SE,
    MEDIAN_SHIFT,
    MISSING_MASS,
    ROUNDED,
    SHIFT,
    UNSEEN,
)
from ..estimate.evaluate import in_blocks
from ..estimate.psis import hidden, khat, khat_upper
from ..estimate.quantities import PROBABILITIES, SORTED_COLUMNS, Estimates, carrying, estimate, flatten, vary
from ..estimate.weights import Weights, log_mean, log_mean_se, mean_elbo
from .check import Check, Role

# of probabilities at the 5, 50 and 95 % points: see bounds.py
PROBABILITY_SE = torch.tensor([[ENDS_SE], [MEDIAN_SE], [ENDS_SE]], dtype=torch.float64)
SHIFTS = (ENDS_SHIFT, MEDIAN_SHIFT, ENDS_SHIFT)  # by which probabilities there may differ: see bounds.py
# of q, compared unweighted with the weighted ones: probabilities are then certain to about a tenth of SHIFTS
OWN_DRAWS = 20_000
# quantities whose own tails are fitted, those with the largest single contributions: two Pareto fits each. Chosen, not
# measured: with fewer the heavy tail of a further one is not seen
TAILED = 50
NAMED_QUANTITIES = 4  # in one sentence, the others are counted: for reading only
# standard errors at the first attempt: of k̂, to its upper 90 % limit, and of what q is compared by, to 97.7 %; higher,
# and right fits are refused more often; lower, and chance claims
UPPER, TWO = 1.28, 2.0


def stricter(multiple: float, attempt: int) -> float:
    """The multiple of a standard error at which attempt i errs 2^(i−1) times less often than attempt 1 does.

    Judging one fit after the other until one passes is optional stopping: together the attempts err at most twice as
    often as the first.
    """
    error = 1 - NormalDist().cdf(multiple)
    return -NormalDist().inv_cdf(error / 2 ** (attempt - 1))


def weight_checks(
    target: Target, pooled: Weights, flow_weights: Weights, attempt: int = 1, growth: float = 1.0
) -> tuple[list[Check], bool]:
    """All that follows from weighted draws of m (pooled) and of q (flow_weights), and whether ``growth`` times as many
    of them might mend what fails. Where they cannot, the tails of single quantities, which cost most, are left out."""
    log_w = pooled.log_w - pooled.log_w.logsumexp(0)
    alive = carrying(log_w)  # elsewhere the model may fail or overflow, and its quantities be NaN or infinite
    names, theta = flatten(target.constrain(pooled.x[alive] if len(alive) < len(log_w) else pooled.x))
    columns = vary(theta)
    if len(alive) < 5 or not len(columns):
        said = "a few draws carry all the weight: the target may be improper"
        return [Check("tails", math.inf, UNSEEN, False, said)], False
    if len(columns) < len(names):
        names, theta = [names[i] for i in columns.tolist()], theta[:, columns]
    values = estimate(theta, log_w[alive])
    upper, two = stricter(UPPER, attempt), stricter(TWO, attempt)
    checks, unseen = [tails(log_w, upper), precision(names, values)], torch.zeros(2, len(names)).to(theta)
    mendable = _mendable(log_w, checks[1], growth)
    if mendable or growth <= 1:
        unseen = unseen_moments(theta, values, log_w[alive], len(log_w), upper)
        checks.insert(1, tails_of_means(names, unseen))
    unweighted = flatten(target.constrain(flow_weights.x[:OWN_DRAWS]))[1][:, columns]
    return [
        *checks,
        sds(names, values, unseen),
        mass(pooled.log_w, flow_weights.log_w, two),
        divergence(pooled.log_w, flow_weights.log_w, two),
        own_draws(names, unweighted, values),
    ], mendable


def _mendable(log_w: Tensor, precise: Check, growth: float) -> bool:
    """Whether ``growth`` times the draws could do, by precision and by the tails of weights log_w that sum to 1.

    Standard errors √Σw²/Σw fall no faster than as 1/draws, and that only if no weight like the heaviest came again.
    What is hidden beyond S draws falls as S^(k−1), k the shape of the tail: its lower limit is taken.
    """
    shape = khat_upper(khat(log_w), len(log_w), -TWO)
    share = hidden(log_w, min(shape, HEAVIEST)) * growth ** (min(shape, HEAVIEST) - 1)
    return precise.statistic < growth and share < UNSEEN


def tails(log_w: Tensor, multiple: float = UPPER) -> Check:
    """The share of ∫p that weights beyond the largest ones carry, at the upper limit of k̂: see psis.hidden."""
    upper = khat_upper(khat(log_w), len(log_w), multiple)
    share = hidden(log_w - log_w.logsumexp(0), min(upper, HEAVIEST))
    sentence = f"weights beyond those drawn carry up to {share:.2%} of the integral (upper limit of k̂ {upper:.2f}"
    otherwise = f"{sentence}), not below {UNSEEN:.0%}: a few draws carry the estimates"
    return Check.of("tails", share, UNSEEN, f"{sentence})", otherwise)


def unseen_moments(theta: Tensor, values: Estimates, log_w: Tensor, draws: int, multiple: float = UPPER) -> Tensor:
    """What weights beyond those drawn may add to the means, in sd, and to the log sds: (2, Q).

    psis.hidden of w|h| and of w h²/2, h = (θ − mean)/sd, with weights log_w (S,) that sum to 1; 0 for all but the
    TAILED quantities in which single draws lead most. draws: of m, those without weight included.
    """

    def log_h(columns: slice) -> Tensor:
        return ((theta[:, columns] - values.mean[columns]) / values.sd[columns]).abs().log()

    def leads(columns: slice) -> Tensor:
        contribution = log_w[:, None] + 2 * log_h(columns)
        return contribution.amax(0) - contribution.logsumexp(0)

    parts = [slice(i, i + SORTED_COLUMNS) for i in range(0, theta.shape[1], SORTED_COLUMNS)]
    lead = torch.cat([leads(part) for part in parts]).argsort(descending=True)[:TAILED].tolist()
    unseen = torch.zeros(2, theta.shape[1], dtype=theta.dtype)
    for i in lead:
        size = log_h(slice(i, i + 1))[:, 0]
        for power in (1, 2):
            terms = log_w + power * size
            unseen[power - 1, i] = hidden(terms, khat_upper(khat(terms), draws, multiple)) / power
    return unseen


def tails_of_means(names: list[str], unseen: Tensor) -> Check:
    """By how much weights beyond those drawn may move a mean, in sd, by unseen (2, Q) of means and log sds.

    Where neither is bounded, as for a Cauchy, there may be no mean to move: :func:`sds` leaves it out of the claim.
    """
    worst, name = _worst(torch.where(_endless(unseen), 0.0, unseen[0]), names)
    sentence = f"weights beyond those drawn move means by up to {worst:.3f} sd ({name})"
    return Check.of("tails of means", worst, MEAN_UNSEEN, sentence, f"{sentence}, not below {MEAN_UNSEEN}")


def precision(names: list[str], values: Estimates) -> Check:
    """The largest standard error, of means and of probabilities, as a multiple of what is asked for."""
    allowed = PROBABILITY_SE.to(values.probability_se)
    kinds = {"the mean": values.mean_se / values.sd / MEAN_SE, "a quantile": (values.probability_se / allowed).amax(0)}
    kind, ratio = max(kinds.items(), key=lambda item: _worst(item[1], names)[0])
    worst, name = _worst(ratio, names)
    sentence = f"the least precise estimate, {kind} of {name}, has {worst:.2f} times the standard error asked for"
    return Check.of("precision", worst, 1.0, sentence, sentence)


def sds(names: list[str], values: Estimates, unseen: Tensor | None = None) -> Check:
    """How far log sds may be off: by what no weight has shown, unseen (2, Q) of means and log sds, and by 2 se."""
    error = TWO * values.log_sd_se + (0.0 if unseen is None else unseen[1])
    worst, name = _worst(error, names)
    said = f"the least certain log sd, of {name}, is off by less than {worst:.3f}"
    otherwise = f"tails are too heavy to tell the sd of {_listed(names, ~(error < LOG_SD))} to {LOG_SD:.0%}: "
    otherwise += "rely on quantiles there, not on sds"
    if unseen is not None and bool(_endless(unseen).any()):
        otherwise += f"; nor, for {_listed(names, _endless(unseen))}, on means, which may not exist"
    return Check.of("sds", worst, LOG_SD, said, otherwise, Role.CAVEAT)


def _endless(unseen: Tensor) -> Tensor:
    """Of which quantities (Q,) neither mean nor sd is bounded by what has been drawn."""
    return unseen.isinf().all(0)


def _listed(names: list[str], which: Tensor) -> str:
    """The first few of the names that a mask (Q,) picks, and how many more."""
    many = [names[i] for i in which.nonzero()[:, 0].tolist()]
    return ", ".join(many[:NAMED_QUANTITIES]) + (
        f" and {len(many) - NAMED_QUANTITIES} more" if len(many) > NAMED_QUANTITIES else ""
    )


def rounding(target: Target, pooled: Weights) -> Check:
    """To how many nats log p is told at the draws that carry weight: eps · E|log p|, eps of what it is computed in."""
    alive = carrying(pooled.log_w)
    if not len(alive):
        return Check("rounding", math.inf, ROUNDED, False, "no draw has a log p to be told", Role.TARGET)
    level = float(pooled.log_w[alive].softmax(0) @ pooled.log_p[alive].abs())
    dtype = precision_of(target, pooled.x[alive])
    error, precision = torch.finfo(dtype).eps * level, f"{dtype}".removeprefix("torch.")
    sentence = f"log p, near {level:.2g} in size, is told to {error:.1g} nats by {precision}"
    wider = "" if dtype == torch.float64 else ", or compute it in float64 throughout"
    otherwise = f"{sentence}, not to {ROUNDED}: subtract a constant from it before it is rounded{wider}"
    return Check.of("rounding", error, ROUNDED, sentence, otherwise, Role.TARGET)


def holes(target: Target, pooled: Weights) -> list[Check]:
    """Where draws of m had no value to believe: how much of p has a log p below that at which such a region begins.

    What lies in it cannot be known; but where log p falls on, it is no more than that. None where all had values.
    """
    lost = (~(pooled.log_p > -math.inf)).nonzero()[:, 0]
    value = in_blocks(lambda rows: as_computed(target, rows), pooled.x[lost]) if len(lost) else pooled.log_p[:0]
    log_p = pooled.log_p.index_put((lost,), value)
    bad = ~(log_p <= BELIEVED)
    rows, edge, _ = edges(target, pooled.x, log_p, bad)
    if not len(rows):
        return []
    i = int(edge.argmax())
    weight = pooled.log_w.softmax(0).nan_to_num(0.0)
    share = float(weight[pooled.log_p < edge[i]].sum())
    where = f"log p is {float(log_p[rows[i]]):.3g} at x = {show(pooled.x[rows[i]])}"
    said = f"{where}, beyond all but {share:.2%} of the mass"
    otherwise = f"{where}, beside draws that weigh ({share:.1%} of the mass may lie there): repair the density there"
    return [Check.of("holes", share, HIDDEN, said, otherwise, Role.TARGET)]


def mass(log_w: Tensor, log_w_q: Tensor, multiple: float = TWO) -> Check:
    difference = log_mean(log_w) - log_mean(log_w_q)
    statistic = abs(difference) + multiple * math.hypot(log_mean_se(log_w), log_mean_se(log_w_q))
    sentence = f"log Ẑ by the defensive proposal and by q differ by {difference:+.4f} (with 2 se: {statistic:.4f}"
    otherwise = f"{sentence}, not below {MISSING_MASS}): q misses mass, or its own weights are too uneven to tell"
    return Check.of("mass outside q", statistic, MISSING_MASS, f"{sentence})", otherwise, Role.FLOW)


def divergence(log_w: Tensor, log_w_q: Tensor, multiple: float = TWO) -> Check:
    """KL(q‖p): what q has wrong in all quantities together, dependence among them included."""
    finite = log_w_q[log_w_q > -math.inf]
    spread = float(finite.std()) if len(finite) > 1 else math.inf
    gap = log_mean(log_w) - mean_elbo(log_w_q)
    statistic = gap + multiple * math.hypot(spread / math.sqrt(len(log_w_q)), log_mean_se(log_w))
    sentence = f"KL(q‖p), the gap of the ELBO, is {gap:.3f} (with 2 se: {statistic:.3f}"
    otherwise = f"{sentence}, not below {DIVERGENCE})"
    return Check.of("divergence", statistic, DIVERGENCE, f"{sentence})", otherwise, Role.FLOW)


def own_draws(names: list[str], theta: Tensor, values: Estimates) -> Check:
    """The largest difference between q's unweighted draws and the estimates, as a multiple of what is allowed."""
    theta = theta[theta.isfinite().all(-1)]
    mean = (theta.mean(0) - values.mean).abs() / values.sd / SHIFT
    below = torch.stack([(theta <= point).to(theta.dtype).mean(0) for point in values.quantiles])
    off = (below - torch.tensor(PROBABILITIES).to(below)[:, None]).abs() / torch.tensor(SHIFTS).to(below)[:, None]
    worst, name = _worst(torch.maximum(mean, off.amax(0)), names)
    sentence = f"draws of q, unweighted, differ most in {name}, by {worst:.2f} times what is allowed"
    return Check.of("own draws", worst, 1.0, sentence, sentence, Role.FLOW)


def _worst(ratio: Tensor, names: list[str]) -> tuple[float, str]:
    """The largest (NaN counts as infinite), and whose it is."""
    ratio = ratio.nan_to_num(nan=math.inf, posinf=math.inf)
    return float(ratio.max()), names[int(ratio.argmax())]
