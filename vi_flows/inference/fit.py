"""fit: from a model or a density to a judged posterior."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..flows import recipes
from ..flows.distribution import Flow
from ..flows.linear import LowerTriangular
from ..flows.parameters import Fixed
from ..targets import Target, check_target, resolve_target, settle_dtype
from .gaussian import Gaussians
from .initialise import locate, start_points
from .judge import Judgement, judge
from .posterior import Posterior, is_model, seeded
from .progress import Progress
from .propriety import improper
from .scoring import as_flow
from .training import CLOSE, Training, train
from .weights import in_blocks, log_weights, mean_elbo

COMPARED = 4000  # draws on which the trained flow and the Gaussian that it started from are compared
CHECKED = 32  # points on which a target is checked first
TRAINING_SHARE = 0.8  # of max_seconds, by when training ends: judging needs the rest

FlowChoice = str | Flow | Callable[[int], Flow]


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

    def __post_init__(self):
        for name, least in (("steps", 0), ("particles", 2), ("num_draws", 100), ("threads", 1)):
            value = getattr(self, name)
            if name == "threads" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        for name in ("lr", "max_seconds"):
            value = getattr(self, name)
            if not (name == "max_seconds" and value is None) and not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if self.dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float64 or torch.float32, got {self.dtype!r}")
        if not (isinstance(self.capture, bool) or self.capture == "auto"):
            raise ValueError(f'capture: expected "auto", True or False, got {self.capture!r}')
        if not isinstance(self.compile, bool):
            raise ValueError(f"compile: expected True or False, got {self.compile!r}")

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

    Locates the mass (Pathfinder, Laplace, Gaussian VI), trains the flow on top of the Gaussian found, never returns
    worse than that Gaussian, and judges the result through a defensive proposal.

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

    Raises
    ------
    TypeError for unknown options; ValueError, in one line, for a target that cannot be fitted; DivergedError.
    """
    known = [f.name for f in dataclasses.fields(Options)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"fit: unknown option {unknown[0]!r}; expected flow, seed, progress, {', '.join(known)}")
    chosen = Options(**options)
    with seeded(seed), threads(chosen.threads), Progress(progress) as bar:
        target = prepare(resolve_target(target_or_model, *args), chosen)
        named = {"flow": flow} if isinstance(flow, str) else {}
        return _fit(target, flow, chosen, {"seed": seed, **named}, bar)


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
    """Step 0: the target in its working precision, checked on points uniform in (−2, 2)."""
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
    if options.dtype is None:
        target = settle_dtype(target, points)
    check_target(target, points)
    return target


@dataclass(frozen=True)
class Start:
    """Where training begins: a flow on its whitening, Gaussians at the modes seen, and how the flow came about."""

    flow: Flow
    modes: Gaussians | None
    description: str
    recipe: str | None


def _fit(target: Target, choice: FlowChoice, options: Options, settings: dict[str, Any], bar: Progress) -> Posterior:
    clock = Clock(options.max_seconds)
    start = _start(target, choice, options, bar)
    clock.lap("locating")
    bar.stage("training", options.steps)
    trained = _train(start.flow, target, options, clock.left(TRAINING_SHARE), bar)
    best, notes = _never_worse(start.flow, trained, target)
    clock.lap("training")
    bar.stage("judging")
    return judged(best.requires_grad_(False), start, target, options, settings, clock, notes, trained.elbo)


def judged(
    flow: Flow,
    start: Start,
    target: Target,
    options: Options,
    settings: dict[str, Any],
    clock: Clock,
    notes: tuple[str, ...] = (),
    trace: Sequence[float] = (),
) -> Posterior:
    """The flow with its judgement, and how it was made."""
    judgement = judge(flow, target, start.modes, options.num_draws)
    if judgement.verdict.status == "unreliable":
        judgement.verdict = judgement.verdict.because(improper(target))
    clock.lap("judging")
    return Posterior(
        **vars(judgement),
        flow=flow,
        target=target,
        modes=start.modes,
        flow_description=start.description,
        notes=(*notes, *_notes(target, judgement)),
        trace=list(trace),
        settings=settings | {"recipe": start.recipe, "model": is_model(target), **options.recorded()},
        timing=clock.laps,
    )


def _start(target: Target, choice: FlowChoice, options: Options, bar: Progress) -> Start:
    """The chosen flow on top of the best Gaussian that locating finds, or a copy of a warm start's."""
    init, place = options.init, {"device": options.device, "dtype": torch.float64}
    if isinstance(init, Posterior) or callable(init):
        if choice != "auto":
            raise ValueError('flow: expected "auto" with init= a Posterior, Flow or guide, whose flow is trained on')
        return _warm_start(init, target, place, bar)
    if choice != "auto":
        resolve_flow(choice, target.dim)  # a mistake in it is told before any work is done
    bar.stage("locating")
    located = locate(target, start_points(target, _init_points(target, init), device=options.device))
    flow, name, recipe = resolve_flow(choice, target.dim, nearly_gaussian=located.variance < CLOSE)
    whitening = Fixed(LowerTriangular, shift=located.best.loc[0], scale_tril=located.best.scale_tril[0])
    flow = flow.to(**place).then(whitening)
    return Start(flow, located.modes, f"{name} on {located.best.origin[0]}", recipe)


def _warm_start(init: Any, target: Target, place: dict[str, Any], bar: Progress) -> Start:
    """A copy of the flow of a Posterior, of a Flow, or of an AutoFlow guide."""
    if not isinstance(init, (Posterior, Flow)) and not isinstance(getattr(init, "flow", None), Flow):
        kind = type(init).__name__
        raise ValueError(f"init: expected a Posterior, a Flow or an AutoFlow, got {kind}, which cannot be trained on")
    flow = as_flow(init, target).requires_grad_().to(**place)
    if not any(True for _ in flow.parameters()):
        raise ValueError("init: expected a Posterior of a flow, got one of a guide or law that cannot be trained on")
    if isinstance(init, Posterior):
        return Start(flow, init.modes, init.flow_description, init.settings.get("recipe"))
    bar.stage("locating")  # for the modes alone
    modes = locate(target, start_points(target, device=place["device"])).modes
    return Start(flow, modes, f"the flow of the {type(init).__name__} given", None)


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


def resolve_flow(choice: FlowChoice, dim: int, nearly_gaussian: bool = False) -> tuple[Flow, str, str | None]:
    """A fresh flow of the given dim, its description, and its recipe's name if it can be rebuilt from that alone.

    "auto" is the spline coupling flow, one pass in both directions, so that training by path gradients and judging
    are cheap; or the Gaussian, if the log-weights of the one located are all but constant.
    """
    if choice == "auto":
        choice = "gaussian" if nearly_gaussian else "spline"
    if isinstance(choice, str):
        if choice not in recipes.__all__:
            raise ValueError(f'flow: expected "auto" or one of {", ".join(recipes.__all__)}, got {choice!r}')
        return getattr(recipes, choice)(dim), f"{choice} flow", choice
    expected = "flow: expected a recipe's name, a callable dim -> Flow, or a Flow"
    if not isinstance(choice, Flow) and (isinstance(choice, nn.Module) or not callable(choice)):
        raise TypeError(f"{expected}, got {choice!r}")
    flow = copy.deepcopy(choice) if isinstance(choice, Flow) else choice(dim)
    if not isinstance(flow, Flow):
        raise TypeError(f"{expected}, got a callable that returns {type(flow).__name__}")
    if flow.dim != dim or flow.context is not None:
        raise ValueError(f"flow: expected dim {dim} and no context, got dim {flow.dim}, context {flow.context}")
    return flow, "the flow given", None


def _init_points(target: Target, init: Tensor | dict[str, Any] | None) -> Tensor | None:
    """Values to start near, as unconstrained points (n, dim)."""
    if init is None:
        return None
    if isinstance(init, dict):
        if not is_model(target):
            raise ValueError("init: named values need a Pyro model; pass a tensor (dim,) of a density's points")
        init = target.unconstrain(init)
    points = torch.atleast_2d(torch.as_tensor(init, dtype=torch.float64))
    if points.shape[-1] != target.dim or points.dim() != 2 or not points.isfinite().all():
        raise ValueError(f"init: expected finite values of shape ({target.dim},), got {tuple(points.shape)}")
    return points


def _never_worse(start: Flow, trained: Training, target: Target) -> tuple[Flow, tuple[str, ...]]:
    """The trained flow, or, if its ELBO is lower, the one that it started from; with notes on what happened."""
    notes = [f"training: {len(trained.elbo)} steps; {trained.reason}."]
    if trained.rolled_back:
        notes.append(f"training met non-finite values and was rolled back {trained.rolled_back} times.")
    if trained.lost:
        notes.append(f"training: {trained.lost} draws had log p = −inf and were left out.")
    if trained.note:
        notes.append(f"{trained.note}.")
    with torch.no_grad():
        noise = start.base.noise((COMPARED,))
        before, after = (
            mean_elbo(in_blocks(lambda rows, q=q: log_weights(q, target, rows).log_w, noise).nan_to_num(nan=-math.inf))
            for q in (start, trained.flow)
        )
    if before > after:
        notes.append(f"training did not help (ELBO {after:.3f} after, {before:.3f} before): the start was kept.")
        return copy.deepcopy(start), tuple(notes)
    return trained.flow, tuple(notes)


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
    return tuple(notes)


class Clock:
    """Wall time of the stages, and what is left of a limit."""

    def __init__(self, limit: float | None):
        self.limit, self.began = limit, time.monotonic()
        self.last, self.laps = self.began, {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self.last = now - self.last, now

    def left(self, share: float) -> float | None:
        return None if self.limit is None else max(share * self.limit - (time.monotonic() - self.began), 0.0)
