"""Autoregressive layers: each coordinate is mapped given those before it (Kingma et al. 2016; Germain et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Size, Tensor

from ..bijection import Bijection, Layer, pulled_back
from ..conditioners.conditioner import Conditioner, Network, Passes, Swept
from ..univariates.univariate import Univariate

CHEAP = 2  # raw numbers a coordinate, up to which a univariate costs less than its network (affine, not splines)
SWEEP_DIMS = 16  # coordinates, from which on a few passes of the whole network are cheaper than a sweep


class AutoregressiveBijection(Bijection):
    """x_i = univariate(z_i; raw_i(z_<i, context)): one network pass forward, a sweep over the coordinates back."""

    def __init__(self, layer: Autoregressive, network: Network, batch: Sequence[int]):
        self.order, self.position, self.network, self.batch = layer.order, layer.position, network, batch
        self.build, self.cheap = layer.univariate.bind(), layer.univariate.count <= CHEAP

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.build(self.network(z)).forward_and_logdet(z)

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The score by one sweep from the last coordinate to the first, as docs/autoregressive_score.md explains.

        With r_i = raw_i(z_<i), x_i = u(z_i; r_i), log|det J| = Σ_i l_i and l_i = log ∂x_i/∂z_i,

            score'_i = (score_i − ∂l_i/∂z_i − pull_i) / (∂x_i/∂z_i),
            pull_i = Σ_{j>i} (∂r_j/∂z_i)ᵀ c_j,  c_j = score'_j ∂x_j/∂r_j + ∂l_j/∂r_j;

        below, x_z is ∂x/∂z at fixed r, and so on. A network that is not swept has the inverse asked instead.
        """
        if not isinstance(self.network, Swept):
            return super().forward_and_score(z, score)
        raw, sweep_back = self.network.with_back(z)
        direct = z.view_as(z)  # a gradient in it leaves the network out: r is fixed
        x, logdet = self.build(raw).forward_and_logdet(direct)
        x_z, x_r = pulled_back((x,), (torch.ones_like(x),), direct, raw)
        l_z, l_r = pulled_back((logdet,), (torch.ones_like(logdet),), direct, raw)
        with torch.no_grad():
            back, scores = sweep_back(), []
            alone, by_pull = (score - l_z) / x_z, back.inside / x_z  # the score without pull, and −∂score'_i/∂pull_i
            alone, by_pull, x_r, l_r = map(self.rows, (alone.unsqueeze(-2), by_pull.unsqueeze(-2), x_r, l_r))
            for i in reversed(range(z.shape[-1])):
                scores.append(torch.addcmul(alone[i], back.pull(i), by_pull[i], value=-1))
                back.add(i, torch.addcmul(l_r[i], scores[-1], x_r[i]))  # c_i
            score = torch.cat(scores[::-1]).index_select(0, self.position).mT.reshape(x.shape)
        return x, logdet, score

    def rows(self, t: Tensor) -> list[Tensor]:
        """(\\*batch, count, dim) -> for each coordinate, in order, (count, N)."""
        columns = t.reshape(-1, *t.shape[-2:]).permute(2, 1, 0).unbind()
        return [columns[i] for i in self.order]

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] >= SWEEP_DIMS and self.cheap and not torch.is_grad_enabled():
            settled = self.settled(x)
            if settled is not None:
                return settled
        return self.swept(x)

    def settled(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """z as the fixed point of z ← univariate(raw(z))⁻¹(x), from z = x, or None if it is not soon reached.

        A pass makes one more coordinate exact, and brings the others closer (Song et al. 2021): where the coupling is
        mild, few passes do for all. Without a graph only: the passes' gradients are not those of the fixed point.
        """
        close = {"rtol": 4 * torch.finfo(x.dtype).eps, "atol": 4 * torch.finfo(x.dtype).eps}
        z = x
        for _ in range(x.shape[-1] // 3):
            before, (z, logdet) = z, self.build(self.network(z)).inverse_and_logdet(x)
            try:
                if z.shape == before.shape and torch.allclose(z, before, **close):
                    return z, logdet
            except RuntimeError:  # inside vmap or a capture no value can be read
                return None
        return None

    def swept(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z coordinate by coordinate: each hidden unit is computed once, when what it sees is known."""
        dim, batch = x.shape[-1], torch.broadcast_shapes(x.shape[:-1], self.batch)
        x = x.expand(*batch, dim)
        swept = isinstance(self.network, Swept)
        sweep = self.network.sweep(batch) if swept else Passes(self.network, self.order, torch.zeros_like(x))
        columns = x.reshape(-1, dim).split(1, -1)
        z, logdets = [], []
        for i in self.order:
            z_i, logdet = self.build(sweep.next(z[-1] if z else None)).inverse_and_logdet(columns[i])
            z.append(z_i)
            logdets.append(logdet)
        logdet = torch.stack(logdets).sum(0).reshape(batch)
        return torch.cat(z, -1).index_select(-1, self.position).reshape(*batch, dim), logdet


class Autoregressive(Layer):
    """An autoregressive layer of any univariate; with affine it is IAF's, and its inverse is MAF's.

    Parameters
    ----------
    univariate: the map of each coordinate.
    conditioner: its raw numbers given the coordinates before it, in the conditioner's order.

    Raises
    ------
    ValueError for a conditioner without an order, or of other sizes.
    """

    def __init__(self, univariate: Univariate, conditioner: Conditioner):
        super().__init__()
        order = conditioner.order
        if order is None or sorted(order) != list(range(len(order))):
            expected = "one with an order, a permutation of the coordinates"
            raise ValueError(f"conditioner: expected {expected}, got the order {order}; MaskedMLP is one")
        conditioner.check(len(order), len(order), univariate.count)
        self.order, self.univariate = order, univariate
        self.register_buffer("position", torch.as_tensor(order).argsort())
        self.conditioner = conditioner

    def forward(self, context: Tensor | None = None) -> Bijection:
        batch = Size() if context is None else context.shape[:-1]
        return AutoregressiveBijection(self, self.conditioner(context), batch)
