"""Simulation-based calibration of default fits: are claimed posteriors right on average over data of the model itself?

    python examples/benchmarks/sbc.py [--model NAME] [--n N] [--seed S] [--json OUT]

Three models: normal (mean and scale), logistic (regression on three covariates), schools (a hierarchy, non-centred).
Data set i has seed S + i; rows that OUT already holds are kept, so that a run goes on where another was stopped. A row:
CPU seconds of one thread; the verdict's status; the p-value of the true parameters under the posterior (Bonferroni over
all quantities; below .01 the posterior excludes them); the checks that failed. Then, for each model, the table of
``vf.testing.simulation_based_calibration``, which says what its columns are.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from rows import read, write
from torch import Tensor

from vi_flows.inference.rehearse.refits import Refit
from vi_flows.testing import simulation_based_calibration

HEADER = f"{'model':<10} {'seed':>4} {'CPU s':>6} {'status':<10} {'p':>5}  failed checks"


def normal(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.5))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + x @ slope), obs=y)


def schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def models() -> dict[str, tuple]:
    """A model and its arguments by name; the observed values among these give the shape only."""
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])  # Rubin's eight schools
    return {
        "normal": (normal, torch.zeros(20)),
        "logistic": (logistic, x, torch.zeros(50)),
        "schools": (schools, sigma, torch.zeros(8)),
    }


def main() -> None:
    known = models()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(known), help="this one only; may be repeated")
    parser.add_argument("--n", type=int, default=200, metavar="N", help="data sets of each model (200)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first data set (0)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rows here, after every row")
    arguments = parser.parse_args()
    if arguments.n < 1:
        parser.error(f"--n: expected a positive integer, got {arguments.n}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = {(row["model"], row["seed"]): row for row in read(arguments.json)}
    tables = []
    print(HEADER, flush=True)
    for name in arguments.model or known:

        def report(row: Refit, name: str = name) -> None:
            print(line(name, row), flush=True)
            rows[name, row.seed] = {"model": name, **dataclasses.asdict(row)}
            if arguments.json is not None:
                write(list(rows.values()), arguments.json)

        model, *data = known[name]
        kept = [restored(row) for (of, _), row in rows.items() if of == name]
        found = simulation_based_calibration(model, arguments.n, *data, seed=arguments.seed, kept=kept, report=report)
        tables.append(f"\n{name}: {found.table()}")
    print("\n".join(tables))


def restored(plain: dict) -> Refit:
    return Refit(**{name: value for name, value in plain.items() if name != "model"})


def line(name: str, row: Refit) -> str:
    start = f"{name:<10} {row.seed:>4} {row.cpu_seconds:>6.1f} {row.status:<10} "
    return start + (" ".join(row.message.split())[:160] or f"{row.p_value:>5.2f}  {', '.join(row.failed)}")


if __name__ == "__main__":
    main()
