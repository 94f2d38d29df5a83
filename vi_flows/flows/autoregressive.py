"""Autoregressive layers: each coordinate is mapped given those before it (Kingma et al. 2016; Germain et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from .bijection import Bijection, Layer
from .linear import bounded
from .networks import REACH, Conditioner, Network, autoregressive_degrees
from .univariate import Univariate


class AutoregressiveBijection(Bijection):
    """x_i = univariate(z_i; raw_i(z_<i, context)): one network pass forward, a sweep over the coordinates back."""

    def __init__(self, layer: Autoregressive, network: Network):
        self.layer, self.network = layer, network

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.univariate(self.network(z)).forward_and_logdet(z)

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each hidden unit is computed once, as soon as the coordinates that it sees are known."""
        layer, sweep = self.layer, Sweep(self.layer, self.network)
        known, logdet = x[..., :0], x.new_zeros(x.shape[:-1])
        for i in layer.order:
            univariate = layer.univariate(sweep.next(known))
            z_i, logdet_i = univariate.inverse_and_logdet(x[..., i : i + 1])
            known, logdet = torch.cat([known.expand(*z_i.shape[:-1], -1), z_i], -1), logdet + logdet_i
        return known.index_select(-1, layer.position), logdet


class Sweep:
    """The conditioner evaluated in degree order: its units sorted by degree make every step a few row blocks."""

    def __init__(self, layer: Autoregressive, network: Network):
        order, self.bias, self.weight = torch.as_tensor(layer.order), network.biases, list(network.weights)
        self.weight[0] = self.weight[0][:, order]
        # rows of the last layer are (count, coordinate): gather them by coordinate, in order
        self.last = self.weight[-1].unflatten(0, (network.count, -1))[:, order]
        self.last_bias = self.bias[-1].unflatten(0, (network.count, -1))[:, order]
        dim = len(layer.order)
        self.ends = [
            torch.searchsorted(autoregressive_degrees(dim, width), torch.arange(dim), right=True).tolist()
            for width in layer.hidden
        ]
        self.hidden: list[Tensor] = []
        self.step = 0

    def next(self, known: Tensor) -> Tensor:
        """raw (\\*batch, count, 1) of the next coordinate, given the coordinates ``known`` so far, in order."""
        below = bounded(known, REACH)
        for i, ends in enumerate(self.ends):
            start, end = ends[self.step - 1] if self.step else 0, ends[self.step]
            new = silu(linear(below, self.weight[i][start:end, : below.shape[-1]]) + self.bias[i][..., start:end])
            if self.step:
                new = torch.cat([self.hidden[i].expand(*new.shape[:-1], -1), new], -1)
                self.hidden[i] = new
            else:
                self.hidden.append(new)
            below = new
        rows = self.last[:, self.step, : below.shape[-1]]
        raw = linear(below, rows, self.last_bias[:, self.step])
        self.step += 1
        return raw.unsqueeze(-1)


class Autoregressive(Layer):
    """An autoregressive layer of any univariate; with affine it is IAF's, and its inverse is MAF's.

    Parameters
    ----------
    order: the coordinates in autoregressive order.
    """

    def __init__(self, order: Sequence[int], univariate: Univariate, hidden: Sequence[int], context: int | None = None):
        super().__init__()
        self.order, self.hidden, self.univariate = tuple(order), tuple(hidden), univariate
        self.register_buffer("position", torch.as_tensor(self.order).argsort())
        self.conditioner = Conditioner(len(order), len(order), univariate.count, hidden, context, order)

    def forward(self, context: Tensor | None = None) -> Bijection:
        return AutoregressiveBijection(self, self.conditioner(context))
