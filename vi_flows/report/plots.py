"""Pictures of a fit: how it was trained, what its weights look like, and what it says of the target."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ..arguments import one_of
from ..inference.judge.fitted import Fitted
from . import panels
from .panels import PANEL_COLUMNS, Quantities, quantities

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.usetex": False,
}
TICKS = 7.5
COLOURS = {"reliable": "#007A5A", "corrected": "#A66F00", "unreliable": "#B83C00"}
FIGURE_DPI = 120
FIGURE_WIDTH = 10.0
FEW_MARGINALS, FEW_PAIRS = 8, 4  # quantities in an overview, and unless some are named
MOST_MARGINALS, MOST_PAIRS = 40, 8


class Picture(Figure):
    """A figure of no window, so that nothing global is touched; it shows itself in a notebook."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=FIGURE_DPI)
        return buffer.getvalue()


def plot(
    posterior: Fitted,
    kind: str = "overview",
    path: str | Path | None = None,
    *,
    var_names: str | Sequence[str] | None = None,
) -> Figure:
    """A picture of the fit, with the verdict as its title; works without a display and changes nothing global.

    Parameters
    ----------
    kind: "trace": the ELBO in training, noisy and averaged, with the ELBO and the log evidence that judging found.
        "weights": which share of the draws lies above each importance weight, with the Pareto tails whose shape is k̂.
        "marginals": densities of quantities, by weighted draws and by draws of q: their difference is the correction.
        "pairs": weighted draws of pairs of quantities. "density": weighted draws over the contours of p, for a target
        of two coordinates, in them. "overview": these together.
    path: a file to write, .png, .pdf or .svg; its folder is made.
    var_names: quantities to draw ("theta", "theta[0]") or to leave out ("~theta"). Without it, some of every variable.

    Raises
    ------
    ValueError for an unknown kind or name, for "density" without two coordinates and a target, and if there are no
    draws because a model was loaded without its target.
    """
    one_of("kind", kind, PLOT_KINDS, "a file name goes in path=")
    if var_names is not None and kind in ("trace", "weights", "density"):
        raise ValueError(f"var_names: expected None with kind {kind!r}, got {var_names!r}; it draws no quantities")
    if kind == "density" and (why := panels.no_density(posterior)):
        raise ValueError(f"kind: density expected {why}")
    with matplotlib.rc_context(STYLE):
        figure = Picture(layout="constrained")
        PLOT_KINDS[kind](figure, posterior, var_names)
        _title(figure, posterior)
        for ax in figure.axes:
            ax.tick_params(which="both", labelsize=TICKS)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=FIGURE_DPI)
    return figure


def _title(figure: Figure, posterior: Fitted) -> None:
    """The verdict with its numbers, and below it what stands against the fit."""
    status, (low, high) = posterior.verdict.status, posterior.khat_interval
    numbers = (
        rf"{status}: $\hat{{k}}$ of q {posterior.khat:.2f} ({low:.2f} to {high:.2f}), "
        f"ESS {posterior.ess:.0f} of {len(posterior.flow_draws)}, {posterior.evidence_name} {posterior.evidence_text}"
    )
    against = [c.sentence for c in posterior.verdict.checks if not c.passed]
    width = int(13 * figure.get_figwidth())
    lines = [numbers, *(textwrap.fill(sentence, width) for sentence in against[:2])]
    figure.suptitle("\n".join(lines), color=COLOURS.get(status), fontsize=9.5)


def _overview(figure: Figure, posterior: Fitted, var_names: str | Sequence[str] | None) -> None:
    chosen = quantities(posterior, var_names)
    rows = math.ceil(min(len(chosen.names), FEW_MARGINALS) / PANEL_COLUMNS)
    top = figure
    figure.set_size_inches(FIGURE_WIDTH, 5.6)
    if len(chosen.names) > 1:
        figure.set_size_inches(FIGURE_WIDTH, 6.1 + 1.5 * rows)
        top, bottom = figure.subfigures(2, 1, height_ratios=(5.6, 0.5 + 1.5 * rows))
        panels.marginals(bottom, chosen, FEW_MARGINALS)
    left, right = top.subfigures(1, 2)
    first, second = left.subplots(2, 1)
    panels.trace(first, posterior)
    panels.weights(second, posterior)
    if not panels.no_density(posterior):
        panels.density(right.subplots(), posterior)
    elif len(chosen.names) > 1:
        panels.pairs(right, chosen, FEW_PAIRS, diagonal=False)
    else:
        panels.marginals(right, chosen, FEW_MARGINALS)


def _single(panel: Callable) -> Callable:
    """A kind that is one panel of its own."""

    def draw(figure: Figure, posterior: Fitted, var_names: str | Sequence[str] | None) -> None:
        figure.set_size_inches(6.5, 4.5)
        panel(figure.subplots(), posterior)

    return draw


def _marginals(figure: Figure, posterior: Fitted, var_names: str | Sequence[str] | None) -> None:
    chosen = quantities(posterior, var_names)
    limit = FEW_MARGINALS if var_names is None else MOST_MARGINALS
    rows, columns = divmod(min(len(chosen.names), limit) - 1, PANEL_COLUMNS)
    figure.set_size_inches(max(2.5 * (PANEL_COLUMNS if rows else columns + 1), 6.0), 1.3 + 1.7 * (rows + 1))
    panels.marginals(_below(figure), chosen, limit)


def _pairs(figure: Figure, posterior: Fitted, var_names: str | Sequence[str] | None) -> None:
    chosen: Quantities = quantities(posterior, var_names)
    limit = FEW_PAIRS if var_names is None else MOST_PAIRS
    side = max(1.9 * min(len(chosen.names), limit), 5.0)
    figure.set_size_inches(side, side + 0.5)
    panels.pairs(_below(figure), chosen, limit)


def _below(figure: Figure) -> Figure:
    """A part of the figure with a title of its own."""
    return figure.subfigures(1, 1)


PLOT_KINDS = {
    "overview": _overview,
    "trace": _single(panels.trace),
    "weights": _single(panels.weights),
    "marginals": _marginals,
    "pairs": _pairs,
    "density": _single(panels.density),
}
