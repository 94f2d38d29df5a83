"""A trained VAE as one HTML page that needs nothing beside it: what it is worth, and what its images look like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import imsave
from torch import Tensor

from ..inference.bounds import KHAT_BOUND
from ..running import seeded
from ..vae.bounds import evaluating
from ..vae.data import Shape
from ..vae.evaluation import ACTIVE, Estimate, Evaluation
from ..vae.model import VAE
from .panels import DARK, LIGHT, TARGET, Q
from .parts import SUFFIXES, WIDE_FIGURE, Image, drawn, render, written
from .plots import Picture

RECONSTRUCTIONS, IMAGE_COLUMNS = 20, 10  # images with their reconstructions; in a row
SAMPLE_IMAGES = 60
LATENT_IMAGES, LATENT_MEAN_DRAWS = 2000, 32  # images in the latent plot, and draws for each posterior mean
GAP, ZOOM = 2, 3  # pixels between images; points of a .png to a pixel
History = Sequence[Mapping[str, float]]


def write_page(
    path: str | Path,
    vae: VAE,
    shape: Shape,
    x: Tensor,
    evaluation: Evaluation,
    history: History,
    settings: Mapping[str, Any],
) -> Path:
    """Write a VAE as an HTML document without scripts and outside resources, whole or not at all. Returns the path.

    Parameters
    ----------
    path: ends in .html; its folder is made. settings: names and values that say how the VAE was made.
    shape: (C, H, W) of a row. x: rows (N, dim) that it was not trained on, those that were evaluated.
    history: a record for each epoch: epoch, elbo, reconstruction, kl, valid_elbo, valid_iwae, seconds.

    Raises ValueError, in one line, for another path or one that cannot be written, and for images of another size.
    """
    if x.dim() != 2 or x.shape[1] != math.prod(shape):
        expected = f"{' × '.join(map(str, shape))} = {math.prod(shape)}"
        raise ValueError(f"x: expected rows of {expected} values, got {tuple(x.shape)}")
    with written(path, SUFFIXES, "report.html") as file, evaluating(vae), seeded(evaluation.seed):
        file.write(_page(vae, shape, x, evaluation, history, settings).encode())
    return Path(path)


def write_images(path: str | Path, x: Tensor, shape: Shape) -> Path:
    """Images x (n, C·H·W) as one picture (.png), ten in a row, or as an array (n, C, H, W) (.npy), whole or not at all.

    Raises ValueError, in one line, for a path that ends otherwise or cannot be written.
    """
    with written(path, (".png", ".npy"), "samples.png") as file:
        if Path(path).suffix.lower() == ".npy":
            np.save(file, x.reshape(-1, *shape).cpu().numpy())
        else:
            picture = _shades(montage(x.cpu().float().split(IMAGE_COLUMNS), shape), x).repeat(ZOOM, 0).repeat(ZOOM, 1)
            imsave(file, np.nan_to_num(picture, nan=1.0), cmap="gray", vmin=0, vmax=1, format="png")
    return Path(path)


def _page(vae: VAE, shape: Shape, x: Tensor, evaluation: Evaluation, history: History, settings: Mapping) -> str:
    x = x[torch.randperm(len(x))].to(vae.posterior.device)
    return render(
        "vae.html.j2",
        evaluation=evaluation,
        numbers=_numbers(evaluation),
        reconstructions=_reconstructions(vae, shape, x[:RECONSTRUCTIONS]),
        samples=_samples(vae, shape, x),
        latent=_latent(vae, x[:LATENT_IMAGES], evaluation),
        curves=_curves(history),
        khat=_khat(evaluation),
        epoch=_epoch(history),
        settings=settings,
    )


# --- words and numbers


def _numbers(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    gap = f"amortisation gap ({evaluation.gap_rows} images, {evaluation.gap_steps} steps)"
    estimates = {
        f"log p(x) by IWAE-{evaluation.draws}, nats": evaluation.iwae,
        "ELBO, nats": evaluation.elbo,
        "reconstruction E_q[log p(x|z)], nats": evaluation.reconstruction,
        "KL(q(z|x)‖p(z)), nats": evaluation.kl,
        f"{gap}, nats": evaluation.gap,
        f"bits per dimension by IWAE-{evaluation.draws}": evaluation.bits,
        "bits per dimension by the ELBO": evaluation.elbo_bits,
    }
    return [(name, f"{e.value:.3f}", _error(e)) for name, e in estimates.items() if e is not None]


def _error(estimate: Estimate) -> str:
    return "–" if math.isnan(estimate.se) else f"{estimate.se:.3f}"


def _epoch(history: History) -> dict[str, str]:
    """The last epoch's record, in nats per image; {} without one."""
    columns = ("epoch", "elbo", "reconstruction", "kl", "valid_elbo", "valid_iwae", "seconds")
    last = history[-1] if history else {}
    return {n.replace("_", " "): f"{last[n]:.6g}" if n in last else "–" for n in columns} if last else {}


# --- pictures


def _reconstructions(vae: VAE, shape: Shape, x: Tensor) -> Image:
    z = vae.posterior(vae.encoder(x)).rsample_and_log_prob()[0]
    mean = vae.likelihood.mean(vae.decoder(z))
    rows = [part for pair in zip(x.split(IMAGE_COLUMNS), mean.split(IMAGE_COLUMNS), strict=True) for part in pair]
    caption = "Images, and in the row below each its reconstruction: the mean of p(x|z) at a draw z of q(z|x)."
    return _images(rows, shape, x, f"{len(x)} images, each above its reconstruction.", caption)


def _samples(vae: VAE, shape: Shape, x: Tensor) -> Image:
    samples = vae.sample(SAMPLE_IMAGES)
    caption = "Means of p(x|z) at draws z of the prior; not chosen."
    return _images(samples.split(IMAGE_COLUMNS), shape, x, f"{SAMPLE_IMAGES} images that the model made up.", caption)


def _images(rows: Sequence[Tensor], shape: Shape, like: Tensor, alt: str, caption: str) -> Image:
    """Rows of images, in the colours of ``like``'s values."""
    picture = _shades(montage([row.cpu().float() for row in rows], shape), like)
    width = WIDE_FIGURE[0]
    size = (width, width * picture.shape[0] / picture.shape[1])

    def draw(figure: Picture) -> None:
        figure.set_layout_engine("none")  # the picture fills the figure
        ax = figure.add_axes((0, 0, 1, 1))
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        ax.set_axis_off()

    return drawn(size, alt, caption, draw)


def _shades(picture: np.ndarray, like: Tensor) -> np.ndarray:
    """Values as shades from 0 to 1: as they are if ``like``'s are within that, else from the least to the greatest."""
    low, high = (float(end) for end in like.aminmax())
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    return np.clip((picture - low) / max(high - low, 1e-12), 0, 1)


def montage(rows: Sequence[Tensor], shape: Shape) -> np.ndarray:
    """Rows of images (n, C·H·W) as one picture (height, width), or (height, width, 3) for three channels; NaN between.

    Of two, or of more than three channels the first is shown.
    """
    channels, height, width = shape
    colours = 3 if channels == 3 else 1
    columns = max(len(row) for row in rows)
    picture = np.full((len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, colours), np.nan)
    for i, row in enumerate(rows):
        for j, image in enumerate(row.reshape(-1, *shape)[:, :colours].permute(0, 2, 3, 1).numpy()):
            top, left = i * (height + GAP), j * (width + GAP)
            picture[top : top + height, left : left + width] = image
    return picture if colours == 3 else picture[..., 0]


def _latent(vae: VAE, x: Tensor, evaluation: Evaluation) -> Image:
    """Posterior means of images in the two units that vary most over them."""
    q = vae.posterior(vae.encoder(x))
    means = sum(q.rsample_and_log_prob()[0] for _ in range(LATENT_MEAN_DRAWS)).cpu() / LATENT_MEAN_DRAWS
    order = sorted(range(vae.latent), key=evaluation.activity.__getitem__, reverse=True)
    first, second = order[0], order[min(1, vae.latent - 1)]

    def draw(figure: Picture) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        left.plot(means[:, first], means[:, second], ".", ms=3, mew=0, alpha=0.5, color=TARGET, rasterized=True)
        left.set(xlabel=f"E[z[{first}] | x]", ylabel=f"E[z[{second}] | x]", title=f"{len(x)} images")
        _activity(right, evaluation)

    alt = f"Posterior means of {len(x)} images in units {first} and {second}; the variance over images of each unit's."
    caption = (
        "Left: posterior means of images in the two units that vary most. Right: the variance over images of every "
        f"unit's posterior mean; units above the line are active ({evaluation.active_units} of {vae.latent})."
    )
    return drawn((WIDE_FIGURE[0], 3.2), alt, caption, draw)


def _activity(ax: Axes, evaluation: Evaluation) -> None:
    values = np.sort(np.maximum(evaluation.activity, 1e-5))[::-1]
    ax.semilogy(np.arange(1, len(values) + 1), values, ".", ms=5, color=TARGET)
    ax.axhline(ACTIVE, color=DARK, lw=0.9, ls="--")
    ax.set(xlabel="units, most active first", title="variance of E[z | x]")


def _curves(history: History) -> Image | None:
    if not history:
        return None
    epoch = [record["epoch"] for record in history]
    names = {"elbo": "training ELBO", "valid_elbo": "validation ELBO", "valid_iwae": "validation IWAE"}
    colours = {"elbo": LIGHT, "valid_elbo": Q, "valid_iwae": TARGET, "reconstruction": DARK, "kl": Q}

    def curve(ax: Axes, name: str, label: str) -> None:
        values = [record.get(name, math.nan) for record in history]
        ax.plot(epoch, values, color=colours[name], lw=1.2, marker="." if len(epoch) < 30 else None, label=label)

    def draw(figure: Picture) -> None:
        bounds, parts, kl = figure.subplots(1, 3, width_ratios=(2, 1, 1))
        for name, label in names.items():
            curve(bounds, name, label)
        curve(parts, "reconstruction", "")
        curve(kl, "kl", "")
        settled = [record.get(name, math.nan) for record in history[len(history) // 10 :] for name in names]
        ends = [value for value in settled if math.isfinite(value)]
        if ends:  # the first epochs may start anywhere
            margin = 0.05 * (max(ends) - min(ends)) or 1.0
            bounds.set_ylim(min(ends) - margin, max(ends) + margin)
        bounds.legend(loc="lower right")
        for ax, title in ((bounds, "bounds of log p(x)"), (parts, "reconstruction"), (kl, "KL")):
            ax.set(xlabel="epoch", title=title)
            ax.xaxis.get_major_locator().set_params(integer=True)
        bounds.set_ylabel("nats per image")

    last = history[-1]
    alt = f"Learning curves of {len(history)} epochs; the last validation IWAE: {last.get('valid_iwae', math.nan):.2f}."
    caption = "Nats per image after each epoch; training values are averages over the epoch, reconstruction and KL too."
    return drawn((WIDE_FIGURE[0] * 1.35, 2.9), alt, caption, draw)


def _khat(evaluation: Evaluation) -> Image | None:
    finite = [value for value in evaluation.khat if math.isfinite(value)]
    if not finite:
        return None
    above = sum(value > KHAT_BOUND for value in evaluation.khat)

    def draw(figure: Picture) -> None:
        ax = figure.subplots()
        ax.hist(finite, bins=min(30, max(5, len(finite) // 8)), color=TARGET, alpha=0.6, lw=0)
        ax.axvline(KHAT_BOUND, color=DARK, lw=0.9, ls="--", label=rf"$\hat{{k}}$ = {KHAT_BOUND}")
        ax.set(xlabel=r"$\hat{k}$ of an image's weights", ylabel="images")
        ax.legend()

    count = len(evaluation.khat)
    alt = f"Histogram of k̂ of {count} images: median {np.median(finite):.2f}, {above} above {KHAT_BOUND}."
    caption = (
        f"k̂ of the weights p(x, z)/q(z|x) of {count} images, {evaluation.khat_draws:,} draws each: {above} are above "
        f"{KHAT_BOUND}, where a bound by importance sampling is low by an unknown amount."
    )
    return drawn((WIDE_FIGURE[0], 2.8), alt, caption, draw)
