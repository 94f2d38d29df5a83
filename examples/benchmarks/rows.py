"""What the benchmarks of fits share: errors of draws against a reference, what they must not exceed, rows in a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from vi_flows.atomic import replacing
from vi_flows.cli.output import to_json
from vi_flows.testing.calibration import CLAIMED, LIMITS, PROBABILITIES

__all__ = ["CLAIMED", "DRAWS", "PROBABILITIES"]
DRAWS = 20_000


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="fits of each, seeds 0 to N - 1")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rows here, after every row")


def wanted(name: str, only: list[str]) -> bool:
    """Whether the options ``--only`` ask for that name: always, if there were none."""
    parts = [part for option in only for part in option.split(",") if part]
    return not parts or any(part in name for part in parts)


def read(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a file that :func:`write` wrote, without those that failed; [] where there is none."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else []
    return [row for row in rows if "error" not in row]


def errors(samples: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, Any]:
    """The largest errors over the reference's quantities, and the quantity whose mean is worst.

    Of means, in the reference's sds; of the probabilities below the reference's 5, 50 and 95 % points.
    """
    names = [str(name) for name in reference["names"]]
    drawn = np.stack([samples[name] for name in names], -1)
    mean = np.abs(drawn.mean(0) - reference["mean"]) / reference["sd"]
    points = (reference["q05"], reference["q50"], reference["q95"])
    below = [np.abs((drawn <= q).mean(0) - p).max() for p, q in zip(PROBABILITIES, points, strict=True)]
    return {"mean": float(mean.max()), "worst": names[int(mean.argmax())], "probabilities": [float(b) for b in below]}


def beyond_limits(found: dict[str, Any]) -> list[str]:
    """Which of the errors of draws are larger than draws of the target would show."""
    errors = {"mean": found["mean"]} | dict(zip(("P5", "P50", "P95"), found["probabilities"], strict=True))
    return [name for name, error in errors.items() if not error <= LIMITS[name]]


def before_after(row: dict[str, Any]) -> str:
    """The errors of means and probabilities of a row, each before and after weighting."""
    before, after = row["before"], row["after"]
    pairs = zip(before["probabilities"], after["probabilities"], strict=True)
    columns = " ".join(f"{b:.3f}"[1:] + " " + f"{a:.3f}"[1:] for b, a in pairs)
    return f"{before['mean']:>5.3f} {after['mean']:>5.3f} {columns}"


def total_line(rows: list[dict[str, Any]], first: str, **counts: int) -> str:
    """A line that begins with ``first``: how many of each kind, errors, and CPU seconds."""
    kinds = "; ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    failed, seconds = sum("error" in row for row in rows), sum(row["cpu_seconds"] for row in rows)
    how = "(mean err and P5, P50, P95: before and after weighting)"
    return f"{first}; {kinds}; {failed} errors; {seconds:.0f} CPU s {how}"


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """All rows so far, whole or not at all; NaN as null, infinities as text."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(rows), encoding="utf-8")
