"""Multilayer perceptrons as conditioners, with the context entering after the first layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh, linear, pad, silu

from ..parameters import START_SD
from .conditioner import Conditioner

# a network sees z clamped to ±INPUT_REACH: beyond it, in the far tails, its output no longer changes
INPUT_REACH = 10.0


@dataclass(frozen=True, eq=False)
class Perceptron:
    """An :class:`MLP` for one context: raw = W_L silu(... silu(W_1 z̃ + b_1) ...) + b_L, z̃ = clamp(z).

    weights[0] has no columns where there is no z; biases[0] may have the batch of the context.
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
            h = linear(hardtanh(z, -INPUT_REACH, INPUT_REACH), self.weights[0]) + h
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


class MLP(Conditioner):
    """The weights of a :class:`Perceptron`, which its call makes.

    Weights are stored times the square root of their fan-in, so that a parameter's step moves its output by about as
    much whatever the width: one learning rate suits all layers, and a perturbed network stays well-conditioned.

    Parameters
    ----------
    inputs, features, count: see :class:`Conditioner`.
    hidden: widths of the hidden layers.
    context: size of the context or None.
    masks: for each layer's weight matrix what it is multiplied by; None for a full network.

    Raises
    ------
    ValueError if ``hidden`` is no sequence of positive widths.
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        count: int,
        hidden: Sequence[int],
        context: int | None = None,
        masks: Sequence[Tensor] | None = None,
    ):
        super().__init__(inputs, features, count)
        self.layers, self.context = len(check_hidden(hidden)) + 1, context
        fan_in, fan_out = [inputs, *hidden], [*hidden, features * count]
        weights = [torch.randn(m, n) for m, n in zip(fan_out, fan_in, strict=True)]
        biases = [torch.randn(m) for m in fan_out]
        weights[-1], biases[-1] = START_SD * weights[-1], START_SD * biases[-1]
        scales = [torch.full_like(w, max(w.shape[1], 1) ** -0.5) for w in weights]
        if masks is not None:
            scales = [mask * scale for mask, scale in zip(masks, scales, strict=True)]
        if context is not None:
            weights.append(torch.randn(hidden[0], context))
            scales.append(torch.full_like(weights[-1], context**-0.5))
        self.shapes = [tensor.shape for tensor in [*weights, *biases]]
        # all weights and biases in one vector: one product scales and masks them, one gradient comes back
        self.vector = nn.Parameter(torch.cat([tensor.reshape(-1) for tensor in [*weights, *biases]]))
        scale = torch.cat([tensor.reshape(-1) for tensor in [*scales, *(torch.ones_like(bias) for bias in biases)]])
        # rounded so that it is the same number in every dtype
        self.register_buffer("scale", scale.bfloat16().to(scale.dtype), persistent=False)

    def tensors(self) -> list[Tensor]:
        """The scaled weights of the layers, those of the context if there is one, and the biases."""
        parts = (self.vector * self.scale).split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def forward(self, context: Tensor | None = None) -> Perceptron:
        tensors = self.tensors()
        weights, biases = tensors[: self.layers], tensors[-self.layers :]
        if context is not None:
            biases[0] = linear(context, tensors[self.layers], biases[0])
        return Perceptron(weights, biases, self.count, self.features)

    def rates(self) -> dict[nn.Parameter, float]:
        return {self.vector: max(self.context or self.inputs, 1) ** 0.5}  # of what the context or, without, z meets

    def fold(self, context: Tensor) -> dict[str, Tensor | None]:
        """The vector for each context, with the context's part in the first bias (biases are not scaled)."""
        if self.context is None:
            return {}
        first = sum(shape.numel() for shape in self.shapes[: self.layers + 1])
        shift = linear(context, self.tensors()[self.layers])
        after = len(self.vector) - first - shift.shape[-1]
        return {"vector": self.vector + pad(shift, (first, after))}


def check_hidden(hidden: Sequence[int]) -> Sequence[int]:
    """hidden, if it is a sequence of positive widths."""
    if (
        not isinstance(hidden, Sequence)
        or not hidden
        or any(not isinstance(width, int) or width < 1 for width in hidden)
    ):
        raise ValueError(f"hidden: expected a sequence of positive widths, got {hidden!r}; the default is (64, 64)")
    return hidden
