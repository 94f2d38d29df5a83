"""A fit as one HTML page that needs nothing beside it: the verdict, tables, pictures, and how to make it again."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..inference.estimate.evaluate import log_density
from ..inference.estimate.psis import smooth
from ..inference.estimate.quantities import flatten
from ..inference.judge.fitted import Fitted, Settings, fixed
from ..inference.locate.gaussian import Kind
from ..inference.options import Options
from ..targets import Energy, LogDensity, PyroModel, Target
from . import panels
from .draws import constraint
from .panels import Quantities
from .parts import SMALL_FIGURE, SUFFIXES, WIDE_FIGURE, Image, drawn, render, written
from .plots import FEW_PAIRS, Picture
from .table import summary

MARGINALS = 24
MODES = 8  # beside one another
CORRECTIONS = {  # methods of a posterior, and their arguments that are recorded
    "anneal": ("particles", "replicates", "seed"),
    "mcmc": ("method", "chains", "num_draws", "warmup", "seed"),
    "resample": ("num_draws", "seed"),
}


def write(posterior: Fitted, path: str | Path) -> Path:
    """Write the page of :func:`page` to ``path``, whole or not at all; its folder is made. Returns the path.

    Raises ValueError, in one line, for a path that does not end in .html or cannot be written, and for a posterior
    without target and stored draws.
    """
    with written(path, SUFFIXES, "report.html") as file:
        file.write(page(posterior).encode())
    return Path(path)


def page(posterior: Fitted) -> str:
    """The posterior as an HTML document without scripts and outside resources."""
    chosen, seconds = panels.quantities(posterior, None), sum(posterior.timing.values())
    return render(
        "fit.html.j2",
        posterior=posterior,
        chosen=chosen,
        numbers=_numbers(posterior),
        checks=_checks(posterior),
        summary=_summary(posterior),
        trace=_trace(posterior),
        weights=_weights(posterior),
        marginals=_marginals(chosen),
        scatter=_pairs(chosen) if len(chosen.names) > 1 else None,
        density=None if panels.no_density(posterior) else _density(posterior),
        modes=_modes(posterior),
        observed=_observed(posterior),
        seconds=seconds,
        stages=[(name, f"{s:.2f}", f"{s / max(seconds, 1e-9):.0%}") for name, s in posterior.timing.items()],
        code=code(posterior),
        settings={name: repr(value) for name, value in _shown(posterior.settings).items()},
    )


# --- numbers and code


def _numbers(posterior: Fitted) -> dict[str, str]:
    """The numbers behind the verdict, by name."""
    low, high = posterior.khat_interval
    count, zero = len(posterior.flow_draws), int((posterior.log_weights == -math.inf).sum())
    rows = {
        "k̂ of the flow q": f"{posterior.khat:.2f} ({low:.2f} to {high:.2f}); below 0.7 is good",
        "k̂ of the proposal": f"{smooth(posterior.proposal.log_w)[1]:.2f}",
        "ESS of q": f"{posterior.ess:.0f} of {count} draws" + (f", of which {zero} have weight 0" if zero else ""),
        posterior.evidence_name: posterior.evidence_text,
        "ELBO of q": fixed(posterior.elbo),
        "dimensions": f"{posterior.dim}, unconstrained",
        "flow": posterior.flow_description or "not recorded",
    }
    known = posterior.target.log_z if posterior.target is not None else None
    if known is not None:
        rows["known to be"] = f"{known:.3f} ({posterior.target.how}); error {posterior.log_evidence - known:+.3f}"
    return rows


def _checks(posterior: Fitted) -> list[tuple[str, ...]]:
    return [
        (c.name, _number(c.statistic), _number(c.bound), "yes" if c.passed else "no", c.sentence)
        for c in posterior.verdict.checks
    ]


def _summary(posterior: Fitted) -> tuple[list[str], list[list[str]]]:
    """Heads and rows."""
    frame = summary(posterior)
    rows = [[str(name), *map(_number, row)] for name, row in zip(frame.index, frame.to_numpy(), strict=True)]
    return ["quantity", *frame.columns], rows


def _modes(posterior: Fitted) -> tuple[str, list[str], list[list[str]]] | None:
    """Caption, heads and rows: the Gaussians that locating saw, the highest first, in named values if there are any."""
    modes, constrain = posterior.modes, constraint(posterior)
    if modes is not None:
        modes = modes.pick([i for i, origin in enumerate(modes.origin) if origin.kind is not Kind.ADAPTED])
    if modes is None or not len(modes):
        return None
    order, columns = range(len(modes)), {}
    with torch.no_grad():
        names, values = flatten({"x": modes.loc} if constrain is None else constrain(modes.loc))
        if posterior.target is not None:
            log_p = log_density(posterior.target, modes.loc)
            order, columns = log_p.argsort(descending=True).tolist(), {"log p, unconstrained": log_p.tolist()}
    columns |= dict(zip(names, values.T.tolist(), strict=True))
    shown = order if len(names) <= MODES else order[:MODES]
    heads = ["quantity", *(f"{i}: {modes.origin[i]}" for i in shown)]
    rows = [[name, *(_number(column[i]) for i in shown)] for name, column in columns.items()]
    if len(names) <= MODES:  # a row for each mode; of many quantities, a column, so that neither grows too wide
        heads, *rows = ([*row] for row in zip(["mode", *heads[1:]], *rows, strict=True))
    some = "" if len(shown) == len(modes) else f" The first {len(shown)} of {len(modes)}."
    kind = "in unconstrained coordinates, for the target is not at hand" if constrain is None else "in named values"
    caption = f"Centres of the Gaussians that locating saw, {kind}; the end of a path is where a search stopped.{some}"
    return caption, heads, rows


def _observed(posterior: Fitted) -> list[tuple[str, ...]]:
    rows = []
    for name, value in (posterior.target.observed if posterior.target is not None else {}).items():
        shape = " × ".join(map(str, value.shape)) or "one value"
        rows.append((name, shape, str(value.dtype), *(_number(float(end)) for end in value.aminmax())))
    return rows


def _shown(settings: Settings) -> dict[str, Any]:
    """What was recorded, options by their own names."""
    plain = {name: value for name, value in vars(settings).items() if name != "options"}
    return {**plain, **settings.options}


def code(posterior: Fitted) -> str:
    """Python that makes the posterior again: a call of fit or diagnose with the recorded options that differ from the
    defaults. What no record can hold (a flow, a guide, ``init``) is named in comments.
    """
    settings, defaults = posterior.settings, vars(Options())
    fitted, recipe = "training" in posterior.timing, settings.recipe
    given = {"flow": settings.flow or recipe, "seed": settings.seed}
    given |= {name: value for name, value in settings.options.items() if name in defaults}
    given = {name: value for name, value in given.items() if value != defaults.get(name)}
    options = [f"{name}={value if name == 'dtype' else repr(value)}" for name, value in given.items()]
    needed, arguments = _target_code(posterior.target)
    if not fitted:
        needed, arguments = ["guide", *needed], ["guide", *arguments]
    comments = [f"{', '.join(needed)}: as in the original"]
    if fitted:
        comments.append(
            "init=, if there was one, is not recorded" if recipe else "flow= or init=: as given, not recorded"
        )
    if fitted and recipe and settings.flow is None:
        comments.append('flow="auto", if that chose it: the same up to chance, from other random numbers')
    if settings.options.get("max_seconds") is not None:
        comments.append("max_seconds ends stages by the clock, not always at the same step")
    imports = ["import torch"] * ("dtype" in given) + ["import vi_flows as vf", ""]
    call = f"posterior = vf.{'fit' if fitted else 'diagnose'}({', '.join([*arguments, *options])})"
    lines = [*imports, *(f"# {comment}" for comment in comments), call]
    for method, names in CORRECTIONS.items():
        how = settings.corrections.get(method)
        if how and not how.get("within_fit"):
            arguments = (f"{name}={how[name]!r}" for name in names if name in how)
            lines.append(f"posterior = posterior.{method}({', '.join(arguments)})")
    return "\n".join(lines)


def _target_code(target: Target | None) -> tuple[list[str], list[str]]:
    """Names that the code needs, and the target's arguments of the call."""
    if isinstance(target, PyroModel):
        model, args, kwargs = target._call
        name = _name(model, "model")
        try:
            parameters = list(inspect.signature(model).parameters)
        except (TypeError, ValueError):  # some callables have none
            parameters = []
        values = [*parameters[: len(args)], *(f"argument_{i}" for i in range(len(parameters), len(args)))]
        if not kwargs:
            return [name, *values], [name, *values]
        named = [f"{key}={key}" for key in kwargs]
        return [name, *values, *kwargs], [f"vf.PyroModel({', '.join([name, *values, *named])})"]
    if type(target) in (LogDensity, Energy):
        name = _name(target.fn, target.argument)
        return [name], [f"vf.{type(target).__name__}({name}, dim={target.dim})"]
    return ["target"], ["target"]


def _name(function: Callable, otherwise: str) -> str:
    name = getattr(function, "__name__", "")
    return name if name.isidentifier() else otherwise


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


# --- pictures


def _trace(posterior: Fitted) -> Image:
    steps = len(posterior.trace)
    alt = f"The ELBO in {steps} training steps" if steps else "No training steps"
    alt += f"; judging found an ELBO of {fixed(posterior.elbo)} and a {posterior.evidence_name} of "
    alt += f"{posterior.evidence_text}."
    caption = "The evidence lower bound in training, and what judging found; their gap is KL(q‖p)."
    return drawn(WIDE_FIGURE, alt, caption, lambda figure: panels.trace(figure.subplots(), posterior))


def _weights(posterior: Fitted) -> Image:
    alt = f"Shares of the draws above each weight: k̂ {posterior.khat:.2f} for the flow q, "
    alt += f"{smooth(posterior.proposal.log_w)[1]:.2f} for the proposal."
    caption = "Which share of the draws lies above each weight. A tail as flat as the dashed line has k̂ = 0.7."
    return drawn(WIDE_FIGURE, alt, caption, lambda figure: panels.weights(figure.subplots(), posterior))


def _marginals(chosen: Quantities) -> list[Image]:
    """One small picture for each quantity, so that a narrow screen shows them below one another."""
    shown, images = chosen.some(MARGINALS), []
    for i, name in enumerate(shown.names):
        alt = f"Density of {name}: weighted draws {_moments(shown.weighted[:, i])}"
        alt += "." if shown.raw is None else f"; draws of q {_moments(shown.raw[:, i])}."
        images.append(drawn(SMALL_FIGURE, alt, name, lambda figure, i=i: panels.marginal(figure.subplots(), shown, i)))
    return images


def _moments(x: np.ndarray) -> str:
    x = x[np.isfinite(x)]
    return f"mean {x.mean():.3g}, sd {x.std():.3g}" if len(x) else "of no finite value"


def _pairs(chosen: Quantities) -> Image:
    names = chosen.some(FEW_PAIRS).names
    caption = "Blue, below the diagonal: weighted draws."
    if chosen.raw is not None:
        caption += " Orange, above it: draws of the flow q as they are."
    if len(names) < len(chosen.names):
        caption += f" {len(names)} of {len(chosen.names)} quantities."
    side = max(1.9 * len(names), 5.0)
    return drawn((side, side), f"Scatter plots of the pairs of {', '.join(names)}.", caption, _both(chosen))


def _both(chosen: Quantities) -> Callable[[Picture], None]:
    """The triangle of pairs of weighted draws, with draws of q as they are in the other half."""

    def draw(figure: Picture) -> None:
        panels.pairs(figure, chosen, FEW_PAIRS)
        figure.suptitle("")
        shown = chosen.some(FEW_PAIRS)
        figure.axes[0].set_ylabel(figure.axes[-len(shown.names)].get_xlabel())  # the first row's, now that it has dots
        for k, ax in enumerate(figure.axes if shown.raw is not None else ()):
            row, column = divmod(k, len(shown.names))
            if column > row:
                ax.set_visible(True)
                dots = shown.raw[: panels.SCATTER_DRAWS]
                ax.plot(dots[:, column], dots[:, row], ".", ms=2.5, mew=0, alpha=0.4, color=panels.Q, rasterized=True)
                ax.set(xlim=shown.span(column), ylim=shown.span(row))

    return draw


def _density(posterior: Fitted) -> Image:
    alt = "Weighted draws over the contours of the target's density in its two unconstrained coordinates."
    return drawn(WIDE_FIGURE, alt, "", lambda figure: panels.density(figure.subplots(), posterior))
