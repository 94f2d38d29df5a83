"""fit: from a model or a density to a judged posterior."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import whole
from ..flows.distribution import Flow
from ..targets import Target, check_target, resolve_target, settle_dtype
from ..targets.check import where_it_starts
from ..targets.values import told_of_values
from .centring import centred
from .checks import Check
from .clock import LOCATING_SHARE, Clock, draw_seconds, step_seconds
from .initialise import joined
from .judge import CONDITION, FIRST, NECKED, PROBED, TIME, Judgement, judge
from .posterior import Posterior, is_model, seeded
from .progress import Progress
from .propriety import IMPROPER, improper
from .psis import import_arviz
from .start import FlowChoice, Start, Starts, init_points, outright, starts
from .training import LONG, DivergedError, Training, train
from .weights import in_blocks, log_weights, mean_elbo

COMPARED = 4000  # draws on which the trained flow and the Gaussian that it started from are compared
GOOD = 0.02  # variance of log-weights, twice the KL, below which no other start is tried
CHECKING = 2.0  # seconds that checks of weights take, about, at tens of dimensions
CHECKED = 32  # points on which a target is checked first


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
    reparam: bool | Mapping[str, Any] = True
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
        if not isinstance(self.reparam, bool):
            options["reparam"] = {name: torch.as_tensor(degree).tolist() for name, degree in self.reparam.items()}
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
    max_seconds: wall time, about, for all stages: locating ends by two fifths of it, training when judging needs the
        rest. Where locating or judging is cut short no claim is made. None: no limit, and the result depends on the
        seed alone, but for annealing, which is left out where it would take longer than locating and training did (or
        15 s), as a note then says. Above 50 dimensions training that leads nowhere is given up, without annealing.
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
    reparam: True centres, or does not, each site of a model whose location or scale is latent, as the ELBO says (see
        :func:`vi_flows.inference.centring.centred`): values keep their names and scale, and a note says what
        was chosen. False leaves the model as written; degrees of centring by site ({"theta": 0.0}) settle them.
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
    """Step 0: the target in its working precision, checked on (−2, 2), or near its starts if none has a value."""
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
    given_up: bool = False


def _fit(target: Target, choice: FlowChoice, options: Options, settings: dict[str, Any], bar: Progress) -> Posterior:
    from .correct import mended  # it corrects what this module makes

    clock = Clock(options.max_seconds)
    bar.stage("locating")
    with clock.ending("locating", LOCATING_SHARE):
        found, centring = outright(target, choice, options.init, options.device), ""
        if found is None:
            target, near, centring = _centred(target, options)
            found = starts(target, choice, options.init, options.device, near)
    clock.lap("locating")
    judging = _forecast(found, target, options, bar) if bar.shown or options.max_seconds is not None else 0.0
    best = _best(target, found, options, clock, clock.training_share(judging), bar)
    clock.lap("training")
    bar.stage("judging")
    settings = settings | {"recipe": best.start.recipe, "model": is_model(target), **options.recorded()}
    settings["centring"] = {name: degree.tolist() for name, degree in getattr(target, "degrees", {}).items()}
    best = dataclasses.replace(best, notes=(*([centring] if centring else []), *best.notes))
    posterior = judged(best, target, found, options, settings, clock)
    return mended(posterior, clock, bar) if options.correct and not best.given_up else posterior


def _centred(target: Target, options: Options) -> tuple[Target, Tensor | None, str]:
    """The target in the coordinates to fit it in, where its mass is there (1, dim), if that is known, and a note."""
    if isinstance(options.init, Posterior):
        degrees = getattr(options.init.target, "degrees", {})
        return (target.recentred(degrees) if degrees else target), None, ""
    return centred(target, options.reparam and not callable(options.init) and options.reparam, options.device)


def _forecast(found: Starts, target: Target, options: Options, bar: Progress) -> float:
    """Seconds that judging will take, and, shown, those of training at most: by a step and a thousand draws."""
    import_arviz()  # which judging would do, at the cost of seconds
    with seeded(0):
        each = draw_seconds(found.flows[0].flow, target)
        steps = [(s.flow, s.most(options.steps)) for s in found.flows]
        training = sum(count * step_seconds(flow, target, options.particles) for flow, count in steps if count)
    judging = each * (1.5 * FIRST + PROBED + NECKED) + CHECKING
    bar.say(f"to come: training at most {training:.0f} s, judging about {judging:.0f} s")
    return judging


def _best(target: Target, found: Starts, options: Options, clock: Clock, share: float, bar: Progress) -> Candidate:
    """Of the starts, trained in turn until one's log-weights are nearly constant, the one with the best ELBO."""
    candidates, failed = [], None
    for k, start in enumerate(found.flows):
        bar.stage("training", options.steps)
        try:
            asked = dataclasses.replace(options, steps=start.most(options.steps))
            trained = _train(start.flow, target, asked, clock.left(share, len(found.flows) - k), bar)
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
    began = time.monotonic()
    judgement = judge(flow, target, modes, options.num_draws, probes=found.probes, clock=clock)
    took, left = time.monotonic() - began, clock.left()
    missed = any(check.name == CONDITION and not check.passed for check in judgement.verdict.checks)
    if missed and (left is None or took < left):
        modes = joined(modes, found.probes)
        judgement = judge(flow, target, modes, options.num_draws, attempt=2, probes=found.probes, clock=clock)
    if clock.cut:
        said = f"{clock.cut[0]} was cut short by max_seconds: modes may have been missed; give it more time"
        judgement.verdict = judgement.verdict.refused(Check(TIME, 1.0, 1.0, False, said))
    if judgement.verdict.status == "unreliable":
        said = improper(target, judgement.proposal, modes)
        if said:
            judgement.verdict = judgement.verdict.refused(Check(IMPROPER, 1.0, 1.0, False, said))
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
        give_up=target.dim > LONG,
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
    flow, elbo, variance = trained.flow, after, spread
    if before > after:
        notes.append(f"training did not help (ELBO {after:.3f} after, {before:.3f} before): the start was kept.")
        flow, elbo, variance = copy.deepcopy(start.flow), before, spread_before
    return Candidate(flow, start, elbo, variance, tuple(notes), trained.elbo, trained.given_up)


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
