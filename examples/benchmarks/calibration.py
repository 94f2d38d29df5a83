"""How often the verdict is wrong: default fits of random targets with log Z = 0 and exact draws.

    python examples/benchmarks/calibration.py [--n N] [--seed S] [--only KIND] [--json OUT]

The kinds take turns, target i has seed S + i; rows that OUT already holds are kept, so that a run goes on where another
was stopped. A row: CPU seconds of one thread; the verdict's status; k̂ and ESS of the flow; the error of log Ẑ; what is
most wrong of the weighted draws and the evidence, and of unweighted draws of q, as multiples of what is allowed; the
checks that failed. Then the table of ``vf.testing.calibrate_verdict``, which says what is right.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from rows import read, wanted, write

from vi_flows.testing import calibrate_verdict
from vi_flows.testing.calibration import NECKS, CalibrationRow
from vi_flows.testing.synthetic import TARGET_KINDS

HEADER = (
    f"{'kind':<8} {'seed':>4} {'D':>3} {'CPU s':>6} {'status':<10} {'k̂':>5} {'ESS':>5} {'log Z error':>11} "
    f"{'weighted':>10} {'of q':>10}  result"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=50, metavar="N", help="targets to fit (50)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first target (0)")
    parser.add_argument("--only", action="append", default=[], metavar="KIND", help="part of a kind, or several: a,b")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rows here, after every row")
    arguments = parser.parse_args()
    every = (*TARGET_KINDS, *NECKS)
    kinds = [kind for kind in every if wanted(kind, arguments.only)] if arguments.only else list(TARGET_KINDS)
    if not kinds:
        parser.error(f"--only: expected part of one of {', '.join(every)}, got {arguments.only}")
    if arguments.n < 1:
        parser.error(f"--n: expected a positive integer, got {arguments.n}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(HEADER, flush=True)
    rows = {(row.kind, row.seed): row for row in map(restored, read(arguments.json)) if row.status != "error"}

    def report(row: CalibrationRow) -> None:
        print(line(row), flush=True)
        rows[row.kind, row.seed] = row
        if arguments.json is not None:
            write([dataclasses.asdict(each) for each in rows.values()], arguments.json)

    print(calibrate_verdict(arguments.n, arguments.seed, kinds=kinds, kept=list(rows.values()), report=report).table())


def restored(plain: dict[str, Any]) -> CalibrationRow:
    """A row as it was before it was written: infinities are text in the file, NaN is null."""

    def number(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: number(item) for name, item in value.items()}
        return float("nan") if value is None else float(value) if value in ("inf", "-inf") else value

    return CalibrationRow(**{name: number(value) for name, value in plain.items()})


def line(row: CalibrationRow) -> str:
    start = f"{row.kind:<8} {row.seed:>4} {row.dim:>3} {row.cpu_seconds:>6.1f} {row.status:<10} "
    if row.status == "error":
        return start + " ".join(row.message.split())[:160]
    numbers = f"{row.khat:>5.2f} {row.ess:>5.0%} {row.log_z_error:>+11.4f} {worst(row.errors):>10} "
    return f"{start}{numbers}{worst(row.own_errors):>10}  {result(row)} ({row.target})"


def worst(errors: dict[str, float]) -> str:
    name = max(errors, key=errors.get)
    return f"{name} {errors[name]:.2f}"


def result(row: CalibrationRow) -> str:
    said = "right" if row.right else f"wrong: {', '.join(row.wrong)}"
    if row.claimed:
        return said if row.right else f"{said}; FALSE CLAIM"
    return f"{said}; unclaimed: {', '.join(row.stopped_by)}" if row.right else said


if __name__ == "__main__":
    main()
