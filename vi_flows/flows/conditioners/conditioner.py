"""The contract of conditioners: a module that makes, for a context, the network from z to raw numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..parameters import Conditioned

Network = Callable[[Tensor], Tensor]  # z (*batch, inputs) -> raw (*batch, count, features); it holds tensors


class Conditioner(Conditioned, nn.Module, ABC):
    """What coupling and autoregressive layers are given: its call makes the raw numbers of their elementwise maps.

    ``conditioner(context)`` is a network, any function z (\\*batch, inputs) -> raw (\\*batch, count, features). It
    holds the tensors that the module has at the call, those of functional_call included, not the module. At the start
    its numbers should be near 0, where the maps are the identity.

    Parameters
    ----------
    inputs: size of z; 0 is allowed, then raw depends on the context alone.
    features, count: raw numbers are made for ``features`` coordinates, ``count`` for each.
    order: for an autoregressive layer (inputs = features) its order of the coordinates, and a promise: the numbers of
        coordinate order[t] depend on z in order[:t] only. None where there is none.
    """

    def __init__(self, inputs: int, features: int, count: int, order: Sequence[int] | None = None):
        super().__init__()
        self.inputs, self.features, self.count = inputs, features, count
        self.order = None if order is None else tuple(order)

    @abstractmethod
    def forward(self, context: Tensor | None = None) -> Network:
        """context (\\*batch, context_dim) or None -> the network for that context."""

    def check(self, inputs: int, features: int, count: int) -> None:
        """ValueError where a layer needs other sizes."""
        expected, got = (inputs, features, count), (self.inputs, self.features, self.count)
        if got != expected:
            remedy = "count is the univariate's, the others are numbers of coordinates"
            raise ValueError(f"conditioner: expected (inputs, features, count) = {expected}, got {got}; {remedy}")


class Sweep(Protocol):
    """A network coordinate by coordinate, for N rows."""

    def next(self, previous: Tensor | None) -> Tensor:
        """raw (N, count, 1) of the next coordinate in order, given the ``previous`` one (N, 1), None at the first."""


class SweepBack(Protocol):
    """The transposed Jacobian of a network, for N rows, from the last coordinate in order to the first.

    inside: (\\*batch, dim), ∂z̃/∂z for what the network sees of z: 0 where it does not.
    """

    inside: Tensor

    def pull(self, step: int) -> Tensor:
        """(1, N): Σ_{j>step} (∂r_j/∂z̃_step)ᵀ c_j, once all later coordinates have been added."""

    def add(self, step: int, cotangent: Tensor) -> None:
        """Add the cotangent c (count, N) of a coordinate's raw numbers."""


@runtime_checkable
class Swept(Protocol):
    """An autoregressive network that computes no part twice when coordinates come one by one, in its order."""

    def __call__(self, z: Tensor) -> Tensor: ...

    def sweep(self, batch: Sequence[int]) -> Sweep:
        """For rows of this batch shape."""

    def with_back(self, z: Tensor) -> tuple[Tensor, Callable[[], SweepBack]]:
        """raw at z, and what begins the sweep back from it."""


class Passes:
    """Any autoregressive network coordinate by coordinate, for N rows: the whole of it at each, with 0 for the unknown.

    zeros: (\\*batch, dim), N rows in all.
    """

    def __init__(self, network: Network, order: Sequence[int], zeros: Tensor):
        self.network, self.order, self.shape, self.step = network, order, zeros.shape, 0
        self.columns = list(zeros.reshape(-1, len(order)).split(1, -1))

    def next(self, previous: Tensor | None) -> Tensor:
        if previous is not None:
            self.columns[self.order[self.step - 1]] = previous
        raw = self.network(torch.cat(self.columns, -1).reshape(self.shape))
        coordinate = raw[..., self.order[self.step]]
        self.step += 1
        return coordinate.reshape(-1, raw.shape[-2], 1)
