"""Autoregressive layers: each coordinate is mapped given those before it (Kingma et al. 2016; Germain et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardtanh, silu

from .bijection import Bijection, Layer, pulled_back
from .networks import REACH, Conditioner, Network, autoregressive_degrees
from .univariate import Univariate

CHEAP = 2  # raw numbers a coordinate, up to which a univariate costs less than its network (affine, not splines)
MANY = 16  # coordinates, from which on a few passes of the whole network are cheaper than a sweep


class AutoregressiveBijection(Bijection):
    """x_i = univariate(z_i; raw_i(z_<i, context)): one network pass forward, a sweep over the coordinates back."""

    def __init__(self, layer: Autoregressive, network: Network):
        self.layer, self.network = layer, network

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.univariate(self.network(z)).forward_and_logdet(z)

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """J is triangular: from the last coordinate i to the first, score'_i = (score_i − ∂ log|det|/∂z_i)/(∂x_i/∂z_i).

        log|det| pulls on z_i also through the later raw_j, and so does each x_j, by its score'_j.
        """
        sums = self.network.sums(z)
        raw, own = self.network.raw(sums[-1]), z.view_as(z)  # a gradient in own leaves the network out
        x, logdet = self.layer.univariate(raw).forward_and_logdet(own)
        slope, tilt = pulled_back((x,), (torch.ones_like(x),), own, raw)
        bend, pull = pulled_back((logdet,), (torch.ones_like(logdet),), own, raw)
        with torch.no_grad():
            direct, through = (score - bend) / slope, (z.abs() < REACH) / slope
            direct, through, tilt, pull = map(self.rows, (direct.unsqueeze(-2), through.unsqueeze(-2), tilt, pull))
            back, scores = SweepBack(self.layer, self.network, sums), []
            for i in reversed(range(z.shape[-1])):
                scores.append(torch.addcmul(direct[i], back.pulls[0].narrow(0, i, 1), through[i], value=-1))
                back.add(i, torch.addcmul(pull[i], scores[-1], tilt[i]))
            score = torch.cat(scores[::-1]).index_select(0, self.layer.position).mT.reshape(x.shape)
        return x, logdet, score

    def rows(self, t: Tensor) -> list[Tensor]:
        """(\\*batch, count, dim) -> for each coordinate, in order, (count, N)."""
        columns = t.reshape(-1, *t.shape[-2:]).permute(2, 1, 0).unbind()
        return [columns[i] for i in self.layer.order]

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        many = x.shape[-1] >= MANY and self.layer.univariate.count <= CHEAP
        if many and not torch.is_grad_enabled():
            found = self.settled(x)
            if found is not None:
                return found
        return self.swept(x)

    def settled(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """z as the fixed point of z ← univariate(raw(z))⁻¹(x), from z = x, or None if it is not soon reached.

        A pass makes one more coordinate exact, and brings the others closer (Song et al. 2021): where the coupling is
        mild, few passes do for all. Without a graph only: the passes' gradients are not those of the fixed point.
        """
        close = {"rtol": 4 * torch.finfo(x.dtype).eps, "atol": 4 * torch.finfo(x.dtype).eps}
        z = x
        for _ in range(x.shape[-1] // 3):
            before, (z, logdet) = z, self.layer.univariate(self.network(z)).inverse_and_logdet(x)
            try:
                if z.shape == before.shape and torch.allclose(z, before, **close):
                    return z, logdet
            except RuntimeError:  # inside vmap or a capture no value can be read
                return None
        return None

    def swept(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z coordinate by coordinate: each hidden unit is computed once, when what it sees is known."""
        layer, dim = self.layer, x.shape[-1]
        batch = torch.broadcast_shapes(x.shape[:-1], self.network.biases[0].shape[:-1])
        columns = x.expand(*batch, dim).reshape(-1, dim).split(1, -1)
        sweep = Sweep(layer, self.network, batch)
        z, logdets = [], []
        for i in layer.order:
            univariate = layer.univariate(sweep.next(z[-1] if z else None))
            z_i, logdet = univariate.inverse_and_logdet(columns[i])
            z.append(z_i)
            logdets.append(logdet)
        logdet = torch.stack(logdets).sum(0).reshape(batch)
        return torch.cat(z, -1).index_select(-1, layer.position).reshape(*batch, dim), logdet


class Sweep:
    """The conditioner evaluated in degree order, for N rows: what is new at a step is added to the sums it feeds.

    ``sums`` (N, width) are the hidden units before silu. Units sorted by degree make the new ones a block. Those that
    are not complete hold part of their sum: the masks give them no weight in what depends on complete ones only.
    """

    def __init__(self, layer: Autoregressive, network: Network, batch: Sequence[int]):
        order, self.sizes = torch.as_tensor(layer.order), layer.sizes
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
        """raw (N, count, 1) of the next coordinate, given the ``previous`` one (N, 1)."""
        step, sums = self.step, self.sums
        if previous is not None:
            sums[0] = torch.addmm(sums[0], hardtanh(previous, -REACH, REACH), self.blocks[0][step - 1])
        for i, sizes in enumerate(self.sizes[:-1]):
            if sizes[step]:
                new = silu(sums[i].narrow(1, self.complete[i], sizes[step]))
                sums[i + 1] = torch.addmm(sums[i + 1], new, self.blocks[i + 1][step])
                self.complete[i] += sizes[step]
        self.step += 1
        return torch.addmm(self.last_bias[step], self.last[step], silu(sums[-1]).mT).mT.unsqueeze(-1)


class SweepBack:
    """The conditioner's Jacobian transposed, for N rows, in falling order of the coordinates: what its numbers pull on.

    ``pulls`` (width, N) belong to the inputs, in order, and to the hidden units of each layer after silu; a unit's is
    passed on once it is complete, when all coordinates that the unit feeds have been added.
    """

    def __init__(self, layer: Autoregressive, network: Network, sums: Sequence[Tensor]):
        order, self.sizes = torch.as_tensor(layer.order), layer.sizes
        sums = [h.reshape(-1, h.shape[-1]).mT for h in sums]
        weights = [network.weights[0][:, order], *network.weights[1:-1]]
        self.blocks = [weight.mT.split(sizes, 1) for weight, sizes in zip(weights, self.sizes, strict=True)]
        self.last = network.weights[-1].unflatten(0, (network.count, -1))[:, order].permute(1, 2, 0).unbind()
        self.slopes = [silu_slope(h).split(sizes) for h, sizes in zip(sums, self.sizes, strict=True)]
        self.pulls = [sums[0].new_zeros(width, sums[0].shape[1]) for width in (len(order), *map(len, sums))]
        self.left = [len(h) for h in sums]  # units that are not complete

    def add(self, step: int, cotangent: Tensor) -> None:
        """Pull by the raw numbers (count, N) of a coordinate."""
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


class Autoregressive(Layer):
    """An autoregressive layer of any univariate; with affine it is IAF's, and its inverse is MAF's.

    Parameters
    ----------
    order: the coordinates in autoregressive order.
    """

    def __init__(self, order: Sequence[int], univariate: Univariate, hidden: Sequence[int], context: int | None = None):
        super().__init__()
        self.order, self.univariate = tuple(order), univariate
        self.register_buffer("position", torch.as_tensor(self.order).argsort())
        dim = len(self.order)
        self.conditioner = Conditioner(dim, dim, univariate.count, hidden, context, order)
        # how many units of each hidden layer have each degree
        degrees = [autoregressive_degrees(dim, width) for width in hidden]
        self.sizes = [torch.bincount(degree, minlength=dim).tolist() for degree in degrees]

    def forward(self, context: Tensor | None = None) -> Bijection:
        return AutoregressiveBijection(self, self.conditioner(context))
