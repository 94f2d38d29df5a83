"""What is approximated: an unnormalised log density on R^D, and how its points become named values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor


class Target:
    """What is approximated: log p(x) on R^D, up to a constant, and how x becomes named values.

    A target of one's own is a subclass that sets ``dim`` and defines :meth:`log_prob`; the rest is what a fit asks
    besides, with answers that hold for a plain density.

    Attributes: dim, D. argument: what the user calls the function, for messages. dtype, device: where log p is
    evaluated. nonfinite: what :func:`check_finite` does with NaN and +inf
    beside values that matter: "raise", or "skip" (weight 0, counted). failed_rows: at how many rows a matrix routine
    raised. names: of the latent sites of a model, None for a density; observed: its data by name; prior: count ->
    draws of its prior (count, dim); mode, mode_reason: how a batch is evaluated; capture, capture_refused: whether by
    recorded operations, and why not; degrees: of centring, by site. log_z, how: log ∫p where it is known, and whence.
    """

    dim: int
    argument = "log_prob"
    dtype: torch.dtype = torch.float64
    device: torch.device | None = None
    nonfinite = "raise"
    failed_rows = 0
    names: Sequence[str] | None = None
    observed: Mapping[str, Tensor] = MappingProxyType({})
    prior: Callable[[int], Tensor] | None = None
    mode, mode_reason = "vmap", ""
    capture: bool | str = "auto"
    capture_refused = ""
    degrees: Mapping[str, Tensor] = MappingProxyType({})
    log_z: float | None = None
    how = ""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p of each row of x (N, dim), as (N,): row by row, differentiably, without branching on values."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method log_prob(x), (N, dim) -> (N,), got none")

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """Named values of x (N, dim), each with leading dimension N: {"x": x}."""
        return {"x": x}

    def as_computed(self, x: Tensor) -> Tensor:
        """log p of x (N, dim), as (N,), values that are not believed included."""
        return self.log_prob(x)

    def coordinate_names(self) -> list[str]:
        """Names of the unconstrained coordinates."""
        return [f"x[{i}]" for i in range(self.dim)]

    def plate_dims(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
        """{"theta": ["schools"]}: for values of these shapes, names of the axes of those that lie in plates."""
        return {}

    def account(self) -> list[str]:
        """Sentences on what is observed and what is held fixed."""
        return []

    def fresh(self, capture: bool | str) -> Target:
        """The target as it is now, evaluated by recorded operations or not, for a fit that begins."""
        return self

    @property
    def movable(self) -> bool:
        """Whether :meth:`to` gives others."""
        return type(self).to is not Target.to

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Target:
        """The same target in another dtype or on another device. Raises ValueError where there is none."""
        raise ValueError("dtype, device: this target has no to(dtype, device) method; leave both at None")


def is_model(target: Target) -> bool:
    """Whether a target's points have names of their own (a Pyro model), so that draws come as a dict."""
    return target.names is not None
