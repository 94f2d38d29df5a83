"""How an approximation of any kind becomes a flow that can be drawn from and scored anywhere."""

from __future__ import annotations

import copy
import functools
from typing import Any

from ..flows.distribution import Flow
from ..targets.target import Target
from .judge.fitted import Fitted


@functools.singledispatch
def as_flow(q: Any, target: Target, *args: Any, **kwargs: Any) -> Flow:
    """q as a flow over the target's unconstrained x, in float64: a copy, of a Flow or of a Posterior's.

    ``vi_flows.guides`` registers Pyro guides, which are called with ``args`` and ``kwargs``.
    """
    raise TypeError(f"guide: expected a Pyro guide, a Flow or a Posterior, got {type(q).__name__}")


@as_flow.register
def _(q: Flow, target: Target, *args: Any, **kwargs: Any) -> Flow:
    if q.dim != target.dim or q.context is not None:
        raise ValueError(f"flow: expected dim {target.dim} and no context, got dim {q.dim}, context {q.context}")
    return copy.deepcopy(q).double()


@as_flow.register
def _(q: Fitted, target: Target, *args: Any, **kwargs: Any) -> Flow:
    if q.flow is None:
        raise ValueError("guide: expected a Posterior with a flow, got one without; load it with vf.load(path, flow=)")
    return as_flow(q.flow, target)
