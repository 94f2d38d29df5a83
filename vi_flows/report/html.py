"""A fit as one HTML page that needs nothing beside it: the verdict, tables, pictures, and how to make it again."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch

from ..inference.estimate.evaluate import log_density
from ..inference.estimate.psis import smooth
from ..inference.estimate.quantities import flatten
from ..inference.judge.fitted import Fitted, fixed
from ..inference.locate.gaussian import Kind
from ..inference.options import Options
from ..targets import Energy, LogDensity, PyroModel, Target
from . import markup, panels
from .draws import constraint
from .markup import bullets, paragraph, section, table
from .panels import Quantities
from .parts import SMALL, SUFFIXES, WIDE, drawn, versions, written
from .plots import FEW_PAIRS, Picture
from .table import summary

ROWS = 500  # of a table
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
    chosen = panels.quantities(posterior, None)
    sections = [
        section("Checks", _checks(posterior)),
        section("Summary", _summary(posterior)),
        section("Training", _trace(posterior)),
        section("Importance weights", _weights(posterior)),
        section("Marginals", _marginals(chosen)),
        section("Pairs", _pairs(chosen)) if len(chosen.names) > 1 else "",
        section("Density", _density(posterior)) if not panels.no_density(posterior) else "",
        section("Modes", _modes(posterior)),
        section("Rehearsal", bullets(posterior.rehearsal.sentences)) if posterior.rehearsal else "",
        section("Data", _data(posterior)),
        section("How it was made", *_making(posterior)),
    ]
    return markup.document(f"{posterior.verdict.status}: a fit by vi_flows", _header(posterior), filter(None, sections))


# --- words and tables


def _header(posterior: Fitted) -> str:
    """The verdict as a headline, its sentences, and the numbers behind it."""
    lead, *reasons = posterior.verdict.reasons
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
    status = escape(posterior.verdict.status)
    sentence = f"{lead[:1].upper()}{lead[1:]}."
    return "\n".join(
        [
            "<header>",
            f'<h1>Verdict: <span style="color: var(--{status})">{status}</span></h1>',
            f'<p class="lead">{escape(sentence)}</p>',
            bullets(reasons),
            markup.pairs("The fit in numbers.", ("number", "value"), rows),
            "</header>",
        ]
    )


def _checks(posterior: Fitted) -> str:
    rows = [
        (c.name, _number(c.statistic), _number(c.bound), "yes" if c.passed else "no", c.sentence)
        for c in posterior.verdict.checks
    ]
    caption = "The steps of the rule; one is passed where its statistic is below its bound."
    return table(caption, ("check", "statistic", "bound", "passed", "in words"), rows, words=("in words",))


def _summary(posterior: Fitted) -> str:
    frame = summary(posterior)
    rows = [(str(name), *map(_number, row)) for name, row in zip(frame.index, frame.to_numpy(), strict=True)]
    caption = (
        "Weighted draws: mean, standard deviation and 5, 50, 95 % points; standard errors of the first two (mcse), "
        "effective sample size and k̂ of each quantity, below 0.7 where mean and sd can be relied on."
    )
    return _first_rows(caption, ("quantity", *frame.columns), rows)


def _modes(posterior: Fitted) -> str:
    """Where the Gaussians lie that locating saw, the highest first, in named values where the target allows."""
    modes, constrain = posterior.modes, constraint(posterior)
    if modes is not None:
        modes = modes.pick([i for i, origin in enumerate(modes.origin) if origin.kind is not Kind.ADAPTED])
    if modes is None or not len(modes):
        return paragraph("None were recorded.")
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
    return _first_rows(caption, heads, rows)


def _first_rows(caption: str, heads: Sequence[str], rows: list[Sequence[str]]) -> str:
    left = paragraph(f"The first {ROWS} of {len(rows)} rows are shown.") if len(rows) > ROWS else ""
    return table(caption, heads, rows[:ROWS]) + left


def _data(posterior: Fitted) -> str:
    if posterior.target is None:
        return paragraph("Not at hand: this posterior was loaded without its target.")
    observed = posterior.target.observed if posterior.target is not None else {}
    if not observed:
        return paragraph("None: the target observes no values.")
    rows = []
    for name, value in observed.items():
        shape = " × ".join(map(str, value.shape)) or "one value"
        rows.append((name, shape, str(value.dtype), *(_number(float(end)) for end in value.aminmax())))
    return table("Observed values.", ("name", "shape", "type", "least", "greatest"), rows)


def _making(posterior: Fitted) -> list[str]:
    total = sum(posterior.timing.values())
    stages = [(name, f"{s:.2f}", f"{s / max(total, 1e-9):.0%}") for name, s in posterior.timing.items()]
    shown = {**vars(posterior.settings), **posterior.settings.options}
    settings = {name: repr(value) for name, value in shown.items()}
    return [
        paragraph(f"Flow: {posterior.flow_description or 'not recorded'}."),
        bullets(posterior.notes),
        table(f"Time by stage, {total:.2f} s in all.", ("stage", "seconds", "share"), stages) if stages else "",
        paragraph("To make it again; with the same inputs and versions, the same numbers:"),
        markup.code_block(code(posterior)),
        markup.pairs("Settings that were recorded.", ("setting", "value"), settings) if settings else "",
        markup.pairs("Versions where this page was written.", ("package", "version"), versions()),
    ]


def code(posterior: Fitted) -> str:
    """Python that makes the posterior again: a call of fit or diagnose with the recorded options that differ from the
    defaults. What no record can hold (a flow, a guide, ``init``) is named in comments.
    """
    settings, defaults = posterior.settings, vars(Options())
    fitted, recipe = "training" in posterior.timing, settings.recipe
    given = {"flow": settings.flow or recipe, "seed": settings.seed, **settings.options}
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


def _trace(posterior: Fitted) -> str:
    steps = len(posterior.trace)
    alt = f"The ELBO in {steps} training steps" if steps else "No training steps"
    alt += f"; judging found an ELBO of {fixed(posterior.elbo)} and a {posterior.evidence_name} of "
    alt += f"{posterior.evidence_text}."
    caption = "The evidence lower bound in training, and what judging found; their gap is KL(q‖p)."
    return drawn(WIDE, alt, caption, lambda figure: panels.trace(figure.subplots(), posterior))


def _weights(posterior: Fitted) -> str:
    alt = f"Shares of the draws above each weight: k̂ {posterior.khat:.2f} for the flow q, "
    alt += f"{smooth(posterior.proposal.log_w)[1]:.2f} for the proposal."
    caption = "Which share of the draws lies above each weight. A tail as flat as the dashed line has k̂ = 0.7."
    return drawn(WIDE, alt, caption, lambda figure: panels.weights(figure.subplots(), posterior))


def _marginals(chosen: Quantities) -> str:
    """One small picture for each quantity, so that a narrow screen shows them below one another."""
    shown, images = chosen.some(MARGINALS), []
    for i, name in enumerate(shown.names):
        alt = f"Density of {name}: weighted draws {_moments(shown.weighted[:, i])}"
        alt += "." if shown.raw is None else f"; draws of q {_moments(shown.raw[:, i])}."
        images.append(drawn(SMALL, alt, name, lambda figure, i=i: panels.marginal(figure.subplots(), shown, i)))
    some = "" if len(shown.names) == len(chosen.names) else f" {len(shown.names)} of {len(chosen.names)} quantities."
    kinds = "Blue areas: weighted draws."
    if shown.raw is not None:
        kinds += " Orange lines: draws of the flow q as they are. Where they differ, weighting corrects the flow."
    return f'{paragraph(kinds + some)}\n<div class="several">\n{chr(10).join(images)}\n</div>'


def _moments(x: np.ndarray) -> str:
    x = x[np.isfinite(x)]
    return f"mean {x.mean():.3g}, sd {x.std():.3g}" if len(x) else "of no finite value"


def _pairs(chosen: Quantities) -> str:
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
                dots = shown.raw[: panels.DOTS]
                ax.plot(dots[:, column], dots[:, row], ".", ms=2.5, mew=0, alpha=0.4, color=panels.Q, rasterized=True)
                ax.set(xlim=shown.span(column), ylim=shown.span(row))

    return draw


def _density(posterior: Fitted) -> str:
    alt = "Weighted draws over the contours of the target's density in its two unconstrained coordinates."
    return drawn(WIDE, alt, "", lambda figure: panels.density(figure.subplots(), posterior))
