"""Corrections of a fit: draws resampled by its weights; annealed ones, where weights alone are not enough."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any

import torch
from torch import Tensor

from ..arguments import whole
from ..targets.target import Target
from .annealing import KEPT, MOST_RUNGS, Path, Run, Rung, pilot, run
from .checks import KHAT_BOUND, MISSING_MASS, Check, precision, sds
from .clock import Clock
from .fit import threads as torch_threads
from .initialise import DENSE_DIMS
from .judge import CARRIED, CAVEATS, CORRECTED, Verdict
from .necks import NECKS, necks
from .posterior import Posterior, seeded
from .progress import Progress
from .proposal import DefensiveProposal
from .propriety import IMPROPER
from .psis import khat, khat_upper, resampling_weights
from .quantities import Estimates, carrying, estimate, flatten, vary
from .quantities import resample as by_weight
from .weights import Weights, effective_sample_size, log_mean, log_mean_se

EVIDENCE_SE = 0.05
AGREEMENT = 3.0  # standard errors
ANNEALED, RUNGS = (1000, 8), 40  # particles, replicates and temperatures at most, with which a fit mends its weights
UNEVEN = 0.9  # of a step's particles, lost to uneven weights


def resample(posterior: Posterior, n: int, seed: int | None) -> Posterior:
    """n equally weighted draws in place of the proposal's; see :meth:`Posterior.resample`."""
    whole("n", n, 100)
    draws = posterior.proposal
    with seeded(seed):
        index = by_weight(resampling_weights(draws.log_w), n)
    log_p = draws.log_p[index]
    verdict = posterior.verdict
    if verdict.status == "reliable":
        verdict = dataclasses.replace(verdict, status="corrected")
    note = f"resample: {n} equally weighted draws, of which {len(index.unique())} differ."
    return dataclasses.replace(
        posterior,
        verdict=verdict.because("the weighted draws are resampled from the proposal by their importance weights"),
        proposal=Weights(draws.x[index], log_p - posterior.log_evidence, log_p),
        notes=(*posterior.notes, note),
        settings={**posterior.settings, "resample": {"n": n, "seed": seed}},
        stored=None,
    )


def anneal(
    posterior: Posterior,
    particles: int,
    replicates: int,
    seed: int | None,
    progress: bool,
    threads: int | None,
    rungs: int = MOST_RUNGS,
    seconds: float = math.inf,
) -> Posterior:
    """Sequential Monte Carlo from the defensive proposal m to p, along m^(1−b) p^b; see :meth:`Posterior.anneal`.

    A pilot run chooses temperatures and kernels, which no later run changes: so each run's Ẑ, the product of the mean
    weights of its steps, is unbiased (Del Moral, Doucet & Jasra 2006). Draws of run r weigh Ẑ_r each.
    seconds: where the pilot tells that all would take longer, or it does, a ValueError says so.
    """
    whole("particles", particles, 100)
    whole("replicates", replicates, 4)
    if threads is not None:
        whole("threads", threads)
    if posterior.target is None:
        raise ValueError("anneal: this posterior has no target; load it with vf.load(path, target=...)")
    began, flow = time.monotonic(), posterior._flow("anneal")
    with seeded(seed), torch_threads(threads), torch.no_grad(), Progress(progress) as bar:
        path = Path(DefensiveProposal(flow, posterior.modes), posterior.target)
        bar.stage("pilot")
        schedule = pilot(path, particles, rungs, replicates, functools.partial(_afford, seconds))
        _sees_something(posterior, schedule)
        bar.stage("annealing", replicates)
        runs = []
        for _ in range(replicates):
            runs.append(run(path, schedule, particles))
            bar.advance()
            _afford(seconds, time.monotonic() - began)
        result = _result(posterior, schedule, runs)
    how = {"particles": particles, "replicates": replicates, "seed": seed, **_recorded(schedule, runs)}
    result.settings["anneal"], result.timing["annealing"] = how, time.monotonic() - began
    return result


def _afford(seconds: float, needed: float) -> None:
    if needed > seconds:
        raise ValueError(
            f"annealing would take about {needed:.0f} s or more, and is given {seconds:.0f} s: "
            "posterior.anneal(progress=True) takes the time that it needs"
        )


def _sees_something(posterior: Posterior, schedule: list[Rung]) -> None:
    """Raise where weights failed but the pilot went from m to p in one step: it has not drawn what is wrong with m, and
    runs from there would not either, and agree with each other."""
    failed = [c.name for c in posterior.verdict.checks if not c.passed and c.name not in (*CORRECTED, *CAVEATS)]
    if len(schedule) == 1 and posterior.verdict.status == "unreliable":
        raise ValueError(
            f"annealing would repeat what is wrong ({', '.join(failed)}): its pilot sees one temperature from the "
            "proposal to the target; fit another flow=, or in other coordinates"
        )


def mended(posterior: Posterior, clock: Clock, bar: Progress) -> Posterior:
    """The posterior; or, if its weights are unreliable but have seen all modes, its annealed draws where these can be
    claimed, and made in time."""
    failed = [check.name for check in posterior.verdict.checks if not check.passed]
    if posterior.verdict.status != "unreliable" or {*CARRIED, IMPROPER, NECKS, "time"} & set(failed):
        return posterior
    if posterior.flow.dim > DENSE_DIMS:
        note = f"annealing in {posterior.flow.dim} dimensions takes long: posterior.anneal() tries it."
        return dataclasses.replace(posterior, notes=(*posterior.notes, note))
    bar.stage("annealing")
    try:
        may = {"rungs": RUNGS, "seconds": clock.for_annealing()}
        annealed = anneal(posterior, *ANNEALED, seed=None, progress=False, threads=None, **may)
    except ValueError as error:
        clock.lap("annealing")
        return dataclasses.replace(posterior, notes=(*posterior.notes, f"{error}."))
    if annealed.verdict.status == "unreliable":
        reason = "annealing did not mend it: " + "; ".join(annealed.verdict.reasons[1:]) + "."
        return dataclasses.replace(posterior, notes=(*posterior.notes, reason), timing=annealed.timing)
    annealed.settings["anneal"] |= {"seed": "the fit's"}
    return dataclasses.replace(annealed, notes=(*annealed.notes, f"weights alone failed by: {', '.join(failed)}."))


def _result(posterior: Posterior, rungs: list[Rung], runs: list[Run]) -> Posterior:
    """The posterior with the runs' draws in place of the proposal's, judged by how the runs differ."""
    log_z = torch.tensor([r.log_z for r in runs], dtype=torch.float64)
    level, se = log_mean(log_z), replicate_se(log_z)
    if level == -math.inf:
        raise ValueError("anneal: expected runs that reach the target, got none; raise particles=")
    # in the form of importance weights: log q = log p − log Ẑ_r, so that draws of run r weigh Ẑ_r
    log_q = torch.cat([r.log_p - r.log_z if r.log_z > -math.inf else -r.log_p for r in runs])
    weights = Weights(torch.cat([r.x for r in runs]), log_q, torch.cat([r.log_p for r in runs]))
    names, independent, values = _estimates(posterior.target, weights, log_z.to(log_q))
    checks = [
        precision(names, values),
        sds(names, values),
        _evidence(se),
        _agreement(posterior, level, se),
        *_steps(runs),
        *(c for c in posterior.verdict.checks if c.name in CARRIED),
        *necks(posterior.target, weights),
    ]
    more = float(torch.cat([(b / a).flatten() for a, b in _errors(independent, values)]).nanmedian())
    note = (
        f"anneal: {len(runs)} runs of {len(runs[0].x) // KEPT} particles over {len(rungs)} temperatures; standard "
        f"errors over the runs are, in the median, {more:.1f} times those of independent draws, which summary() shows."
    )
    return dataclasses.replace(
        posterior,
        verdict=_decide(checks),
        proposal=weights,
        log_evidence=level,
        log_evidence_se=se,
        skipped=sum(r.skipped for r in runs),
        notes=(*(n for n in posterior.notes if not n.startswith("anneal:")), note),
        settings=dict(posterior.settings),
        timing=dict(posterior.timing),
        stored=None,
    )


def replicate_se(log_z: Tensor) -> float:
    """Standard error of log mean Ẑ_r over R replicates log_z (R,): sd(Ẑ)/(mean Ẑ √R)."""
    return log_mean_se(log_z) * math.sqrt(len(log_z) / (len(log_z) - 1))


def _estimates(target: Target, draws: Weights, log_z: Tensor) -> tuple[list[str], Estimates, Estimates]:
    """Names and estimates of the quantities, with standard errors as of independent draws, and over the replicates.

    An estimate is h = Σ_r W_r h_r with W_r = Ẑ_r/ΣẐ and h_r the mean over the draws of run r, and
    se² = R/(R−1) Σ W_r² (h_r − h)².
    """
    names, theta = flatten(target.constrain(draws.x))
    columns = vary(theta[carrying(draws.log_w)])
    names, theta = [names[i] for i in columns.tolist()], theta[:, columns]
    values, share = estimate(theta, draws.log_w), log_z.softmax(0)

    def error(h: Tensor) -> Tensor:
        means = h.reshape(len(log_z), -1, h.shape[-1]).mean(1)
        means = torch.where(share[:, None] > 0, means, 0.0)  # where nothing weighs, nothing need be finite
        spread = share.square() @ (means - share @ means).square()
        return (len(log_z) / (len(log_z) - 1) * spread).sqrt()

    spread = ((theta - values.mean) / values.sd).square() / 2
    over = dataclasses.replace(
        values,
        mean_se=error(theta),
        log_sd_se=error(spread),
        probability_se=torch.stack([error((theta <= point).to(theta.dtype)) for point in values.quantiles]),
    )
    return names, values, over


def _errors(a: Estimates, b: Estimates) -> list[tuple[Tensor, Tensor]]:
    return [(getattr(a, name), getattr(b, name)) for name in ("mean_se", "log_sd_se", "probability_se")]


def _evidence(se: float) -> Check:
    passed = se < EVIDENCE_SE
    sentence = f"the standard error of log Ẑ over the runs is {se:.4f}" + (
        "" if passed else f", not below {EVIDENCE_SE}"
    )
    return Check("evidence", se, EVIDENCE_SE, passed, sentence)


def _agreement(posterior: Posterior, level: float, se: float) -> Check:
    """Whether importance weights of m, which both start from, give the same evidence."""
    difference = level - posterior.log_evidence
    error = math.hypot(se, posterior.log_evidence_se)
    statistic = abs(difference) - AGREEMENT * error
    passed = statistic < MISSING_MASS
    sentence = f"log Ẑ by annealing and by importance weights alone differ by {difference:+.4f} (se {error:.4f})"
    sentence += "" if passed else f", by more than {MISSING_MASS} and {AGREEMENT:g} se: one of them misses mass"
    return Check("agreement", statistic, MISSING_MASS, passed, sentence)


def _steps(runs: list[Run]) -> list[Check]:
    """The weights of each step, of all runs together: the heaviest tail, and the smallest ESS."""
    steps = [torch.cat(log_w) for log_w in zip(*(r.log_w for r in runs if r.log_w), strict=True)]
    worst = max(khat_upper(khat(log_w), len(log_w)) for log_w in steps)
    share = min(effective_sample_size(log_w) / len(log_w) for log_w in steps)
    heavy, even = worst < KHAT_BOUND, 1 - share < UNEVEN
    tails = f"the largest upper limit of k̂ of a step's weights is {worst:.2f}"
    tails += "" if heavy else f", not below {KHAT_BOUND}: m leaves out a part of p that moves do not mend"
    evenness = f"the least even weights of a step have an ESS of {share:.0%} of the particles"
    evenness += "" if even else f", not above {1 - UNEVEN:.0%}"
    return [Check("tails", worst, KHAT_BOUND, heavy, tails), Check("evenness", 1 - share, UNEVEN, even, evenness)]


def _decide(checks: list[Check]) -> Verdict:
    """ "corrected" where every check passes: the weighted draws can be relied on, whatever those of q are like."""
    failed = [c for c in checks if not c.passed]
    bad = any(c.name not in CAVEATS for c in failed)
    status = "unreliable" if bad else "corrected"
    lead = "do not rely on these draws" if bad else "use weighted draws (the default of sample): they were annealed"
    return Verdict(status, (lead, *(c.sentence for c in failed or checks)), tuple(checks))


def _recorded(rungs: list[Rung], runs: list[Run]) -> dict[str, Any]:
    """What was done, as JSON can hold it; log Ẑ of a run without weight is None."""
    return {
        "temperatures": [rung.b for rung in rungs],
        "steps": [rung.step for rung in rungs],
        "leaps": [rung.leaps for rung in rungs],
        "acceptance": [[round(rate, 3) for rate in r.acceptance] for r in runs],
        "log_evidence": [r.log_z if math.isfinite(r.log_z) else None for r in runs],
    }
