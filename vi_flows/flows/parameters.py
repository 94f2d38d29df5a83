"""Where a bijection's tensors come from: a module's own parameters, a linear map of the context, or fixed buffers."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .bijection import Bijection, Layer

START_SD = 1e-3  # around the identity: not 0, so that every parameter has a gradient from the first step


class Maths(Protocol):
    """A bijection class as :class:`Parametric` sees it: raw tensors in, bijection out; it owns nothing."""

    def start(self, dim: int, **options: Any) -> dict[str, Tensor]:
        """Names, shapes (without batch) and identity values of the raw tensors."""

    def __call__(self, **tensors: Any) -> Bijection:
        """Raw tensors of shape (\\*batch, \\*shape), and the same options, to a bijection."""


class Parametric(Layer):
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
        self.maths, self.options = maths, options
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
            weight = self.weight * context.shape[-1] ** -0.5  # the parametrisation of networks.Conditioner
            parts = linear(context, weight, self.bias).split([shape.numel() for shape in self.shapes.values()], dim=-1)
            tensors = {
                name: part.reshape(context.shape[:-1] + shape)
                for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
            }
        return self.maths(**tensors, **self.options)


class Fixed(Layer):
    """A layer of constant tensors (buffers), the same for every context: a permutation, the whitening of a target."""

    def __init__(self, maths: type[Bijection], **tensors: Tensor):
        super().__init__()
        self.maths, self.names = maths, tuple(tensors)
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, context: Tensor | None = None) -> Bijection:
        return self.maths(**{name: getattr(self, name) for name in self.names})
