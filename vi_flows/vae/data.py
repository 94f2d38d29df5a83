"""Images (or any rows of numbers) to train on, from NumPy's and MNIST's files: checked, split and made binary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..arguments import one_of, whole
from .files import SPLITS, by, digits, read, refuse

Shape = tuple[int, int, int]
BINARISE = ("none", "static", "dynamic", "threshold")
CLASSES = 100  # a column of integers with fewer different values may be labels
FLOAT_ROWS = 4096  # rows turned into floats at a time
BELOW_ONE = 1 - 2.0**-16  # in float32, 255 + u rounds to 256 for the largest u


@dataclass(frozen=True, eq=False)
class Images:
    """Rows of pixels (N, dim) for training, validation and test, dim = C·H·W in that order.

    Parameters
    ----------
    train, valid, test: bytes, or float32. Bytes are 0 and 1 if ``levels`` is 2, else grey levels k from 0 to 255.
    shape: (C, H, W).
    levels: how many values a pixel of :meth:`values` can have: 2, 256, or None for real numbers.
    noise: "none"; or training rows are grey bytes, and :meth:`values` draws at each training step: "dynamic", 0 or 1
        with probability k/255; "dequantise", (k + u)/256 with u ~ U(0, 1). valid and test were drawn once, as floats.
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    shape: Shape
    levels: int | None
    noise: str = "none"

    @property
    def dim(self) -> int:
        return math.prod(self.shape)

    def values(self, rows: Tensor, training: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Rows of train, valid or test as float32 (N, dim): 0 or 1, k/255, or real numbers as they are.

        With ``training`` rows get the noise of a training step, from the generator or the global one. Without it
        training rows of grey levels are the probabilities of 1, or the middles (k + ½)/256.
        """
        x = rows.to(torch.float32)
        if rows.is_floating_point() or (self.levels == 2 and self.noise == "none"):
            return x
        if self.noise == "dequantise":
            u = torch.rand(x.shape, generator=generator, device=x.device) * BELOW_ONE if training else 0.5
            return (x + u) / 256
        return torch.bernoulli(x / 255, generator=generator) if training and self.noise == "dynamic" else x / 255

    def all_values(self) -> Iterator[Tensor]:
        """All rows as a training step, validation and test see them, some after the others."""
        for rows in (self.train, self.valid, self.test):
            for part in rows.split(FLOAT_ROWS):
                yield self.values(part, training=rows is self.train)

    @cached_property
    def centre(self) -> float:
        """The mean over all pixels of the training values."""
        return self._average(lambda x: x)

    @cached_property
    def spread(self) -> float:
        """The standard deviation over all pixels of the training values, of 0 and 1 where these are drawn."""
        if self.noise == "dynamic":
            return math.sqrt(self.centre * (1 - self.centre))
        return math.sqrt(self._average(lambda x: (x - self.centre).square()))

    def _average(self, f: Callable[[Tensor], Tensor]) -> float:
        sums = [f(self.values(rows).double()).sum() for rows in self.train.split(FLOAT_ROWS)]
        return float(sum(sums)) / self.train.numel()


def load(
    data: str | Path,
    *,
    shape: Sequence[int] | None = None,
    binarise: str = "none",
    dequantise: bool = False,
    seed: int = 0,
    key: str | None = None,
) -> Images:
    """Read, check and split a data set.

    Parameters
    ----------
    data: "digits", 1,797 images of 8 × 8 that come with the package (:func:`.files.digits`); or a path:

        - .npz with arrays train, valid, test; or train, test (a sixth of train is split off for validation); or one
          array, split 80/10/10;
        - .npy, or an IDX file, MNIST's format, gzipped or not: one array, split 80/10/10;
        - a folder with MNIST's files: the images of train and t10k, as train and test. Label files are not read.

        Arrays are rows (N, dim), or images (N, H, W), (N, C, H, W) or (N, H, W, C), of bool, integers 0 to 255, or
        floats. Floats that are all k/255 become bytes; others are kept as real numbers.
    shape: (C, H, W) where rows do not say: by default a square if dim is one, else (1, 1, dim).
    binarise: grey bytes to 0 and 1: "static" draws each pixel once, with its grey value as probability; "dynamic" draws
        training pixels at each step (Salakhutdinov & Murray 2008); "threshold" cuts at one half.
    dequantise: grey bytes to (k + u)/256, for likelihoods with a density (Uria et al. 2013).
    seed: of the splits and of what is drawn once.
    key: the array of an .npz with others beside it.

    Raises
    ------
    ValueError in one line for files that are missing, damaged or hold anything but pixels, and options that do not fit.
    """
    _check_options(binarise, dequantise, seed)
    generator = torch.Generator().manual_seed(seed)
    arrays = digits(data, key) if data == "digits" else read(Path(data), key)
    rows, own = _rows(arrays, shape)
    rows, levels = _bytes_where_possible(rows)
    if (dequantise or binarise != "none") and levels != 256:
        option = "dequantise" if dequantise else "binarise"
        got = "pixels that are 0 or 1 already" if levels == 2 else "real numbers"
        raise ValueError(f"{option}: expected grey bytes in --data, got {got}; leave it out, or save pixels as uint8")
    rows = _split(rows, generator)
    if bool((rows["train"] == rows["train"].flatten()[0]).all()):
        refuse("pixels that vary", f"{float(rows['train'][0, 0]):g} everywhere in the training rows", "check the file")
    images = Images(Path(data).name.split(".")[0] or str(data), **rows, shape=own, levels=levels)
    return _with_noise(images, binarise, dequantise, generator)


def _check_options(binarise: str, dequantise: bool, seed: int) -> None:
    one_of("binarise", binarise, BINARISE)
    if dequantise and binarise != "none":
        raise ValueError(f"dequantise: expected no binarisation beside it, got {binarise}; choose one of the two")
    whole("seed", seed, 0)


def _with_noise(images: Images, binarise: str, dequantise: bool, generator: torch.Generator) -> Images:
    """Grey images made binary or real, what is drawn once drawn from the generator."""
    if binarise == "none" and not dequantise:
        return images
    if binarise == "threshold":
        return replace(images, levels=2, **{name: (getattr(images, name) >= 128).to(torch.uint8) for name in SPLITS})
    levels, noise = (None, "dequantise") if dequantise else (2, "dynamic")
    noisy = replace(images, levels=levels, noise=noise)

    def once(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.cat([noisy.values(part, True, generator).to(dtype) for part in rows.split(FLOAT_ROWS)])

    if binarise == "static":
        return replace(images, levels=2, **{name: once(getattr(images, name), torch.uint8) for name in SPLITS})
    return replace(noisy, valid=once(images.valid), test=once(images.test))


def _split(rows: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """train, valid and test from these, or from train and test, or from one array."""
    if len(rows) == 3:
        return rows
    where, first = next(iter(rows.items()))
    n = len(first)
    if n < 10:
        refuse("at least 10 rows to split", f"{n} in {where}", "give arrays train, valid and test")
    order = torch.randperm(n, generator=generator)
    if "test" in rows:
        return {"train": first[order[n // 6 :]], "valid": first[order[: n // 6]], "test": rows["test"]}
    valid, test, train = order.split([n // 10, n // 10, n - 2 * (n // 10)])
    return {"train": first[train], "valid": first[valid], "test": first[test]}


def _bytes_where_possible(rows: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
    """Rows as bytes where their values allow it, and the number of levels of a pixel."""
    if len({r.dtype for r in rows.values()}) > 1:
        got = ", ".join(f"{'bytes' if r.dtype == torch.uint8 else 'floats'} in {name}" for name, r in rows.items())
        refuse("pixels of one type", got, "save all arrays as uint8, or all as float32")
    parts = [part for r in rows.values() for part in r.split(FLOAT_ROWS)]
    if parts[0].is_floating_point():
        if not all(_is_grey(part) for part in parts):
            return rows, None
        rows = {name: (255 * r).round().to(torch.uint8) for name, r in rows.items()}
        parts = [part for r in rows.values() for part in r.split(FLOAT_ROWS)]
    if all(bool((part <= 1).all()) for part in parts):
        return rows, 2
    if all(bool(((part == 0) | (part == 255)).all()) for part in parts):
        return {name: r // 255 for name, r in rows.items()}, 2
    return rows, 256


def _is_grey(x: Tensor) -> bool:
    """All values k/255, to rounding."""
    return bool(((x >= 0) & (x <= 1) & ((255 * x - (255 * x).round()).abs() < 1e-3)).all())


def _rows(arrays: dict[str, np.ndarray], shape: Sequence[int] | None) -> tuple[dict[str, Tensor], Shape]:
    """Arrays as rows (N, dim) of bytes or float32, and the (C, H, W) of a row."""
    if shape is not None and (len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape)):
        raise ValueError(f"shape: expected (colours, height, width), got {tuple(shape)!r}; such as (1, 28, 28)")
    rows, shapes = {}, {}
    for name, array in arrays.items():
        array = _colours_first(array, name)
        shapes[name] = _shape_of(array, name, None if shape is None else tuple(shape))
        rows[name] = torch.from_numpy(_numbers(array.reshape(len(array), -1), name))
    if len(set(shapes.values())) > 1:
        got = ", ".join(f"{by(s)} in {name}" for name, s in shapes.items())
        refuse("rows of one size", got, "save images of one size")
    return rows, next(iter(shapes.values()))


def _colours_first(array: np.ndarray, name: str) -> np.ndarray:
    """The array, its axes (N, dim) or (N, C, H, W); refused if it has others or is empty."""
    got = f"an array of shape {array.shape} in {name}"
    if array.ndim == 1:
        refuse("rows of pixels (N, dim) or images (N, H, W)", got, "are these labels? give the pixels")
    if array.ndim not in (2, 3, 4):
        refuse("rows of pixels (N, dim) or images (N, H, W)", got, "reshape it")
    if array.size == 0:
        refuse("at least one row of pixels", got, "leave the empty array out, or fill it")
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4 and array.shape[1] not in (1, 3):
        if array.shape[3] not in (1, 3):
            refuse("images (N, C, H, W) or (N, H, W, C) of 1 or 3 colours", got, "save rows, and give shape=(C, H, W)")
        return np.moveaxis(array, 3, 1)
    return array


def _shape_of(array: np.ndarray, name: str, shape: Shape | None) -> Shape:
    """(C, H, W): what is asked for, if it fits; else the array's own, a square, or (1, 1, dim)."""
    if array.ndim == 4:
        if shape not in (None, array.shape[1:]):
            refuse(f"images of {by(shape)}, as shape says", f"{by(array.shape[1:])} in {name}", "leave shape out")
        return array.shape[1:]
    dim = array.shape[1]
    side = math.isqrt(dim - 1)
    got = f"{dim} columns in {name}"
    if shape is not None:
        if math.prod(shape) == dim - 1:
            refuse(f"{dim - 1} = {by(shape)} columns", f"{got}, one more", "take the labels out")
        if math.prod(shape) != dim:
            refuse(f"{math.prod(shape)} = {by(shape)} columns, as shape says", got, "give the shape of its images")
        return shape
    if side > 4 and side**2 == dim - 1 and (_like_labels(array[:, 0]) or _like_labels(array[:, -1])):
        column = "first" if _like_labels(array[:, 0]) and not _like_labels(array[:, -1]) else "last"
        remedy = f"take that column out, or give shape=(1, 1, {dim})"
        refuse(f"rows of pixels, such as {side} × {side}", f"{got}, the {column} one like labels", remedy)
    side = math.isqrt(dim)
    return (1, side, side) if side**2 == dim else (1, 1, dim)


def _like_labels(column: np.ndarray) -> bool:
    values = np.unique(column) if column.dtype.kind in "biuf" else np.array([0.5])
    return len(values) <= CLASSES and bool((values == np.round(values)).all())


def _numbers(rows: np.ndarray, name: str) -> np.ndarray:
    """Contiguous bytes or float32; refused unless they are whole numbers from 0 to 255, or finite floats."""
    kind = rows.dtype.kind
    if kind not in "biuf":
        refuse("bytes or floats", f"{rows.dtype} in {name}", "save the array as uint8 or float32")
    low, high = rows.min(), rows.max()  # NaN if any is
    if kind != "f":
        if low < 0 or high > 255:
            refuse(
                "whole numbers from 0 to 255",
                f"{low} to {high} in {name}",
                "rescale them, or save real numbers as floats",
            )
        return rows.astype(np.uint8, order="C")
    largest = np.finfo(np.float32).max
    if not (-largest <= low and high <= largest):
        bad = np.argwhere(~(np.abs(rows) <= largest))[0]
        got = f"{rows[tuple(bad)]} in {name}, row {bad[0]}, column {bad[1]}"
        refuse("finite numbers", got, "leave such rows out, or fill them")
    return rows.astype(np.float32, order="C")
