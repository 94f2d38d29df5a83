"""Conditioners: multilayer perceptrons, masked (MADE) or not, with the context entering after the first layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh, linear, silu

from .parameters import START_SD

REACH = 10.0  # a network sees z clamped to ±REACH: beyond it, in the far tails, its output no longer changes


def autoregressive_degrees(dim: int, width: int) -> Tensor:
    """Sorted degrees 0..dim − 1 of ``width`` hidden units; a unit of degree m sees the first m coordinates only."""
    return torch.arange(width) * dim // width


class Network(NamedTuple):
    """A conditioner for one context: raw = W_L silu(... silu(W_1 z̃ + b_1) ...) + b_L, (\\*batch, count, features).

    It holds tensors, not the module: a bijection keeps the parameters that it was built with, those of functional_call
    included. weights[0] has no columns where there is no z; bias[0] may have the batch of the context.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    count: int
    features: int

    def __call__(self, z: Tensor) -> Tensor:
        return self.raw(self.sums(z)[-1])

    def sums(self, z: Tensor) -> list[Tensor]:
        """The hidden units before silu, layer by layer, each (\\*batch, width)."""
        h = self.biases[0]
        if self.weights[0].shape[1]:
            h = linear(hardtanh(z, -REACH, REACH), self.weights[0]) + h
        sums = [h]
        for weight, bias in zip(self.weights[1:-1], self.biases[1:-1], strict=True):
            sums.append(linear(silu(sums[-1]), weight, bias))
        return sums

    def raw(self, h: Tensor) -> Tensor:
        """raw from the last of the sums."""
        rows = silu(h).reshape(-1, h.shape[-1])
        # the batch is the last axis in memory: univariates then work along long contiguous rows
        raw = torch.addmm(self.biases[-1].unsqueeze(-1), self.weights[-1], rows.mT)
        return raw.view(self.count, self.features, *h.shape[:-1]).movedim((0, 1), (-2, -1))


class Conditioner(nn.Module):
    """The weights of a multilayer perceptron from z̃ = clamp(z) and the context; its call gives a :class:`Network`.

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
        _check(hidden)
        self.features, self.count, self.layers = features, count, len(hidden) + 1
        self.fan_in = max(context or inputs, 1)  # of the weights that z or, if there is one, the context meets
        fan_in, fan_out = [inputs, *hidden], [*hidden, features * count]
        weights = [torch.randn(m, n) for m, n in zip(fan_out, fan_in, strict=True)]
        biases = [torch.randn(m) for m in fan_out]
        weights[-1], biases[-1] = START_SD * weights[-1], START_SD * biases[-1]
        masks = [1] * self.layers if order is None else self.masks(order, hidden)
        scales = [
            mask * torch.ones_like(w) * max(w.shape[1], 1) ** -0.5 for mask, w in zip(masks, weights, strict=True)
        ]
        if context is not None:
            weights.append(torch.randn(hidden[0], context))
            scales.append(torch.full_like(weights[-1], context**-0.5))
        self.shapes = [tensor.shape for tensor in [*weights, *biases]]
        # all weights and biases in one vector: one product scales and masks them, one gradient comes back
        self.vector = nn.Parameter(torch.cat([tensor.reshape(-1) for tensor in [*weights, *biases]]))
        scale = torch.cat([tensor.reshape(-1) for tensor in [*scales, *(torch.ones_like(bias) for bias in biases)]])
        # rounded so that it is the same number in every dtype
        self.register_buffer("scale", scale.bfloat16().to(scale.dtype), persistent=False)

    def masks(self, order: Sequence[int], hidden: Sequence[int]) -> list[Tensor]:
        dim = len(order)
        position = torch.empty(dim, dtype=torch.long)
        position[torch.as_tensor(order)] = torch.arange(dim)
        degrees = [position + 1, *(autoregressive_degrees(dim, width) for width in hidden)]
        masks = [after[:, None] >= before for before, after in itertools.pairwise(degrees)]
        return [*masks, (position[:, None] >= degrees[-1]).repeat(self.count, 1)]

    def forward(self, context: Tensor | None = None) -> Network:
        parts = (self.vector * self.scale).split([shape.numel() for shape in self.shapes])
        tensors = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        weights, biases = tensors[: self.layers], tensors[-self.layers :]
        if context is not None:
            biases[0] = linear(context, tensors[self.layers], biases[0])
        return Network(weights, biases, self.count, self.features)


def _check(hidden: Sequence[int]) -> None:
    if (
        not isinstance(hidden, Sequence)
        or not hidden
        or any(not isinstance(width, int) or width < 1 for width in hidden)
    ):
        raise ValueError(f"hidden: expected a sequence of positive widths, got {hidden!r}; the default is (64, 64)")
