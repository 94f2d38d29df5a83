"""Coupling layers: part of the coordinates conditions an elementwise map of the rest (Dinh et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bijection import Bijection, Layer, pulled_back
from .networks import Conditioner, Network
from .univariate import Univariate


class CouplingBijection(Bijection):
    """x_keep = z_keep, x_change = univariate(z_change; raw(z_keep, context)); a univariate's log-determinant."""

    def __init__(self, layer: Coupling, network: Network):
        self.layer, self.network = layer, network

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor, Bijection]:
        keep, change = z.index_select(-1, self.layer.order).split(self.layer.sizes, -1)
        keep = keep.view_as(keep)  # a node of its own, so that a gradient in it leaves the changed part out
        return keep, change, self.layer.univariate(self.network(keep))

    def join(self, keep: Tensor, changed: Tensor) -> Tensor:
        keep = keep.expand(*changed.shape[:-1], -1)
        return torch.cat([keep, changed], -1).index_select(-1, self.layer.restore)

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        keep, change, univariate = self.parts(z)
        changed, logdet = univariate.forward_and_logdet(change)
        return self.join(keep, changed), logdet

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep, change, univariate = self.parts(x)
        changed, logdet = univariate.inverse_and_logdet(change)
        return self.join(keep, changed), logdet

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The score of what changes is the univariate's; through the conditioner it pulls on what is kept."""
        keep, change, univariate = self.parts(z)
        of_keep, of_change = score.index_select(-1, self.layer.order).split(self.layer.sizes, -1)
        changed, logdet, of_change = univariate.forward_and_score(change, of_change)
        (pull,) = pulled_back((changed, logdet), (of_change, torch.ones_like(logdet)), keep)
        return self.join(keep, changed), logdet, self.join(of_keep - pull, of_change)


class Coupling(Layer):
    """A coupling layer of any univariate: with affine it is RealNVP's, with rational_quadratic a neural spline's.

    Parameters
    ----------
    mask: dim booleans; True marks the coordinates that change.
    """

    def __init__(self, mask: Sequence[bool], univariate: Univariate, hidden: Sequence[int], context: int | None = None):
        super().__init__()
        change = torch.as_tensor(mask)
        self.univariate = univariate
        self.sizes = [int((~change).sum()), int(change.sum())]
        self.register_buffer("order", change.long().argsort(stable=True))  # those that are kept come first
        self.register_buffer("restore", self.order.argsort())
        self.conditioner = Conditioner(*self.sizes, univariate.count, hidden, context)

    def forward(self, context: Tensor | None = None) -> Bijection:
        return CouplingBijection(self, self.conditioner(context))
