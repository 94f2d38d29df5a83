"""The stages of a fit in turn: locate, train each start, keep the best, judge it, correct it."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DivergedError
from ..flows.distribution import Flow
from ..progress import Progress
from ..running import LOCATING_SHARE, Clock, seeded
from ..targets import Target, check_target, settle_dtype
from ..targets.check import where_it_starts
from ..targets.target import is_model
from ..targets.values import told_of_values
from .bounds import GOOD
from .correct.anneal import mended
from .estimate.evaluate import in_blocks
from .estimate.psis import import_arviz
from .estimate.weights import draw_seconds, log_weights, mean_elbo
from .judge.check import Check, Role
from .judge.fitted import Fitted, Settings
from .judge.propriety import improper
from .judge.verdict import FIRST_DRAWS, NECKED, PROBED, Judgement, cut_short, judge
from .locate.centring import centred
from .locate.locate import joined
from .options import Options
from .start import FlowChoice, Start, Starts, init_points, outright, starts
from .train.loop import LONG, Training, train
from .train.step import step_seconds

# draws on which the trained flow and its start are compared: ELBOs are then certain to the sd of log-weights by 63;
# with fewer, chance undoes a training
COMPARED = 4000
CHECKING = 2.0  # seconds that checks of weights take, about, at tens of dimensions: less, and judging is cut short
CHECK_POINTS = 32  # on which a target is checked first: fewer miss what fails at some. Chosen, not measured


def prepare(target: Target, options: Options) -> Target:
    """Step 0: the target in its working precision, checked on (−2, 2), or near its starts if none has a value."""
    points = 4 * torch.rand(CHECK_POINTS, target.dim, dtype=torch.float64, device=options.device) - 2
    if options.dtype is not None or options.device is not None:
        target = target.to(options.dtype, options.device)
    target = target.fresh(options.capture)
    near = init_points(target, options.init) if isinstance(options.init, (dict, Tensor)) else None
    points = where_it_starts(target, points, near)
    if options.dtype is None:
        return settle_dtype(target, points)
    check_target(target, points)
    return target


@dataclass(frozen=True, eq=False)
class Candidate:
    """A trained flow, or the start that it did not improve on."""

    flow: Flow
    start: Start
    elbo: float
    variance: float
    notes: tuple[str, ...]
    trace: Sequence[float] = ()
    given_up: bool = False


def fitted(target: Target, choice: FlowChoice, options: Options, seed: int, bar: Progress) -> Fitted:
    """The chosen flow fitted to a target that :func:`prepare` has seen, judged, and corrected where that mends it."""
    clock = Clock(options.max_seconds)
    bar.stage("locating")
    with clock.ending("locating", LOCATING_SHARE):
        located, centring = outright(target, choice, options.init, options.device), ""
        if located is None:
            target, near, centring = _centred(target, options)
            located = starts(target, choice, options.init, options.device, near)
    clock.lap("locating")
    judging = _forecast(located, target, options, bar) if bar.shown or options.max_seconds is not None else 0.0
    best = _best(target, located, options, clock, clock.training_share(judging), bar)
    clock.lap("training")
    bar.stage("judging")
    settings = Settings(
        seed=seed,
        flow=choice if isinstance(choice, str) else None,
        recipe=best.start.recipe,
        is_model=is_model(target),
        centring={name: degree.tolist() for name, degree in target.degrees.items()},
        options=options.recorded(),
    )
    best = dataclasses.replace(best, notes=(*([centring] if centring else []), *best.notes))
    posterior = judged(best, target, located, options, settings, clock)
    return mended(posterior, clock, bar) if options.correct and not best.given_up else posterior


def _centred(target: Target, options: Options) -> tuple[Target, Tensor | None, str]:
    """The target in the coordinates to fit it in, where its mass is there (1, dim), if that is known, and a note."""
    if isinstance(options.init, Fitted):
        degrees = options.init.target.degrees if options.init.target else {}
        return (target.recentred(degrees) if degrees else target), None, ""
    return centred(target, options.reparam and not callable(options.init) and options.reparam, options.device)


def _forecast(located: Starts, target: Target, options: Options, bar: Progress) -> float:
    """Seconds that judging will take, and, shown, those of training at most: by a step and a thousand draws."""
    import_arviz()  # which judging would do, at the cost of seconds
    with seeded(0):
        each = draw_seconds(located.flows[0].flow, target)
        steps = [(s.flow, s.most(options.steps)) for s in located.flows]
        training = sum(count * step_seconds(flow, target, options.particles) for flow, count in steps if count)
    judging = each * (1.5 * FIRST_DRAWS + PROBED + NECKED) + CHECKING
    bar.say(f"to come: training at most {training:.0f} s, judging about {judging:.0f} s")
    return judging


def _best(target: Target, located: Starts, options: Options, clock: Clock, share: float, bar: Progress) -> Candidate:
    """Of the starts, trained in turn until one's log-weights are nearly constant, the one with the best ELBO."""
    candidates, failed = [], None
    for k, start in enumerate(located.flows):
        bar.stage("training", options.steps)
        try:
            limited = dataclasses.replace(options, steps=start.most(options.steps))
            trained = _train(start.flow, target, limited, clock.left(share, len(located.flows) - k), bar)
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
    best: Candidate, target: Target, located: Starts, options: Options, settings: Settings, clock: Clock
) -> Fitted:
    """The flow with its judgement, and how it was made."""
    flow, modes = best.flow.requires_grad_(False), located.modes
    began = time.monotonic()
    judgement = judge(flow, target, modes, options.num_draws, probes=located.probes, clock=clock)
    took, left = time.monotonic() - began, clock.left()
    if judgement.verdict.failed(Role.CONDITION) and (left is None or took < left):
        modes = joined(modes, located.probes)
        judgement = judge(flow, target, modes, options.num_draws, attempt=2, probes=located.probes, clock=clock)
    if clock.cut:
        cut = cut_short(f"{clock.cut[0]} was cut short by max_seconds: modes may have been missed")
        judgement.verdict = judgement.verdict.refused(cut)
    if judgement.verdict.status == "unreliable":
        said = improper(target, judgement.proposal, modes)
        if said:
            judgement.verdict = judgement.verdict.refused(Check("improper", 1.0, 1.0, False, said, Role.TARGET))
    clock.lap("judging")
    return Fitted(
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
    if target.dtype != torch.float64:
        notes.append(f"precision: the target was evaluated in {target.dtype}.")
    if target.mode != "vmap":
        notes.append(f"the model was evaluated by {target.mode}: {target.mode_reason}.")
    if target.capture is True and target.capture_refused:
        notes.append(f"capture: the model's evaluations were not recorded: {target.capture_refused}.")
    if target.failed_rows:
        notes.append(
            f"the model failed at {target.failed_rows} points (a matrix not positive definite, say): weight 0."
        )
    if judgement.skipped:
        notes.append(f"{judgement.skipped} draws had log p NaN or +inf: skipped, weight 0.")
    notes += target.account()
    return (*notes, *told_of_values(target, judgement.proposal.x, judgement.proposal.log_p))
