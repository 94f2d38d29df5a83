"""Autoregressive layers: each coordinate is mapped given those before it (Kingma et al. 2016; Germain et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from .bijection import Bijection, Layer
from .linear import bounded
from .networks import REACH, Conditioner, autoregressive_degrees
from .univariate import Univariate


class AutoregressiveBijection(Bijection):
    """x_i = univariate(z_i; raw_i(z_<i, context)): one network pass forward, a sweep over the coordinates back."""

    def __init__(self, layer: Autoregressive, context: Tensor | None):
        self.layer, self.context = layer, context

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.univariate(self.layer.conditioner(z, self.context)).forward_and_logdet(z)

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each hidden unit is computed once, as soon as the coordinates that it sees are known."""
        sweep, z, logdet = Sweep(self.layer, self.context), [], x.new_zeros(x.shape[:-1])
        for i in self.layer.order:
            univariate = self.layer.univariate(sweep.raw())
            z_i, logdet_i = univariate.inverse_and_logdet(x[..., i : i + 1])
            sweep.push(z_i)
            z.append(z_i)
            logdet = logdet + logdet_i
        return torch.cat(z, -1).index_select(-1, self.layer.position), logdet


class Sweep:
    """The conditioner evaluated in degree order: units complete at a step push their share into the layers above.

    ``sums[l]`` holds the inputs of layer l's units as far as they are known; sorted by degree, each step completes a
    block of them. :meth:`raw` gives the numbers of the next coordinate, :meth:`push` takes its value.
    """

    def __init__(self, layer: Autoregressive, context: Tensor | None):
        net, order = layer.conditioner, torch.as_tensor(layer.order)
        dim, depth = len(order), len(layer.hidden)
        self.sums = [net.first_bias(context), *list(net.biases)[1:depth]]
        inner, *self.weights = (net.weight(i).mT for i in range(depth))
        self.inner = inner.unbind()  # by coordinate
        self.order, self.step, self.hidden = layer.order, 0, self.sums[-1][..., :0]
        # rows of the last layer are (count, coordinate): gather them by coordinate, in order
        self.last = net.weight(depth).unflatten(0, (net.count, -1)).index_select(1, order).unbind(1)
        self.last_bias = net.biases[depth].unflatten(0, (net.count, -1)).index_select(1, order).unbind(1)
        degrees = [autoregressive_degrees(dim, width) for width in layer.hidden]
        self.ends = [torch.searchsorted(d, torch.arange(-1, dim), right=True).tolist() for d in degrees]

    def raw(self) -> Tensor:
        """raw (\\*batch, count, 1) of the next coordinate, given those pushed so far."""
        for i, ends in enumerate(self.ends):
            start, end = ends[self.step], ends[self.step + 1]
            if start == end:
                continue
            units = silu(self.sums[i][..., start:end])
            if i < len(self.weights):
                self.sums[i + 1] = self.sums[i + 1] + units @ self.weights[i][start:end]
            else:
                self.hidden = torch.cat([self.hidden.expand(*units.shape[:-1], -1), units], -1)
        raw = linear(self.hidden, self.last[self.step][:, : self.hidden.shape[-1]], self.last_bias[self.step])
        return raw.unsqueeze(-1)

    def push(self, z: Tensor) -> None:
        """Take the value (\\*batch, 1) of the coordinate whose numbers :meth:`raw` gave."""
        self.sums[0] = self.sums[0] + bounded(z, REACH) * self.inner[self.order[self.step]]
        self.step += 1


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
        return AutoregressiveBijection(self, context)
