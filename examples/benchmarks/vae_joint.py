"""What flow posteriors buy where encoder, flow and decoder are trained together: bounds of log p(x) on test images.

    python examples/benchmarks/vae_joint.py --data mnist_static.npz [--only NAME] [--network mlp|conv] [--epochs N]
                                            [--warm-up N] [--seeds N] [--device cpu|cuda] [--json F]

64 latents, batches of 100, Adam at 1e-3 falling to 0 along a cosine, the KL's weight rising to 1 in the first half of
the epochs; four layers of each flow, as ``vae.POSTERIORS`` has them. All rows of a seed see the same order of images.

A row: seconds of training; on all test images −ELBO and −IWAE-200 (a bound of −log p(x) from above) of the state after
the last epoch; the gain in each over the diagonal Gaussian of the same seed, paired over images, ± its standard error.
Then, for each posterior, means over seeds with their sd. Published rows (−ELBO 86.55 for a Gaussian, 83.32 for
Sylvester: Grathwohl et al. 2019, table 3) are of convolutions trained for up to 2,000 epochs. Rows that F has are kept.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rows import add_fit_arguments, read, write
from torch import Tensor

from vi_flows.vae import POSTERIORS, Architecture, Images, build, load
from vi_flows.vae.bounds import bound
from vi_flows.vae.networks import NETWORKS
from vi_flows.vae.training import VAEOptions, begin, train

LATENT, DRAWS = 64, 200
BOUNDS = ("elbo", "iwae")
HEADER = f"{'posterior':<22} {'seed':>4} {'s':>6} {'−ELBO':>8} {'−IWAE':>8}  {'gain in ELBO':>15}  {'in IWAE':>15}"


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    rows = {(row["name"], row["seed"]): row for row in read(arguments.json)}
    data = load(arguments.data)
    print(HEADER, flush=True)
    names = [name for name in POSTERIORS if name == "diagonal" or name in arguments.only]
    for seed in range(arguments.seeds):
        for name in names:
            if (name, seed) not in rows:
                rows[name, seed] = measure(name, data, arguments, seed)
                if arguments.json is not None:
                    write(list(rows.values()), arguments.json)
            print(line(rows[name, seed], rows["diagonal", seed]), flush=True)
    for name in names:
        print(total(name, [(rows[name, seed], rows["diagonal", seed]) for seed in range(arguments.seeds)]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="static MNIST: train, valid, test")
    parser.add_argument("--only", default="iaf,sylvester", metavar="NAMES", help="posteriors beside the diagonal: a,b")
    parser.add_argument("--network", choices=NETWORKS, default="mlp")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--warm-up", type=int, metavar="N", help="epochs (half of all)")
    parser.add_argument("--device", default="cpu")
    add_fit_arguments(parser)
    parser.set_defaults(seeds=3)
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    if unknown := [name for name in arguments.only if name not in POSTERIORS]:
        parser.error(f"--only: expected some of {', '.join(POSTERIORS)}, got {unknown[0]}")
    return arguments


def measure(name: str, data: Images, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    warm_up = arguments.epochs // 2 if arguments.warm_up is None else arguments.warm_up
    options = VAEOptions(arguments.epochs, schedule="cosine", warm_up=warm_up, valid_draws=1, seed=seed)
    torch.manual_seed(seed)
    architecture = Architecture(
        data.shape, LATENT, arguments.network, posterior=name, centre=data.centre, spread=data.spread
    )
    state = begin(build(architecture).to(arguments.device), options)
    began = time.monotonic()
    train(state, data, options)
    seconds = time.monotonic() - began
    found = bound(state.vae, data.values(data.test), DRAWS, seed=seed)
    return {
        "name": name,
        "seed": seed,
        "seconds": seconds,
        **{k: v.tolist() for k, v in zip(BOUNDS, found, strict=True)},
    }


def gains(row: dict[str, Any], diagonal: dict[str, Any], name: str) -> Tensor:
    return torch.tensor(row[name]) - torch.tensor(diagonal[name])


def line(row: dict[str, Any], diagonal: dict[str, Any]) -> str:
    first = f"{row['name']:<22} {row['seed']:>4} {row['seconds']:>6.0f}"
    values = " ".join(f"{-fmean(row[name]):>8.2f}" for name in BOUNDS)
    if row is diagonal:
        return f"{first} {values}"
    each = [gains(row, diagonal, name) for name in BOUNDS]
    said = "  ".join(f"{g.mean():>7.2f} ± {g.std() / math.sqrt(len(g)):.3f}" for g in each)
    return f"{first} {values}  {said}"


def total(name: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Means over seeds ± sd over seeds."""
    values = [spread([-fmean(row[key]) for row, _ in pairs]) for key in BOUNDS]
    better = [spread([float(gains(row, diagonal, key).mean()) for row, diagonal in pairs]) for key in BOUNDS]
    said = f"; gains {better[0]} and {better[1]}" if name != "diagonal" else ""
    return f"{name:<22} −ELBO {values[0]}, −IWAE-{DRAWS} {values[1]}{said}"


def spread(values: list[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
