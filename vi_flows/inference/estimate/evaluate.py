"""A target over many points: in blocks, with gradients and Hessians."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...targets.target import Target
from ...targets.values import BELIEVED

BLOCK_ROWS = 1000  # rows in one evaluation of a target: larger ones fall out of the processor's caches


def in_blocks(fn, x: Tensor, block: int = BLOCK_ROWS) -> Tensor:
    """fn over the rows of x, ``block`` at a time, without a graph."""
    with torch.no_grad():
        return torch.cat([fn(rows) for rows in x.split(block)])


def log_density(target: Target, x: Tensor) -> Tensor:
    """log p at x (N, dim) in blocks, as (N,): −inf where it is not a number, or not believed."""
    log_p = in_blocks(target.log_prob, x)
    return torch.where(log_p <= BELIEVED, log_p, -math.inf)


# in sd, over which gradients are differenced to see whether second derivatives are right: over the largest rounding is
# small, over the smallest all but the second derivative is, so that right ones agree with one of them
DIFFERENCE_STEPS = (1e-2, 1e-4, 1e-6)
# points at which that is looked at, and how far off, relatively, they may be at one of them: a missing second
# derivative is off by about 1; lower, and rounding has exact Hessians differenced
TRIED_POINTS, NEAR = 4, 0.1


def value_and_grad(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    """log p (N,) and its gradient (N, dim), in blocks; rows without values to believe give −inf and 0."""
    values, grads = [], []
    for rows in x.detach().split(BLOCK_ROWS):
        rows = rows.clone().requires_grad_()
        with torch.enable_grad():
            value = target.log_prob(rows)
            (grad,) = torch.autograd.grad(value.sum(), rows)
        values.append(value.detach())
        grads.append(grad)
    value, grad = torch.cat(values), torch.cat(grads)
    good = value.isfinite() & (value <= BELIEVED) & grad.isfinite().all(-1)
    return torch.where(good, value, -torch.inf), torch.where(good[:, None], grad, 0.0)


def hessians(target: Target, x: Tensor, scale: Tensor) -> Tensor:
    """Hessians of log p at the rows of x (N, dim) -> (N, dim, dim): exact, by one backward pass for each coordinate.

    Rows where that is not finite (``logaddexp`` of far apart terms has no second derivative in torch) are differenced:
    central differences of the gradient, over steps of 1e-3 times ``scale`` (N, dim), about the sd of each coordinate.
    So are all rows of a target that torch can differentiate only once (``torch.cdist``, say).
    """
    if _has_second_derivatives(target, x, scale):
        grad, leaf = _gradient_with_graph(target, x)
        hessian = torch.stack([_gradient(grad[:, i].sum(), leaf) for i in range(x.shape[1])], -2).detach()
    else:
        hessian = x.new_full((*x.shape, x.shape[1]), torch.nan)
    bad = (~hessian.isfinite().all(-1).all(-1)).nonzero()[:, 0]
    if len(bad):
        hessian[bad] = _differenced(target, x[bad], 1e-3 * scale[bad])
    return (hessian + hessian.mT) / 2


def _has_second_derivatives(target: Target, x: Tensor, scale: Tensor) -> bool:
    """Whether H v by autograd is what gradients differ by along v, at some points near x and for some step.

    An operation that torch differentiates once either raises, or passes for a constant without a word.
    """
    generator = torch.Generator().manual_seed(0)
    noise, v = (torch.randn(2, *x[:TRIED_POINTS].shape, generator=generator, dtype=torch.float64)).to(x)
    v, at = (
        scale[:TRIED_POINTS] * v,
        x[:TRIED_POINTS] + 0.1 * scale[:TRIED_POINTS] * noise,
    )  # off any kink that an optimum lies on
    try:
        grad, leaf = _gradient_with_graph(target, at)
        product = _gradient((grad * v).sum(), leaf)
    except RuntimeError:
        return False
    steps = torch.tensor(DIFFERENCE_STEPS).to(x)[:, None, None]
    _, grads = value_and_grad(target, torch.stack([at + steps * v, at - steps * v]).reshape(-1, x.shape[1]))
    ahead, behind = grads.reshape(2, len(DIFFERENCE_STEPS), *at.shape)
    differences = (ahead - behind) / (2 * steps)
    size = torch.linalg.vector_norm(scale[:TRIED_POINTS] * differences, dim=-1)
    off = torch.linalg.vector_norm(scale[:TRIED_POINTS] * (product - differences), dim=-1)
    return not bool((off > NEAR * size).all())


def _gradient_with_graph(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    """∇log p (N, dim) at a leaf x (N, dim), and the leaf."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(target.log_prob(leaf).sum(), leaf, create_graph=True)
    return grad, leaf


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    """d value / d leaf, 0 where value does not depend on it (the gradient of a linear log density)."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True, materialize_grads=True)[0]


def _differenced(target: Target, x: Tensor, step: Tensor) -> Tensor:
    """(∇log p(x + hᵢeᵢ) − ∇log p(x − hᵢeᵢ)) / 2hᵢ as row i, for all rows of x and steps h (N, dim)."""
    n, dim = x.shape
    offsets = torch.diag_embed(step)
    points = torch.stack([x[:, None] + offsets, x[:, None] - offsets])
    _, grad = value_and_grad(target, points.reshape(-1, dim))
    ahead, behind = grad.reshape(2, n, dim, dim)
    return (ahead - behind) / (2 * step.unsqueeze(-1))
