"""The many given the few: Newton's method and Gaussian VI of sparse precision, for many values of the few at once."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...flows.recursion import Graph
from ...running import late
from ...targets.target import Target
from ..estimate.evaluate import log_density, value_and_grad
from .sparsity import elimination, probing

# of differenced gradients, in units of the many. Chosen, not measured: smaller, and rounding counts; larger, and what
# is not quadratic does
PRECISION_STEP = 1e-3
# of a Newton step, of which the best is taken, in one evaluation: without the small ones a spike stops the ascent
NEWTON_SHARES = (1.0, 0.4, 0.1, 0.02, 0.004, 0.0005)
# of the diagonal, added in turn where a precision is not positive: the least that does distorts steps least
DAMPING = (0.03, 0.3, 3.0, 30.0)
# nats that a Newton step promises, from where it is not taken: far below DIVERGENCE; lower costs precisions, of as many
# gradients as there are colours
CLOSE_GAIN = 1e-3
# units, at most, of a move of a mean in Gaussian VI: noise in a precision that is all but singular would throw it away.
# Chosen, not measured: lower, and far means are not reached in so few rounds
MOST_NEWTON_STEP = 3.0


class Conditional:
    """p(u | η) as N(m(η), P(η)⁻¹) with P's Cholesky factor on ``graph``, where x has few coordinates η and many u.

    u is measured in ``unit`` (n,) everywhere, in the order of graph.many. A precision is kept as (b, log_s) of
    u_i − m_i = Σ_j b_ij (u_j − m_j) + s_i z_i: see flows/structured.py.

    pattern: (dim, dim), where the Hessian of log p is not 0. few: indices.
    """

    def __init__(self, target: Target, pattern: Tensor, few: Tensor, unit: Tensor):
        self.target = target
        others = torch.tensor([i for i in range(target.dim) if i not in set(few.tolist())])
        order, parents, depth = elimination(pattern[others][:, others])
        by_depth = sorted(range(len(order)), key=lambda k: depth[k])
        place = {old: new for new, old in enumerate(by_depth)}
        pairs = [(place[k], place[j]) for k in by_depth for j in sorted(parents[k], key=place.get)]
        child, parent = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(-1)
        many = others[torch.tensor(order)[by_depth]]
        self.graph = Graph(few, many, child, parent, torch.tensor([depth[k] for k in by_depth]))
        self.pattern = pattern[many][:, many]
        self.seen = self.pattern[child, parent]
        self.unit = unit[many]
        self.dim, self.n = target.dim, len(many)

    @cached_property
    def probes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Colours (n,), and whether each entry (E,) is read from the product with its parent's, with its child's."""
        child, parent = self.graph.child, self.graph.parent
        colours, hub = probing(self.pattern)
        by_parent, by_child = ~(hub[child] & ~hub[parent]), ~(hub[parent] & ~hub[child])
        return colours, by_parent.to(self.unit), by_child.to(self.unit)

    @cached_property
    def _pairs(self) -> list[tuple[Tensor, ...]]:
        """For each depth, pairs of entries (i, j), (i, k), k < j, of one child i, and the entry (j, k) that eliminating
        i changes."""
        graph, n = self.graph, len(self.graph.many)
        child, parent = graph.child.numpy(), graph.parent.numpy()
        at = np.full((n, n), -1, dtype=np.int32)
        at[child, parent] = np.arange(len(child))
        first = np.searchsorted(child, np.arange(n + 1))
        out = []
        for k in range(graph.count):
            left, right = [], []
            for i in range(graph.starts[k], graph.starts[k + 1]):
                j, i_k = np.tril_indices(first[i + 1] - first[i], -1)
                left.append(first[i] + j)
                right.append(first[i] + i_k)
            left, right = np.concatenate(left), np.concatenate(right)
            of = np.maximum(at[parent[left], parent[right]], at[parent[right], parent[left]])
            out.append(tuple(torch.as_tensor(v, dtype=torch.long) for v in (left, right, of)))
        return out

    def points(self, eta: Tensor, u: Tensor) -> Tensor:
        """x (..., dim) of η (..., d) and u (..., n)."""
        eta = eta.expand(*u.shape[:-1], eta.shape[-1])
        return torch.cat([eta, u * self.unit], -1).index_select(-1, self.graph.back)

    def gradients(self, eta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p, and its gradient in u, at (..., d) and (..., n)."""
        x = self.points(eta, u)
        value, grad = value_and_grad(self.target, x.reshape(-1, self.dim))
        return value.reshape(x.shape[:-1]), grad.reshape(x.shape).index_select(-1, self.graph.many) * self.unit

    def precision(self, eta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """−∂²log p/∂u² at (K, S, ·), averaged over S: its diagonal (K, n) and entries (K, E), by coloured probes."""
        colours, by_parent, by_child = self.probes
        probes = PRECISION_STEP * torch.nn.functional.one_hot(colours).mT.to(u)
        diagonal, entries = 0.0, 0.0
        child, parent = self.graph.child, self.graph.parent
        for s in range(u.shape[1]):
            at = u[:, s, None]
            sides = [self.gradients(eta[:, None], at + sign * probes)[1] for sign in (1, -1)]
            moved = (sides[1] - sides[0]) / (2 * PRECISION_STEP)
            diagonal = diagonal + moved[:, colours, torch.arange(self.n)]
            both = by_parent * moved[:, colours[parent], child] + by_child * moved[:, colours[child], parent]
            entries = entries + torch.where(self.seen, both / (by_parent + by_child), 0.0)
        return diagonal / u.shape[1], entries / u.shape[1]

    def factor(self, diagonal: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """(b, log_s) of a precision; where it is not positive, of one with a heavier diagonal."""
        b, log_s, good = self._factor(diagonal, entries)
        for more in DAMPING:
            bad = (~good).nonzero()[:, 0]
            if not len(bad):
                break
            failed, size = diagonal[bad], diagonal[bad].abs()
            heavier = failed + more * (size + size.mean(-1, keepdim=True))
            b[bad], log_s[bad], good[bad] = self._factor(heavier, entries[bad])
        return torch.where(good[:, None], b, 0.0), torch.where(good[:, None], log_s, 0.0)

    def _factor(self, diagonal: Tensor, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Elimination from the deepest level up; which rows (K,) are positive."""
        graph = self.graph
        diagonal, entries = diagonal.clone(), entries.clone()
        good = diagonal.isfinite().all(-1) & entries.isfinite().all(-1)
        diagonal[~good], entries[~good] = 1.0, 0.0
        first = torch.searchsorted(graph.child.contiguous(), torch.tensor(graph.starts))
        for k in reversed(range(graph.count)):
            level = slice(graph.starts[k], graph.starts[k + 1])
            good &= (diagonal[:, level] > 1e-10).all(-1)
            diagonal[:, level] = diagonal[:, level].clamp_min(1e-10)
            edges = slice(int(first[k]), int(first[k + 1]))
            child, parent = graph.child[edges], graph.parent[edges]
            left, right, of = self._pairs[k]
            ratio = entries[:, edges] / diagonal[:, child]
            diagonal.index_add_(1, parent, -entries[:, edges] * ratio)
            if len(left):
                start = int(first[k])
                entries.index_add_(1, of, -entries[:, left] * ratio[:, right - start])
            entries[:, edges] = -ratio  # from here on these are b
        good &= diagonal.isfinite().all(-1) & entries.isfinite().all(-1)
        return entries, -0.5 * diagonal.log(), good

    def spread(self, b: Tensor, log_s: Tensor, noise: Tensor) -> Tensor:
        """P^{−1/2} z of (..., n)."""
        return self.graph.solve(b, log_s.exp() * noise)

    def newton_step(self, b: Tensor, log_s: Tensor, grad: Tensor) -> Tensor:
        """P⁻¹ g (K, n), kept to MOST_NEWTON_STEP."""
        with torch.enable_grad():
            e = torch.zeros_like(grad, requires_grad=True)
            (back,) = torch.autograd.grad(self.graph.solve(b, e), e, grad)
        return self.graph.solve(b, (2 * log_s).exp() * back)

    def laplace(self, eta: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
        """u (K, n) at the maxima of p(·, η), by damped Newton steps, and (b, log_s) of the last precision there."""
        u = u.clone()
        b, log_s = u.new_zeros(len(u), len(self.graph.child)), torch.zeros_like(u)
        going = torch.arange(len(u))
        for _ in range(iterations):
            value, grad = self.gradients(eta[going], u[going])
            b[going], log_s[going] = self.factor(*self.precision(eta[going], u[going, None]))
            step = self.newton_step(b[going], log_s[going], grad)
            trials = torch.stack([u[going] + t * step for t in NEWTON_SHARES], 1)
            reached = self.values(eta[going, None], trials)
            best, which = reached.max(-1)
            better = best > value
            chosen = trials[torch.arange(len(going)), which]
            u[going] = torch.where(better[:, None], chosen, u[going])
            going = going[better & ((step * grad).sum(-1) / 2 > CLOSE_GAIN)]
            if not len(going) or late():
                break
        return u, b, log_s

    def values(self, eta: Tensor, u: Tensor) -> Tensor:
        x = self.points(eta, u)
        return log_density(self.target, x.reshape(-1, self.dim)).reshape(x.shape[:-1])

    def noise(self, rows: int, pairs: int) -> Tensor:
        """Antithetic standard normals (rows, 2 pairs, n)."""
        z = torch.randn(rows, pairs, self.n, dtype=self.unit.dtype)
        return torch.cat([z, -z], 1)

    def variational(
        self, eta: Tensor, u: Tensor, b: Tensor, log_s: Tensor, pairs: int, rounds: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best Gaussian (Opper & Archambeau 2009): E[∇ log p] = 0, P = −E[∇² log p], by fixed-point rounds from a
        Laplace approximation; precisions are averaged over rounds, at falling rates."""
        mean = None
        for k in range(rounds):
            noise = self.noise(len(u), pairs)
            at = u[:, None] + self.spread(b[:, None], log_s[:, None], noise)
            new = self.precision(eta, at)
            mean = new if mean is None else tuple(m + (v - m) / (1 + k) for m, v in zip(mean, new, strict=True))
            grad = self.gradients(eta[:, None], at)[1].mean(1)
            b, log_s = self.factor(*mean)
            u = u + self.newton_step(b, log_s, grad).clamp(-MOST_NEWTON_STEP, MOST_NEWTON_STEP)
            if late():
                break
        return u, b, log_s
