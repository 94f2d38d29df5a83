"""Corrections of a fit: draws resampled by its weights; annealed ones, where weights alone are not enough."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any

import torch
from torch import Tensor

from ...arguments import whole
from ...progress import Progress
from ...running import Clock, seeded
from ...running import threads as torch_threads
from ..bounds import AGREEMENT, KHAT_BOUND, MISSING_MASS, UNEVEN
from ..estimate.psis import khat, khat_upper, resampling_weights
from ..estimate.quantities import Estimates, estimate
from ..estimate.quantities import resample as by_weight
from ..estimate.weights import Weights, effective_sample_size, log_mean
from ..judge.check import CARRIED, Check, Role
from ..judge.checks import precision, sds
from ..judge.fitted import Fitted
from ..judge.latent import LatentPath, Rung
from ..judge.necks import necks
from ..judge.proposal import DefensiveProposal
from ..locate.points import DENSE_DIMS
from .draws import bridge, evidence, quantities_of, replicate_se, walk_of_necks, with_draws, with_errors
from .smc import KEPT_SWEEPS, MOST_RUNGS, AnnealingRun, annealing_run, pilot

# particles and replicates, and temperatures at most, with which a fit mends its weights: over fewer runs the
# error of log Ẑ is a guess, and more of anything takes longer than the fit; posterior.anneal() takes more
ANNEALED, RUNGS = (1000, 8), 40
# what to do with the draws, before all reasons: who reads one sentence reads this
ANNEALED_LEAD = "use weighted draws (the default of sample): they were annealed"


def resample(posterior: Fitted, n: int, seed: int | None) -> Fitted:
    """n equally weighted draws in place of the proposal's; see :meth:`Posterior.resample`."""
    whole("num_draws", n, 100)
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
        settings=posterior.settings.corrected("resample", {"num_draws": n, "seed": seed}),
        stored=None,
    )


def anneal(
    posterior: Fitted,
    particles: int,
    replicates: int,
    seed: int | None,
    progress: bool,
    threads: int | None,
    rungs: int = MOST_RUNGS,
    seconds: float = math.inf,
) -> Fitted:
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
        walk = walk_of_necks(posterior)
        path = LatentPath(DefensiveProposal(flow, posterior.modes), posterior.target, walk)
        bar.stage("pilot")
        schedule = pilot(path, particles, rungs, replicates, functools.partial(_afford, seconds))
        _sees_something(posterior, schedule)
        bar.stage("annealing", replicates)
        runs = []
        for _ in range(replicates):
            runs.append(annealing_run(path, schedule, particles))
            bar.advance()
            _afford(seconds, time.monotonic() - began)
        result = _result(posterior, schedule, runs)
    how = {"particles": particles, "replicates": replicates, "seed": seed, **_recorded(schedule, runs)}
    timing = {**posterior.timing, "annealing": time.monotonic() - began}
    return dataclasses.replace(result, settings=posterior.settings.corrected("anneal", how), timing=timing)


def _afford(seconds: float, needed: float) -> None:
    if needed > seconds:
        raise ValueError(
            f"annealing would take about {needed:.0f} s or more, and is given {seconds:.0f} s: "
            "posterior.anneal(progress=True) takes the time that it needs"
        )


def _sees_something(posterior: Fitted, schedule: list[Rung]) -> None:
    """Raise where weights failed but the pilot went from m to p in one step: it has not drawn what is wrong with m, and
    runs from there would not either, and agree with each other."""
    failed = posterior.verdict.failed(Role.DRAWS)
    if len(schedule) == 1 and failed:
        raise ValueError(
            f"annealing would repeat what is wrong ({', '.join(failed)}): its pilot sees one temperature from the "
            "proposal to the target; fit another flow=, or in other coordinates"
        )


def mended(posterior: Fitted, clock: Clock, bar: Progress) -> Fitted:
    """The posterior; or, if its weights are unreliable but have seen all modes, its annealed draws where these can be
    claimed, and made in time. Necks that no draw has reached are reached by moves of scales."""
    failed = posterior.verdict.failed()
    if posterior.verdict.status != "unreliable" or posterior.verdict.failed(*CARRIED):
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
    how = {**annealed.settings.corrections["anneal"], "within_fit": True}
    notes = (*annealed.notes, f"weights alone failed by: {', '.join(failed)}.")
    return dataclasses.replace(annealed, notes=notes, settings=annealed.settings.corrected("anneal", how))


def _result(posterior: Fitted, rungs: list[Rung], runs: list[AnnealingRun]) -> Fitted:
    """The posterior with the runs' draws in place of the proposal's, judged by how the runs differ."""
    bridged = any(r.settling is not None for r in runs)
    if bridged:  # what m leaves out no weight tells, and weights of m need not agree
        early = torch.tensor([_bridged(r, rungs[0].b, r.settling) for r in runs], dtype=torch.float64)
        runs = [dataclasses.replace(r, log_z=_bridged(r, rungs[0].b, r.log_p - r.log_m)) for r in runs]
    log_z = torch.tensor([r.log_z for r in runs], dtype=torch.float64)
    level, se = log_mean(log_z), replicate_se(log_z)
    if level == -math.inf:
        raise ValueError("anneal: expected runs that reach the target, got none; raise particles=")
    # in the form of importance weights: log q = log p − log Ẑ_r, so that draws of run r weigh Ẑ_r
    log_q = torch.cat([r.log_p - r.log_z if r.log_z > -math.inf else -r.log_p for r in runs])
    weights = Weights(torch.cat([r.x for r in runs]), log_q, torch.cat([r.log_p for r in runs]))
    names, theta, _ = quantities_of(posterior.target, weights)
    independent = estimate(theta, weights.log_w)
    values = with_errors(independent, theta, functools.partial(_error_over_runs, share=log_z.to(log_q).softmax(0)))
    checks = [
        precision(names, values),
        sds(names, values),
        evidence(se),
        _settled(early, log_z) if bridged else _agreement(posterior, level, se),
        *_steps(runs),
        *posterior.verdict.carried(),
        *necks(posterior.target, weights),
    ]
    more = float(torch.cat([(b / a).flatten() for a, b in _errors(independent, values)]).nanmedian())
    note = (
        f"{len(runs)} runs of {len(runs[0].x) // KEPT_SWEEPS} particles over {len(rungs)} temperatures; standard "
        f"errors over the runs are, in the median, {more:.1f} times those of independent draws, which summary() shows."
        + (" Scales were moved, and log evidence is a bridge from the proposal to the draws." if bridged else "")
    )
    result = with_draws(posterior, "anneal", weights, checks, (level, se), note, ANNEALED_LEAD)
    return dataclasses.replace(result, skipped=sum(r.skipped for r in runs))


def _error_over_runs(h: Tensor, share: Tensor) -> Tensor:
    """Standard errors (Q,) of means of h (R · n, Q), of which run r has the share W_r = Ẑ_r/ΣẐ.

    An estimate is Σ_r W_r h_r, with h_r the mean over the draws of run r, and se² = R/(R−1) Σ W_r² (h_r − h)².
    """
    means = h.reshape(len(share), -1, h.shape[-1]).mean(1)
    means = torch.where(share[:, None] > 0, means, 0.0)  # where nothing weighs, nothing need be finite
    spread = share.square() @ (means - share @ means).square()
    return (len(share) / (len(share) - 1) * spread).sqrt()


def _errors(a: Estimates, b: Estimates) -> list[tuple[Tensor, Tensor]]:
    return [(getattr(a, name), getattr(b, name)) for name in ("mean_se", "log_sd_se", "probability_se")]


def _agreement(posterior: Fitted, level: float, se: float) -> Check:
    """Whether importance weights of m, which both start from, give the same evidence."""
    difference = level - posterior.log_evidence
    error = math.hypot(se, posterior.log_evidence_se)
    statistic = abs(difference) - AGREEMENT * error
    sentence = f"log Ẑ by annealing and by importance weights alone differ by {difference:+.4f} (se {error:.4f})"
    otherwise = f"{sentence}, by more than {MISSING_MASS} and {AGREEMENT:g} se: one of them misses mass"
    return Check.of("agreement", statistic, MISSING_MASS, sentence, otherwise, Role.BESIDE)


def _bridged(made: AnnealingRun, b: float, log_w_of_p: Tensor | None) -> float:
    """log Ẑ of a run's first weights, at temperature b, and those of later states; −∞ where it had lost all weight."""
    return bridge(made.log_w[0] / b, log_w_of_p) if made.log_w else -math.inf


def _settled(early: Tensor, late: Tensor) -> Check:
    """Whether moves of scales have come to their end: by log Ẑ (R,) with states before those that are kept, and these.

    The bound is half of what may be missing: where moves leave half of an error, what they then mended is what is left.
    """
    drift = (late - early).nan_to_num(nan=0.0)
    statistic = float(drift.mean().abs() + drift.std() / math.sqrt(len(drift)))
    sentence = f"log Ẑ changed by {float(drift.mean()):+.4f} over the last moves of scales"
    otherwise = f"{sentence}, not seen to be within {MISSING_MASS / 2}: they have not come to the end of a neck"
    return Check.of("settled", statistic, MISSING_MASS / 2, sentence, otherwise)


def _steps(runs: list[AnnealingRun]) -> list[Check]:
    """The weights of each step, of all runs together: the heaviest tail, and the smallest ESS."""
    steps = [torch.cat(log_w) for log_w in zip(*(r.log_w for r in runs if r.log_w), strict=True)]
    worst = max(khat_upper(khat(log_w), len(log_w)) for log_w in steps)
    share = min(effective_sample_size(log_w) / len(log_w) for log_w in steps)
    tails = f"the largest upper limit of k̂ of a step's weights is {worst:.2f}"
    heavy = f"{tails}, not below {KHAT_BOUND}: m leaves out a part of p that moves do not mend"
    even = f"the least even weights of a step have an ESS of {share:.0%} of the particles"
    return [
        Check.of("tails", worst, KHAT_BOUND, tails, heavy),
        Check.of("evenness", 1 - share, UNEVEN, even, f"{even}, not above {1 - UNEVEN:.0%}"),
    ]


def _recorded(rungs: list[Rung], runs: list[AnnealingRun]) -> dict[str, Any]:
    """What was done, as JSON can hold it; log Ẑ of a run without weight is None."""
    return {
        "temperatures": [rung.b for rung in rungs],
        "steps": [rung.step for rung in rungs],
        "leaps": [rung.leaps for rung in rungs],
        "acceptance": [[round(rate, 3) for rate in r.acceptance] for r in runs],
        "log_evidence": [r.log_z if math.isfinite(r.log_z) else None for r in runs],
    }
