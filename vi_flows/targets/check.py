"""Step 0 of a fit: is this a density that can be fitted? Every answer "no" is one line with its remedy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import first_line
from .density import LogDensity, check_form
from .target import Target, is_model
from .values import BELIEVED, SUNK, as_computed, beside_mass, precision_of, show

RTOL = {torch.float64: 1e-9, torch.float32: 1e-4}  # of two calls at the same x
ROW_RTOL = 1e-4
MAX_SINGLES = 6  # rows evaluated alone
MAX_DIFFERENCES = 8  # points at which the gradient is compared with finite differences
JITTER = 1e-6  # of points about given ones, so that none are the same
WITHOUT_GRADIENT = 0.2  # of the points, that may have a log p but no gradient, where NaN is skipped


@dataclass(frozen=True)
class CheckReport:
    """What a check saw: points evaluated, how many had finite log p, and the precision the target works in."""

    points: int
    finite: int
    precision: torch.dtype


def check_target(target: Target, x: Tensor) -> CheckReport:
    """Verify target at x (N, dim), N >= 2 (32 to 64 points where the fit starts), before anything is fitted.

    In this order: form of the result (tensor, dtype, shape, device), the same value twice, a finite value somewhere,
    rows independent of one another, named values, a finite gradient that agrees with finite differences, every
    coordinate of influence. Raises ValueError, in one line that names the argument, what was expected, what came and
    the remedy. Points without a value count as −inf; where they lie beside high values a warning says so.
    """
    name = target.argument
    _check_points(x, target.dim)
    x = x.detach()
    log_p = _evaluate(target, x, name)
    precision = torch.float64 if precision_of(target, x) == torch.float64 else torch.float32
    _check_repeatable(target, x, log_p, precision, name)
    _check_values(target, x, log_p, name)
    _check_rows(target, x, log_p, name)
    _check_names(target, x)
    gradient = _gradient(target, x, log_p, name)
    finite = log_p.isfinite() & gradient.isfinite().all(-1)
    _check_coordinates(target, x[finite], log_p[finite], gradient[finite], name)
    if bool(finite.any()):
        first = finite.nonzero()[:MAX_DIFFERENCES, 0]
        precision = _check_differences(target, x[first], gradient[first], precision, name)
    return CheckReport(len(x), int(log_p.isfinite().sum()), precision)


def where_it_starts(target: Target, x: Tensor, near: Tensor | None = None) -> Tensor:
    """x (N, dim), or, where the target has no finite value at any of them, as many points about the other starts.

    near: (n, dim), those that the user gave; a model has draws of its prior.
    """
    prior = target.prior
    if near is None and prior is None:
        return x
    try:
        with torch.no_grad():
            if bool(target.log_prob(x).isfinite().any()):
                return x
            given = prior(len(x)) if near is None else near.repeat(len(x) // len(near) + 1, 1)[: len(x)]
            given = given.to(x)
            given = given + JITTER * (1 + given.abs()) * torch.randn_like(given)
            return given if bool(target.log_prob(given).isfinite().any()) else x
    except Exception:  # what is wrong with a target is told where it is checked
        return x


def settle_dtype(target: Target, x: Tensor) -> Target:
    """The checked target in the dtype it works in: itself, or its float32 version where float64 is beyond it.

    That is a target that raises on float64 input but not on float32 (tensors or networks of its own in float32), or
    that computes in float32 whatever it is given. Raises ValueError as check_target does.
    """
    can_move = target.movable and target.dtype == torch.float64
    try:
        report = check_target(target, x)
    except ValueError as error:
        if not (can_move and isinstance(error.__cause__, RuntimeError)):
            raise
        single = target.to(torch.float32)
        try:
            check_target(single, x)
        except ValueError:
            raise error from error.__cause__
        return single
    if report.precision == torch.float32 and can_move and isinstance(target, LogDensity):
        single = target.to(torch.float32)
        # rough differences may also be an ill-conditioned float64 computation, which float32 would only make worse
        if _result_dtype(target, x) == torch.float32 or torch.equal(single.log_prob(x), target.log_prob(x)):
            return single
    return target


def _check_points(x: Tensor, dim: int) -> None:
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != dim or len(x) < 2 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"x: expected at least 2 points, floats of shape (N, {dim}), got {got}; pass one point per row"
        )
    if not bool(x.isfinite().all()):
        raise ValueError(f"x: expected finite points, got {show(x[~x.isfinite().all(-1)][0])}")


def _evaluate(target: Target, x: Tensor, name: str) -> Tensor:
    """log p at x without a gradient, its form checked; whatever else the target raises becomes one line."""
    given = x.clone()
    try:
        with torch.no_grad():
            log_p = target.log_prob(given)
    except Exception as error:
        raise _one_line(error, x, name) from error
    check_form(log_p, len(x), x.device, name)
    if not torch.equal(given, x):
        raise ValueError(f"{name}: expected x to be left as it is, got x changed in place; work on x.clone()")
    return log_p


def _one_line(error: Exception, x: Tensor, name: str) -> ValueError:
    if isinstance(error, ValueError) and ": expected" in str(error) and "\n" not in str(error):
        return error  # one of this package's own
    return ValueError(
        f"{name}: expected values at {x.dtype} x of shape {tuple(x.shape)}, got {first_line(error)}; "
        "check dim and dtype"
    )


def _result_dtype(target: Target, x: Tensor) -> torch.dtype:
    """The dtype the target computes in, as far as its result tells."""
    if not isinstance(target, LogDensity):
        return target.dtype
    with torch.no_grad():
        return target.fn(x[:2].to(dtype=target.dtype, device=target.device, copy=True)).dtype


def _check_repeatable(target: Target, x: Tensor, log_p: Tensor, precision: torch.dtype, name: str) -> None:
    again = _evaluate(target, x, name)
    differ = ~torch.isclose(log_p, again, rtol=RTOL[precision], atol=0.0, equal_nan=True)
    if bool(differ.any()):
        i = int(differ.nonzero()[0, 0])
        raise ValueError(
            f"{name}: expected the same value for the same x, got {float(log_p[i]):.6g} and {float(again[i]):.6g} "
            f"at x = {show(x[i])}; remove random numbers (dropout, minibatches) from it"
        )


def _check_values(target: Target, x: Tensor, log_p: Tensor, name: str) -> None:
    """Raise where no point has a finite value; warn where a point without one lies beside values that matter."""
    bad, sign = ~(log_p.isfinite() & (log_p <= BELIEVED)), -1 if name == "energy" else 1
    if not bool(bad.any()):
        return
    value = sign * as_computed(target, x)
    if bool(bad.all()):
        empty = bool((value == -sign * torch.inf).all())
        got = "NaN" if bool(value.isnan().all()) else f"{float(value[0]):.4g}"
        remedy = (
            "start inside the support, or map R^D onto it (torch.distributions.biject_to)"
            if empty
            else f"check data and formula, and subtract a constant from log p above {BELIEVED:.2g}"
        )
        raise ValueError(
            f"{name}: expected finite values, got {got} at all {len(x)} points, first x = {show(x[0])}; {remedy}"
        )
    # a model may well say −inf, where its data lie outside a support
    log_p = sign * value
    i = beside_mass(target, x, log_p, bad if isinstance(target, LogDensity) else bad & (log_p != -torch.inf))
    if i is not None:
        warnings.warn(
            f"{name}: expected finite values on all of R^{x.shape[1]}, got {float(value[i]):.4g} at x = {show(x[i])} "
            f"({int(bad.sum())} of {len(x)} points), beside values that matter; it counts as no density: repair it "
            "there, or put the constraint in (torch.distributions.biject_to, with its log|det|, or as a Pyro model)",
            stacklevel=4,
        )


def _check_rows(target: Target, x: Tensor, log_p: Tensor, name: str) -> None:
    """Raise unless a row's value is the same alone; loose, for an ill-conditioned row may differ by rounding."""
    rows = log_p.isfinite().nonzero()[:, 0]
    rows = rows[torch.linspace(0, len(rows) - 1, min(MAX_SINGLES, len(rows))).long()]
    alone = torch.cat([_evaluate(target, x[i : i + 1], name) for i in rows.tolist()])
    error = ((alone - log_p[rows]).abs() / log_p[rows].abs().max().clamp(min=1e-300)).nan_to_num(torch.inf)
    if bool((error > ROW_RTOL).any()):
        worst = int(error.argmax())
        raise ValueError(
            f"{name}: expected each row's value to depend on that row only, got {float(log_p[rows[worst]]):.6g} in a "
            f"batch of {len(x)} and {float(alone[worst]):.6g} alone; do not sum, average or normalise over the rows"
        )


def _check_names(target: Target, x: Tensor) -> None:
    with torch.no_grad():
        named = target.constrain(x)
    if not isinstance(named, dict) or not named:
        raise ValueError(
            f"constrain: expected a dict of named tensors, got {type(named).__name__}; "
            "return {'x': x} for plain coordinates"
        )
    for key, value in named.items():
        if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != len(x):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"constrain: expected '{key}' to be a tensor of shape ({len(x)}, ...), got {got}; "
                "return one value per row"
            )


def _gradient(target: Target, x: Tensor, log_p: Tensor, name: str) -> Tensor:
    """d log p/dx (N, dim); raises where there is none, where it is not finite, and where it is 0 everywhere."""
    z = x.clone().requires_grad_()
    finite = log_p.isfinite()
    without = "a result differentiable in x, got one without a graph; remove .detach(), .item(), no_grad, numpy"
    zero = f"a gradient, got 0 at all {len(x)} points; use differentiable operations"
    if bool((log_p[finite] == log_p[finite][0]).all()):
        without = zero = (
            f"a density that varies, got {float(log_p[finite][0]):.6g} at all {len(x)} points; make it depend on x"
        )
    try:
        value = target.log_prob(z)
        if not value.requires_grad:
            raise ValueError(f"{name}: expected {without}")
        total = value[finite].sum()
        (gradient,) = torch.autograd.grad(total, z, allow_unused=True, materialize_grads=True)
    except Exception as error:
        raise _one_line(error, x, name) from error
    _check_gradient_finite(target, x, log_p, gradient, name)
    if bool((gradient[finite] == 0).all()):
        raise ValueError(f"{name}: expected {zero}")
    return gradient


def _check_gradient_finite(target: Target, x: Tensor, log_p: Tensor, gradient: Tensor, name: str) -> None:
    finite = log_p.isfinite()
    bad = ~gradient.isfinite().all(-1) & finite
    matters = bad & (log_p > log_p[finite].max() - SUNK)  # below, arithmetic may be about to overflow
    count = int(bad.sum())
    few = WITHOUT_GRADIENT * len(x) if target.nonfinite == "skip" else 0
    if int(matters.sum()) > few or count > int(finite.sum()) / 2:
        i = int((matters if bool(matters.any()) else bad).nonzero()[0, 0])
        raise ValueError(
            f"{name}: expected a finite gradient, got {show(gradient[i])} at x = {show(x[i])} "
            f"({count} of {len(x)} points); avoid 0 * inf in the backward pass (torch.where with a safe argument in "
            "both branches, clamp before log or sqrt)"
        )


def _check_coordinates(target: Target, x: Tensor, log_p: Tensor, gradient: Tensor, name: str) -> None:
    """Raise for a coordinate that log p does not depend on: such a density cannot be normalised."""
    for j in (gradient == 0).all(0).nonzero()[:, 0].tolist():
        moved = x.clone()
        moved[:, j] += 1.0
        if torch.equal(_evaluate(target, moved, name), log_p):
            which = f"x[:, {j}]" + (f" ('{target.coordinate_names()[j]}')" if is_model(target) else "")
            raise ValueError(
                f"{name}: expected every coordinate to matter, got no dependence on {which}, so that p has no "
                "finite integral; lower dim, or give it a prior"
            )


def _check_differences(target: Target, x: Tensor, gradient: Tensor, precision: torch.dtype, name: str) -> torch.dtype:
    """Compare the gradient along one random direction with central differences; raise if most points disagree.

    Returns the precision they show: where differences at float64's step are rough (they disagree among themselves) and
    at float32's longer step are smooth, the function computes in float32 inside.
    """
    slope, near, wrong, rough = _differences(target, x, gradient, precision, name)
    if precision == torch.float64 and rough > 0.5:
        single = _differences(target, x, gradient, torch.float32, name)
        if single[3] <= 0.5:
            precision = torch.float32
            slope, near, wrong, rough = single
    if wrong.sum() > 0.5 * len(wrong):
        i = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"{name}: expected its gradient to be its slope, got {float(slope[i]):.4g} by autograd and "
            f"{float(near[i]):.4g} by differences; look for .detach() or a custom backward in it"
        )
    return precision


def _differences(
    target: Target, x: Tensor, gradient: Tensor, precision: torch.dtype, name: str
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Slopes along a random direction at each x: by autograd, by central differences, and whether these two disagree.

    Also the share of the points at which differences of step h and 2h disagree. Points with non-finite values are left
    out.
    """
    eps = torch.finfo(precision).eps
    h = eps ** (1 / 3) * x.abs().amax(-1).clamp(min=1.0)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
    v = v / v.norm(dim=-1, keepdim=True)
    steps = torch.stack([h, -h, 2 * h, -2 * h])
    around = _evaluate(target, (x + steps.unsqueeze(-1) * v).reshape(-1, x.shape[1]), name).reshape(4, -1)
    usable = around.isfinite().all(0)
    around, h, slope = around[:, usable], h[usable], (gradient * v).sum(-1)[usable]
    near, far = (around[0] - around[1]) / (2 * h), (around[2] - around[3]) / (4 * h)
    rounding = 100 * eps * around.abs().amax(0) / h
    rough = (near - far).abs() > 1e-4 * (near.abs() + far.abs()) + rounding
    wrong = (slope - near).abs() > 1e-4 * (slope.abs() + near.abs()) + rounding + 4 * (near - far).abs()
    return slope, near, wrong, float(rough.double().mean()) if len(rough) else 0.0
