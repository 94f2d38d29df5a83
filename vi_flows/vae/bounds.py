"""Bounds of log p(x) for every row, in bounded memory: ELBO and IWAE from the same log-weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arguments import whole
from ..flows.bases import Base
from ..inference.posterior import seeded

if TYPE_CHECKING:
    from .model import VAE, Terms

CHUNK = 1000  # draws that are decoded at once
NUMBERS = 2**25  # that a decoder gives at once, at most: 256 levels of every pixel are many


def bound(vae: VAE, x: Tensor, draws: int = 1, seed: int = 0, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """ELBO and IWAE-K, log (1/K) Σ_k w_k (Burda et al. 2016), of each row of x (N, dim): two (N,), double precision.

    In eval mode and without a graph; depends on ``seed`` alone and leaves the generators as they were. A row is encoded
    once; no more than ``chunk`` of its K = ``draws`` draws are decoded at a time, and the numbers do not depend on it.

    Raises ValueError where x are no rows.
    """
    with evaluating(vae), seeded(seed):
        return of_weights(terms.log_w for terms in blocks(vae, x, draws, chunk))


def of_weights(log_w: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """ELBO and IWAE-K of each row, from the log-weights (K, n) of some rows after the others."""
    elbo, iwae = zip(*((each.mean(0), log_mean(each)) for each in map(double, log_w)), strict=True)
    return torch.cat(elbo), torch.cat(iwae)


def blocks(vae: VAE, x: Tensor, draws: int, chunk: int = CHUNK) -> Iterator[Terms]:
    """Terms of ``draws`` draws of q(z|x) for the rows of x (N, dim), some rows after the others."""
    x = on_device(vae, x)

    def of(rows: slice) -> Callable[[Tensor], Terms]:
        q = vae.posterior(vae.encoder(x[rows]))
        return lambda noise: vae.terms(x[rows], q, noise)

    return in_blocks(of, vae.posterior.base, len(x), draws, affordable(vae, x, chunk))


def in_blocks(
    of: Callable[[slice], Callable[[Tensor], Terms]], base: Base, count: int, draws: int, chunk: int
) -> Iterator[Terms]:
    """Terms of ``draws`` draws for ``count`` rows, some rows after the others, ``chunk`` draws or fewer at a time.

    of(rows) prepares rows, and gives what makes their terms from base noise (draws, n, k). The noise comes from the
    global generator row by row, and so is the same whatever the chunk.
    """
    whole("draws", draws)
    size = max(1, chunk // draws)
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count))
        make = of(rows)
        noise = torch.stack([base.noise((draws,)) for _ in range(first, rows.stop)], 1)
        parts = [make(some) for some in noise.split(max(1, chunk // noise.shape[1]))]
        yield type(parts[0])(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(parts[0])))


def affordable(vae: VAE, x: Tensor, chunk: int) -> int:
    """``chunk``, or fewer draws where these make more than ``NUMBERS`` numbers of the decoder."""
    return min(whole("chunk", chunk), max(1, NUMBERS // (vae.likelihood.channels * x.shape[1])))


def on_device(vae: VAE, x: Tensor) -> Tensor:
    """Rows x (N, dim) where the VAE is; ValueError where they are no rows."""
    if x.dim() != 2 or not len(x):
        raise ValueError(f"x: expected rows of shape (N, dim), got {tuple(x.shape)}; flatten the images")
    return x.to(vae.posterior.device)


def double(x: Tensor) -> Tensor:
    """x in double precision, where every device has it."""
    return x.detach().cpu().double()


def log_mean(log_w: Tensor) -> Tensor:
    """log (1/K) Σ_k w_k of log_w (K, N), as (N,)."""
    return log_w.logsumexp(0) - math.log(len(log_w))


@contextmanager
def evaluating(vae: VAE) -> Iterator[None]:
    """Every part in eval mode and no graph; afterwards each is as it was."""
    training = [module for module in vae.modules() if module.training]
    vae.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
