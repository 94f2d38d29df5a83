"""What a user gives, as a target; and which of their keywords are the model's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .pyro_model import PyroModel
from .target import Target


def resolve_target(target_or_model: Target | Callable[..., Any], *args: Any, **kwargs: Any) -> Target:
    """A Target as it is, or PyroModel(model, *args, **kwargs) of a Pyro model. Raises TypeError for anything else."""
    if isinstance(target_or_model, Target):
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


def check_keywords(
    function: Callable[..., Any], target_or_model: Any, kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Raise TypeError, in one line, for keywords of a call of ``function`` that would not arrive where they should.

    kwargs: those that are no options of the function: the model must take them. options: its own, of which none that
    is not at its default may be an argument of the model too, for it would not reach it.
    """
    name = function.__qualname__.removesuffix(".__init__")
    defaults = {n: p.default for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    takes, takes_any = _arguments(target_or_model)
    unknown = [] if takes_any else sorted(set(kwargs) - takes)
    if unknown:
        expected = f"expected {', '.join(defaults)}, or an argument of the model"
        raise TypeError(f"{name}: unknown option {unknown[0]!r}; {expected}")
    both = sorted(n for n in takes & set(defaults) & set(options) if options[n] is not defaults[n])
    if both:
        raise TypeError(
            f"{name}: {both[0]!r} is an option of {name} and an argument of the model; give the model its own by "
            f"vf.PyroModel(model, ..., {both[0]}=...)"
        )


def _arguments(model: Any) -> tuple[set[str], bool]:
    """The names of a model's arguments, and whether it takes any others; none of a target."""
    if isinstance(model, Target):
        return set(), False
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):  # some callables have none
        return set(), True
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)
