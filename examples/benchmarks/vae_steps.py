"""Time a training step of flow-VAEs beside Pyro's: encode, draw, decode, gradient, one Adam step.

    python examples/benchmarks/vae_steps.py [--only NAME] [--rounds 7] [--batch 100] [--json OUT]

784-300-256 and 64-300-300-784 with ReLU, 64 latents, Bernoulli pixels, float32, on random bits. "Pyro": SVI with
Trace_ELBO; its Gaussian guide has heads for mean and log sd, its planar and IAF guides the conditional transforms of
pyro.distributions, whose parameters are read from the same 256 numbers. Ours: four layers each, as ``vae.POSTERIORS``
has them, Sylvester with 8 columns (triangular: 64) or 8 reflections.

All contestants take turns in every round, in one process on one thread. A time is the median over the rounds of the
process's CPU time, in ms; the ratio is that to Pyro's Gaussian VAE, and in brackets its range over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from flows import take_turns
from pyro.infer import SVI, Trace_ELBO
from rows import wanted
from torch import Tensor, nn

from vi_flows.vae import POSTERIORS, Architecture, build
from vi_flows.vae.training import NegativeBound, VAEOptions, begin

LATENT, CONTEXT, LAYERS = 64, 256, 4
WIDTHS = {"iaf": {"hidden": (320,)}}


class PyroVAE(nn.Module):
    """The VAE of Pyro's tutorials, with conditional transforms after its Gaussian."""

    def __init__(self, transform: Callable[[], nn.Module] | None = None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, CONTEXT), nn.ReLU())
        self.loc, self.log_scale = nn.Linear(CONTEXT, LATENT), nn.Linear(CONTEXT, LATENT)
        layers = [nn.Linear(LATENT, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 784)]
        self.decoder = nn.Sequential(*layers)
        self.transforms = nn.ModuleList([transform() for _ in range(LAYERS)] if transform else [])

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        h = self.encoder(x)
        with pyro.plate("rows", len(x)):
            q = dist.Normal(self.loc(h), self.log_scale(h).exp()).to_event(1)
            if len(self.transforms):
                q = dist.TransformedDistribution(q, [transform.condition(h) for transform in self.transforms])
            pyro.sample("z", q)


class PlanarHead(nn.Linear):
    """A planar layer's bias, u and w as linear maps of the context."""

    def __init__(self):
        super().__init__(CONTEXT, 1 + 2 * LATENT)

    def forward(self, h: Tensor) -> tuple[Tensor, ...]:
        return super().forward(h).split([1, LATENT, LATENT], -1)


def pyro_step(x: Tensor, transform: Callable[[], nn.Module] | None = None) -> Callable[[], float]:
    vae = PyroVAE(transform)
    pyro.clear_param_store()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    store = pyro.get_param_store()
    kept: dict | None = None

    def step() -> float:
        nonlocal kept
        if kept is not None:  # each contestant has the parameter store to itself
            store.set_state(kept)
        loss = svi.step(x)
        kept = store.get_state()
        return loss

    return step


def our_step(x: Tensor, posterior: str) -> Callable[[], None]:
    options = WIDTHS.get(posterior, {})
    architecture = Architecture((1, 28, 28), LATENT, posterior=posterior, posterior_options=options)
    state = begin(build(architecture), VAEOptions())
    loss = NegativeBound(state.vae, VAEOptions())

    def step() -> None:
        noise = state.vae.posterior.base.noise((1, len(x)))
        state.optimizer.zero_grad(set_to_none=True)
        loss(x, noise, 1.0, len(x))[0].backward()
        state.optimizer.step()

    return step


def contestants(x: Tensor) -> dict[str, Callable[[], Callable]]:
    peers = {
        "Pyro Gaussian": lambda: pyro_step(x),
        "Pyro planar-4": lambda: pyro_step(x, lambda: dist.transforms.ConditionalPlanar(PlanarHead())),
        "Pyro IAF-4": lambda: pyro_step(
            x, lambda: dist.transforms.conditional_affine_autoregressive(LATENT, CONTEXT, hidden_dims=[320])
        ),
    }
    return peers | {name: lambda name=name: our_step(x, name) for name in POSTERIORS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="part of a name, or several: a,b")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all times here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    x = torch.bernoulli(torch.full((arguments.batch, 784), 0.2))
    made = contestants(x)
    runs = {n: make() for n, make in made.items() if n == "Pyro Gaussian" or wanted(n, arguments.only)}
    times = take_turns(runs, arguments.rounds)
    base = times["Pyro Gaussian"]
    print(f"{'':<24}{'ms':>8}  times Pyro's Gaussian")
    for name, each in times.items():
        ratios = [a / b for a, b in zip(each, base, strict=True)]
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:<24}{statistics.median(each):>8.1f}  {statistics.median(ratios):.2f} {spread}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "batch": arguments.batch, "ms": times}))


if __name__ == "__main__":
    main()
