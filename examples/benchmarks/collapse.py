"""Whether a fit that collapses onto one of two modes says so, and whether targets of one mode are believed.

    python examples/benchmarks/collapse.py [--only NAME] [--seeds N] [--json OUT]

First two unit normals at ±6 and at ±8 along the first axis, in 1, 2 and 8 dimensions, of equal mass and of 9 to 1, each
fitted by ``vf.fit`` with default settings and seeds 0 to N − 1 (N = 2). A row: CPU seconds of one thread; the verdict's
status; the share of the mode at +a in weighted draws and in q's own draws, beside the truth; the error of log Ẑ ± its
standard error; ESS of the flow; the result. "Recovered" is a claim of reliable or corrected with the share within .015
and log Ẑ within 0.1; a claim beyond these is a FALSE CLAIM; without a claim a row is "unreliable".

Then 20 targets of one mode, with seed 0, in the table of energies.py. A false alarm is a fit that is right and yet not
claimed. Rows that OUT already holds are kept.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from typing import Any

import energies
import torch
from rows import CLAIMED, DRAWS, add_fit_arguments, read, total_line, wanted, write
from torch import Tensor

import vi_flows as vf
from vi_flows.targets.known import KnownDensity
from vi_flows.testing.synthetic import synthetic

SHARE_LIMIT = 0.015  # of the share of a mode; of log Z: energies.LOG_Z_LIMIT
RESULTS = ("recovered", "unreliable", "FALSE CLAIM", "error")
PAIRS = {
    f"two D={dim} ±{apart} {share:.1f}": (dim, float(apart), share)
    for dim in (1, 2, 8)
    for apart in (6, 8)
    for share in (0.5, 0.9)
}
SYNTHETIC = {"normal": 5, "student": 4, "banana": 4, "funnel": 4}  # targets of seeds 0, 1, ... of each kind
CATALOGUE = ("banana", "funnel", "u2")

HEADER = (
    f"{'two normals':<14} {'seed':>4} {'CPU s':>6} {'status':<10} {'true':>5} {'weighted':>8} {'of q':>5} "
    f"{'log Z error ± se':>18} {'ESS':>5}  result"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="part of a name, or several: a,b")
    add_fit_arguments(parser)
    parser.set_defaults(seeds=2)
    arguments = parser.parse_args()
    pairs = [name for name in PAIRS if wanted(name, arguments.only)]
    alone = [name for name in unimodal() if wanted(name, arguments.only)]
    if not pairs and not alone:
        parser.error(f"--only: expected part of one of {', '.join([*PAIRS, *unimodal()])}, got {arguments.only}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kept = {(row["name"], row["seed"]): row for row in read(arguments.json)}
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any], words: str) -> None:
        print(words, flush=True)
        rows.append(row)
        if arguments.json is not None:
            write([*rows, *kept.values()], arguments.json)

    if pairs:
        print(HEADER, flush=True)
        for name in pairs:
            for seed in range(arguments.seeds):
                row = kept.pop((name, seed), None) or measure(name, seed)
                add(row, line(row))
        print(totals(rows))
    if alone:
        print(energies.HEADER, flush=True)
        for name in alone:
            row = kept.pop((name, 0), None) or measure_alone(name)
            add(row, energies.line(row))
        print(totals_alone(rows[-len(alone) :]))


def two_normals(dim: int, apart: float, share: float) -> KnownDensity:
    """share · N(+a e₁, I) + (1 − share) · N(−a e₁, I): log Z = 0."""
    centre = torch.zeros(dim, dtype=torch.float64)
    centre[0] = apart

    def log_p(x: Tensor) -> Tensor:
        squares = torch.stack([(x - centre).square().sum(-1), (x + centre).square().sum(-1)])
        logs = squares.new_tensor([share, 1 - share]).log()
        return (logs[:, None] - squares / 2).logsumexp(0) - dim / 2 * math.log(2 * math.pi)

    return KnownDensity(log_p, dim, log_z=0.0, how="normalised", modes=2, mode_of=lambda x: (x[:, 0] > 0).long())


def unimodal() -> dict[str, str]:
    """Names of the targets of one mode, and of what kind they are."""
    made = {f"{kind} {seed}": kind for kind, count in SYNTHETIC.items() for seed in range(count)}
    return made | dict.fromkeys(CATALOGUE, "catalogue")


def measure(name: str, seed: int) -> dict[str, Any]:
    """One fit of two normals, beside the truth; a failure is a row too."""
    dim, apart, share = PAIRS[name]
    density = two_normals(dim, apart, share)
    row: dict[str, Any] = {"name": name, "dim": dim, "seed": seed, "share": share}
    began = time.process_time()
    try:
        posterior = vf.fit(density, seed=seed, progress=False)
        row |= {"cpu_seconds": time.process_time() - began} | energies.numbers(posterior, density)
        for kind, weighted in (("weighted", True), ("own", False)):
            draws = posterior.sample(DRAWS, weighted=weighted, seed=seed + 1)
            row[kind] = float(density.mode_shares(draws)[1])
        row["result"] = result(row)
    except Exception as error:
        row |= {"cpu_seconds": time.process_time() - began, "error": f"{type(error).__name__}: {error}"}
    return row


def result(row: dict[str, Any]) -> str:
    """What the fit comes to: its claim against the share of a mode and log Z."""
    right = abs(row["weighted"] - row["share"]) <= SHARE_LIMIT and abs(row["log_z_error"]) <= energies.LOG_Z_LIMIT
    if row["status"] in CLAIMED:
        return "recovered" if right else "FALSE CLAIM"
    return "unreliable, though right" if right else "unreliable"


def line(row: dict[str, Any]) -> str:
    start = f"{row['name']:<14} {row['seed']:>4} {row['cpu_seconds']:>6.1f} "
    if "error" in row:
        return start + "error: " + " ".join(row["error"].split())[:160]
    shares = f"{row['share']:>5.3f} {row['weighted']:>8.3f} {row['own']:>5.3f}"
    evidence = f"{row['log_z_error']:>+9.4f} ± {row['log_z_se']:>6.4f}"
    return f"{start}{row['status']:<10} {shares} {evidence} {row['ess']:>5.0%}  {row['result']}"


def totals(rows: list[dict[str, Any]]) -> str:
    results = [row.get("result", "error") for row in rows]
    said = [f"{sum(each.startswith(word) for each in results)} {word}" for word in RESULTS]
    seconds = sum(row["cpu_seconds"] for row in rows)
    return f"{len(rows)} fits of two normals: {', '.join(said)}; {seconds:.0f} CPU s"


def measure_alone(name: str) -> dict[str, Any]:
    """One fit of a target of one mode with seed 0, as energies.py measures it."""
    kind, _, seed = name.partition(" ")
    density = synthetic(kind, int(seed)) if seed else vf.catalogue.get(name)
    return energies.measure(name, density, density.draws(energies.EXACT_DRAWS), 0)


def totals_alone(rows: list[dict[str, Any]]) -> str:
    done = [row for row in rows if "error" not in row]
    return total_line(
        rows,
        f"{len(rows)} targets of one mode: {sum(row['status'] in CLAIMED for row in done)} claimed",
        false_alarms=sum(row["unclaimed"] for row in done),
        wrong_and_unclaimed=sum(bool(row["wrong"]) and not row["false_claim"] for row in done),
        false_claims=sum(row["false_claim"] for row in done),
    )


if __name__ == "__main__":
    main()
