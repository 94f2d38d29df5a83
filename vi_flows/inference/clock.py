"""Wall time: of the stages of a fit, what is left of a limit, and what is still to come."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import math
import time
from collections.abc import Callable, Iterator

from ..flows.distribution import Flow
from ..targets.target import Target
from .weights import BLOCK, in_blocks, log_weights

LOCATING_SHARE = 0.4  # of a limit, by when locating ends: what it misses no later stage finds
TRAINING_SHARE = 0.8  # by when training ends, or sooner, for judging needs the rest:
LEAST_TRAINING = 0.6  # but no sooner than this
FLOOR = 15.0  # seconds that annealing may take, however quickly locating and training were done

_until: contextvars.ContextVar[float] = contextvars.ContextVar("until", default=math.inf)


def late() -> bool:
    """Whether the time for the stage that runs is up: the loops of locating end where they are, then."""
    return time.monotonic() > _until.get()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of the second of two calls: the first one may set things up."""
    work()
    began = time.monotonic()
    work()
    return time.monotonic() - began


class Clock:
    """Wall time of the stages, and what is left of a limit (None: no limit).

    laps: seconds by stage. cut: stages that a limit ended before their time.
    """

    def __init__(self, limit: float | None):
        self.limit, self.began = limit, time.monotonic()
        self.last, self.laps = self.began, {}
        self.cut: list[str] = []

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self.last = now - self.last, now

    def left(self, share: float = 1.0, parts: int = 1) -> float | None:
        """Of that share of the limit, what is left for the next of so many parts; None without a limit."""
        return None if self.limit is None else max(share * self.limit - (time.monotonic() - self.began), 0.0) / parts

    @contextlib.contextmanager
    def ending(self, name: str, share: float) -> Iterator[None]:
        """A stage whose loops ask :func:`late`, and end when that share of the limit is used up."""
        token = _until.set(math.inf if self.limit is None else self.began + share * self.limit)
        try:
            yield
            self.cut += [name] if late() else []
        finally:
            _until.reset(token)

    def training_share(self, judging: float) -> float:
        """The share of the limit by when training ends, if judging takes so many seconds."""
        if self.limit is None:
            return TRAINING_SHARE
        return min(max(1 - 1.2 * judging / self.limit, LEAST_TRAINING), TRAINING_SHARE)

    def for_annealing(self) -> float:
        """Seconds that annealing may take: what is left of the limit, else as many as locating and training took."""
        spent = self.laps.get("locating", 0.0) + self.laps.get("training", 0.0)
        return max(spent, FLOOR) if self.limit is None else self.left()


def step_seconds(flow: Flow, target: Target, particles: int) -> float:
    """Seconds of one training step, run eagerly: recorded steps are faster."""
    flow = copy.deepcopy(flow)

    def step() -> None:
        log_w = log_weights(flow, target, particles, path=True).log_w
        if log_w.requires_grad:
            log_w.sum().backward()

    return seconds_of(step)


def draw_seconds(flow: Flow, target: Target) -> float:
    """Seconds to draw from a flow and evaluate the target there, a draw."""
    noise = flow.base.noise((BLOCK,))
    return seconds_of(lambda: in_blocks(lambda rows: log_weights(flow, target, rows).log_w, noise)) / BLOCK
