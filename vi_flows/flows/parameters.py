"""Where a bijection's tensors come from: a module's own parameters, a linear map of the context, or fixed buffers."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .bijection import Bijection, Layer

START_SD = 1e-3  # around the identity: not 0, so that every parameter has a gradient from the first step


class Conditioned:
    """A module that takes a context in, and what is asked of it by what makes the context: the encoder of a VAE."""

    def rates(self) -> dict[nn.Parameter, float]:
        """By how much the learning rate is to be multiplied for a parameter to learn as an ordinary layer's does; 1 for
        those left out."""
        return {}

    def fold(self, context: Tensor) -> dict[str, Tensor | None]:
        """Own parameters (N, \\*shape) with which the module is at context 0 what it is at contexts (N, c).

        By their names here; None for one that does nothing at context 0. Raises TypeError where it is not written.
        """
        raise TypeError(f"fold: expected {type(self).__name__} to put a context into its parameters; write its fold()")


class Maths(Protocol):
    """A bijection class as :class:`Parametric` sees it: raw tensors in, bijection out; it owns nothing."""

    def start(self, dim: int, **options: Any) -> dict[str, Tensor]:
        """Names, shapes (without batch) and identity values of the raw tensors."""

    def __call__(self, **tensors: Any) -> Bijection:
        """Raw tensors of shape (\\*batch, \\*shape), and the same options, to a bijection."""


class Parametric(Layer, Conditioned):
    """A layer of free tensors: its own parameters, or an affine map of the context.

    Parameters
    ----------
    maths: a bijection class with ``start(dim, **options)``, which names its raw tensors and their identity values.
    dim: the event size.
    context: size of the context, or None for own parameters.
    options: passed to ``maths`` (a rank, a kind ...).
    """

    def __init__(self, maths: Maths, dim: int, context: int | None = None, **options: Any):
        super().__init__()
        self.maths, self.options, self.context = maths, options, context
        start = {
            name: value + START_SD * torch.randn_like(value) for name, value in maths.start(dim, **options).items()
        }
        self.shapes = {name: value.shape for name, value in start.items()}
        if context is None:
            self.own = nn.ParameterDict({name: nn.Parameter(value) for name, value in start.items()})
        else:
            bias = torch.cat([value.reshape(-1) for value in start.values()])
            self.weight, self.bias = nn.Parameter(START_SD * torch.randn(len(bias), context)), nn.Parameter(bias)

    def forward(self, context: Tensor | None = None) -> Bijection:
        if context is None:
            tensors = dict(self.own.items())
        else:
            parts = self.raw(context).split([shape.numel() for shape in self.shapes.values()], dim=-1)
            tensors = {
                name: part.reshape(context.shape[:-1] + shape)
                for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
            }
        return self.maths(**tensors, **self.options)

    def raw(self, context: Tensor) -> Tensor:
        """All raw numbers (\\*batch, n) of a context; the weight is stored times √fan-in, as those of networks.MLP."""
        return linear(context, self.weight * context.shape[-1] ** -0.5, self.bias)

    def rates(self) -> dict[nn.Parameter, float]:
        return {} if self.context is None else {self.weight: self.context**0.5}

    def fold(self, context: Tensor) -> dict[str, Tensor | None]:
        return {} if self.context is None else {"weight": None, "bias": self.raw(context)}


class Fixed(Layer):
    """A layer of constant tensors (buffers), the same for every context: a permutation, the whitening of a target."""

    def __init__(self, maths: type[Bijection], **tensors: Tensor):
        super().__init__()
        self.maths, self.names = maths, tuple(tensors)
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, context: Tensor | None = None) -> Bijection:
        return self.maths(**{name: getattr(self, name) for name in self.names})
