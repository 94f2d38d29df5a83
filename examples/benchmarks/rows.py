"""What the benchmarks of fits share: errors of draws against a reference, what they must not exceed, rows in a file."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 20_000
PROBABILITIES = (0.05, 0.5, 0.95)
MEAN_LIMIT = 0.1
PROBABILITY_LIMITS = (0.015, 0.03, 0.015)
CLAIMED = ("reliable", "corrected")


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
    probabilities = zip(PROBABILITIES, found["probabilities"], PROBABILITY_LIMITS, strict=True)
    return ([] if found["mean"] < MEAN_LIMIT else ["mean"]) + [
        f"P{p * 100:.0f}" for p, error, limit in probabilities if not error <= limit
    ]


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """All rows so far, whole or not at all; NaN as null, infinities as text."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(_plain(rows), indent=1, allow_nan=False), encoding="utf-8")
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
