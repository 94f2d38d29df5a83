"""Which coordinates curve which: the Hessian's pattern, those that move the curvature of others, and an elimination
order of the rest, for a precision that factors sparsely."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...targets.target import Target
from ..estimate.evaluate import value_and_grad

# of differenced gradients, before the scales are known. Chosen, not measured: larger blurs narrow coordinates, smaller
# drowns wide ones in rounding
PATTERN_STEP = 1e-4
ZERO = 1e-9  # of the largest entry of a row, below which an entry is rounding: lower, and all seem to hang together
MOVED_AT_ONCE = 64  # coordinates that are moved at once: D² numbers each, in blocks
# numbers of neighbours, the highest, from where coordinates are tried as hubs: each trial colours the rest anew, and
# more hardly ever save a product
TRIED_DEGREES = 8
SMALL_PART = 3  # nodes, from where an order is not sought: there is no fill to save


def curvature(target: Target, x: Tensor, step: Tensor) -> Tensor:
    """−∇² log p at x (dim,), by central differences of the gradient; NaN in rows where that is not finite."""
    sides = []
    for sign in (1, -1):
        value, grad = value_and_grad(target, x + sign * torch.diag(step))
        sides.append(torch.where((value > -torch.inf)[:, None], grad, torch.nan))
    return (sides[1] - sides[0]) / (2 * step[:, None])


def pattern(curvatures: list[Tensor]) -> Tensor:
    """Where any of the curvatures (dim, dim) is not 0, symmetric, with the diagonal."""
    nonzero = torch.eye(len(curvatures[0]), dtype=torch.bool)
    for each in curvatures:
        size = each.abs().nan_to_num(nan=0.0)
        nonzero |= (size > ZERO * size.amax(-1, keepdim=True)).cpu()
    return nonzero | nonzero.mT


def coloured(pattern: Tensor, apart: int) -> Tensor:
    """Greedy colours (n,) such that coordinates within ``apart`` steps (1 or 2) of each other have different ones."""
    near = [row.nonzero()[:, 0].tolist() for row in pattern]
    colours = [-1] * len(near)
    for i in sorted(range(len(near)), key=lambda k: -len(near[k])):
        around = near[i] if apart == 1 else {k for j in near[i] for k in near[j]}
        taken = {colours[k] for k in around}
        colours[i] = next(c for c in range(len(near) + 1) if c not in taken)
    return torch.tensor(colours)


def probing(pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Colours (n,) by which all entries of a symmetric matrix of this pattern can be read from products with as many
    vectors, and which coordinates are hubs: these have colours of their own, and entries with a hub are read from its
    product; others from that with the colour of either side."""
    degree = pattern.sum(-1)
    best: tuple[int, Tensor, Tensor] | None = None
    for least in [int(degree.max()) + 1, *degree.unique().flip(0).tolist()[:TRIED_DEGREES]]:
        hub = degree >= least
        rest = (~hub).nonzero()[:, 0]
        colours = torch.full_like(degree, -1)
        colours[rest] = coloured(pattern[rest][:, rest], 2).to(degree)
        count = int(colours.max()) + 1 if len(rest) else 0
        colours[hub] = count + torch.arange(int(hub.sum()))
        if best is None or count + int(hub.sum()) < best[0]:
            best = count + int(hub.sum()), colours, hub
    return best[1], best[2]


def influence(
    target: Target, x: Tensor, of: Tensor, pattern: Tensor, steps: Tensor, among: Tensor | None = None
) -> Tensor:
    """By how much a move of each coordinate by its step (dim,) changes the curvature of the others: (dim,)

        c_j = Σ_{k≠j} min(|Δ_j log C_kk|, 1)²,  C = −∇² log p.

    Where steps are sds, a Gaussian that leaves j among the others loses about c_j/4 nats. of: C (dim, dim) at x.
    among: indices that are asked about (all); 0 for others, which then cost nothing.
    """
    dim, colours = len(x), coloured(pattern, 1).to(x.device)
    probes = PATTERN_STEP * torch.nn.functional.one_hot(colours).mT.to(x)
    usual = of.diagonal().nan_to_num(nan=1.0).abs().clamp_min(1e-12)
    coordinates = torch.arange(dim, device=x.device)
    out = x.new_zeros(dim)
    for index in (coordinates if among is None else among).split(MOVED_AT_ONCE):
        at = x + torch.diag(steps)[index]
        points = torch.cat([at[:, None], at[:, None] + probes], 1)
        grad = value_and_grad(target, points.reshape(-1, dim))[1].reshape(points.shape)
        moved = ((grad[:, 0] - grad[:, 1 + colours, coordinates]) / PATTERN_STEP).abs().clamp_min(1e-12)
        change = (moved / usual).log().abs().clamp_max(1.0)
        change[torch.arange(len(index)), index] = 0.0
        out[index] = change.square().sum(-1)
    return out


def elimination(pattern: Tensor) -> tuple[list[int], list[list[int]], list[int]]:
    """An order in which a precision of this pattern factors with little fill, and few steps one after the other.

    Returns the nodes with the one eliminated last first; for each place in this order the places of what it depends on
    (its entries in the factor, all of them earlier); and its depth in the elimination tree. By nested dissection
    (George 1973): separators are levels of breadth-first searches, or single nodes with more neighbours than most.
    """
    near = [set(row.nonzero()[:, 0].tolist()) - {i} for i, row in enumerate(pattern)]
    order: list[int] = []
    stack = [set(range(len(near)))]
    while stack:
        for part in _components(stack.pop(), near):
            first = _separator(part, near)
            order += sorted(first, key=lambda i: -len(near[i]))
            if len(first) < len(part):
                stack.append(part - first)
    return order, *_eliminated(order, near)


def _eliminated(order: list[int], near: list[set[int]]) -> tuple[list[list[int]], list[int]]:
    place = {node: k for k, node in enumerate(order)}
    parents: list[set[int]] = [{place[j] for j in near[node] if place[j] < k} for k, node in enumerate(order)]
    for k in range(len(order) - 1, 0, -1):
        if parents[k]:
            parents[max(parents[k])] |= parents[k] - {max(parents[k])}
    depth = []
    for k in range(len(order)):
        depth.append(depth[max(parents[k])] + 1 if parents[k] else 0)
    return [sorted(p) for p in parents], depth


def _components(nodes: set[int], near: list[set[int]]) -> list[set[int]]:
    left, parts = set(nodes), []
    while left:
        part = set().union(*_levels(next(iter(left)), left, near))
        left -= part
        parts.append(part)
    return parts


def _levels(start: int, nodes: set[int], near: list[set[int]]) -> list[set[int]]:
    """Nodes by their distance from one of them."""
    seen, levels = {start}, [{start}]
    while levels[-1]:
        beyond = set().union(*(near[i] for i in levels[-1])) & nodes
        levels.append(beyond - seen)
        seen |= beyond
    return levels[:-1]


def _separator(part: set[int], near: list[set[int]]) -> set[int]:
    """Nodes to be eliminated after all others of a connected part; all of it where it cannot be split."""
    if len(part) <= SMALL_PART:
        return part
    degree = {i: len(near[i] & part) for i in part}
    hub = max(part, key=lambda i: (degree[i], -i))
    if degree[hub] > 4 * float(np.median(list(degree.values()))):
        return {hub}
    start, best = min(part, key=lambda i: (degree[i], i)), (float("inf"), part)
    for _ in range(4):  # from one end to the other
        levels = _levels(start, part, near)
        before = 0
        for k, level in enumerate(levels):
            if 0 < k < len(levels) - 1:
                score = max(before, len(part) - before - len(level)) + 2 * len(level)
                best = min(best, (score, level), key=lambda pair: pair[0])
            before += len(level)
        start = min(levels[-1], key=lambda i: (degree[i], i))
    return best[1]
