"""What a flow buys over a diagonal Gaussian as the posterior of a single image, under a decoder that stays as it is.

    python examples/benchmarks/vae_posteriors.py --data mnist_static.npz [--only NAME] [--seeds N] [--steps N,N]
                                                 [--json OUT]

The decoder is that of a VAE with diagonal posteriors (784-300-256 and 32-300-300-784 with ReLU, 32 latents, Bernoulli
pixels), trained for 5 epochs with seed 0 by Adam at 1e-3 in batches of 100. Each seed takes 40 random test images; each
image gets posteriors of its own, fitted by Adam from .02 down to 0 with 8 draws a step. All families start near the
identity in the frame of the VAE's own q(z|x), loc + scale · z: from N(0, I) 400 steps do not bring the diagonal
Gaussian to its optimum, and flows, which learn faster, seem to gain five nats.

A row: CPU seconds of one thread; the ELBO of the images from 2,000 fresh draws, the same noise for all; its gain over
the diagonal Gaussian, paired, ± standard error over images; IWAE-2000, an estimate of log p(x) from below. "+ full" is
a flow over the Gaussian of full covariance: its closing layer is a triangular affine one instead of an elementwise one.
Then the gains over the diagonal and over the full Gaussian, the mean over seeds with the least and the greatest. Rows
that OUT already holds are kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rows import add_fit_arguments, read, wanted, write
from torch import Tensor

from vi_flows import recipes
from vi_flows.flows.distribution import Flow
from vi_flows.flows.layers.linear import FullAffine
from vi_flows.flows.parameters import Parametric
from vi_flows.vae.data import Images, load
from vi_flows.vae.evaluation import Estimate
from vi_flows.vae.model import VAE, Architecture, build
from vi_flows.vae.refine import refine
from vi_flows.vae.training import VAEOptions, begin, train

LATENT = 32
IMAGES, FRESH = 40, 2000  # test images, and draws to judge a posterior by
RATE, DRAWS = 0.02, 8


def over_full(flow: Flow) -> Flow:
    """A flow whose last layer, an elementwise affine one, gives way to a triangular one."""
    return Flow([*flow.layers[:-1], Parametric(FullAffine, flow.dim)], flow.base)


POSTERIORS: dict[str, Callable[[], Flow]] = {
    "diagonal": lambda: recipes.diagonal(LATENT),
    "full": lambda: recipes.gaussian(LATENT),
    "planar-4": lambda: recipes.planar(LATENT, layers=4),
    "planar-16": lambda: recipes.planar(LATENT, layers=16),
    "radial-4": lambda: recipes.radial(LATENT, layers=4),
    "sylvester-4 M=8": lambda: recipes.sylvester(LATENT, layers=4),
    "sylvester-4 M=D": lambda: recipes.sylvester(LATENT, layers=4, rank=LATENT),
    "householder-4 M=D": lambda: recipes.sylvester(LATENT, layers=4, rank=LATENT, kind="householder"),
    "triangular-4": lambda: recipes.sylvester(LATENT, layers=4, kind="triangular"),
    "iaf-2": lambda: recipes.iaf(LATENT, layers=2),
    "spline-4": lambda: recipes.spline(LATENT, layers=4),
    "planar-4 + full": lambda: over_full(recipes.planar(LATENT, layers=4)),
    "iaf-2 + full": lambda: over_full(recipes.iaf(LATENT, layers=2)),
    "spline-2 + full": lambda: over_full(recipes.spline(LATENT, layers=2, mixing="none")),
}

HEADER = f"{'posterior':<18} {'steps':>5} {'seed':>4} {'s':>5} {'ELBO':>9} {'gain over diagonal':>19} {'IWAE':>9}"


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    rows = read(arguments.json)
    data, vae = load(arguments.data), None
    print(HEADER, flush=True)
    for steps in arguments.steps:
        for seed in range(arguments.seeds):
            for name in arguments.posteriors:
                row = find(rows, name, steps, seed)
                if row is None:
                    vae = vae or trained(data)
                    row = measure(name, vae, data, steps, seed)
                    rows.append(row)
                    if arguments.json is not None:
                        write(rows, arguments.json)
                print(line(row, find(rows, "diagonal", steps, seed)), flush=True)
    print("\n".join(totals(rows, arguments)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="static MNIST: train, valid, test")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="part of a name, or several: a,b")
    parser.add_argument("--steps", default="400,1600", metavar="N,N", help="of Adam")
    add_fit_arguments(parser)
    parser.set_defaults(seeds=3)
    arguments = parser.parse_args()
    try:
        arguments.steps = [int(part) for part in arguments.steps.split(",")]
    except ValueError:
        parser.error(f"--steps: expected integers such as 400,1600, got {arguments.steps}")
    if not arguments.data.exists():
        parser.error(f"--data: expected a file, got {arguments.data}")
    arguments.posteriors = [name for name in POSTERIORS if name == "diagonal" or wanted(name, arguments.only)]
    return arguments


def find(rows: list[dict[str, Any]], name: str, steps: int, seed: int) -> dict[str, Any] | None:
    key = (name, steps, seed)
    return next((row for row in rows if (row["name"], row["steps"], row["seed"]) == key), None)


def trained(data: Images) -> VAE:
    """The VAE whose decoder is frozen; the same for all seeds."""
    began = time.monotonic()
    torch.manual_seed(0)
    vae = build(Architecture(data.shape, LATENT, centre=data.centre, spread=data.spread))
    state = begin(vae, VAEOptions(epochs=5, valid_draws=1))
    train(state, data, VAEOptions(epochs=5, valid_draws=1))
    print(f"VAE: {time.monotonic() - began:.0f} s, validation ELBO {state.history[-1]['valid_elbo']:.2f}", flush=True)
    return vae


def measure(name: str, vae: VAE, data: Images, steps: int, seed: int) -> dict[str, Any]:
    """Posteriors of one family for the images of a seed."""
    x = chosen(data, seed)
    torch.manual_seed(seed)
    flow = POSTERIORS[name]()
    began = time.process_time()
    frame = encoded(vae, x)
    refined = refine(vae, x, steps=steps, draws=DRAWS, lr=RATE, posterior=flow, frame=frame, seed=seed)
    seconds = time.process_time() - began
    elbo, iwae = refined.bound(FRESH, seed=seed + 1)
    row = {"name": name, "steps": steps, "seed": seed, "cpu_seconds": seconds}
    return row | {"elbo": elbo.tolist(), "iwae": iwae.tolist()}


def chosen(data: Images, seed: int) -> Tensor:
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))
    return data.values(data.test[order[:IMAGES]])


@torch.no_grad()
def encoded(vae: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the VAE's own posteriors: what its diagonal flow makes of 0, and of 1 beyond."""
    q = vae.posterior(vae.encoder(x))
    mean, _ = q.from_noise(torch.zeros(len(x), LATENT))
    return mean, q.from_noise(torch.ones(len(x), LATENT))[0] - mean


def gain(row: dict[str, Any], diagonal: dict[str, Any]) -> Estimate:
    """The mean over images of what the posterior's ELBO is above the diagonal Gaussian's."""
    return Estimate.of(torch.tensor(row["elbo"]) - torch.tensor(diagonal["elbo"]))


def line(row: dict[str, Any], diagonal: dict[str, Any]) -> str:
    start = (
        f"{row['name']:<18} {row['steps']:>5} {row['seed']:>4} {row['cpu_seconds']:>5.0f} {fmean(row['elbo']):>9.3f}"
    )
    return f"{start} {gain(row, diagonal)!s:>19} {fmean(row['iwae']):>9.3f}"


def totals(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """The mean gains of each posterior over seeds, with their range."""
    lines = []
    for steps in arguments.steps:
        for name in arguments.posteriors:
            found = [find(rows, name, steps, seed) for seed in range(arguments.seeds)]
            parts = []
            for other in ("diagonal", "full"):
                beside = [find(rows, other, steps, seed) for seed in range(arguments.seeds)]
                if other != name and None not in beside:
                    gains = [gain(*pair).value for pair in zip(found, beside, strict=True)]
                    parts.append(f"{fmean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f}) over {other}")
            if parts:
                lines.append(f"{steps} steps, {name}: {', '.join(parts)}")
    return lines


if __name__ == "__main__":
    main()
