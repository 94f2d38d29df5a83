"""Fit every density of ``vf.catalogue`` by ``vf.fit`` with default settings, and compare it with what is known of it.

    python examples/benchmarks/energies.py [--only NAME] [--seeds N] [--data DIR] [--json OUT]

DIR holds the data files of credit and ionosphere, which are left out without it; rows that OUT already holds are kept.
A row: CPU seconds of one thread; the verdict's status; k̂ of the flow (mean and sd over repeats); ESS of the flow; the
gap log Z − ELBO; the error of log Ẑ ± its standard error; modes found in weighted draws (that have a tenth or more of
their mass), of those that there are, and the largest error of a mode's mass; then, of draws before and after weighting,
the largest error of a mean in sds, and of the probabilities below the true 5, 50 and 95 % points. Errors of draws are
against exact draws, where there are any. A claim of reliable or corrected is false beyond the limits of rows.py, or if
log Ẑ is off by more than 0.1; an ELBO above log Z by more than 3 standard errors is a bug.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rows import (
    CLAIMED,
    DRAWS,
    add_fit_arguments,
    before_after,
    beyond_limits,
    errors,
    read,
    total_line,
    wanted,
    write,
)
from torch import Tensor

import vi_flows as vf

EXACT_DRAWS = 400_000
LOG_Z_LIMIT = 0.1
FOUND = 0.1  # of its own mass, which a mode that was found has at least
BUG = "ELBO above log Z"

HEADER = (
    f"{'density':<10} {'D':>3} {'seed':>4} {'CPU s':>6} {'status':<10} {'k̂ (sd)':>11} {'ESS':>5} {'gap':>7} "
    f"{'log Z error ± se':>18} {'modes':>7} {'mass':>5} {'mean err':>11} {'P5':>9} {'P50':>9} {'P95':>9}  result"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="part of a name, or several: a,b")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the data files of credit and ionosphere")
    add_fit_arguments(parser)
    arguments = parser.parse_args()
    chosen = densities(parser, arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(HEADER, flush=True)
    kept = {(row["name"], row["seed"]): row for row in read(arguments.json)}
    rows: list[dict[str, Any]] = []
    for name, density in chosen.items():
        exact = density.draws(EXACT_DRAWS) if density.draw is not None else None
        for seed in range(arguments.seeds):
            rows.append(row := kept.pop((name, seed), None) or measure(name, density, exact, seed))
            print(line(row), flush=True)
            if arguments.json is not None:
                write([*rows, *kept.values()], arguments.json)
    print(totals(rows))


def densities(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, vf.catalogue.KnownDensity]:
    """The densities that ``--only`` names; those that need data only with ``--data``."""
    names = [name for name in vf.catalogue.names() if wanted(name, arguments.only)]
    if not names:
        parser.error(f"--only: expected part of one of {', '.join(vf.catalogue.names())}, got {arguments.only}")
    try:
        return {
            name: vf.catalogue.get(name, arguments.data if vf.catalogue.needs_data(name) else None)
            for name in names
            if arguments.data is not None or not vf.catalogue.needs_data(name)
        }
    except ValueError as error:
        parser.error(f"--{error}")


def measure(name: str, density: vf.catalogue.KnownDensity, exact: Tensor | None, seed: int) -> dict[str, Any]:
    """One fit, compared with what is known; a failure is a row too."""
    row: dict[str, Any] = {"name": name, "dim": density.dim, "seed": seed}
    began = time.process_time(), time.monotonic()
    try:
        posterior = vf.fit(density, seed=seed, progress=False)
        row |= {"cpu_seconds": time.process_time() - began[0], "seconds": time.monotonic() - began[1]}
        row |= numbers(posterior, density)
        if exact is not None:
            for kind, weighted in (("before", False), ("after", True)):
                row[kind] = compare(posterior.sample(DRAWS, weighted=weighted, seed=seed + 1), exact, density)
        row |= judge(row)
    except Exception as error:
        row |= {"cpu_seconds": time.process_time() - began[0], "error": f"{type(error).__name__}: {error}"}
    return row


def numbers(posterior: vf.Posterior, density: vf.catalogue.KnownDensity) -> dict[str, Any]:
    return {
        "status": posterior.verdict.status,
        "reasons": posterior.verdict.reasons,
        "khat": posterior.khat,
        "khat_spread": posterior.khat_spread,
        "ess": posterior.ess / len(posterior.flow_draws),
        "elbo": posterior.elbo,
        "elbo_se": float(posterior.log_weights.std()) / math.sqrt(len(posterior.log_weights)),
        "gap": density.log_z - posterior.elbo,
        "known_log_z_se": density.log_z_se,
        "log_z_error": posterior.log_evidence - density.log_z,
        "log_z_se": posterior.log_evidence_se,
        "timing": posterior.timing,
        "flow": posterior.flow_description,
        "notes": posterior.notes,
    }


def compare(x: Tensor, exact: Tensor, density: vf.catalogue.KnownDensity) -> dict[str, Any]:
    """Draws x against exact ones: marginals, and the masses of the modes."""
    names = [f"x[{i}]" for i in range(density.dim)]
    points = torch.stack([column.quantile(exact.new_tensor([0.05, 0.5, 0.95])) for column in exact.mT], 1)
    low, middle, high = points.numpy()
    reference = {"names": names, "mean": exact.mean(0).numpy(), "sd": exact.std(0).numpy()}
    reference |= {"q05": low, "q50": middle, "q95": high}
    found = errors(dict(zip(names, x.mT.numpy(), strict=True)), reference)
    shares, true = density.mode_shares(x), density.mode_shares(exact)
    return found | {
        "modes": density.modes,
        "modes_found": int((shares >= FOUND * true).sum()),
        "mode_mass_error": float((shares - true).abs().max()),
        "mode_entropy": entropy(shares) / entropy(true) if density.modes > 1 else None,
    }


def entropy(shares: Tensor) -> float:
    return float(-torch.xlogy(shares, shares).sum())


def judge(row: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with a row's numbers, and whether its status claims too much or too little."""
    wrong = ["log Z"] if not abs(row["log_z_error"]) <= LOG_Z_LIMIT else []
    wrong += beyond_limits(row["after"]) if "after" in row else []
    claimed = row["status"] in CLAIMED
    bug = row["gap"] < -3 * math.hypot(row["elbo_se"], row["known_log_z_se"])
    return {"wrong": wrong, "false_claim": claimed and bool(wrong), "unclaimed": not claimed and not wrong, "bug": bug}


def line(row: dict[str, Any]) -> str:
    start = f"{row['name']:<10} {row['dim']:>3} {row['seed']:>4} {row['cpu_seconds']:>6.1f} "
    if "error" in row:
        return start + "error: " + " ".join(row["error"].split())[:160]
    khat = f"{row['khat']:.2f} ({row['khat_spread']:.2f})"
    start += (
        f"{row['status']:<10} {khat:>11} {row['ess']:>5.0%} {row['gap']:>7.3f} "
        f"{row['log_z_error']:>+9.4f} ± {row['log_z_se']:>6.4f} "
    )
    return f"{start}{of_draws(row)}  {result(row)}"


def of_draws(row: dict[str, Any]) -> str:
    if "after" not in row:
        return " " * 55
    after = row["after"]
    return (
        f"{after['modes_found']}/{after['modes']}".rjust(7) + f" {after['mode_mass_error']:>5.3f} " + before_after(row)
    )


def result(row: dict[str, Any]) -> str:
    said = [f"wrong: {', '.join(row['wrong'])}"] if row["wrong"] else ["right"]
    said += [word for word, true in (("unclaimed", row["unclaimed"]), ("FALSE CLAIM", row["false_claim"])) if true]
    return "; ".join(said + ([f"BUG: {BUG}"] if row["bug"] else []))


def totals(rows: list[dict[str, Any]]) -> str:
    done = [row for row in rows if "error" not in row]
    return total_line(
        rows,
        f"{len(rows)} fits: {sum(row['status'] in CLAIMED for row in done)} claimed",
        false_claims=sum(row["false_claim"] for row in done),
        right_but_unclaimed=sum(row["unclaimed"] for row in done),
        bugs=sum(row["bug"] for row in done),
    )


if __name__ == "__main__":
    main()
