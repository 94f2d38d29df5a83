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
from ..running import seeded
from .distributed import ALONE, Workers

if TYPE_CHECKING:
    from .model import VAE, Terms

DECODED_DRAWS = 1000  # draws that are decoded at once
DECODED_NUMBERS = 2**25  # that a decoder gives at once, at most: 256 levels of every pixel are many


def bound(
    vae: VAE, x: Tensor, draws: int = 1, seed: int = 0, chunk: int = DECODED_DRAWS, processes: Workers = ALONE
) -> tuple[Tensor, Tensor]:
    """ELBO and IWAE-K, log (1/K) Σ_k w_k (Burda et al. 2016), of each row of x (N, dim): two (N,), double precision.

    In eval mode and without a graph; depends on ``seed`` alone and leaves the generators as they were. A row is encoded
    once; no more than ``chunk`` of its K = ``draws`` draws are decoded at a time, and the numbers do not depend on it,
    nor on how many ``processes`` share the rows.

    Raises ValueError where x are no rows, or fewer than there are processes.
    """
    with evaluating(vae), seeded(seed):
        elbo, iwae = bounds_of(terms.log_w for terms in blocks(vae, x, draws, chunk, processes))
    return processes.gathered(elbo, len(x)), processes.gathered(iwae, len(x))


def bounds_of(log_w: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """ELBO and IWAE-K of each row, from the log-weights (K, n) of some rows after the others."""
    elbo, iwae = zip(*((each.mean(0), log_mean_by_row(each)) for each in map(double, log_w)), strict=True)
    return torch.cat(elbo), torch.cat(iwae)


def blocks(vae: VAE, x: Tensor, draws: int, chunk: int = DECODED_DRAWS, processes: Workers = ALONE) -> Iterator[Terms]:
    """Terms of ``draws`` draws of q(z|x) for this process's share of the rows of x (N, dim), some after the others."""
    count, x = len(x), processes.share(on_device(vae, x, processes.count))

    def of(rows: slice) -> Callable[[Tensor], Terms]:
        q = vae.posterior(vae.encoder(x[rows]))
        return lambda noise: vae.terms(x[rows], q, noise)

    return terms_in_blocks(of, vae.posterior.base, count, draws, affordable(vae, x, chunk), processes)


def terms_in_blocks(
    of: Callable[[slice], Callable[[Tensor], Terms]],
    base: Base,
    count: int,
    draws: int,
    chunk: int,
    processes: Workers = ALONE,
) -> Iterator[Terms]:
    """Terms of ``draws`` draws for ``count`` rows, some rows after the others, ``chunk`` draws or fewer at a time.

    of(rows) prepares rows of a process's share, and gives what makes their terms from base noise (draws, n, k). The
    noise of all rows comes from the global generator, row by row: it is the same whatever the chunk and the processes.
    """
    whole("draws", draws)
    size = max(1, chunk // draws) * processes.count
    for first in range(0, count, size):
        noise = torch.stack([base.noise((draws,)) for _ in range(min(size, count - first))], 1)
        noise, begin = processes.share(noise, 1), first // processes.count
        if own := noise.shape[1]:
            make = of(slice(begin, begin + own))
            parts = [make(some) for some in noise.split(max(1, chunk // own))]
            yield type(parts[0])(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(parts[0])))


def affordable(vae: VAE, x: Tensor, chunk: int) -> int:
    """``chunk``, or fewer draws where these make more than ``DECODED_NUMBERS`` numbers of the decoder."""
    return min(whole("chunk", chunk), max(1, DECODED_NUMBERS // (vae.likelihood.channels * x.shape[1])))


def on_device(vae: VAE, x: Tensor, least: int = 1) -> Tensor:
    """Rows x (N, dim) where the VAE is; ValueError where they are no rows, or too few."""
    if x.dim() != 2 or not len(x):
        raise ValueError(f"x: expected rows of shape (N, dim), got {tuple(x.shape)}; flatten the images")
    if len(x) < least:
        raise ValueError(f"x: expected a row for each of {least} processes, got {len(x)}; start fewer")
    return x.to(vae.posterior.device)


def double(x: Tensor) -> Tensor:
    """x in double precision, where every device has it."""
    return x.detach().cpu().double()


def log_mean_by_row(log_w: Tensor) -> Tensor:
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
