"""The one training loop: a pure step of (flat parameters, batch), Adam on one tensor, rules to go on or stop."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import DivergedError
from ...flows.distribution import Flow
from ...targets.target import Target
from .objectives import Objective, elbo
from .source import Noise, Source
from .step import Flat, Gradient, Loss, ReverseKL

# steps over which losses and gradient norms are compared. Chosen, not measured: shorter, and noise ends training early;
# longer, and it goes on in vain
WINDOW = 50
# of Adam: with the usual .999 second moments would remember most of a training. Chosen, not measured
BETAS = (0.9, 0.99)
# of the steps, at the full rate before it falls: less leaves flows short, more leaves noise in. Chosen, not measured
HELD = 0.6
# times the median gradient norm, above which a step is skipped, or its gradient cut: lower slows training, higher lets
# single draws in the tails throw a flow off. Chosen, not measured
SKIP, CLIP = 10.0, 2.0
NORMS_KNOWN = 10  # norms from which their median is one: before, no step is skipped
MOST_ROLL_BACKS = 3  # each halves the rate: at an eighth of it what still diverges is the target's fault
LEAST_GAIN = 2e-3  # nats over two windows, below which the ELBO stands still: a 25th of what DIVERGENCE allows
LOST_SHARE = 0.2  # of a step's draws at −inf, above which the target needs a constraint: what is lost has no gradient
CLOSE_VARIANCE = 4e-3  # variance of log w, twice the KL, below which a better fit would not be noticed
# steps, from where a fit may be given up: before, those that end well may look as bad
GIVEN_UP_FROM = 4 * WINDOW
LONG = 50  # dimensions, above which training that leads nowhere is given up: below, it takes a minute or so
HOPELESS = 8.0  # variance of log w, e⁻⁸ of all draws being a handful; lower, fits that long training mends are given up


@dataclass(eq=False)
class Training:
    """What training did: elbo has one noisy value a step; reason says in words why it stopped, note what failed;
    given_up whether it stopped because it led nowhere."""

    flow: Flow
    elbo: list[float] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0
    skipped: int = 0
    lost: int = 0
    drawn: int = 0
    rolled_back: int = 0
    given_up: bool = False
    note: str = ""


def train(
    flow: Flow,
    target: Target,
    *,
    steps: int = 1500,
    particles: int = 256,
    lr: float = 1e-2,
    objective: Objective = elbo,
    path: bool = False,
    max_seconds: float | None = None,
    give_up: bool = False,
    record: bool | str = False,
    compile: bool = False,
    report: Callable[[int, int, float], None] | None = None,
) -> Training:
    """Maximise the objective over a copy of ``flow`` by Adam; returns it with its averaged last iterates.

    The rate warms up, holds until the ELBO is stationary (or 60 % of the steps are used), then falls to 0 on a cosine,
    over whose second half iterates are averaged. Gradients above 10 times the running median norm are skipped, above
    2 times it clipped. Non-finite values roll back to the last good point and halve the rate.

    Parameters
    ----------
    give_up: without max_seconds, end where the variance of log-weights is above ``HOPELESS`` after ``GIVEN_UP_FROM``
        steps or more, and falls no faster than as 1/steps: as many draws as a verdict takes would not do.
    record: run the steps, after the first few, as recorded operations, which give the same numbers faster ("auto", or
        True: ``note`` says why where that fails).
    compile: run them as machine code, fused by TorchInductor: equal to rounding, several times faster, after a minute
        or so of compiling. Where that fails a warning and ``note`` say why, in one line.
    report: called with (step, steps, mean ELBO of the last window) for a progress bar.

    Raises
    ------
    DivergedError after the fourth roll-back; ValueError if more than 20 % of a window's draws have log p = −inf.
    Ctrl-C ends training with the average so far, and says so in ``reason``.
    """
    loss = ReverseKL(copy.deepcopy(flow).train(), target, objective, path)
    source = Noise(loss.flow.base, particles, stretched=path)
    loop = _Loop(loss, source, steps, lr, Gradient(loss, Flat(loss), bool(record), compile))
    result = Training(loss.flow)
    _run_loop(loop, result, max_seconds, give_up, report or (lambda *progress: None))
    result.note = loop.gradient.note
    if record is True and loop.gradient.refused:
        result.note = f"capture: the training step was not recorded: {loop.gradient.refused}"
    return result


def _run_loop(
    loop: _Loop,
    result: Training,
    max_seconds: float | None,
    give_up: bool,
    report: Callable[[int, int, float], None],
) -> None:
    """Steps until the loop is finished or time is up; then the averaged iterates are the parameters of the loss."""
    give_up = give_up and max_seconds is None
    began = time.monotonic()
    try:
        for i in range(loop.steps):
            loop.advance(i, result)
            report(i + 1, loop.ends_at, statistics.fmean(result.elbo[-WINDOW:] or [math.nan]))
            if max_seconds is not None and time.monotonic() - began > max_seconds:
                result.reason = f"the time limit of {max_seconds:g} s was reached"
                break
            if loop.finished(i, result) or (give_up and loop.hopeless(i, result)):
                break
    except KeyboardInterrupt:
        result.reason = f"interrupted at step {len(result.elbo)}"
    loop.flat.store(loop.loss, loop.average())
    result.seconds = time.monotonic() - began


class _Loop:
    """The state of one training run."""

    def __init__(self, loss: Loss, source: Source, steps: int, lr: float, gradient: Gradient):
        self.loss, self.source, self.steps, self.lr = loss, source, steps, lr
        self.flat, self.gradient = gradient.flat, gradient
        self.vector = self.flat.vector.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.vector], lr=lr, betas=BETAS, fused=True)
        self.norms: deque[float] = deque(maxlen=2 * WINDOW)
        self.variances: deque[float] = deque(maxlen=WINDOW)
        self.spreads: list[float] = []  # the median variance of each window
        self.warm_up = max(1, min(WINDOW, steps // 10))
        self.decay_from = max(1, int(HELD * steps))
        self.ends_at = steps
        self.why = "all steps were used"
        self.good = self._checkpoint()
        self.mean, self.count = self.vector.detach().clone(), 0

    def rate(self, i: int) -> float:
        if i < self.decay_from:
            return self.lr * min(1.0, (i + 1) / self.warm_up)
        done = (i - self.decay_from) / max(self.ends_at - self.decay_from, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def advance(self, i: int, result: Training) -> None:
        """One Adam step; a bad one is undone."""
        self.optimizer.param_groups[0]["lr"] = self.rate(i)
        gradient, log_w = self.gradient(self.vector, self.source.batch())
        log_w = log_w[: self.source.watched]
        alive = log_w[log_w > -torch.inf]
        result.lost += len(log_w) - len(alive)
        result.drawn += len(log_w)
        norm = float(torch.linalg.vector_norm(gradient))
        value = float(alive.mean()) if len(alive) else math.nan
        self.variances.append(float(alive.var()) if len(alive) > 1 else math.inf)
        self._check_lost(i, result)
        if not (math.isfinite(norm) and math.isfinite(value)):
            self._roll_back(i, result)
        else:
            result.elbo.append(value)
            self._apply(i, gradient, norm, result)
        if i % WINDOW == WINDOW - 1:
            self.good = self._checkpoint()
            self.spreads.append(statistics.median(self.variances))

    def _apply(self, i: int, gradient: Tensor, norm: float, result: Training) -> None:
        typical = statistics.median(self.norms) if len(self.norms) >= NORMS_KNOWN else norm
        self.norms.append(norm)
        if norm > SKIP * typical:
            result.skipped += 1
            return
        self.vector.grad = gradient * min(1.0, CLIP * typical / max(norm, 1e-300))
        self.optimizer.step()
        if i >= (self.decay_from + self.ends_at) // 2:
            self.count += 1
            self.mean += (self.vector.detach() - self.mean) / self.count

    def finished(self, i: int, result: Training) -> bool:
        """Whether step i was the last; moves the decay forward once the ELBO stands still."""
        if i + 1 >= self.ends_at:
            result.reason = self.why
            return True
        if i + 1 < self.decay_from and (i + 1) % (WINDOW // 2) == 0 and len(self.variances) == WINDOW:
            if statistics.fmean(self.variances) < CLOSE_VARIANCE:
                self._decay(i + 1, WINDOW, "log-weights were all but constant")
            elif len(result.elbo) >= 4 * WINDOW and _stationary(result.elbo):
                self._decay(i + 1, max(2 * WINDOW, (i + 1) // 2), "the ELBO was stationary")
        return False

    def hopeless(self, i: int, result: Training) -> bool:
        """Whether, the rate still at its height, log-weights vary hopelessly, and not half as much as half-way here."""
        if i + 1 < GIVEN_UP_FROM or (i + 1) % WINDOW or i + 1 >= self.decay_from:
            return False
        before, now = self.spreads[len(self.spreads) // 2 - 1], self.spreads[-1]
        if now > HOPELESS and now > before / 2:
            result.given_up = True
            result.reason = f"given up: log-weights had a variance of {now:.1f}, of {before:.1f} half-way there; "
            result.reason += "max_seconds= says how long it may go on"
        return result.given_up

    def _decay(self, step: int, length: int, why: str) -> None:
        self.decay_from, self.ends_at = step, min(self.steps, step + length)
        self.why = f"{why} from step {step}"

    def average(self) -> Tensor:
        """The averaged iterates, or the last good ones if averaging had not begun."""
        return self.mean if self.count else self.vector.detach()

    def _check_lost(self, i: int, result: Training) -> None:
        if (i + 1) % WINDOW == 0 and result.lost > LOST_SHARE * result.drawn:
            share = result.lost / result.drawn
            raise ValueError(
                f"log_prob: expected finite values in training, got −inf at {share:.0%} of the draws; put the "
                "constraint into the target: transform the parameter, or give the Pyro site its support"
            )

    def _checkpoint(self) -> tuple[Tensor, dict]:
        return self.vector.detach().clone(), copy.deepcopy(self.optimizer.state_dict())

    def _roll_back(self, i: int, result: Training) -> None:
        result.rolled_back += 1
        if result.rolled_back > MOST_ROLL_BACKS:
            raise DivergedError(
                f"fit: log-weights or gradients were not finite at step {i}, for the fourth time at learning rate "
                f"{self.lr:.1e}; lower lr=, or look for overflow in the target"
            )
        with torch.no_grad():
            self.vector.copy_(self.good[0])
        self.optimizer.load_state_dict(self.good[1])
        self.lr /= 2


def _stationary(trace: list[float]) -> bool:
    """Whether the last two windows gained no more than their noise (or 0.002 nats) over the two before them."""
    late, early = trace[-2 * WINDOW :], trace[-4 * WINDOW : -2 * WINDOW]
    gain = statistics.fmean(late) - statistics.fmean(early)
    noise = math.sqrt((statistics.variance(late) + statistics.variance(early)) / len(late))
    return gain < max(noise, LEAST_GAIN)
