"""A progress bar of the stages of a fit, by rich."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A context manager: ``stage(name, total)`` begins one, ``step(done, total, elbo)`` or ``advance()`` moves it.

    remaining: show how long a stage will still take, not for how long it has run.
    """

    def __init__(self, show: bool, remaining: bool = False):
        self.bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=8 if remaining else 40),  # notes are long there: a line is 80 wide
            TextColumn("{task.fields[note]}"),
            *([TextColumn("left"), TimeRemainingColumn()] if remaining else [TimeElapsedColumn()]),
            console=Console(stderr=True),
            disable=not show,
        )
        self.shown, self.task = show, None

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self.bar.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        self._finish()
        self.task = self.bar.add_task(name, total=total, note="")

    def step(self, done: int, total: int, elbo: float) -> None:
        self.note(done, total, f"ELBO {elbo:.2f}  step {done}/{total}")

    def note(self, done: float, total: float, text: str, stage: str | None = None) -> None:
        """Show text, and where ``stage`` is given that name for the stage."""
        self.bar.update(self.task, completed=done, total=total, note=text, description=stage)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.shown:
            self.bar.print(text)

    def advance(self, count: int = 1) -> None:
        """So many more of the stage's total are done."""
        self.bar.advance(self.task, count)

    def _finish(self) -> None:
        if self.task is not None:
            self.bar.update(self.task, total=1, completed=1)
            self.bar.stop_task(self.task)
