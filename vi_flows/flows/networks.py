"""Conditioners: multilayer perceptrons, masked (MADE) or not, with the context entering after the first layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from .linear import bounded
from .parameters import START_SD

REACH = 10.0  # a network sees reach · tanh(z/reach): beyond it, in the far tails, its output no longer changes


def autoregressive_degrees(dim: int, width: int) -> Tensor:
    """Sorted degrees 0..dim − 1 of ``width`` hidden units; a unit of degree m sees the first m coordinates only."""
    return torch.arange(width) * dim // width


class Network(NamedTuple):
    """A conditioner for one context: raw = W_L silu(... silu(W_1 z̃ + b_1) ...) + b_L, (\\*batch, count, features).

    It holds tensors, not the module: a bijection keeps the parameters that it was built with, those of functional_call
    included. weights[0] is None where there is no z; bias[0] may have the batch of the context.
    """

    weights: list[Tensor | None]
    biases: list[Tensor]
    count: int
    features: int

    def __call__(self, z: Tensor) -> Tensor:
        h = self.biases[0]
        if self.weights[0] is not None:
            h = linear(bounded(z, REACH), self.weights[0]) + h
        for weight, bias in zip(self.weights[1:-1], self.biases[1:-1], strict=True):
            h = linear(silu(h), weight, bias)
        rows = silu(h).reshape(-1, h.shape[-1])
        # the batch is the last axis in memory: univariates then work along long contiguous rows
        raw = torch.addmm(self.biases[-1].unsqueeze(-1), self.weights[-1], rows.mT)
        return raw.view(self.count, self.features, *h.shape[:-1]).movedim((0, 1), (-2, -1))


class Conditioner(nn.Module):
    """The weights of a multilayer perceptron from z̃ = bounded(z) and the context; its call gives a :class:`Network`.

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
        if (
            not isinstance(hidden, Sequence)
            or not hidden
            or any(not isinstance(width, int) or width < 1 for width in hidden)
        ):
            raise ValueError(f"hidden: expected a sequence of positive widths, got {hidden!r}; the default is (64, 64)")
        self.features, self.count = features, count
        pairs = list(itertools.pairwise([*hidden, features * count]))
        start = [1.0] * (len(hidden) - 1) + [START_SD]
        self.inner = nn.Parameter(torch.randn(hidden[0], inputs)) if inputs else None
        self.context = None if context is None else nn.Parameter(torch.randn(hidden[0], context))
        self.weights = nn.ParameterList(sd * torch.randn(m, n) for sd, (n, m) in zip(start, pairs, strict=True))
        self.biases = nn.ParameterList(
            sd * torch.randn(m) for sd, m in zip([1.0, *start], [hidden[0], *(m for _, m in pairs)], strict=True)
        )
        self.masked = order is not None
        for i, mask in enumerate(self.masks(order, hidden) if order is not None else []):
            self.register_buffer(f"mask{i}", mask)

    def masks(self, order: Sequence[int], hidden: Sequence[int]) -> list[Tensor]:
        dim = len(order)
        position = torch.empty(dim, dtype=torch.long)
        position[torch.as_tensor(order)] = torch.arange(dim)
        degrees = [position + 1, *(autoregressive_degrees(dim, width) for width in hidden)]
        masks = [after[:, None] >= before for before, after in itertools.pairwise(degrees)]
        return [*masks, (position[:, None] >= degrees[-1]).repeat(self.count, 1)]

    def weight(self, i: int) -> Tensor | None:
        """Weights of layer i, scaled and masked."""
        weight = self.inner if i == 0 else self.weights[i - 1]
        if weight is None:
            return None
        weight = weight * weight.shape[1] ** -0.5
        return weight * getattr(self, f"mask{i}") if self.masked else weight

    def first_bias(self, context: Tensor | None) -> Tensor:
        """C context + b_1 (\\*context_batch, width)."""
        if context is None:
            return self.biases[0]
        return linear(context, self.context * context.shape[-1] ** -0.5, self.biases[0])

    def forward(self, context: Tensor | None = None) -> Network:
        # a slice of a ParameterList would wrap its items anew, and lose those that functional_call put in
        biases = [self.first_bias(context), *list(self.biases)[1:]]
        return Network([self.weight(i) for i in range(len(biases))], biases, self.count, self.features)
