"""Conditioners: multilayer perceptrons, masked (MADE) or not, with the context entering after the first layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from .parameters import START_SD


def autoregressive_degrees(dim: int, width: int) -> Tensor:
    """Sorted degrees 0..dim − 1 of ``width`` hidden units; a unit of degree m sees the first m coordinates only."""
    return torch.arange(width) * dim // width


class Conditioner(nn.Module):
    """raw = W_L silu(... silu(W_1 z + C context + b_1) ...) + b_L, shaped (\\*batch, count, features).

    Weights are stored times the square root of their fan-in, so that a parameter's step moves its output by about as
    much whatever the width: one learning rate suits all layers, and a perturbed network stays well-conditioned.

    Parameters
    ----------
    inputs: size of z. 0 is allowed: then raw depends on the context alone.
    features, count: raw numbers are made for ``features`` coordinates, ``count`` for each.
    hidden: widths of the hidden layers.
    context: size of the context or None.
    order: None for a full network; else the autoregressive order of the coordinates (inputs = features), and the
        weights are masked such that the numbers of coordinate order[t] depend on order[:t] only (Germain et al. 2015).
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        count: int,
        hidden: Sequence[int],
        context: int | None = None,
        order: Sequence[int] | None = None,
    ):
        super().__init__()
        self.features, self.count = features, count
        sizes = [inputs, *hidden, features * count]
        pairs = list(itertools.pairwise(sizes))
        start = [1.0] * len(hidden) + [START_SD]
        self.weights = nn.ParameterList(sd * torch.randn(m, n) for sd, (n, m) in zip(start, pairs, strict=True))
        self.biases = nn.ParameterList(sd * torch.randn(m) for sd, (_, m) in zip(start, pairs, strict=True))
        self.context = None if context is None else nn.Parameter(torch.randn(hidden[0], context))
        for i, mask in enumerate(self.masks(order, hidden) if order is not None else []):
            self.register_buffer(f"mask{i}", mask)
        self.masked = order is not None

    def masks(self, order: Sequence[int], hidden: Sequence[int]) -> list[Tensor]:
        dim = len(order)
        position = torch.empty(dim, dtype=torch.long)
        position[torch.as_tensor(order)] = torch.arange(dim)
        degrees = [position + 1, *(autoregressive_degrees(dim, width) for width in hidden)]
        masks = [after[:, None] >= before for before, after in itertools.pairwise(degrees)]
        return [*masks, (position[:, None] >= degrees[-1]).repeat(self.count, 1)]

    def weight(self, i: int) -> Tensor:
        """Weights of layer i, scaled and masked."""
        weight = self.weights[i] * max(self.weights[i].shape[1], 1) ** -0.5
        return weight * getattr(self, f"mask{i}") if self.masked else weight

    def first_bias(self, context: Tensor | None) -> Tensor:
        """C context + b_1 (\\*context_batch, width)."""
        if context is None:
            return self.biases[0]
        return linear(context, self.context * context.shape[-1] ** -0.5, self.biases[0])

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        h = linear(z, self.weight(0)) + self.first_bias(context)
        for i in range(1, len(self.weights)):
            h = linear(silu(h), self.weight(i), self.biases[i])
        return h.unflatten(-1, (self.count, self.features))
