"""What pages are made with: templates, a file that is whole or not there, pictures inside, the versions of packages."""

from __future__ import annotations

import os
import platform
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import matplotlib
import numpy as np
import pyro
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..atomic import replacing
from ..inference.estimate.psis import import_arviz
from ..version import __version__
from .plots import STYLE, TICKS, Picture

SUFFIXES = (".html", ".htm")
WIDE_FIGURE, SMALL_FIGURE = (5.6, 4.0), (2.0, 1.5)  # inches: what still can be read on a phone
PAGE_DPI = 144  # one and a half points for each of a screen
PIXELS = 96  # to the inch, in CSS
TEMPLATES = Environment(  # all that is put into a page is escaped
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Image(NamedTuple):
    """A picture for a page: a PNG in base64, its size in CSS pixels, what it shows in words, and what stands above."""

    png: str
    width: int
    height: int
    alt: str
    caption: str


def render(template: str, **shown: Any) -> str:
    """The page that a file of templates/ makes of what is shown; the versions of packages are added."""
    return TEMPLATES.get_template(template).render(versions=versions(), **shown)


@contextmanager
def written(path: str | Path, suffixes: Sequence[str], example: str) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when all is written to it; its folder is made.

    It is opened before the work, so that a bad path is told at once: ValueError, in one line, for a path that ends
    otherwise or cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes or os.path.isdir(path):
        raise ValueError(
            f"path: expected a file name that ends in {' or '.join(suffixes)}, got {path}; such as {example}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            yield file
    except OSError as error:
        reason = f"{path} ({error.strerror}); choose another folder"
        raise ValueError(f"path: expected a file that can be written, got {reason}") from None


def drawn(size: tuple[float, float], alt: str, caption: str, draw: Callable[[Picture], None]) -> Image:
    """What ``draw`` puts on a figure, as a picture inside the page."""
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=size, layout="constrained")
        draw(figure)
        for ax in figure.axes:
            ax.tick_params(which="both", labelsize=TICKS)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=PAGE_DPI)
    width, height = (round(PIXELS * side) for side in size)
    return Image(b64encode(buffer.getvalue()).decode(), width, height, alt, caption)


def versions() -> dict[str, str]:
    packages = {"torch": torch, "pyro": pyro, "numpy": np, "arviz": import_arviz(), "matplotlib": matplotlib}
    others = {name: str(package.__version__) for name, package in packages.items()}
    return {"vi_flows": __version__, **others, "Python": platform.python_version()}
