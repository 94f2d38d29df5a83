"""Time flows beside the peers that are installed: training steps, draws with log q, log densities.

    python examples/benchmarks/flows.py [--only FAMILY] [--dims 2,10,50] [--batches 64,1000] [--rounds 7] [--json OUT]

Peers (zuko, normflows, nflows, torchflows: ``pip install vi-flows[bench]``; and Pyro) get the same architecture, as
flow_peers.py says, with what cannot be matched. "ours" is that architecture; "recipe" is what ``fit`` uses, which adds
affine maps and, for splines, LU layers.

step      draws with log q, the mean of log q − log p for a correlated Gaussian p, its gradient, one fused Adam step
draw      draws with log q, no gradient; for MAF, D dependent steps
log_prob  log q of given values, no gradient; for IAF and autoregressive splines, D dependent steps
svi       a step of Pyro's SVI with Trace_ELBO, its particles vectorized, on a hierarchical normal model of D latents:
          AutoFlow beside AutoNormalizingFlow

All contestants take turns in every round, in one process on one thread. A time is the median over the rounds of the
process's CPU time, in ms; the ratio is that of the best peer to ours, and in brackets its range over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from flow_peers import LAYERS, PEERS, Model, ours, plain_flow, pyro_transforms, recipe, recipe_flow
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import Tensor

import vi_flows as vf

CONTESTANTS = {"ours": ours, "recipe": recipe, **PEERS}
OPERATIONS = ("step", "draw", "log_prob", "svi")
SVI_FAMILIES = ("planar", "realnvp", "spline", "iaf")
SECONDS, MOST = 0.04, 200  # one contestant's turn in a round, and its number of repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="FAMILY", help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--dims", type=integers, default=[2, 10, 50], metavar="D,D,...")
    parser.add_argument("--batches", type=integers, default=[64, 1000], metavar="B,B,...")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all times here")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(LAYERS):
        parser.error(f"--only: expected one of {', '.join(LAYERS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    warnings.simplefilter("ignore")
    rows, reasons = [], {}
    for family in arguments.only or LAYERS:
        print(f"\n{family}\n{'':<9}{'D':>3}{'B':>6}", *(f"{name:>10}" for name in CONTESTANTS), " best peer / ours")
        for dim in arguments.dims:
            for batch in arguments.batches:
                for row in compare(family, dim, batch, arguments.rounds, arguments.seed, reasons):
                    rows.append(row)
                    print(line(row), flush=True)
    print("\n- where a peer has no such flow or cannot do this:")
    for (name, family, operation), reason in reasons.items():
        print(f"  {name}, {family}{operation and ' ' + operation}: {reason}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "dtype": arguments.dtype, "rows": rows}))


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def compare(
    family: str, dim: int, batch: int, rounds: int, seed: int, reasons: dict[tuple[str, str, str], str]
) -> list[dict[str, Any]]:
    """One row per operation: CPU milliseconds of each contestant in each round; why a contestant is missing."""
    runs: dict[str, dict[str, Callable[[], Any]]] = {operation: {} for operation in OPERATIONS}
    pyro.clear_param_store()
    for name, build in CONTESTANTS.items():
        torch.manual_seed(seed)
        try:
            operations = prepare(build(family, dim), dim, batch)
            if family in SVI_FAMILIES and name in ("ours", "recipe", "pyro"):
                operations["svi"] = svi_step(name, family, dim, batch)
        except Exception as error:  # peers differ in what they raise for what they lack
            reasons[name, family, ""] = reason(error)
            continue
        for operation, run in operations.items():
            try:
                run()
                runs[operation][name] = run
            except Exception as error:
                reasons[name, family, operation] = reason(error)
    return [
        {
            "family": family,
            "operation": operation,
            "dim": dim,
            "batch": batch,
            "ms": take_turns(runs[operation], rounds),
        }
        for operation in OPERATIONS
        if runs[operation]
    ]


def prepare(model: Model, dim: int, batch: int) -> dict[str, Callable[[], Any]]:
    """The operations on one model; Adam is fused for everyone, so that flows and not optimizers are compared."""
    optimizer = torch.optim.Adam(model.parameters, 1e-3, fused=True)
    values = torch.randn(batch, dim)

    def step() -> None:
        x, log_q = model.draw(batch)
        optimizer.zero_grad()
        (log_q - log_p(x)).mean().backward()
        optimizer.step()

    return {
        "step": step,
        "draw": torch.no_grad()(lambda: model.draw(batch)),
        "log_prob": torch.no_grad()(lambda: model.log_prob(values.clone())),  # a clone: no cache knows it
    }


def svi_step(name: str, family: str, dim: int, particles: int) -> Callable[[], Any]:
    """A step of SVI whose guide is that contestant's."""

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        with pyro.plate("groups", dim - 1):
            theta = pyro.sample("theta", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=torch.linspace(-1.0, 2.0, dim - 1))

    if name == "pyro":
        guide = AutoNormalizingFlow(model, lambda n: dist.transforms.ComposeTransformModule(pyro_transforms(family, n)))
    else:
        flow = plain_flow(family, dim) if name == "ours" else recipe_flow(family, dim)
        guide = vf.AutoFlow(model, flow, locate=False, name=name)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    return SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step


def log_p(x: Tensor) -> Tensor:
    """A Gaussian of mean 1 in which each coordinate follows the one before it, up to a constant."""
    centred = x - 1
    return -(centred[..., 0].square() + (centred[..., 1:] - 0.5 * centred[..., :-1]).square().sum(-1))


def take_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of one run of each, by round; as many repeats for all as its own duration allows."""
    repeats = {name: max(1, min(MOST, int(SECONDS / max(seconds(run, 1), 1e-6)))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        names = list(runs)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(1e3 * seconds(runs[name], repeats[name]))
    return times


def seconds(run: Callable[[], Any], repeats: int) -> float:
    began = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - began) / repeats


def line(row: dict[str, Any]) -> str:
    medians = {name: statistics.median(times) for name, times in row["ms"].items()}
    cells = [f"{medians[name]:>10.3f}" if name in medians else f"{'-':>10}" for name in CONTESTANTS]
    start = f"{row['operation']:<9}{row['dim']:>3}{row['batch']:>6} {' '.join(cells)}"
    peers = {name: value for name, value in medians.items() if name in PEERS}
    if not peers or "ours" not in medians:
        return start
    best = min(peers, key=peers.get)
    ratios = [peer / own for peer, own in zip(row["ms"][best], row["ms"]["ours"], strict=True)]
    return f"{start}  {peers[best] / medians['ours']:.2f}x {best} ({min(ratios):.2f} to {max(ratios):.2f})"


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"


if __name__ == "__main__":
    main()
