"""Masked perceptrons (MADE), and their two sweeps: forward along the order, and back with the Jacobian's transpose."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardtanh, silu

from .mlp import INPUT_REACH, MLP, Perceptron, check_hidden


def degrees(dim: int, hidden: Sequence[int]) -> list[Tensor]:
    """Sorted degrees 0..dim − 1 of the units of each hidden layer; one of degree m sees the first m coordinates."""
    return [torch.arange(width) * dim // width for width in hidden]


def masks(order: Sequence[int], count: int, hidden: Sequence[int]) -> list[Tensor]:
    """What each weight matrix keeps, so that the numbers of coordinate order[t] depend on order[:t] only."""
    position = torch.as_tensor(order).argsort()
    of_units = degrees(len(order), hidden)
    kept = [after[:, None] >= before for before, after in itertools.pairwise([position + 1, *of_units])]
    return [*kept, (position[:, None] >= of_units[-1]).repeat(count, 1)]


@dataclass(frozen=True, eq=False)
class MaskedPerceptron(Perceptron):
    """A :class:`MaskedMLP` for one context; sizes: how many units of each hidden layer have each degree."""

    order: tuple[int, ...]
    sizes: list[list[int]]

    def sweep(self, batch: Sequence[int]) -> MaskedSweep:
        return MaskedSweep(self, batch)

    def with_back(self, z: Tensor) -> tuple[Tensor, Callable[[], MaskedSweepBack]]:
        sums = self.sums(z)
        return self.raw(sums[-1]), lambda: MaskedSweepBack(self, z, sums)


class MaskedMLP(MLP):
    """An autoregressive :class:`MLP` by masks of its weights (Germain et al. 2015).

    Parameters
    ----------
    order: the coordinates in autoregressive order.
    count: raw numbers for each.
    hidden, context: as in :class:`MLP`.

    Raises
    ------
    ValueError if ``hidden`` is no sequence of positive widths.
    """

    def __init__(self, order: Sequence[int], count: int, hidden: Sequence[int], context: int | None = None):
        dim, kept = len(order), masks(order, count, check_hidden(hidden))
        super().__init__(dim, dim, count, hidden, context, kept)
        self.order = tuple(order)
        self.sizes = [torch.bincount(each, minlength=dim).tolist() for each in degrees(dim, hidden)]

    def forward(self, context: Tensor | None = None) -> MaskedPerceptron:
        return MaskedPerceptron(**vars(super().forward(context)), order=self.order, sizes=self.sizes)


class MaskedSweep:
    """The network in degree order, see :class:`conditioner.Sweep`: what is new at a step is added to the sums it feeds.

    ``sums`` (N, width) are the hidden units before silu. Units sorted by degree make the new ones a block. Those that
    are not complete hold part of their sum: the masks give them no weight in what depends on complete ones only.
    """

    def __init__(self, network: MaskedPerceptron, batch: Sequence[int]):
        order, self.sizes = torch.as_tensor(network.order), network.sizes
        self.sums = [bias.expand(*batch, -1).reshape(-1, bias.shape[-1]) for bias in network.biases[:-1]]
        # the weights that a new coordinate, or new units, have in the next layer
        self.blocks = [network.weights[0].mT[order].split(1)]
        for weight, sizes in zip(network.weights[1:-1], self.sizes[:-1], strict=True):
            self.blocks.append(weight.mT.split(sizes))
        # rows of the last layer are (count, coordinate): gather them by coordinate, in order
        self.last = network.weights[-1].unflatten(0, (network.count, -1))[:, order].unbind(1)
        self.last_bias = network.biases[-1].unflatten(0, (network.count, -1))[:, order].unsqueeze(-1).unbind(1)
        self.complete = [0] * len(self.sizes)
        self.step = 0

    def next(self, previous: Tensor | None) -> Tensor:
        step, sums = self.step, self.sums
        if previous is not None:
            sums[0] = torch.addmm(sums[0], hardtanh(previous, -INPUT_REACH, INPUT_REACH), self.blocks[0][step - 1])
        for i, sizes in enumerate(self.sizes[:-1]):
            if sizes[step]:
                new = silu(sums[i].narrow(1, self.complete[i], sizes[step]))
                sums[i + 1] = torch.addmm(sums[i + 1], new, self.blocks[i + 1][step])
                self.complete[i] += sizes[step]
        self.step += 1
        return torch.addmm(self.last_bias[step], self.last[step], silu(sums[-1]).mT).mT.unsqueeze(-1)


class MaskedSweepBack:
    """The Jacobian's sweep, see :class:`conditioner.SweepBack`; inside is false where z is clamped.

    ``pulls`` (width, N) belong to the inputs, in order, and to the hidden units of each layer after silu; a unit's is
    passed on once it is complete, when all coordinates that the unit feeds have been added.
    """

    def __init__(self, network: MaskedPerceptron, z: Tensor, sums: Sequence[Tensor]):
        order, self.sizes = torch.as_tensor(network.order), network.sizes
        self.inside = z.abs() < INPUT_REACH
        sums = [h.reshape(-1, h.shape[-1]).mT for h in sums]
        weights = [network.weights[0][:, order], *network.weights[1:-1]]
        self.blocks = [weight.mT.split(sizes, 1) for weight, sizes in zip(weights, self.sizes, strict=True)]
        self.last = network.weights[-1].unflatten(0, (network.count, -1))[:, order].permute(1, 2, 0).unbind()
        self.slopes = [silu_slope(h).split(sizes) for h, sizes in zip(sums, self.sizes, strict=True)]
        self.pulls = [sums[0].new_zeros(width, sums[0].shape[1]) for width in (len(order), *map(len, sums))]
        self.left = [len(h) for h in sums]  # units that are not complete

    def pull(self, step: int) -> Tensor:
        return self.pulls[0].narrow(0, step, 1)

    def add(self, step: int, cotangent: Tensor) -> None:
        pulls = self.pulls
        pulls[-1] = torch.addmm(pulls[-1], self.last[step], cotangent)
        for i, sizes in reversed(list(enumerate(self.sizes))):
            if sizes[step]:
                self.left[i] -= sizes[step]
                complete = pulls[i + 1].narrow(0, self.left[i], sizes[step]) * self.slopes[i][step]
                pulls[i] = torch.addmm(pulls[i], self.blocks[i][step], complete)


def silu_slope(x: Tensor) -> Tensor:
    """The derivative of silu, σ(x) (1 + x (1 − σ(x)))."""
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))
