"""Fit every posterior of a suite by ``vf.fit`` with default settings, and compare it with its reference.

    python examples/benchmarks/posteriordb.py --suite DIR [--only NAME] [--seeds N] [--json OUT]

DIR is laid out as in suite.py. A row of the table: CPU seconds of one thread; the verdict's status; k̂ of the flow (mean
and sd over repeats); ESS of the flow; log normaliser ± standard error, and its error; KL(q‖p) = log Z − ELBO; then, for
the draws before and after weighting, the largest error of a mean in reference sds, and the largest errors of the
probabilities below the reference's 5, 50 and 95 % points. A row is "met" if it is within LIMITS and claimed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from rows import CLAIMED, DRAWS, add_fit_arguments, before_after, beyond_limits, errors, total_line, write
from suite import Case, add_arguments, cases

import vi_flows as vf

KHAT_LIMIT = 0.7
LIMITS = {"A": (0.1, 15.0), "B": (0.15, 30.0), "C": (0.3, 60.0)}  # by tier: KL, CPU seconds
ODE_MODELS = ("lotka_volterra", "one_comp_mm_elim_abs", "sir", "soil_incubation")  # have 4 times the seconds

HEADER = (
    f"{'posterior':<26} {'D':>3} {'seed':>4} {'CPU s':>6} {'status':<10} {'k̂ (sd)':>11} {'ESS':>5} {'log Z ± se':>18} "
    f"{'error':>7} {'KL':>7} {'mean err':>11} {'P5':>9} {'P50':>9} {'P95':>9}  result"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    add_fit_arguments(parser)
    arguments = parser.parse_args()
    chosen = cases(parser, arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(HEADER, flush=True)
    rows: list[dict[str, Any]] = []
    for case in chosen:
        for seed in range(arguments.seeds):
            rows.append(row := measure(case, seed))
            print(line(row), flush=True)
            if arguments.json is not None:
                write(rows, arguments.json)
    print(totals(rows))


def measure(case: Case, seed: int) -> dict[str, Any]:
    """One fit, compared with the reference; a failure is a row too."""
    row = {"name": case.name, "short": case.short, "dim": case.dim, "tier": case.tier, "seed": seed}
    began = time.process_time(), time.monotonic()
    try:
        module, data = case.load()
        posterior = vf.fit(module.model, data, seed=seed, progress=False)
        row |= {"cpu_seconds": time.process_time() - began[0], "seconds": time.monotonic() - began[1]}
        row |= numbers(posterior, case)
        for kind, weighted in (("before", False), ("after", True)):
            samples = posterior.sample(DRAWS, weighted=weighted, seed=seed + 1)
            arrays = {name: value.numpy() for name, value in samples.items()}
            row[kind] = errors(module.to_reference(arrays), case.reference())
        row |= judge(row)
    except Exception as error:
        row |= {"cpu_seconds": time.process_time() - began[0], "error": f"{type(error).__name__}: {error}"}
    return row


def numbers(posterior: vf.Posterior, case: Case) -> dict[str, Any]:
    return {
        "status": posterior.verdict.status,
        "reasons": posterior.verdict.reasons,
        "khat": posterior.khat,
        "khat_spread": posterior.khat_spread,
        "ess": posterior.ess / len(posterior.flow_draws),
        "log_z": posterior.log_evidence,
        "log_z_se": posterior.log_evidence_se,
        "log_z_error": posterior.log_evidence - case.log_z,
        "kl": case.log_z - posterior.elbo,
        "timing": posterior.timing,
        "flow": posterior.flow_description,
        "notes": posterior.notes,
    }


def judge(row: dict[str, Any]) -> dict[str, Any]:
    """Which limits the row misses, and whether its status claims too much or too little."""
    kl_limit, seconds = LIMITS[row["tier"]]
    seconds *= 4 if row["short"] in ODE_MODELS else 1
    claimed = row["status"] in CLAIMED
    wrong = beyond_limits(row["after"])
    short_of = ["KL"] if not row["kl"] <= kl_limit else []
    short_of += ["CPU s"] if row["cpu_seconds"] > seconds else []
    excused = row["tier"] == "C" and row["status"] == "corrected"
    short_of += ["k̂"] if not row["khat"] < KHAT_LIMIT and not excused else []
    short_of += ["unclaimed"] if not claimed and not wrong else []
    return {"misses": wrong + short_of, "met": not wrong + short_of, "false_claim": claimed and bool(wrong)}


def line(row: dict[str, Any]) -> str:
    start = f"{row['short'][:26]:<26} {row['dim']:>3} {row['seed']:>4} {row['cpu_seconds']:>6.1f} "
    if "error" in row:
        return start + "error: " + " ".join(row["error"].split())[:160]
    khat = f"{row['khat']:.2f} ({row['khat_spread']:.2f})"
    return (
        f"{start}{row['status']:<10} {khat:>11} {row['ess']:>5.0%} {row['log_z']:>9.3f} ± {row['log_z_se']:>6.4f} "
        f"{row['log_z_error']:>+7.3f} {row['kl']:>7.3f} {before_after(row)}  {result(row)}"
    )


def result(row: dict[str, Any]) -> str:
    said = "met" if row["met"] else "misses " + ", ".join(row["misses"])
    return said + (" FALSE CLAIM" if row["false_claim"] else "")


def totals(rows: list[dict[str, Any]]) -> str:
    done = [row for row in rows if "error" not in row]
    return total_line(
        rows,
        f"{sum(row['met'] for row in done)} of {len(rows)} met",
        false_claims=sum(row["false_claim"] for row in done),
        right_but_unclaimed=sum("unclaimed" in row["misses"] for row in done),
    )


if __name__ == "__main__":
    main()
