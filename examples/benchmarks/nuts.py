"""The time of ``vf.fit`` beside that of NUTS at equal effective sample size, on posteriors of a suite.

    python examples/benchmarks/nuts.py --suite DIR [--only NAME] [--seeds N] [--peer NAME] [--json OUT]

DIR is laid out as in suite.py; without --only, four of its posteriors. Besides Pyro's NUTS, that of numpyro, blackjax
or nutpie as well (--peer, or several: a,b), where these are installed and the model is written in nuts_peers.py. Rows
that OUT already holds are kept.

vf.fit runs with default settings, all in: its ESS is that of its weighted draws, (sd/mcse of the mean)², the least over
the reference's quantities. A chain warms up, then draws until its bulk ESS, of the worst of the same quantities, is
400; one that stands still is an error. A row: CPU seconds of one thread, all in, and what of these is compilation (of a
chain: until it can take its first step); the least ESS; CPU seconds to an ESS of 1,000 and to that of the fit's draws
(a chain's by extrapolation: its compilation and warm-up once, its draws in proportion), and how many times the fit's
seconds the latter are; the largest error of a mean against the reference, in its sds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import arviz
import numpy as np
import nuts_peers
import torch
from nuts_peers import PEERS, PIECE, Chain, PyroChain
from rows import add_fit_arguments, read, write
from suite import Case, add_arguments, cases

import vi_flows as vf
from vi_flows.inference.estimate.quantities import estimate

FOUR = ["eight_schools_noncentered", "kidscore_interaction", "arma11", "nes2000-nes"]
ENOUGH = 400  # bulk ESS at which a chain ends
MOST = 20_000  # draws
GOAL = 1000  # effective draws

HEADER = (
    f"{'posterior':<26} {'D':>3} {'seed':>4} {'method':<8} {'CPU s':>6} {'compile':>7} {'ESS':>6} "
    f"{'s at 1,000':>10} {'s at the fit’s ESS':>18} {'× fit':>6} {'mean err':>8}  what it was"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    add_fit_arguments(parser)
    text = f"also the NUTS of {', '.join(PEERS).lower()}, or of several: a,b"
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help=text)
    arguments = parser.parse_args()
    arguments.only = arguments.only or FOUR
    chosen = cases(parser, arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    peers = chosen_peers(parser, arguments.peer)
    models = nuts_peers.numpyro_models() if peers else {}
    kept = {(row["name"], row["seed"], row["method"]): row for row in read(arguments.json)}
    rows: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    for case in chosen:
        for seed in range(arguments.seeds):
            fit = None
            for method, measure in contestants(case, seed, peers, models):
                row = kept.pop((case.name, seed, method), None) or attempt(case, seed, method, measure)
                fit = fit or row
                rows.append(row)
                print(line(row, fit), flush=True)
                if arguments.json is not None:
                    write([*rows, *kept.values()], arguments.json)


def chosen_peers(parser: argparse.ArgumentParser, asked: list[str]) -> dict[str, type[Chain]]:
    """The chains that ``--peer`` names, on one thread of XLA; without those, said in a line, that are not installed."""
    one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {one}".strip()
    names = {name.lower(): name for name in PEERS}
    found = {}
    for part in [part.lower() for option in asked for part in option.split(",") if part]:
        if part not in names:
            parser.error(f"--peer: expected one of {', '.join(names)}, got {part}")
        try:
            for module in ("numpyro", part):
                importlib.import_module(module)
            found[names[part]] = PEERS[names[part]]
        except ImportError as error:
            print(f"{names[part]} is left out: {error}", flush=True)
    return found


def contestants(
    case: Case, seed: int, peers: dict[str, type[Chain]], models: dict[str, Callable]
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The methods of a posterior, the fit first, and how each is measured."""
    yield "vf.fit", lambda: measure_fit(case, seed)
    module, data = case.load()
    yield "Pyro", lambda: measure_chain(case, functools.partial(PyroChain, module.model, data, seed))
    if case.short not in models and peers:
        print(f"{', '.join(peers)}, {case.short}: left out, not written in nuts_peers.py", flush=True)
        return
    for name, chain in peers.items():
        make = functools.partial(chain, models[case.short], data, seed)
        yield name, functools.partial(measure_chain, case, make)


def attempt(case: Case, seed: int, method: str, measure: Callable[[], dict]) -> dict[str, Any]:
    """A row; a failure is one too."""
    row = {"name": case.name, "short": case.short, "dim": case.dim, "seed": seed, "method": method}
    began = time.process_time()
    try:
        return row | measure()
    except Exception as error:
        seconds = time.process_time() - began
        return row | {"cpu_seconds": seconds, "error": f"{type(error).__name__}: {error}"}


def measure_fit(case: Case, seed: int) -> dict[str, Any]:
    module, data = case.load()
    seconds, posterior = timed(lambda: vf.fit(module.model, data, seed=seed, progress=False))
    values = posterior.target.constrain(posterior.proposal.x)
    theta = quantities(case, {name: value.numpy() for name, value in values.items()})
    values = estimate(torch.as_tensor(theta), posterior.proposal.log_w.double())
    return {
        "cpu_seconds": seconds,
        "ess": float(((values.sd / values.mean_se) ** 2).min()),
        "mean_error": mean_error(case, values.mean.numpy()),
        "status": posterior.verdict.status,
        "draws": len(theta),
        "timing": posterior.timing,
        "annealed": "anneal" in posterior.settings.corrections,
        "flow": posterior.flow_description,
    }


def measure_chain(case: Case, make: Callable[[], Chain]) -> dict[str, Any]:
    """One chain, from its making on; its CPU seconds leave out what measuring takes."""
    compile_seconds, made = timed(make)
    states: list[Any] = []
    draw_seconds = ess = 0.0
    with contextlib.closing(made) as chain:
        warmup_seconds, _ = timed(chain.warm_up)
        while ess < ENOUGH and len(states) * PIECE < MOST:
            seconds, piece = timed(lambda: chain.run(PIECE))
            states.append(piece)
            draw_seconds += seconds
            theta = quantities(case, chain.values(states))
            if not np.ptp(theta, axis=0).all():  # the ESS of what never changes would be that of independent draws
                raise RuntimeError(f"stuck after its warm-up: {len(theta)} draws are all alike")
            ess = least_ess(theta)
    return {
        "cpu_seconds": compile_seconds + warmup_seconds + draw_seconds,
        "compile_seconds": compile_seconds,
        "warmup": chain.warmup,
        "warmup_seconds": warmup_seconds,
        "draw_seconds": draw_seconds,
        "ess": ess,
        "ess_of_means": least_ess(theta, "mean"),
        "mean_error": mean_error(case, theta.mean(0)),
        "draws": len(theta),
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of some work, and what it returns."""
    began = time.process_time()
    out = work()
    return time.process_time() - began, out


def quantities(case: Case, values: dict[str, np.ndarray]) -> np.ndarray:
    """The reference's quantities (n, Q) of sites in the model's terms."""
    module, _ = case.load()
    found = module.to_reference(values)
    return np.stack([np.asarray(found[str(name)], dtype=float) for name in case.reference()["names"]], -1)


def least_ess(theta: np.ndarray, method: str = "bulk") -> float:
    """The least effective sample size of the quantities of one chain (n, Q), by ArviZ."""
    return min(float(arviz.ess(column[None], method=method)) for column in theta.T)


def mean_error(case: Case, mean: np.ndarray) -> float:
    reference = case.reference()
    return float((np.abs(mean - reference["mean"]) / reference["sd"]).max())


def seconds_to(row: dict[str, Any], ess: float) -> float:
    """CPU seconds to so many effective draws: of a fit, those that it takes; of a chain, by extrapolation."""
    if "draw_seconds" not in row:
        return row["cpu_seconds"]
    return row["compile_seconds"] + row["warmup_seconds"] + row["draw_seconds"] * ess / row["ess"]


def line(row: dict[str, Any], fit: dict[str, Any]) -> str:
    start = f"{row['short'][:26]:<26} {row['dim']:>3} {row['seed']:>4} {row['method']:<8} {row['cpu_seconds']:>6.1f} "
    if "error" in row:
        return start + "error: " + " ".join(row["error"].split())[:160]
    compiled = f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "–"
    at_fits = seconds_to(row, fit.get("ess", float("nan")))
    times = at_fits / fit["cpu_seconds"]
    return (
        f"{start}{compiled:>7} {row['ess']:>6.0f} {seconds_to(row, GOAL):>10.1f} {at_fits:>18.1f} {times:>6.1f} "
        f"{row['mean_error']:>8.3f}  {remark(row)}"
    )


def remark(row: dict[str, Any]) -> str:
    if "status" in row:
        many = " (annealed: its draws are not independent)" if row["annealed"] else ""
        return f"{row['status']}, {row['draws']:,} draws{many}"
    warmed = f"{row['warmup']:,} in {row['warmup_seconds']:.1f} s"
    return f"{row['draws']:,} draws in {row['draw_seconds']:.1f} s after {warmed}"


if __name__ == "__main__":
    main()
