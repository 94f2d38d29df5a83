"""A posterior for each image: the flow's parameters fitted to that image alone, while the decoder stays as it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..arguments import whole
from ..errors import DivergedError
from ..flows.distribution import Flow
from ..flows.parameters import Conditioned
from ..running import seeded
from .bounds import DECODED_DRAWS, affordable, bounds_of, evaluating, on_device, terms_in_blocks
from .model import VAE, Terms

REFINED_ROWS = 50  # that are fitted together

Frame = tuple[Tensor, Tensor]


class RefinedDraws(nn.Module):
    """Draws of a flow and their log q from base noise, at context 0 if it takes one, in a row's frame loc + scale · z.

    A module of its own, because what :func:`torch.func.functional_call` puts in lasts only until it returns.
    """

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    def forward(self, noise: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        context = None if self.flow.context is None else noise.new_zeros(self.flow.context)
        z, log_q = self.flow(context).from_noise(noise)
        return loc + scale * z, log_q - scale.log().sum(-1)


@dataclass(frozen=True, eq=False)
class Refined:
    """Posteriors of N rows x (N, dim), a flow's parameters for each, under the decoder and prior of a VAE.

    frame: loc and scale (N, latent). parameters: by their names in the flow, (N, \\*shape). trace: the ELBO estimates
    of training, (steps, N).
    """

    vae: VAE
    x: Tensor
    draws: RefinedDraws
    frame: Frame
    parameters: dict[str, Tensor]
    trace: Tensor

    def terms(self, rows: slice, noise: Tensor) -> Terms:
        """Terms of these rows at base noise (K, n, k)."""
        parameters = {name: value[rows] for name, value in self.parameters.items()}
        frame = tuple(part[rows] for part in self.frame)
        return terms(self.vae, self.x[rows], self.draws, frame, parameters, noise)

    def bound(self, draws: int = 1000, seed: int = 0, chunk: int = DECODED_DRAWS) -> tuple[Tensor, Tensor]:
        """ELBO and IWAE-K of each row (N,), as :func:`vi_flows.vae.bounds.bound` has them, from the same noise."""

        def of(rows: slice) -> Callable[[Tensor], Terms]:
            return lambda noise: self.terms(rows, noise)

        with evaluating(self.vae), seeded(seed):
            chunk = affordable(self.vae, self.x, chunk)
            found = terms_in_blocks(of, self.draws.flow.base, len(self.x), draws, chunk)
            return bounds_of(each.log_w for each in found)


def refine(
    vae: VAE,
    x: Tensor,
    steps: int = 400,
    draws: int = 8,
    lr: float = 0.01,
    posterior: Flow | None = None,
    frame: Frame | None = None,
    seed: int = 0,
    rows: int = REFINED_ROWS,
) -> Refined:
    """Fit q to every row of x (N, dim) on its own, by Adam on the reparametrised ELBO, its rate falling to 0.

    Parameters
    ----------
    steps, draws, lr: Adam's steps, draws a row in each, and its rate at the start.
    posterior: a flow without context from which every row starts; None: from the VAE's own q(z|x). Then all of the
        flow's parameters are free, those of its conditioners too, and the encoder's output is held.
    frame: locations and scales (N, latent); a row's z is loc + scale · (draw of its flow). A flow near the identity, in
        the frame of a Gaussian that fits already, is spared the way there from N(0, I). None: 0 and 1.
    seed: the result depends on it alone. rows: how many are fitted together; memory is theirs.

    Raises
    ------
    ValueError for a flow of another size or with a context; DivergedError where a row's ELBO is no number at the end.
    """
    for name, value in (("steps", steps), ("draws", draws), ("rows", rows)):
        whole(name, value)
    if posterior is not None and (posterior.context is not None or posterior.dim != vae.latent):
        given = f"dim {posterior.dim}, context {posterior.context}"
        raise ValueError(f"posterior: expected a flow of dim {vae.latent} without context, got {given}")
    x = on_device(vae, x)
    flow = copy.deepcopy(vae.posterior if posterior is None else posterior).requires_grad_(False)
    zero = torch.zeros(len(x), vae.latent, dtype=flow.dtype, device=flow.device)
    frame = (zero, zero + 1) if frame is None else frame
    if any(part.shape != zero.shape for part in frame) or not (frame[1] > 0).all():
        given = " and ".join(str(tuple(part.shape)) for part in frame)
        raise ValueError(f"frame: expected locations and positive scales of shape {tuple(zero.shape)}, got {given}")
    parts = []
    with evaluating(vae), seeded(seed):
        for some, loc, scale in zip(x.split(rows), *(part.split(rows) for part in frame), strict=True):
            start = folded(flow, None if posterior is not None else vae.encoder(some), len(some))
            parts.append(_fit(vae, some, RefinedDraws(flow), (loc, scale), start, steps, draws, lr))
    parameters = {name: torch.cat([part.parameters[name] for part in parts]) for name in parts[0].parameters}
    return Refined(vae, x, RefinedDraws(flow), frame, parameters, torch.cat([part.trace for part in parts], 1))


def terms(
    vae: VAE, x: Tensor, draws: RefinedDraws, frame: Frame, parameters: dict[str, Tensor], noise: Tensor
) -> Terms:
    """Terms of rows x (n, dim), each with its own frame and parameters, at base noise (K, n, k)."""

    def each(own: dict[str, Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(draws, {f"flow.{name}": value for name, value in own.items()}, inputs)

    z, log_q = vmap(each, in_dims=(0, 1, 0, 0), out_dims=1)(parameters, noise, *frame)
    return Terms(z, vae.likelihood.log_prob(vae.decoder(z), x), vae.prior().log_prob(z), log_q)


def folded(flow: Flow, h: Tensor | None, count: int) -> dict[str, Tensor]:
    """Parameters (N, \\*shape) with which the flow is at context 0 what it is at contexts h (N, c).

    What heads and conditioners add for a context goes into their biases, see :class:`Conditioned`. Parameters that do
    nothing at context 0 are left out.
    """
    held = {}
    for name, module in flow.named_modules() if h is not None else ():
        if isinstance(module, Conditioned):
            held |= {f"{name}.{own}": value for own, value in module.fold(h).items()}
    parameters = {name: held.get(name, value.expand(count, *value.shape)) for name, value in flow.named_parameters()}
    return {name: value.detach().clone() for name, value in parameters.items() if value is not None}


def _fit(
    vae: VAE, x: Tensor, draws: RefinedDraws, frame: Frame, start: dict[str, Tensor], steps: int, count: int, lr: float
) -> Refined:
    """Adam on the rows' own parameters; a row's gradient is in these alone, so that rows do not disturb each other."""
    parameters = {name: value.requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    trace = []
    for _ in range(steps):
        noise = draws.flow.base.noise((count, len(x)))
        with torch.enable_grad():
            elbo = terms(vae, x, draws, frame, parameters, noise).log_w.mean(0)
            gradients = torch.autograd.grad(-elbo.sum(), parameters.values(), materialize_grads=True)
        for value, gradient in zip(parameters.values(), gradients, strict=True):
            value.grad = gradient
        optimizer.step()
        schedule.step()
        trace.append(elbo.detach())
    if not (last := trace[-1].isfinite()).all():
        raise DivergedError(f"refine: the ELBO of {int((~last).sum())} of {len(x)} rows is not finite; lower lr=")
    return Refined(
        vae, x, draws, frame, {name: value.detach() for name, value in parameters.items()}, torch.stack(trace)
    )
