"""What values of log p are worth: which are believed, where NaN does no harm, to how many nats they tell."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .recording import tensors
from .target import Target

# log p above 1/eps of float64 cannot be told to a nat: no density can be fitted there, but arithmetic that overflows
# (a Kalman filter's, say) ends there, and one such point would pass for the mode. Lower, and densities with a large
# constant are lost.
BELIEVED = 1 / torch.finfo(torch.float64).eps
# Nats below the best value known, at which a region without values begins far from all mass. Lower, and a NaN that
# hides a part of the posterior goes untold; higher, and sound densities that overflow in their tails are refused.
SUNK = 30.0
BORDERS, BISECTIONS = 16, 50  # points without a value whose border is sought, and halvings of the way there
SIDE, LOOKED = 4.0, 256  # of the box around 0 from which starts come, and points in it that a fit's notes speak of
SKIPPED_WARN = 0.01  # of the draws, skipped for want of a value, from where a warning says so
PRECISION_ROWS = 8  # at which the precision of a target is looked at


def believed(log_p: Tensor) -> Tensor:
    """log_p (N,) with −inf for values above BELIEVED, which only arithmetic that has overflowed gives."""
    return torch.where(log_p > BELIEVED, -torch.inf, log_p)


def as_computed(target: Target, x: Tensor) -> Tensor:
    """log p (N,) as the target computes it, values that are not believed included."""
    with torch.no_grad():
        return target.as_computed(x)


def beside_mass(target: Target, x: Tensor, log_p: Tensor, bad: Tensor) -> int | None:
    """The first of the ``bad`` rows of x (N, dim) whose region without values begins where log p (N,) still matters.

    A density that overflows far out has sunk by then, SUNK nats, and one for each dimension, and more below the best;
    where it has not, NaN may hide a part of the mass. None if there is no such row, or no value at all.
    """
    rows, edge, best = edges(target, x, log_p, bad)
    high = (edge > best - SUNK - x.shape[1]).nonzero()[:, 0]
    return int(rows[high[0]]) if len(high) else None


def edges(target: Target, x: Tensor, log_p: Tensor, bad: Tensor) -> tuple[Tensor, Tensor, float]:
    """Up to BORDERS of the ``bad`` rows of x (N, dim), log p where their region begins (B,), and the best log p.

    By bisection on the segment from the best row; from a row of −inf the first −inf is sought, from others the first
    value that is none. log_p (N,): as computed.
    """
    good, rows = log_p.isfinite() & ~bad, bad.nonzero()[:, 0]
    if not bool(good.any()) or not len(rows):
        return rows[:0], log_p[:0], -torch.inf
    best = int(torch.where(good, log_p, -torch.inf).argmax())
    rows = rows[torch.linspace(0, len(rows) - 1, min(BORDERS, len(rows))).long().to(rows.device)]
    inside, outside = x[best].expand(len(rows), -1), x[rows]
    edge, empty = log_p[best].expand(len(rows)), log_p[rows] == -torch.inf
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        value = as_computed(target, middle)
        known = (value <= BELIEVED) & ((value > -torch.inf) | ~empty)
        inside, outside = torch.where(known[:, None], middle, inside), torch.where(known[:, None], outside, middle)
        edge = torch.where(known, value, edge)
    return rows, edge, float(log_p[best])


def check_finite(log_p: Tensor, x: Tensor, target: Target) -> tuple[Tensor, int]:
    """Apply the target's policy for NaN, +inf and what else is above BELIEVED to log_p (N,) at x (N, dim): they
    become −inf, so weight 0 and gradient 0; returns (log_p, how many were replaced).

    "raise" (the default): ValueError naming the first x where there is no value although values that matter lie beside
    it; where log p has sunk before it overflows, nothing is lost. "skip": never; above 1 % of the rows this warns.
    −inf is a legitimate value (weight 0) and passes.
    """
    bad = ~(log_p <= BELIEVED)
    count = int(bad.sum())
    if count == 0:
        return log_p, 0
    skips = target.nonfinite == "skip"
    first = int(bad.nonzero()[0, 0]) if skips else beside_mass(target, x, log_p, bad)
    if first is not None:
        where = f"{float(log_p[first])} at x = {show(x[first])} ({count} of {len(x)} points)"
        if not skips:
            raise ValueError(
                f"log_prob: expected finite values or -inf, got {where}, beside values that matter; "
                'repair the density there, or pass nonfinite="skip"'
            )
        if count > SKIPPED_WARN * len(x):
            warnings.warn(f"log_prob: skipped {where}; they count as log p = -inf", stacklevel=2)
    return torch.where(bad, -torch.inf, log_p), count


def told_of_values(target: Target, x: Tensor, log_p: Tensor) -> list[str]:
    """Sentences on what had no value: in the box around 0 where fits start, and among weighted draws x with log_p."""
    uniform = torch.rand(LOOKED, target.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    box = (SIDE * (uniform - 0.5)).to(x.device)
    value, told = as_computed(target, box), []
    outside = ~(value.isfinite() & (value <= BELIEVED))
    if bool(outside.any()):
        share = int(outside.sum()) / LOOKED
        where = f"{share:.0%} of the box of side {SIDE:g} around 0 ({_first(value, box, outside)})"
        told.append(f"log p has no value to believe in {where}: counted as −inf.")
    lost = x[~(log_p > -torch.inf)]
    value = as_computed(target, lost) if len(lost) else log_p[:0]
    rows = value > BELIEVED
    if bool(rows.any()):
        told.append(
            f"log p is above {BELIEVED:.2g} at {int(rows.sum())} draws ({_first(value, lost, rows)}), where arithmetic "
            "has overflowed: not believed, weight 0."
        )
    return told


def _first(value: Tensor, x: Tensor, rows: Tensor) -> str:
    i = int(rows.nonzero()[0, 0])
    return f"{float(value[i]):.3g} at x = {show(x[i])}"


def show(x: Tensor, limit: int = 6) -> str:
    """A point for a message: '[0.1, -2]', cut after `limit` coordinates."""
    values = [f"{float(v):.4g}" for v in x.detach().reshape(-1)[:limit]]
    return f"[{', '.join(values)}{', ...' if x.numel() > limit else ''}]"


def precision_of(target: Target, x: Tensor) -> torch.dtype:
    """The coarsest floating-point dtype in which any step from x (N, dim) to log p is computed.

    Seen in the operations that are dispatched, and in values that are all exact in float32, which a density computed
    elsewhere (by NumPy, say) may show.
    """
    x = x[:PRECISION_ROWS].detach()
    with torch.no_grad():
        rows = x.clone()
        with _Precision(rows) as seen:
            log_p = target.log_prob(rows)
    log_p = log_p[log_p.isfinite() & (log_p != 0)]
    if len(log_p) > 1 and torch.equal(log_p.float().to(log_p.dtype), log_p):
        seen.note(torch.float32)
    return seen.coarsest


class _Precision(TorchDispatchMode):
    """Notes the floating-point dtypes of all that is computed from x."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.coarsest = x.dtype
        self.reached = {id(x): x}  # held, so that no id is used twice

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that it asks for imports the compiler, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(id(t) in self.reached for t in tensors((args, kwargs or {}))):
            for result in tensors(out):
                if result.is_floating_point():  # a mask ends the way: what is made of it holds no digits of x
                    self.reached[id(result)] = result
                    self.note(result.dtype)
        return out

    def note(self, dtype: torch.dtype) -> None:
        if torch.finfo(dtype).eps > torch.finfo(self.coarsest).eps:
            self.coarsest = dtype
