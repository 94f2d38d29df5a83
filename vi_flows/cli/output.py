"""What the command line gives back: tables and words for people, JSON for machines, files for later."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

import vi_flows as vf

from ..atomic import replacing

if TYPE_CHECKING:
    from pandas import DataFrame

SUMMARY_ROWS = 40  # of the summary that are printed
SUMMARY_COLUMNS = ("mean", "sd", "5%", "50%", "95%", "mcse_mean")  # those that fit a screen; the files have all
PICTURES = (".png", ".pdf", ".svg")
STYLES = {"reliable": "bold green", "corrected": "bold yellow", "unreliable": "bold red"}
VERDICT_MEANINGS = {
    "reliable": "The flow and its draws can be used as they are.",
    "corrected": "Use weighted draws (as in this table and in draws.npz).",
    "unreliable": "Do not rely on these numbers.",
}


def show(posterior: vf.Posterior, summary: DataFrame, console: Console) -> None:
    """The summary table, the verdict in words, and the numbers behind it."""
    console.print(_table(summary[list(SUMMARY_COLUMNS)]))
    if len(summary) > SUMMARY_ROWS:
        console.print(f"... and {len(summary) - SUMMARY_ROWS} more rows (all of them with --out DIR or --json)")
    status = posterior.verdict.status
    console.print(f"Verdict: [{STYLES[status]}]{status}[/]. {VERDICT_MEANINGS[status]}")
    for reason in posterior.verdict.reasons[1:]:  # the first says what VERDICT_MEANINGS does
        console.print(_item(reason))
    console.print()
    console.print(_numbers(posterior))
    said = [*posterior.notes, *(posterior.rehearsal.sentences if posterior.rehearsal else ())]
    if said:
        console.print("\nNotes")
    for sentence in said:
        console.print(_item(sentence))


def _table(summary: DataFrame) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in summary.columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in summary.head(SUMMARY_ROWS).iterrows():
        table.add_row(str(name), *(f"{value:.4g}" for value in row))
    return table


def _item(sentence: str) -> Padding:
    return Padding(f"- {sentence.rstrip('.')}", (0, 0, 0, 2))


def _numbers(posterior: vf.Posterior) -> Table:
    low, high = posterior.khat_interval
    total = sum(posterior.timing.values())
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in posterior.timing.items())
    count = len(posterior.flow_draws)
    rows = {
        "k̂ of the flow": f"{posterior.khat:.2f} ({low:.2f} to {high:.2f}); below 0.7 is good",
        "ESS of the flow": f"{posterior.ess:.0f} of {count} draws ({posterior.ess / count:.0%})",
        posterior.evidence_name: posterior.evidence_text,
        "ELBO": f"{posterior.elbo:.3f}",
        "flow": posterior.flow_description,
        "time": f"{total:.1f} s ({stages})",
    }
    known = posterior.target.log_z
    if known is not None:
        rows["known to be"] = f"{known:.3f} ({posterior.target.how}); error {posterior.log_evidence - known:+.3f}"
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def as_dict(posterior: vf.Posterior, summary: DataFrame, files: list[Path]) -> dict[str, Any]:
    """All that a machine may want to know of a fit, apart from its draws."""
    numbers = ("khat", "khat_interval", "khat_spread", "ess", "elbo", "log_evidence", "log_evidence_se")
    return {
        "version": vf.__version__,
        "status": posterior.verdict.status,
        "reasons": posterior.verdict.reasons,
        "checks": [dataclasses.asdict(check) for check in posterior.verdict.checks],
        **{name: getattr(posterior, name) for name in numbers},
        "known_log_z": posterior.target.log_z,
        "num_draws": len(posterior.flow_draws),
        "dim": posterior.dim,
        "summary": {str(name): dict(row) for name, row in summary.iterrows()},
        "flow": posterior.flow_description,
        "notes": posterior.notes,
        "rehearsal": posterior.rehearsal and posterior.rehearsal.to_dict(),
        "timing": posterior.timing,
        "settings": vars(posterior.settings),
        "files": [str(path) for path in files],
    }


def to_json(value: Any) -> str:
    """JSON without the tokens NaN and Infinity: null, and the strings "inf" and "-inf"."""
    return json.dumps(_plain(value), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(value) if math.isfinite(value) else str(float(value))
    return value


def prepare_folder(folder: Path, option: str = "--out") -> None:
    """Make the folder before the work begins. Raises ValueError, in one line, where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, os.strerror(13))
    except OSError as error:
        message = f"expected a folder that can be written to, got {folder} ({error.strerror})"
        raise ValueError(f"{option}: {message}") from None


def prepare_picture(path: Path) -> None:
    """Make the picture's folder before the work begins. Raises ValueError, in one line, for what is no such file."""
    if path.suffix.lower() not in PICTURES or path.is_dir():
        raise ValueError(f"--plot: expected a file name that ends in {', '.join(PICTURES)}, got {path}")
    prepare_folder(path.parent, "--plot")


def draw(posterior: vf.Posterior, path: Path) -> Path:
    """Write the picture of the fit, whole or not at all; returns its path."""
    _replace(path, lambda file: posterior.plot().savefig(file, format=path.suffix[1:].lower()))
    return path


def write(
    posterior: vf.Posterior, summary: DataFrame, folder: Path, draws: int, picture: Path | None = None
) -> list[Path]:
    """posterior.safetensors, summary.csv, draws.npz (weighted), posterior.png, report.html and result.json, each whole
    or not at all; result.json also names the ``picture`` that was written elsewhere. Returns their paths.
    """
    names = ("posterior.safetensors", "summary.csv", "draws.npz", "posterior.png", "report.html", "result.json")
    files = [folder / name for name in names]
    posterior.save(files[0])
    _replace(files[1], lambda file: file.write(summary.to_csv(index_label="name").encode()))
    drawn = posterior.sample(draws, seed=posterior.settings.seed)
    named = drawn if isinstance(drawn, dict) else {"x": drawn}
    _replace(files[2], lambda file: np.savez(file, **{name: value.cpu().numpy() for name, value in named.items()}))
    draw(posterior, files[3])
    posterior.report(files[4])
    files += [picture] if picture is not None else []
    _replace(files[5], lambda file: file.write(to_json(as_dict(posterior, summary, files)).encode()))
    return files


def _replace(path: Path, write_to: Callable[[BinaryIO], Any]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        write_to(file)
