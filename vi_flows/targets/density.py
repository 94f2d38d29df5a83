"""Densities and energies given as a function of points."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from .target import Target
from .values import believed

POLICIES = ("raise", "skip")


class LogDensity(Target):
    """The target log p(x) = fn(x), up to a constant.

    fn: maps a float tensor x (N, dim) to the log densities (N,), differentiably and row by row. It is given a copy of x
    in the target's own ``dtype`` (float64 unless changed by :meth:`to`), so it may work in place; the result returns in
    x's dtype. dim: D, the number of coordinates of x.
    nonfinite: what :func:`check_finite` does with NaN and +inf beside values that matter: "raise", or "skip" (weight 0,
    counted).
    Raises TypeError or ValueError for arguments of another kind.
    """

    sign = 1

    def __init__(self, fn: Callable[[Tensor], Tensor], dim: int, nonfinite: str = "raise") -> None:
        if not callable(fn):
            raise TypeError(
                f"fn: expected a callable (N, dim) -> (N,), got {type(fn).__name__}; pass the function itself"
            )
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim: expected a positive int, got {dim!r}; pass the number of coordinates of x")
        if dim < 1:
            raise ValueError(f"dim: expected a positive int, got {dim}; pass the number of coordinates of x")
        if nonfinite not in POLICIES:
            raise ValueError(f"nonfinite: expected one of {POLICIES}, got {nonfinite!r}")
        self.fn = fn
        self.dim = dim
        self.nonfinite = nonfinite
        self.dtype = torch.float64
        self.device: torch.device | None = None
        self.failed_rows = 0

    def log_prob(self, x: Tensor) -> Tensor:
        """log p of each row of x (N, dim), as (N,) in x's dtype, −inf where it is above values.BELIEVED.

        Raises ValueError if fn's result has another form.
        """
        return believed(self.as_computed(x))

    def as_computed(self, x: Tensor) -> Tensor:
        """log p of each row of x (N, dim), as (N,), whatever fn gives."""
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x: expected shape (N, {self.dim}), got {tuple(x.shape)}; pass one point per row")
        with _without_validation():  # points far out may overflow a distribution's parameters
            value = self._evaluate(x.to(dtype=self.dtype, device=self.device)).to(dtype=x.dtype, device=x.device)
        return value if self.sign > 0 else -value

    def _evaluate(self, x: Tensor) -> Tensor:
        """fn of the rows of x; where a matrix routine fails, by halves down to the row at fault: density 0."""
        try:
            value = self.fn(x.clone())  # a copy: fn may change its input in place
        except torch.linalg.LinAlgError:
            if len(x) == 1:
                self.failed_rows += 1
                return (0 * x.sum(-1)).masked_fill(
                    torch.ones(1, dtype=torch.bool, device=x.device), -self.sign * torch.inf
                )
            half = len(x) // 2
            return torch.cat([self._evaluate(x[:half]), self._evaluate(x[half:])])
        check_form(value, x.shape[0], x.device, self.argument)
        return value

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LogDensity:
        """A copy whose fn is evaluated in another dtype or on another device."""
        other = copy.copy(self)
        other.dtype = other.dtype if dtype is None else dtype
        other.device = other.device if device is None else torch.device(device)
        return other


class Energy(LogDensity):
    """The target log p(x) = -fn(x), up to a constant: fn is an energy in units of kT. Arguments of LogDensity."""

    argument = "energy"
    sign = -1


@contextlib.contextmanager
def _without_validation() -> Iterator[None]:
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def check_form(value: Any, count: int, device: torch.device, name: str) -> None:
    """Raise ValueError unless value is a float tensor of shape (count,) on device; static, so that it can be traced."""
    expected = f"{name}: expected a float tensor of shape ({count},)"
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{expected}, got {type(value).__name__}; compute it with torch operations on x, one value per row"
        )
    if tuple(value.shape) != (count,):
        raise ValueError(f"{expected}, got {tuple(value.shape)}; {_shape_remedy(tuple(value.shape), count, name)}")
    if not value.dtype.is_floating_point:
        raise ValueError(f"{expected}, got dtype {value.dtype}; return a real floating-point log density")
    if value.device != device:
        raise ValueError(f"{expected} on {device}, got one on {value.device}; keep the result on the device of x")


def _shape_remedy(shape: tuple[int, ...], count: int, name: str) -> str:
    if shape == (count, 1):
        return f"return {name}(x).squeeze(-1)"
    if shape == ():
        return "sum over the coordinates only, .sum(-1), not over the rows"
    if len(shape) == 2 and shape[0] == count:
        return "sum over the coordinates, .sum(-1)"
    return "return one value per row of x"
