"""Where training starts: a flow over the Gaussian, or the mixture of Gaussians, that locating found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..flows import recipes
from ..flows.bases import Base
from ..flows.distribution import Flow
from ..flows.layers.linear import LowerTriangular
from ..flows.parameters import Fixed
from ..targets import Target
from ..targets.target import is_model
from .bounds import EVEN, PAYS
from .judge.fitted import Fitted
from .locate.gaussian import Gaussians
from .locate.locate import Located, locate
from .locate.mixture import whitened
from .locate.points import DENSE_DIMS, MANY_DIMS, start_points
from .scoring import as_flow
from .structured.locate import LEAST_DIM, Inside, locate_structured
from .structured.regressed import around

FlowChoice = str | Flow | Callable[[int], Flow]
# training steps over a Gaussian located, at most: they take .1 s each, and a fit that is lost is to end
AROUND_STEPS = 600
UNIMODAL = ("gaussian", "diagonal")  # recipes that stay what they are called: who asks for them wants no mixture


@dataclass(frozen=True, eq=False)
class Start:
    """A flow to train, how it came about, its recipe's name if it can be rebuilt from that, and a limit of steps."""

    flow: Flow
    description: str
    recipe: str | None
    steps: int | None = None

    def most(self, steps: int) -> int:
        return steps if self.steps is None else min(steps, self.steps)


@dataclass(frozen=True, eq=False)
class Starts:
    """Flows to train in turn, of which the best is kept; modes for the judging proposal, probes that judge these."""

    flows: tuple[Start, ...]
    modes: Gaussians | None
    probes: Gaussians | None = None


def outright(target: Target, choice: FlowChoice, init: Any, device: torch.device | str | None) -> Starts | None:
    """A structured start where that is asked for, or, of very many coordinates, where it pays: then nothing else is
    located, nor centred, for it follows necks as the model is written."""
    if isinstance(init, Fitted) or callable(init) or not (choice == "structured" or target.dim > MANY_DIMS):
        return None
    inside = _inside(target, choice, init_points(target, init), device)
    if inside is None:
        return None
    place = {"device": device, "dtype": torch.float64}
    return Starts((_on_structure(choice, inside, place),), inside.near, inside.probes)


def starts(
    target: Target, choice: FlowChoice, init: Any, device: torch.device | str | None, near: Tensor | None = None
) -> Starts:
    """The chosen flow over what locating finds, also from points ``near`` (n, dim), or a copy of a warm start's."""
    place = {"device": device, "dtype": torch.float64}
    if isinstance(init, Fitted) or callable(init):
        if choice != "auto":
            raise ValueError('flow: expected "auto" with init= a Posterior, Flow or guide, whose flow is trained on')
        return _warm_start(init, target, place)
    if choice != "auto":
        resolve_flow(choice, target.dim)  # a mistake in it is told before any work is done
    known = [points for points in (init_points(target, init), near) if points is not None]
    points = torch.cat(known) if known else None
    inside = _inside(target, choice, points, device) if target.dim <= MANY_DIMS else None
    located = locate(target, start_points(target, points, device=device))
    if inside is not None and inside.variance < located.variance:
        return Starts((_on_structure(choice, inside, place),), located.modes, located.probes)
    flows = [_around(target, choice, located, place) or _on_gaussian(choice, located, place)]
    if located.mixture is not None and isinstance(choice, str) and choice not in UNIMODAL:
        flows.insert(0, _on_mixture(choice, located, place))
    return Starts(tuple(flows), located.modes, located.probes)


def _inside(target: Target, choice: FlowChoice, points: Tensor | None, device: Any) -> Inside | None:
    """A structured start, if it is asked for, or if the flow is ours to choose and its log-weights say that it pays."""
    if choice == "structured":
        inside = locate_structured(target, points)
        if inside is None:
            expected = 'flow: "structured" needs few coordinates on which the curvature of many others hangs'
            raise ValueError(f"{expected}, found none among {target.dim}; take another flow")
        return inside
    if choice != "auto" or device not in (None, "cpu") or target.dim < LEAST_DIM:
        return None
    inside = locate_structured(target, points, asked=False)
    return inside if inside is not None and inside.variance < PAYS else None


def _on_structure(choice: FlowChoice, inside: Inside, place: dict[str, Any]) -> Start:
    few, many = len(inside.flow.layers[1].graph.few), len(inside.flow.layers[1].graph.many)
    how = f"structured flow: {many} coordinates Gaussian, with a sparse precision, given {few}"
    if choice == "auto":
        how += f", chosen as its log-weights vary little (variance {inside.variance:.2g}, limit {PAYS:g})"
    return Start(inside.flow.to(**place), how, "structured")


def _around(target: Target, choice: FlowChoice, located: Located, place: dict[str, Any]) -> Start | None:
    """The Gaussian located as a structured flow, where the flow is ours to choose and could add to it.

    Above ``MANY_DIMS`` only, where a spline flow takes minutes; below, it fits what this leaves out: of five models of
    33 to 70 dimensions none was claimed with this flow, and four, all that were tried, with the spline.
    """
    if choice != "auto" or target.dim <= MANY_DIMS or located.variance < EVEN or place["device"] not in (None, "cpu"):
        return None
    with torch.no_grad():
        flow = around(target, located.best)
    if flow is None:
        return None
    many = f"structured flow: {len(flow.layers[1].graph.many)} coordinates Gaussian given the others"
    how = f"{many}, on {located.best.origin[0]}{_because(choice, located.variance)}"
    return Start(flow.requires_grad_().to(**place), how, "structured", steps=AROUND_STEPS)


def _on_gaussian(choice: FlowChoice, located: Located, place: dict[str, Any]) -> Start:
    best, even = located.best, located.variance < EVEN
    flow, name, recipe = resolve_flow(choice, best.loc.shape[1], nearly_gaussian=even)
    whitening = Fixed(LowerTriangular, shift=best.loc[0], scale_tril=best.scale_tril[0])
    why = _because(choice, located.variance)
    if choice == "auto" and best.loc.shape[1] > DENSE_DIMS:
        why += "" if even else f"; in {best.loc.shape[1]} dimensions training costs more than it gains: it is kept"
        return Start(flow.to(**place).then(whitening), f"{name} on {best.origin[0]}{why}", recipe, steps=0)
    return Start(flow.to(**place).then(whitening), f"{name} on {best.origin[0]}{why}", recipe)


def _on_mixture(choice: str, located: Located, place: dict[str, Any]) -> Start:
    variance, optima = located.mixture_variance, len(located.optima)
    base, whitening = whitened(located.mixture)
    flow, name, recipe = resolve_flow(choice, base.dim, nearly_gaussian=variance < EVEN, base=base)
    how = f"{name} on a mixture of {len(base.weights)} Gaussians at {optima} optima{_because(choice, variance)}"
    return Start(flow.to(**place).then(whitening.to(**place)), how, recipe)


def _because(choice: FlowChoice, variance: float) -> str:
    """Why "auto" chose what it did."""
    if choice != "auto":
        return ""
    if variance < EVEN:
        return f", whose log-weights are all but constant (variance {variance:.4f}): a flow could add nothing"
    return f", whose log-weights vary (variance {variance:.2g})"


def _warm_start(init: Any, target: Target, place: dict[str, Any]) -> Starts:
    """A copy of the flow of a Posterior, of a Flow, or of an AutoFlow guide."""
    if not isinstance(init, (Fitted, Flow)) and not isinstance(getattr(init, "flow", None), Flow):
        kind = type(init).__name__
        raise ValueError(f"init: expected a Posterior, a Flow or an AutoFlow, got {kind}, which cannot be trained on")
    flow = as_flow(init, target).requires_grad_().to(**place)
    if not any(True for _ in flow.parameters()):
        raise ValueError("init: expected a Posterior of a flow, got one of a guide or law that cannot be trained on")
    if isinstance(init, Fitted):
        return Starts((Start(flow, init.flow_description, init.settings.recipe),), init.modes)
    located = locate(target, start_points(target, device=place["device"]))  # for the modes alone
    return Starts((Start(flow, f"the flow of the {type(init).__name__} given", None),), located.modes, located.probes)


def resolve_flow(
    choice: FlowChoice, dim: int, nearly_gaussian: bool = False, base: Base | None = None
) -> tuple[Flow, str, str | None]:
    """A fresh flow of the given dim, its description, and its recipe's name if it can be rebuilt from that alone.

    "auto" is the spline coupling flow, one pass in both directions, so that training by path gradients and judging
    are cheap; or the Gaussian, if the log-weights of the one located are all but constant. Above DENSE_DIMS dimensions
    it is the diagonal Gaussian, over the full one located: planar, Sylvester and diagonal flows gained less than 0.1
    nats there in 300 steps, and couplings took minutes for as many.
    """
    if choice == "auto":
        choice = "diagonal" if dim > DENSE_DIMS else "gaussian" if nearly_gaussian else "spline"
    if isinstance(choice, str):
        if choice not in recipes.__all__:
            raise ValueError(f'flow: expected "auto" or one of {", ".join(recipes.__all__)}, got {choice!r}')
        return getattr(recipes, choice)(dim, base=base), f"{choice} flow", choice
    expected = "flow: expected a recipe's name, a callable dim -> Flow, or a Flow"
    if not isinstance(choice, Flow) and (isinstance(choice, nn.Module) or not callable(choice)):
        raise TypeError(f"{expected}, got {choice!r}")
    flow = copy.deepcopy(choice) if isinstance(choice, Flow) else choice(dim)
    if not isinstance(flow, Flow):
        raise TypeError(f"{expected}, got a callable that returns {type(flow).__name__}")
    if flow.dim != dim or flow.context is not None:
        raise ValueError(f"flow: expected dim {dim} and no context, got dim {flow.dim}, context {flow.context}")
    return flow, "the flow given", None


def init_points(target: Target, init: Tensor | dict[str, Any] | None) -> Tensor | None:
    """Values to start near, as unconstrained points (n, dim)."""
    if init is None:
        return None
    if isinstance(init, dict):
        if not is_model(target):
            raise ValueError("init: named values need a Pyro model; pass a tensor (dim,) of a density's points")
        init = target.unconstrain(init)
    points = torch.atleast_2d(torch.as_tensor(init, dtype=torch.float64))
    if points.shape[-1] != target.dim or points.dim() != 2 or not points.isfinite().all():
        raise ValueError(f"init: expected finite values of shape ({target.dim},), got {tuple(points.shape)}")
    return points
