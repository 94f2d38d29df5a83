"""What a user gives, as a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .pyro_model import PyroModel
from .target import Target


def resolve_target(target_or_model: Target | Callable[..., Any], *args: Any, **kwargs: Any) -> Target:
    """A Target as it is, or PyroModel(model, *args, **kwargs) of a Pyro model. Raises TypeError for anything else."""
    if isinstance(target_or_model, Target) and not isinstance(target_or_model, type):
        if args or kwargs:
            raise TypeError(
                f"args: expected none beside a target, got {len(args) + len(kwargs)}; "
                "only a Pyro model takes its data here"
            )
        return target_or_model
    if not callable(target_or_model):
        kind = type(target_or_model).__name__
        raise TypeError(
            f"target: expected a Target or a Pyro model, got {kind}; wrap a function as LogDensity(fn, dim=D), or "
            "inherit from Target"
        )
    return PyroModel(target_or_model, *args, **kwargs)
