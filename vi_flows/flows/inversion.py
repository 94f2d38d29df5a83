"""Numerical inverses with implicit gradients: solve without a graph, then take one Newton step with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def monotone_root(
    f: Callable[[Tensor], tuple[Tensor, Tensor]],
    y: Tensor,
    lo: Tensor,
    hi: Tensor,
    start: Tensor | None = None,
    iterations: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve f(x) = y elementwise for an increasing f, by bracketed Newton steps.

    A fixed number of masked iterations, so that it runs under vmap and can be captured: a Newton step where it stays
    inside the bracket, a bisection where it does not and, without ``start``, at every third iteration but the last 16.
    The root's gradient is the implicit one, dx/dθ = −(∂f/∂θ)/f'(x), taken by one Newton step with the graph: it reaches
    everything that ``f`` holds. First derivatives are exact, second ones are not.

    Parameters
    ----------
    f: maps x to (f(x), f'(x)), elementwise.
    y: the values to reach; lo, hi: a bracket, f(lo) <= y <= f(hi), broadcast against y.
    start: where Newton's method alone converges from, such as the inflection of a sigmoid: on either side of it the
        curvature has one sign, so that the steps overshoot at most once. The bracket's middle if None.
    iterations: 20 with a start, 64 without.

    Returns
    -------
    x, the root (shape of y), and converged, a boolean tensor: whether |f(x) − y| is within rounding of zero.
    """
    iterations = iterations or (64 if start is None else 20)
    with torch.no_grad():
        # a little wider than asked: a step to a root at the very edge must not look like one that leaves the bracket
        slack = 16 * torch.finfo(y.dtype).eps * (1 + lo.abs() + hi.abs())
        target, a, b = y.detach(), lo - slack, hi + slack
        x = (a + b) / 2 if start is None else torch.minimum(torch.maximum(start.detach(), a), b)
        for i in range(iterations):
            value, slope = f(x)
            above = value > target
            a, b = torch.where(above, a, x), torch.where(above, x, b)
            newton = x - (value - target) / slope
            middle = (a + b) / 2
            bisect = start is None and i % 3 == 2 and i < iterations - 16
            x = middle if bisect else torch.where((newton >= a) & (newton <= b), newton, middle)
        value, slope = f(x)
        # the residual that rounding of x and of f allows
        scale = 1 + target.abs() + slope.abs() * x.abs() + torch.maximum(a.abs(), b.abs())
        converged = (value - target).abs() <= 1e3 * torch.finfo(y.dtype).eps * scale
    value, slope = f(x)
    return x - (value - y) / slope.detach(), converged


def where_converged(value: Tensor, converged: Tensor) -> Tensor:
    """NaN where a numerical inverse has not converged: captured code keeps it, the eager boundary raises on it."""
    return torch.where(converged, value, torch.full_like(value, torch.nan))
