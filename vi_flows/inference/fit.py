"""fit: from a model or a density to a judged posterior."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import whole
from ..flows.distribution import Flow
from ..targets import Target, check_target, resolve_target, settle_dtype
from ..targets.check import where_it_starts
from ..targets.values import told_of_values
from .initialise import DENSE_DIMS, joined
from .judge import CARRIED, CONDITION, Judgement, judge
from .posterior import Posterior, is_model, seeded
from .progress import Progress
from .propriety import improper
from .start import FlowChoice, Start, Starts, init_points, starts
from .training import DivergedError, Training, train
from .weights import in_blocks, log_weights, mean_elbo

COMPARED = 4000  # draws on which the trained flow and the Gaussian that it started from are compared
GOOD = 0.02  # variance of log-weights, twice the KL, below which no other start is tried
CHECKED = 32  # points on which a target is checked first
ANNEALED, RUNGS = (1000, 8), 40  # particles, replicates and temperatures at most, to mend unreliable weights with
TRAINING_SHARE = 0.8  # of max_seconds, by when training ends: judging needs the rest


@dataclass(frozen=True)
class Options:
    """What fit's keyword options say; see :func:`fit`."""

    steps: int = 1500
    particles: int = 256
    lr: float = 1e-2
    max_seconds: float | None = None
    num_draws: int = 10_000
    dtype: torch.dtype | None = None
    device: str | torch.device | None = None
    init: Any = None
    threads: int | None = 1
    capture: bool | str = "auto"
    compile: bool = False
    correct: bool = True
    rehearse: int = 0

    def __post_init__(self):
        for name, least in (("steps", 0), ("particles", 2), ("num_draws", 100), ("threads", 1), ("rehearse", 0)):
            if name != "threads" or self.threads is not None:
                whole(name, getattr(self, name), least)
        for name in ("lr", "max_seconds"):
            value = getattr(self, name)
            if not (name == "max_seconds" and value is None) and not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if self.dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float64 or torch.float32, got {self.dtype!r}")
        if not (isinstance(self.capture, bool) or self.capture == "auto"):
            raise ValueError(f'capture: expected "auto", True or False, got {self.capture!r}')
        for name in ("compile", "correct"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")

    def recorded(self) -> dict[str, Any]:
        """The options as JSON can hold them, without ``init``."""
        options = {name: value for name, value in vars(self).items() if name != "init"}
        return options | {name: str(options[name]) for name in ("dtype", "device") if options[name] is not None}


def fit(
    target_or_model: Any,
    *args: Any,
    flow: FlowChoice = "auto",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Posterior:
    """Fit a flow to a Pyro model or an unnormalised density by reverse KL, and judge it by importance weights.

    Locates the mass (Pathfinder, Laplace, Gaussian VI), trains the flow on top of the Gaussian, or the mixture of them,
    that is found, never returns worse than that, and judges the result through a defensive proposal.

    Parameters
    ----------
    target_or_model: a Pyro model (``args`` are its arguments), or a target: ``LogDensity``, ``Energy``, ``PyroModel``.
    flow: "auto", the name of a recipe, a callable dim -> Flow, or a Flow (copied); see ``vf.recipes``.
    seed: the result depends on it alone; torch's global generators are left as found.
    progress: show a progress bar.
    steps: at most so many training steps (1500). particles: draws in each (256). lr: of Adam (0.01).
    max_seconds: wall time for locating and training together, about; judging comes on top. None: no limit.
    num_draws: draws kept, and in each of the five repeats of k̂ (10,000).
    dtype: of the target's evaluation: float64 unless it can only do float32; flow and weights are float64 always.
    device: where flow and target work.
    init: a Posterior, a Flow or an AutoFlow guide, whose flow is trained on; or values to start near: a dict of named
        values of a model, or a tensor (dim,) or (n, dim) of unconstrained points.
    threads: of torch during the fit. 1 unless asked: on a few hundred rows a second thread costs more than it does.
        None leaves torch's setting.
    capture: "auto" runs training steps and a Pyro model's evaluations, once they have come up often enough to pay, as
        the tensor operations recorded from one of them: the same numbers, without running the Python again. False
        never does; True does from the first model evaluation on, and notes why where it cannot.
    compile: compile the training step to machine code, for long trainings: two to ten times faster, after a minute or
        so (not counted in ``max_seconds``). Where that fails a warning and a note say why, and training goes on.
    correct: where importance weights are unreliable although all modes are seen, anneal (:meth:`Posterior.anneal`), and
        return that if it can be claimed. False leaves the verdict at what the weights say.
    rehearse: so many data sets are drawn from the fit and refitted (:meth:`Posterior.rehearse`), at some seconds each.

    Raises
    ------
    TypeError for unknown options; ValueError, in one line, for a target that cannot be fitted; DivergedError.
    """
    from .rehearse import check_rehearsal  # which calls this function

    known = [f.name for f in dataclasses.fields(Options)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"fit: unknown option {unknown[0]!r}; expected flow, seed, progress, {', '.join(known)}")
    chosen = Options(**options)
    with seeded(seed), threads(chosen.threads), Progress(progress) as bar:
        target = prepare(resolve_target(target_or_model, *args), chosen)
        if chosen.rehearse:
            check_rehearsal(target, chosen.rehearse)
        named = {"flow": flow} if isinstance(flow, str) else {}
        posterior = _fit(target, flow, chosen, {"seed": seed, **named}, bar)
        if chosen.rehearse:
            bar.stage("rehearsing", chosen.rehearse)
            posterior.rehearse(chosen.rehearse, seed, report=lambda row: bar.advance())
    return posterior


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run on so many torch threads, then restore what was set; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(target: Target, options: Options) -> Target:
    """Step 0: the target in its working precision, checked on points uniform in (−2, 2), or near its starts where none
    of these has a value."""
    points = 4 * torch.rand(CHECKED, target.dim, dtype=torch.float64, device=options.device) - 2
    if options.dtype is not None or options.device is not None:
        if not hasattr(target, "to"):
            raise ValueError("dtype, device: this target has no to(dtype, device) method; leave both at None")
        target = target.to(options.dtype, options.device)
    if hasattr(target, "capture"):
        target.forget()  # the model may read something that has changed since
        if options.capture != "auto":
            target = copy.copy(target)
            target.capture = options.capture
    near = init_points(target, options.init) if isinstance(options.init, (dict, Tensor)) else None
    points = where_it_starts(target, points, near)
    if options.dtype is None:
        return settle_dtype(target, points)
    check_target(target, points)
    return target


@dataclass(frozen=True)
class Candidate:
    """A trained flow, or the start that it did not improve on."""

    flow: Flow
    start: Start
    elbo: float
    variance: float
    notes: tuple[str, ...]
    trace: Sequence[float] = ()


def _fit(target: Target, choice: FlowChoice, options: Options, settings: dict[str, Any], bar: Progress) -> Posterior:
    clock = Clock(options.max_seconds)
    bar.stage("locating")
    found = starts(target, choice, options.init, options.device)
    clock.lap("locating")
    best = _best(target, found, options, clock, bar)
    clock.lap("training")
    bar.stage("judging")
    settings = settings | {"recipe": best.start.recipe, "model": is_model(target), **options.recorded()}
    posterior = judged(best, target, found, options, settings, clock)
    return _annealed(posterior, bar) if options.correct else posterior


def _annealed(posterior: Posterior, bar: Progress) -> Posterior:
    """The posterior; or, if its weights are unreliable but have seen all modes, its annealed draws where these can be
    claimed."""
    from .correct import anneal  # it corrects what this module makes

    failed = [check.name for check in posterior.verdict.checks if not check.passed]
    if posterior.verdict.status != "unreliable" or set(CARRIED) & set(failed) or improper(posterior.target):
        return posterior
    if posterior.flow.dim > DENSE_DIMS:
        note = f"annealing in {posterior.flow.dim} dimensions takes long: posterior.anneal() tries it."
        return dataclasses.replace(posterior, notes=(*posterior.notes, note))
    bar.stage("annealing")
    try:
        annealed = anneal(posterior, *ANNEALED, seed=None, progress=False, threads=None, rungs=RUNGS)
    except ValueError as error:
        return dataclasses.replace(posterior, notes=(*posterior.notes, f"{error}"))
    if annealed.verdict.status == "unreliable":
        reason = "annealing did not mend it: " + "; ".join(annealed.verdict.reasons[1:]) + "."
        return dataclasses.replace(posterior, notes=(*posterior.notes, reason), timing=annealed.timing)
    annealed.settings["anneal"] |= {"seed": "the fit's"}
    return dataclasses.replace(annealed, notes=(*annealed.notes, f"weights alone failed by: {', '.join(failed)}."))


def _best(target: Target, found: Starts, options: Options, clock: Clock, bar: Progress) -> Candidate:
    """Of the starts, trained in turn until one's log-weights are nearly constant, the one with the best ELBO."""
    candidates, failed = [], None
    for k, start in enumerate(found.flows):
        bar.stage("training", options.steps)
        try:
            asked = options if start.steps is None else dataclasses.replace(options, steps=start.steps)
            trained = _train(start.flow, target, asked, clock.left(TRAINING_SHARE, len(found.flows) - k), bar)
        except DivergedError as error:
            failed = error
            continue
        candidates.append(_never_worse(start, trained, target))
        if candidates[-1].variance < GOOD:
            break
    if not candidates:
        raise failed
    best = max(candidates, key=lambda candidate: candidate.elbo)
    others = [f"{c.start.description}: ELBO {c.elbo:.3f}, not {best.elbo:.3f}." for c in candidates if c is not best]
    return dataclasses.replace(best, notes=(*best.notes, *others))


def judged(
    best: Candidate, target: Target, found: Starts, options: Options, settings: dict[str, Any], clock: Clock
) -> Posterior:
    """The flow with its judgement, and how it was made."""
    flow, modes = best.flow.requires_grad_(False), found.modes
    judgement = judge(flow, target, modes, options.num_draws, probes=found.probes)
    if any(check.name == CONDITION and not check.passed for check in judgement.verdict.checks):
        modes = joined(modes, found.probes)
        judgement = judge(flow, target, modes, options.num_draws, probes=found.probes, attempt=2)
    if judgement.verdict.status == "unreliable":
        judgement.verdict = judgement.verdict.because(improper(target))
    clock.lap("judging")
    return Posterior(
        **vars(judgement),
        flow=flow,
        target=target,
        modes=modes,
        flow_description=best.start.description,
        notes=(*best.notes, *_notes(target, judgement)),
        trace=list(best.trace),
        settings=settings,
        timing=clock.laps,
    )


def _train(flow: Flow, target: Target, options: Options, seconds: float | None, bar: Progress) -> Training:
    if not options.steps:
        return Training(flow, reason="no steps were asked for")
    return train(
        flow,
        target,
        steps=options.steps,
        particles=options.particles,
        lr=options.lr,
        path=True,
        max_seconds=seconds,
        record=options.capture,
        compile=options.compile,
        report=bar.step,
    )


def _never_worse(start: Start, trained: Training, target: Target) -> Candidate:
    """The trained flow, or, if its ELBO is lower, the one that it started from; with notes on what happened."""
    notes = [f"training: {len(trained.elbo)} steps; {trained.reason}."]
    if trained.rolled_back:
        notes.append(f"training met non-finite values and was rolled back {trained.rolled_back} times.")
    if trained.lost:
        notes.append(f"training: {trained.lost} draws had log p = −inf and were left out.")
    if trained.note:
        notes.append(f"{trained.note}.")
    noise = start.flow.base.noise((COMPARED,))
    (before, spread_before), (after, spread) = (
        _elbo_and_variance(in_blocks(lambda rows, q=q: log_weights(q, target, rows).log_w, noise))
        for q in (start.flow, trained.flow)
    )
    if before > after:
        notes.append(f"training did not help (ELBO {after:.3f} after, {before:.3f} before): the start was kept.")
        return Candidate(copy.deepcopy(start.flow), start, before, spread_before, tuple(notes), trained.elbo)
    return Candidate(trained.flow, start, after, spread, tuple(notes), trained.elbo)


def _elbo_and_variance(log_w: Tensor) -> tuple[float, float]:
    log_w = log_w.nan_to_num(nan=-math.inf)
    finite = log_w[log_w > -math.inf]
    return mean_elbo(log_w), float(finite.var()) if len(finite) > 1 else math.inf


def _notes(target: Target, judgement: Judgement) -> tuple[str, ...]:
    notes = []
    if getattr(target, "dtype", torch.float64) != torch.float64:
        notes.append(f"precision: the target was evaluated in {target.dtype}.")
    if getattr(target, "mode", "vmap") != "vmap":
        notes.append(f"the model was evaluated by {target.mode}: {target.mode_reason}.")
    if getattr(target, "capture", "auto") is True and target.capture_refused:
        notes.append(f"capture: the model's evaluations were not recorded: {target.capture_refused}.")
    if getattr(target, "failed_rows", 0):
        notes.append(
            f"the model failed at {target.failed_rows} points (a matrix not positive definite, say): weight 0."
        )
    if judgement.skipped:
        notes.append(f"{judgement.skipped} draws had log p NaN or +inf: skipped, weight 0.")
    notes += target.account() if hasattr(target, "account") else []
    return (*notes, *told_of_values(target, judgement.proposal.x, judgement.proposal.log_p))


class Clock:
    """Wall time of the stages, and what is left of a limit."""

    def __init__(self, limit: float | None):
        self.limit, self.began = limit, time.monotonic()
        self.last, self.laps = self.began, {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self.last = now - self.last, now

    def left(self, share: float, parts: int = 1) -> float | None:
        """Of that share of the limit, what is left for the next of so many parts; None without a limit."""
        return None if self.limit is None else max(share * self.limit - (time.monotonic() - self.began), 0.0) / parts
