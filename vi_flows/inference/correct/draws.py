"""Draws that carry errors of their own, of runs or of chains: their estimates, and what is judged with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...running import seeded
from ...targets.target import Target
from ..bounds import EVIDENCE_SE
from ..estimate.quantities import Estimates, carrying, flatten, vary
from ..estimate.weights import Weights, log_mean, log_mean_se
from ..judge.check import Check, Role, Verdict
from ..judge.fitted import Fitted
from ..judge.necks import Walk, necks, scale_moves

BRIDGED = 200  # rounds of a fixed point: each leaves the share of the error by which m and p overlap too little


def quantities_of(target: Target, draws: Weights) -> tuple[list[str], Tensor, Tensor]:
    """Names and values (N, Q) of the quantities that vary over weighted draws, and their places among all (Q,)."""
    names, theta = flatten(target.constrain(draws.x))
    columns = vary(theta[carrying(draws.log_w)])
    return [names[i] for i in columns.tolist()], theta[:, columns], columns


def with_errors(values: Estimates, theta: Tensor, error: Callable[[Tensor], Tensor]) -> Estimates:
    """The estimates of quantities theta (N, Q) with standard errors of means of h (N, Q) by error(h) (Q,)."""
    return dataclasses.replace(
        values,
        mean_se=error(theta),
        log_sd_se=error(((theta - values.mean) / values.sd).square() / 2),
        probability_se=torch.stack([error((theta <= point).to(theta.dtype)) for point in values.quantiles]),
    )


def with_draws(
    posterior: Fitted,
    method: str,
    draws: Weights,
    checks: Sequence[Check],
    evidence: tuple[float, float],
    note: str,
    lead: str,
) -> Fitted:
    """The posterior with these draws in place of the proposal's, judged by these checks.

    evidence: log Ẑ and its standard error. note: what was done; it takes the place of one on an earlier ``method``.
    """
    return dataclasses.replace(
        posterior,
        verdict=Verdict.of(checks, lead),
        proposal=draws,
        log_evidence=evidence[0],
        log_evidence_se=evidence[1],
        notes=(*(n for n in posterior.notes if not n.startswith(f"{method}:")), f"{method}: {note}"),
        timing=dict(posterior.timing),
        stored=None,
    )


def evidence(se: float) -> Check:
    sentence = f"the standard error of log Ẑ over the runs is {se:.4f}"
    return Check.of("evidence", se, EVIDENCE_SE, sentence, f"{sentence}, not below {EVIDENCE_SE}")


def replicate_se(log_z: Tensor) -> float:
    """Standard error of log mean Ẑ_r over R replicates log_z (R,): sd(Ẑ)/(mean Ẑ √R)."""
    return log_mean_se(log_z) * math.sqrt(len(log_z) / (len(log_z) - 1))


def bridge(log_w: Tensor, log_w_of_p: Tensor) -> float:
    r"""log Z from log-weights log p − log m of draws of m (N,) and of draws of p (M,) (Meng & Wong 1996): the Z where

    .. math:: Z = \frac{\text{mean}_m\, w / (N w + M Z)}{\text{mean}_p\, 1 / (N w + M Z)}.

    Where m never draws, w is large, and such draws of p count as nothing on either side: what m leaves out does not
    bias Z, as long as p's draws have it.
    """
    n, m = math.log(len(log_w)), math.log(len(log_w_of_p))
    log_z = log_w.new_tensor(log_mean(log_w))
    for _ in range(BRIDGED):
        of_m = log_w - torch.logaddexp(n + log_w, m + log_z)
        log_z = of_m.logsumexp(0) - n - (-torch.logaddexp(n + log_w_of_p, m + log_z)).logsumexp(0) + m
    return float(log_z)


def walk_of_necks(posterior: Fitted) -> Walk | None:
    """Moves of scales, where the weighted draws do not reach where a scale is small (or large); else None."""
    target, draws = posterior.target, posterior.proposal
    with seeded(0):  # whatever is drawn here, the rest is what it would be without
        checks = [c for c in posterior.verdict.checks if c.role is Role.NECK] or necks(target, draws)
        return None if all(check.passed for check in checks) else scale_moves(target, draws)
