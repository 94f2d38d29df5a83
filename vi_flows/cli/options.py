"""Options that commands share, and how a command takes many of them as one record."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

import vi_flows as vf

Seed = Annotated[int, typer.Option("--seed", help="The result depends on it alone.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress bar (it is on standard error).")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def takes_records(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer of one that takes records: of a parameter that is a dataclass, the fields become options."""
    hints = get_type_hints(command, include_extras=True)
    records = {name: kind for name, kind in hints.items() if is_dataclass(kind)}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in records.items()}
        command(**given, **made)

    options: dict[str, Parameter] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        defaults = {f.name: f.default for f in fields(records[name])} if name in records else {name: parameter.default}
        kinds = get_type_hints(records[name], include_extras=True) if name in records else hints
        for option, default in defaults.items():
            options[option] = Parameter(option, Parameter.KEYWORD_ONLY, default=default, annotation=kinds[option])
    run.__signature__ = inspect.Signature(list(options.values()))  # both are what typer reads
    run.__annotations__ = {name: option.annotation for name, option in options.items()}
    return run


@dataclass(frozen=True)
class Fitting:
    """How to fit, by names of arguments of vf.fit."""

    flow: Annotated[str, typer.Option("--flow", metavar="NAME", help="auto, or: " + ", ".join(vf.recipes.__all__))] = (
        "auto"
    )
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="Time for all stages, about; none: no limit.")
    ] = None
    num_draws: Annotated[
        int, typer.Option("--num-draws", help="Draws of the flow in each of five judgements of k̂.")
    ] = 10_000
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="Of torch; more than 1 pays for large data only.")
    ] = 1
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the training step: a minute that pays in long trainings.")
    ] = False


@dataclass(frozen=True)
class RunOptions:
    """What every command that fits is asked for: the run's seed and length, and where its result goes."""

    seed: Seed = 0
    steps: Annotated[int | None, typer.Option("--steps", help="At most so many training steps.")] = None
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write posterior, summary, draws, picture, report, result here."),
    ] = None
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Write a picture of the fit (or .pdf, .svg).")
    ] = None
    as_json: AsJson = False
    no_progress: NoProgress = False
