"""Running a stage: seeds, threads, and wall time: what is left of a limit, and what is to come."""

from __future__ import annotations

import contextlib
import contextvars
import math
import time
from collections.abc import Callable, Iterator

import torch

LOCATING_SHARE = 0.4  # of a limit, by when locating ends: what it misses no later stage finds
TRAINING_SHARE = 0.8  # by when training ends, or sooner, for judging needs the rest:
LEAST_TRAINING = 0.5  # but no sooner than this
RESERVE = 1.5  # times the seconds that judging is told to take, kept for it: a machine may be busier then
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
        return min(max(1 - RESERVE * judging / self.limit, LEAST_TRAINING), TRAINING_SHARE)

    def for_annealing(self) -> float:
        """Seconds that annealing may take: what is left of the limit, else as many as locating and training took."""
        spent = self.laps.get("locating", 0.0) + self.laps.get("training", 0.0)
        return max(spent, FLOOR) if self.limit is None else self.left()


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run under its own seed and leave torch's global generators as they were; None: draw from the global state."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run on so many torch threads, then restore what was set; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
