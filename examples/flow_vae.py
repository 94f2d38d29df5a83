"""A VAE whose posterior is a flow, in one page: what does the flow buy over a diagonal Gaussian?

    python examples/flow_vae.py [--data PATH|digits] [--posterior NAME ...] [--epochs N] [--seed S]

Trains the same encoder and decoder once with each posterior, and compares bounds of log p(x) on test images that none
of them has seen. The flow's parameters are linear maps of the encoder's output, one set for each image.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

import vi_flows as vf
from vi_flows.vae import VAE, load
from vi_flows.vae.bounds import bound
from vi_flows.vae.likelihoods import Bernoulli
from vi_flows.vae.networks import mlp
from vi_flows.vae.training import parameter_groups

LATENT, HIDDEN, BATCH = 16, 200, 100

# a posterior is a recipe with a context: the flow's own near-identity start suits it
POSTERIORS = {
    "diagonal": lambda context: vf.recipes.diagonal(LATENT, context),
    "full": lambda context: vf.recipes.gaussian(LATENT, context),
    "planar": lambda context: vf.recipes.planar(LATENT, context, layers=4),
    "sylvester": lambda context: vf.recipes.sylvester(LATENT, context, layers=4),
    "iaf": lambda context: vf.recipes.iaf(LATENT, context, layers=4, hidden=(100,)),
    "spline": lambda context: vf.recipes.spline(LATENT, context, layers=2),
}


def make(posterior: str, images) -> VAE:
    """Encoder x -> h, posterior q(z|x) = flow(h), decoder z -> logits, Bernoulli pixels."""
    likelihood = Bernoulli()
    encoder, decoder = mlp(
        images.shape, LATENT, likelihood.channels, images.centre, images.spread, hidden=(HIDDEN, HIDDEN)
    )
    return VAE(encoder, POSTERIORS[posterior](encoder.context), decoder, likelihood)


def train(vae: VAE, images, epochs: int, warm_up: int) -> None:
    """Adam on E_q[log p(x|z) + β (log p(z) − log q(z|x))], β rising to 1 while latents are taken into use."""
    optimizer = torch.optim.Adam(parameter_groups(vae, 1e-3))  # the flow's weights have rates of their own
    for epoch in range(epochs):
        beta = min((epoch + 1) / warm_up, 1.0)
        for index in torch.randperm(len(images.train)).split(BATCH):
            terms = vae(images.values(images.train[index], training=True))
            loss = -terms.annealed(beta).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def estimate(values: Tensor) -> str:
    """The mean over images ± its standard error."""
    return f"{values.mean():.2f} ± {values.std() / math.sqrt(len(values)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, or a file (.npz, .npy, IDX) of binary or grey images")
    parser.add_argument("--posterior", nargs="+", choices=POSTERIORS, default=["diagonal", "sylvester"])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    images = load(arguments.data, binarise="dynamic" if arguments.data == "digits" else "none")
    x = images.values(images.test)
    print(f"{images.name}: {len(images.train)} training and {len(x)} test images of {images.shape}")
    print(f"{'posterior':<12} {'test ELBO':>16} {'IWAE-200':>16} {'ELBO over the first':>20}  seconds")
    first = None
    for name in arguments.posterior:
        torch.manual_seed(arguments.seed)
        began, vae = time.monotonic(), make(name, images)
        train(vae, images, arguments.epochs, warm_up=max(arguments.epochs // 4, 1))
        elbo, iwae = bound(vae, x, draws=200, seed=0)
        first = elbo if first is None else first
        gain = "" if first is elbo else estimate(elbo - first)  # paired over images: a far smaller error
        seconds = time.monotonic() - began
        print(f"{name:<12} {estimate(elbo):>16} {estimate(iwae):>16} {gain:>20}  {seconds:7.0f}", flush=True)
    print("The errors are over images; another seed is another training run: try several before believing a gain.")


if __name__ == "__main__":
    main()
