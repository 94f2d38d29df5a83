"""``vi-flows``: fit a Pyro model, sample a density or an energy, and read the verdict, from the command line."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import vi_flows as vf

from ..vae.distributed import LostWorker
from . import demo as eight_schools
from . import vae
from .inputs import known_densities, loaded, read_data, to_density, to_model
from .options import Fitting, RunOptions, takes_records
from .output import as_dict, draw, prepare_folder, prepare_picture, show, to_json, write

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
DEFAULT_DRAWS = 4000

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fit normalizing flows to posteriors and densities, and say whether the result can be relied on.",
)

app.add_typer(vae.app, name="vae")

Draws = Annotated[int | None, typer.Option("--draws", "-n", help=f"Weighted draws in DIR/draws.npz ({DEFAULT_DRAWS}).")]
Rehearse = Annotated[
    int, typer.Option("--rehearse", metavar="K", help="Draw K data sets from the fit and refit them, to see it err.")
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 with any verdict, 2 for bad input, 1 for a fit that failed."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = app(arguments or ["--help"], prog_name="vi-flows", standalone_mode=False) or 0
            # versions of typer differ in what they make of Ctrl-C
            return _interrupted() if status == INTERRUPTED else status
        except (KeyboardInterrupt, typer.Abort):
            return _interrupted()
        except (vf.DivergedError, vf.NotConverged, LostWorker) as error:
            return _fail(error, FAILED)
        except (ValueError, TypeError) as error:
            return _fail(_in_words(error), BAD_INPUT)
        except Exception as error:
            if not hasattr(error, "format_message"):  # all of the parser's own errors have one
                raise
            return _fail(error.format_message(), BAD_INPUT)


def _fail(message: object, status: int) -> int:
    print("vi-flows: " + " ".join(str(message).split()), file=sys.stderr)
    return status


def _interrupted() -> int:
    return _fail("interrupted before there was a result", INTERRUPTED)


def _in_words(error: Exception) -> str:
    """An error's message; if it is not one of this package (but a model's own, say) also its kind and place."""
    if ": expected" in str(error):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (in {Path(last.filename).name}, line {last.lineno})"


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        print("vi-flows: warning: " + " ".join(str(message).split()), file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vi-flows {vf.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command()
@takes_records
def fit(
    model: Annotated[str, typer.Argument(metavar="FILE.py:MODEL", help="A Pyro model.")],
    fitting: Fitting,
    run: RunOptions,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE.json", help="A JSON object of the model's arguments.")
    ] = None,
    draws: Draws = None,
    rehearse: Rehearse = 0,
) -> None:
    """Fit a flow to the posterior of a Pyro model."""
    with loaded(model) as function:
        _run(to_model(function, read_data(data)), run, draws, rehearse=rehearse, **vars(fitting))


@app.command()
@takes_records
def sample(
    fitting: Fitting,
    run: RunOptions,
    density: Annotated[
        str,
        typer.Argument(metavar="FILE.py:FUNCTION|NAME", help="A log density (N, D) -> (N,), or a known one's name."),
    ] = "",
    dim: Annotated[int | None, typer.Option("--dim", help="D, the number of coordinates; a NAME has its own.")] = None,
    energy: Annotated[bool, typer.Option("--energy", help="FUNCTION is an energy: minus a log density.")] = False,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Where the data file of credit or ionosphere is.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the known densities by name, and stop.")] = False,
    draws: Draws = None,
) -> None:
    """Sample an unnormalised density or energy, your own or a known one of the literature."""
    if listed:
        print(known_densities())
        return
    with to_density(density, dim, energy, data) as target:
        _run(target, run, draws, **vars(fitting))


@app.command()
@takes_records
def demo(run: RunOptions) -> None:
    """Fit eight schools, a small hierarchical model with real data; a picture goes to demo.png or to DIR."""
    if not run.as_json:
        print(eight_schools.TITLE)
    if run.plot is None and run.out is None:
        run = replace(run, plot=Path("demo.png"))
    _run(vf.PyroModel(eight_schools.model, *eight_schools.data()), run)


def _run(target: vf.Target, run: RunOptions, draws: int | None = None, **options: Any) -> None:
    """Fit, write the files that were asked for, and print the result."""
    if draws is not None and (draws < 1 or run.out is None):
        raise ValueError(
            f"--draws: expected a positive number and --out, got {draws} and {run.out}; DIR/draws.npz has them"
        )
    if run.out is not None:
        prepare_folder(run.out)
    if run.plot is not None:
        prepare_picture(run.plot)
    given = {name: value for name, value in {"steps": run.steps, **options}.items() if value is not None}
    posterior = vf.fit(target, seed=run.seed, progress=not run.no_progress, **given)
    summary = posterior.summary()
    files = [draw(posterior, run.plot)] if run.plot is not None else []
    if run.out is not None:
        files = write(posterior, summary, run.out, draws or DEFAULT_DRAWS, run.plot)
    if run.as_json:
        print(to_json(as_dict(posterior, summary, files)))
        return
    console = Console(highlight=False)
    show(posterior, summary, console)
    if run.out is not None:
        names = [path.name for path in files if path.parent == run.out]
        console.print(f"written to {run.out}: {', '.join(names)}", soft_wrap=True)
    if run.plot is not None:
        console.print(f"picture: {run.plot}", soft_wrap=True)
