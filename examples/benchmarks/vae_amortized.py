"""What amortized flow posteriors buy where posteriors are far from Gaussian: the lower half of the image is hidden.

    python examples/benchmarks/vae_amortized.py --data mnist_static.npz [--only NAME] [--seeds N] [--steps N] [--json F]

The decoder is that of vae_posteriors.py and stays as it is; likelihood and encoder see rows 0 to 13 of each image. The
encoder (392-300-256 with ReLU) is first trained with a diagonal Gaussian for 2,000 steps, of its own seed. Every
posterior starts from this encoder with heads of its own and is trained for --steps (1,000) more, by Adam at 1e-3 and in
the last 300 at 2e-4, batches of 100, on the same images in the same order.

A row: CPU seconds of one thread; −ELBO of 2,000 random test images, ten draws each; the gain over the diagonal
Gaussian of the same seed, paired over images, ± its standard error. Then the gain's mean over seeds, its least and
greatest. Rows that F already holds are kept.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rows import add_fit_arguments, read, wanted, write
from torch import Tensor, nn
from vae_posteriors import LATENT, trained

from vi_flows import recipes
from vi_flows.flows.distribution import Flow
from vi_flows.vae import VAE, Images, load
from vi_flows.vae.bounds import bound
from vi_flows.vae.networks import mlp
from vi_flows.vae.training import parameter_groups

SEEN = 392  # pixels: rows 0 to 13
WARM, LOWER, BATCH, TEST, DRAWS = 2000, 300, 100, 2000, 10
CONTEXT = 256

POSTERIORS = {
    "diagonal": lambda: recipes.diagonal(LATENT, CONTEXT),
    "full": lambda: recipes.gaussian(LATENT, CONTEXT),
    "planar-4": lambda: recipes.planar(LATENT, CONTEXT, layers=4),
    "radial-4": lambda: recipes.radial(LATENT, CONTEXT, layers=4),
    "sylvester-4": lambda: recipes.sylvester(LATENT, CONTEXT, layers=4),
    "iaf-4": lambda: recipes.iaf(LATENT, CONTEXT, layers=4, hidden=(320,)),
    "spline-2": lambda: recipes.spline(LATENT, CONTEXT, layers=2, hidden=(128,), mixing="none"),
}


class UpperHalf(nn.Module):
    """A decoder's outputs for the pixels that are seen."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(z)[..., :SEEN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="static MNIST: train, valid, test")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="part of a name, or several: a,b")
    parser.add_argument("--steps", type=int, default=1000, help="of Adam, after the warm start")
    add_fit_arguments(parser)
    parser.set_defaults(seeds=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {(row["name"], row["seed"]): row for row in read(arguments.json)}
    data, first = load(arguments.data), None
    print(f"{'posterior':<12} {'seed':>4} {'s':>5} {'−ELBO':>8}  gain over diagonal", flush=True)
    names = [name for name in POSTERIORS if name == "diagonal" or wanted(name, arguments.only)]
    for seed in range(arguments.seeds):
        warm = None
        for name in names:
            if (name, seed) not in rows:
                first = first or trained(data)
                warm = warm or warm_start(first, data, seed)
                rows[name, seed] = measure(name, warm, data, arguments.steps, seed)
                if arguments.json is not None:
                    write(list(rows.values()), arguments.json)
            print(line(rows[name, seed], rows["diagonal", seed]), flush=True)
    for name in names[1:]:
        gains = [fmean(gain(rows[name, seed], rows["diagonal", seed])) for seed in range(arguments.seeds)]
        print(f"{name:<12} {fmean(gains):.3f} ({min(gains):.3f} to {max(gains):.3f})")


def warm_start(first: VAE, data: Images, seed: int) -> VAE:
    """An encoder of the upper half, trained with a diagonal Gaussian under the frozen decoder."""
    torch.manual_seed(seed)
    encoder, _ = mlp((1, 14, 28), LATENT, 1, data.centre, data.spread)
    vae = VAE(encoder, POSTERIORS["diagonal"](), UpperHalf(first.decoder), first.likelihood)
    fit(vae, data, WARM, seed)
    return vae


def measure(name: str, warm: VAE, data: Images, steps: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    flow: Flow = POSTERIORS[name]()
    vae = VAE(copy.deepcopy(warm.encoder), flow, warm.decoder, warm.likelihood)
    began = time.process_time()
    fit(vae, data, steps, seed + 1)
    seconds = time.process_time() - began
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))[:TEST]
    elbo, _ = bound(vae, data.values(data.test[order])[:, :SEEN], DRAWS, seed=seed)
    return {"name": name, "seed": seed, "cpu_seconds": seconds, "elbo": elbo.tolist()}


def fit(vae: VAE, data: Images, steps: int, seed: int) -> None:
    """Adam on the ELBO; the decoder is frozen."""
    torch.manual_seed(seed)
    groups = [g | {"params": [p for p in g["params"] if p.requires_grad]} for g in parameter_groups(vae, 1e-3)]
    optimizer = torch.optim.Adam(groups, fused=True)
    for step in range(steps):
        if step == steps - LOWER:
            for group in optimizer.param_groups:
                group["lr"] *= 0.2
        index = torch.randint(len(data.train), (BATCH,))
        loss = -vae(data.values(data.train[index])[:, :SEEN]).log_w.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def gain(row: dict[str, Any], diagonal: dict[str, Any]) -> list[float]:
    return [a - b for a, b in zip(row["elbo"], diagonal["elbo"], strict=True)]


def line(row: dict[str, Any], diagonal: dict[str, Any]) -> str:
    gains = torch.tensor(gain(row, diagonal))
    said = f"{gains.mean():.3f} ± {gains.std() / math.sqrt(len(gains)):.3f}" if row is not diagonal else ""
    return f"{row['name']:<12} {row['seed']:>4} {row['cpu_seconds']:>5.0f} {-fmean(row['elbo']):>8.3f}  {said}"


if __name__ == "__main__":
    main()
