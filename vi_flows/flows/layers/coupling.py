"""Coupling layers: part of the coordinates conditions an elementwise map of the rest (Dinh et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..bijection import Bijection, Layer, pulled_back
from ..conditioners.conditioner import Conditioner, Network
from ..univariates.univariate import Univariate


class Split(nn.Module):
    """The two parts of a coupling's coordinates: those that are kept, and those that change.

    Parameters
    ----------
    mask: dim booleans; True marks the coordinates that change, of which there must be one.

    Raises
    ------
    ValueError for another mask.
    """

    def __init__(self, mask: Sequence[bool]):
        super().__init__()
        change = torch.as_tensor(mask)
        if change.dtype != torch.bool or change.dim() != 1 or not change.any():
            expected = "a sequence of booleans, at least one of them True (it changes)"
            raise ValueError(f"mask: expected {expected}, got {mask!r}")
        self.kept, self.changed = int((~change).sum()), int(change.sum())
        self.register_buffer("order", change.long().argsort(stable=True))  # those that are kept come first
        self.register_buffer("restore", self.order.argsort())

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (\\*batch, dim) -> (\\*batch, kept) and (\\*batch, changed)."""
        keep, change = x.index_select(-1, self.order).split([self.kept, self.changed], -1)
        return keep, change

    def join(self, keep: Tensor, changed: Tensor) -> Tensor:
        """(\\*batch, dim) from its parts; that which is kept may lack the batch axes of the other."""
        keep = keep.expand(*changed.shape[:-1], -1)
        return torch.cat([keep, changed], -1).index_select(-1, self.restore)


class CouplingBijection(Bijection):
    """x_keep = z_keep, x_change = univariate(z_change; raw(z_keep, context)); a univariate's log-determinant."""

    def __init__(self, layer: Coupling, network: Network):
        self.split, self.build, self.network = layer.split, layer.univariate.bind(), network

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor, Bijection]:
        """What is kept, what changes, and the map that changes it."""
        keep, change = self.split.parts(z)
        keep = keep.view_as(keep)  # a node of its own, so that a gradient in it leaves the changed part out
        return keep, change, self.build(self.network(keep))

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        keep, change, univariate = self.parts(z)
        changed, logdet = univariate.forward_and_logdet(change)
        return self.split.join(keep, changed), logdet

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep, change, univariate = self.parts(x)
        changed, logdet = univariate.inverse_and_logdet(change)
        return self.split.join(keep, changed), logdet

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The score of what changes is the univariate's; through the conditioner it pulls on what is kept."""
        keep, change, univariate = self.parts(z)
        of_keep, of_change = self.split.parts(score)
        changed, logdet, of_change = univariate.forward_and_score(change, of_change)
        (pull,) = pulled_back((changed, logdet), (of_change, torch.ones_like(logdet)), keep)
        return self.split.join(keep, changed), logdet, self.split.join(of_keep - pull, of_change)


class Coupling(Layer):
    """A coupling layer of any univariate: with affine it is RealNVP's, with rational_quadratic a neural spline's.

    Parameters
    ----------
    split: which coordinates are kept, and which change.
    univariate: the map of those that change.
    conditioner: its raw numbers, for split.changed coordinates, given the split.kept others.

    Raises
    ------
    ValueError for a conditioner of other sizes.
    """

    def __init__(self, split: Split, univariate: Univariate, conditioner: Conditioner):
        super().__init__()
        conditioner.check(split.kept, split.changed, univariate.count)
        self.split, self.univariate, self.conditioner = split, univariate, conditioner

    def forward(self, context: Tensor | None = None) -> Bijection:
        return CouplingBijection(self, self.conditioner(context))
