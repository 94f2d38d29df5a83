"""The parts of a picture of a fit, each drawn into axes that are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from ..inference.bounds import KHAT_BOUND
from ..inference.estimate.evaluate import log_density
from ..inference.estimate.psis import import_arviz, smooth, tail_size
from ..inference.estimate.quantities import flatten, vary
from ..inference.estimate.weights import log_mean
from ..inference.judge.fitted import Fitted, fixed
from ..inference.train.loop import WINDOW
from ..targets.target import is_model
from .draws import constraint, select, variable, weighted_draws

Q, TARGET, DARK, LIGHT = "#D55E00", "#0072B2", "#333333", "#999999"  # Okabe and Ito: told apart by the colour-blind
KDE_DRAWS, SCATTER_DRAWS = 20_000, 2000  # weighted draws behind the curves; those of them that are shown one by one
SMOOTHER = 1.6  # than ArviZ: two curves are compared, and bumps of chance in one would look like a correction
PANEL_COLUMNS = 4
GRID = 120  # points a side, for contours
REGIONS = (0.99, 0.9, 0.5)  # probability inside each contour


@dataclass(frozen=True)
class Quantities:
    """Chosen quantities: draws of the target (n, K), equally weighted, and draws of q (m, K), None where unknown."""

    names: list[str]
    weighted: np.ndarray
    raw: np.ndarray | None

    def some(self, limit: int) -> Quantities:
        """At most ``limit`` of them, taken from all variables in turn."""
        seen: dict[str, int] = {}
        turn = []
        for name in self.names:
            seen[variable(name)] = rank = seen.get(variable(name), -1) + 1
            turn.append(rank)
        chosen = sorted(sorted(range(len(turn)), key=turn.__getitem__)[:limit])
        raw = None if self.raw is None else self.raw[:, chosen]
        return Quantities([self.names[i] for i in chosen], self.weighted[:, chosen], raw)

    def span(self, i: int) -> tuple[float, float]:
        """What to show of quantity i: nearly all of both kinds of draws, but not the far ends of heavy tails."""
        ends = [_span(x[:, i]) for x in (self.weighted, self.raw) if x is not None]
        return min(low for low, _ in ends), max(high for _, high in ends)


def quantities(posterior: Fitted, var_names: str | Sequence[str] | None) -> Quantities:
    """The quantities that var_names keep, see :func:`select`, with their draws."""
    constrain = constraint(posterior)
    if constrain is None and posterior.stored is None:
        raise ValueError("plot: this posterior has no target; load it with vf.load(path, target=...)")
    count = KDE_DRAWS if constrain is not None else len(posterior.stored)
    names, weighted = flatten(weighted_draws(posterior, count, seed=0).values)
    keep = select(names, var_names)
    if var_names is None:  # a correlation matrix has constant entries
        varying = set(vary(weighted.nan_to_num()).tolist())
        keep = [i for i in keep if i in varying] or keep
    raw = None if constrain is None else flatten(constrain(posterior.flow_draws))[1][:, keep].cpu().numpy()
    return Quantities([names[i] for i in keep], weighted[:, keep].cpu().numpy(), raw)


def trace(ax: Axes, posterior: Fitted) -> None:
    """The ELBO in training, noisy and averaged, below the ELBO and the log evidence that judging found."""
    values = np.asarray(posterior.trace, dtype=float)
    window = max(min(WINDOW, len(values) // 4), 1)
    if len(values):
        ax.plot(values, color=LIGHT, lw=0.5, alpha=0.7, label="one step")
        mean = np.convolve(values, np.full(window, 1 / window), "valid")
        ax.plot(np.arange(len(mean)) + window - 1, mean, color=DARK, lw=1.2, label=f"mean of {window}")
    else:
        ax.text(0.5, 0.5, "no training steps", transform=ax.transAxes, ha="center", color=LIGHT)
        ax.set_xticks([])
    level, se = posterior.log_evidence, posterior.log_evidence_se
    found = [v for v in (posterior.elbo, level - se, level + se) if abs(v) < 1e9]
    if abs(posterior.elbo) < 1e9:
        ax.axhline(posterior.elbo, color=Q, lw=1.2, ls="--", label=f"ELBO of q {fixed(posterior.elbo)}")
    if abs(level) < 1e9 and math.isfinite(se):
        ax.axhspan(level - se, level + se, color=TARGET, alpha=0.25, lw=0)
        ax.axhline(level, color=TARGET, lw=1.2, label=f"{posterior.evidence_name} {posterior.evidence_text}")
    settled = values[len(values) // 10 :]  # the first steps may start anywhere
    ends = [*np.quantile(settled, (0.005, 0.995)), *found] if len(values) else found
    if ends:
        margin = 0.08 * (max(ends) - min(ends)) or 1.0
        ax.set_ylim(min(ends) - margin, max(ends) + margin)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.set(title="training", xlabel="step", ylabel="ELBO (nats)")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best" if len(values) < 5000 else "lower right")  # the best place takes long to find among many


def weights(ax: Axes, posterior: Fitted) -> None:
    """How the largest weights are spread, for q and for the proposal: the share of draws above each weight.

    In these coordinates a tail of shape k ends in a line of slope −1/k; the dashed one is where k = 0.7 would lead.
    """
    proposal = posterior.proposal.log_w
    ends = [
        _tail(ax, posterior.log_weights, Q, "flow q", posterior.khat),
        _tail(ax, proposal, TARGET, "proposal", smooth(proposal)[1]),
    ]
    ends = [end for end in ends if end is not None]
    ax.set(xscale="log", yscale="log")
    if ends:
        ax.set_xlim(min(0.8, *(low for low, _ in ends)), max(2.0, *(2 * high for _, high in ends)))
        few = math.log10(ax.get_xlim()[1] / ax.get_xlim()[0]) < 2
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(top=1.5)
    handles, _ = ax.get_legend_handles_labels()
    handles += [
        Line2D([], [], color=DARK, lw=1.2, label="fitted tails"),
        Line2D([], [], color=DARK, lw=0.9, ls="--", label=f"the limit, k = {KHAT_BOUND}"),
    ]
    ax.legend(handles=handles, loc="upper right")
    ax.set(title="importance weights", xlabel="weight / mean weight", ylabel="share of draws above")


def _tail(ax: Axes, log_w: Tensor, colour: str, label: str, khat: float) -> tuple[float, float] | None:
    """One kind of weights with its fitted tail; returns the range of weights to show, None if all are 0."""
    log_w = log_w.detach().double().cpu()
    n, alive = len(log_w), int((log_w > -math.inf).sum())
    if not alive:
        return None
    order = log_w.argsort(descending=True)[:alive]
    relative = log_w - log_mean(log_w)
    w, share = relative[order].exp().numpy(), (np.arange(alive) + 1) / n
    shown = np.unique(np.geomspace(1, alive, 400).astype(int)) - 1
    lost = f", {1 - alive / n:.0%} are 0" if alive < 0.995 * n else ""
    ax.plot(w[shown], share[shown], ".", ms=3.5, color=colour, label=rf"{label}: $\hat{{k}}$ {khat:.2f}{lost}")
    smoothed, shape = smooth(log_w)
    m = math.ceil(tail_size(alive))
    if 5 <= m < alive and math.isfinite(shape) and shape != 0:
        constant = (smoothed - relative)[order[alive // 2]]  # smoothing changes the tail, and normalises
        fitted = (smoothed[order[:m]] - constant).sort(descending=True)[0].exp().numpy()
        ax.plot(fitted, (np.arange(m) + 0.5) / n, color=colour, lw=1.2)
        scale = (fitted[m // 2] - w[m]) / _excess(0.5, shape)
        left = np.geomspace(1, 0.5 / m, 100)
        ax.plot(w[m] + scale * _excess(left, KHAT_BOUND), left * m / n, color=colour, lw=0.9, ls="--")
    return max(w[int(0.75 * alive)], 0.01 * w[min(m, alive - 1)], 1e-9 * w[0]), w[0]


def _excess(share: float | np.ndarray, k: float) -> float | np.ndarray:
    """Above which ``share`` of a generalised Pareto distribution of shape k and scale 1 lies: (share^−k − 1)/k."""
    return -np.log(share) if abs(k) < 1e-8 else np.expm1(-k * np.log(share)) / k


def marginals(figure: FigureBase, chosen: Quantities, limit: int) -> None:
    """Densities of quantities: of the target by weighted draws, and of q as it is."""
    shown = chosen.some(limit)
    columns = min(PANEL_COLUMNS, len(shown.names))
    grid = figure.subplots(math.ceil(len(shown.names) / columns), columns, squeeze=False)
    for i, ax in enumerate(grid.flat):
        if i < len(shown.names):
            marginal(ax, shown, i)
            ax.set_title(_plain(shown.names[i]))
        else:
            ax.set_visible(False)
    handles = [Patch(facecolor=TARGET, alpha=0.35, label="weighted draws")]
    if shown.raw is not None:
        handles += [Line2D([], [], color=Q, lw=1.2, label="draws of the flow q, not weighted")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(_counted("marginals", shown, chosen), fontsize="medium")


def marginal(ax: Axes, chosen: Quantities, i: int) -> None:
    """The density of one quantity, without a scale."""
    span = chosen.span(i)
    x, y = _curve(chosen.weighted[:, i], span)
    ax.fill_between(x, y, color=TARGET, alpha=0.35, lw=0)
    ax.plot(x, y, color=TARGET, lw=1)
    if chosen.raw is not None:
        ax.plot(*_curve(chosen.raw[:, i], span), color=Q, lw=1.2)
    ax.set(yticks=[], xlim=span, ylim=(0, None))
    ax.spines["left"].set_visible(False)


def pairs(figure: FigureBase, chosen: Quantities, limit: int, diagonal: bool = True) -> None:
    """Weighted draws of every pair of quantities, in a lower triangle, with the marginals on its diagonal."""
    shown = chosen.some(limit)
    count, skip = len(shown.names), 0 if diagonal or len(shown.names) == 1 else 1
    grid = figure.subplots(count - skip, count - skip, squeeze=False)
    dots = shown.weighted[:SCATTER_DRAWS]  # they come in random order
    for row, column in np.ndindex(grid.shape):
        ax, i, j = grid[row, column], row + skip, column
        if column > row:
            ax.set_visible(False)
        elif i == j:
            marginal(ax, shown, i)
        else:
            ax.plot(dots[:, j], dots[:, i], ".", ms=2.5, mew=0, alpha=0.4, color=TARGET, rasterized=True)
            ax.set(xlim=shown.span(j), ylim=shown.span(i))
        ax.locator_params(nbins=3)
        if row == len(grid) - 1:
            ax.set_xlabel(_plain(shown.names[j]))
        else:
            ax.tick_params(labelbottom=False)
        if column == 0 and i != j:
            ax.set_ylabel(_plain(shown.names[i]))
        else:
            ax.tick_params(labelleft=False)
    figure.suptitle(_counted("pairs, weighted draws", shown, chosen), fontsize="medium")


def no_density(posterior: Fitted) -> str:
    """Why the density cannot be drawn; empty if it can."""
    if posterior.dim != 2:
        return f"two coordinates, got {posterior.dim}; use kind='pairs'"
    return "" if posterior.target is not None else "a target, got none; load it with vf.load(path, target=...)"


def density(ax: Axes, posterior: Fitted) -> None:
    """Weighted draws over the contours of p in its two (unconstrained) coordinates."""
    dots = weighted_draws(posterior, KDE_DRAWS, seed=0).x.cpu()
    spans = [_widened(*_span(dots[:, i].numpy())) for i in (0, 1)]
    axes = [torch.linspace(low, high, GRID, dtype=dots.dtype) for low, high in spans]
    points = torch.cartesian_prod(*axes).to(posterior.proposal.x)
    log_p = log_density(posterior.target, points).cpu()
    p = (log_p - log_p.max()).exp().numpy()
    ordered = np.sort(p)[::-1]
    inside = np.cumsum(ordered) / ordered.sum()
    levels = np.unique([ordered[np.searchsorted(inside, region)] for region in REGIONS])
    surface = (*(axis.numpy() for axis in axes), p.reshape(GRID, GRID).T)
    ax.contourf(*surface, levels=[*levels, 1.001], colors=["#E3ECF4", "#B9D0E5", "#86B0D5"][-len(levels) :])
    ax.plot(*dots[:SCATTER_DRAWS].numpy().T, ".", ms=3, mew=0, alpha=0.6, color=DARK, rasterized=True)
    names, suffix = posterior.target.coordinate_names(), " (unconstrained)" if is_model(posterior.target) else ""
    labels = [_plain(name) + suffix for name in names]
    ax.set(xlim=spans[0], ylim=spans[1], xlabel=labels[0], ylabel=labels[1])
    ax.set_title(f"weighted draws over p: {', '.join(f'{r:.0%}' for r in sorted(REGIONS))} regions")


def _span(x: np.ndarray) -> tuple[float, float]:
    x = x[np.isfinite(x)]
    if not len(x):
        return -1.0, 1.0
    least, low, middle, high, most = np.quantile(x, (0.001, 0.05, 0.5, 0.95, 0.999))
    low, high = max(least, middle - 4 * (middle - low)), min(most, middle + 4 * (high - middle))
    return (low, high) if high > low else (low - 0.5 * abs(low) - 1e-3, high + 0.5 * abs(high) + 1e-3)


def _widened(low: float, high: float) -> tuple[float, float]:
    return low - 0.1 * (high - low), high + 0.1 * (high - low)


def _curve(x: np.ndarray, span: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The density of x within the span, by ArviZ's kernel estimate; a spike where x does not vary."""
    inside = x[(x >= span[0]) & (x <= span[1])]
    if len(inside) < 2 or np.ptp(inside) <= 1e-12 * np.abs(inside).max():
        at = inside[:1] if len(inside) else np.array([np.nan])
        return np.repeat(at, 2), np.array([0.0, 1.0])
    grid, pdf = import_arviz().kde(inside, bw_fct=SMOOTHER)
    return grid, pdf * len(inside) / len(x)


def _counted(title: str, shown: Quantities, chosen: Quantities) -> str:
    some, all_ = len(shown.names), len(chosen.names)
    return title if some == all_ else f"{title}: {some} of {all_} quantities"


def _plain(name: str) -> str:
    """A name as text: a dollar sign would begin mathematics."""
    return name.replace("$", r"\$")
