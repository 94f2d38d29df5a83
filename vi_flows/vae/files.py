"""Arrays from NumPy's and MNIST's files, read without trust: damaged ones are refused, nothing is unpickled."""

from __future__ import annotations

import contextlib
import gzip
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..errors import first_line

SPLITS = ("train", "valid", "test")
LABELS = ("label", "target", "class")  # in names of arrays that hold no pixels; so are y, y_train, ...
IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
GZIP = b"\x1f\x8b"
FOLDER = {"train": ("train-images",), "test": ("t10k-images", "test-images")}  # MNIST's files and its relatives'


def digits(data: str, key: str | None) -> dict[str, np.ndarray]:
    """1,797 handwritten digits of 8 × 8 pixels, their 17 levels spread over the bytes.

    The test set of E. Alpaydin & C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
    Repository, 1998 (doi 10.24432/C50P49, CC BY 4.0), in scikit-learn's order; its values as they are in digits.npz.
    """
    _no_key(key, data)
    with np.load(Path(__file__).with_name("digits.npz")) as archive:
        return {data: np.rint(archive["images"] * (255 / 16)).astype(np.uint8)}


def read(path: Path, key: str | None) -> dict[str, np.ndarray]:
    """The arrays of a path, by what it begins with: train, valid and test, train and test, or one under its name.

    Raises ValueError, in one line, for files that are missing, damaged or of another kind, and arrays too many.
    """
    if path.is_dir():
        _no_key(key, path)
        return {split: _idx(_only(path, stems)) for split, stems in FOLDER.items()}
    if not path.is_file():
        refuse("a file or a folder", f"{path}, which does not exist", "check the path")
    with _readable(path), path.open("rb") as file:
        head = file.read(6)
    if head[:2] == b"PK":
        return _npz(path, key)
    _no_key(key, path)
    if head == b"\x93NUMPY":
        with _readable(path):
            return {path.name: np.load(path, allow_pickle=False)}
    if head[:2] in (GZIP, b"\0\0"):
        return {path.name: _idx(path)}
    refuse("an .npz, .npy or IDX file", f"{path}, which is none", "save the pixels with numpy.savez")


def _npz(path: Path, key: str | None) -> dict[str, np.ndarray]:
    with path.open("rb") as file:  # opened here: NumPy leaves a damaged file open
        with _readable(path):
            archive = np.load(file, allow_pickle=False)
        names = _wanted(archive.files, key, path)
        with _readable(path):
            arrays = {name: archive[name] for name in names}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            refuse("arrays", f"{name} in {path}, which is none", "write the file with numpy.savez")
    return arrays


def _wanted(names: Sequence[str], key: str | None, path: Path) -> Sequence[str]:
    """Which arrays of an .npz to read; labels and what else has no place are refused, not passed over."""
    listed = ", ".join(names) or "none"
    if key is not None:
        if key not in names:
            refuse(f"an array {key!r} in {path}", f"only {listed}", "give key= one of these")
        return [key]
    labels = [name for name in names if name == "y" or name.startswith("y_") or any(w in name.lower() for w in LABELS)]
    if labels:
        refuse(
            f"pixels only in {path}",
            f"{labels[0]}, which looks like labels",
            "leave it out, or name an array with key=",
        )
    if len(names) == 1:
        return names
    if not {"train", "test"} <= set(names) <= set(SPLITS):
        refuse(f"arrays train, valid, test (or one) in {path}", listed, "rename them, or name one with key=")
    return [name for name in SPLITS if name in names]


def _idx(path: Path) -> np.ndarray:
    """The array of an IDX file: two zeros, type, number of axes, their sizes as big-endian integers, the values."""
    with _readable(path):
        with path.open("rb") as plain:
            unpack = gzip.open if plain.read(2) == GZIP else open
        with unpack(path, "rb") as file:
            head = file.read(4)
            axes = head[3] if len(head) == 4 else 0
            sizes, body = file.read(4 * axes), file.read()
    if head[:2] != b"\0\0" or axes == 0 or head[2] not in IDX_TYPES or len(sizes) < 4 * axes:
        refuse("an IDX file", f"{path}, which does not begin like one", "check the file")
    shape = [int(n) for n in np.frombuffer(sizes, ">u4")]
    if axes == 1:
        refuse("images", f"{path}, which holds labels (one number a row)", "give the file of images")
    dtype = np.dtype(IDX_TYPES[head[2]])
    if len(body) != math.prod(shape) * dtype.itemsize:
        expected = f"{math.prod(shape) * dtype.itemsize} bytes of {by(shape)} in {path}"
        refuse(expected, f"{len(body)}", "the file is damaged: copy it again")
    return np.frombuffer(body, dtype).reshape(shape)


def _only(folder: Path, stems: tuple[str, ...]) -> Path:
    """The one file of a folder whose name has one of the stems; the plain one, where it is also there gzipped."""
    found = sorted(path for path in folder.iterdir() if path.is_file() and any(stem in path.name for stem in stems))
    found = [path for path in found if path.suffix != ".gz" or path.with_suffix("") not in found]
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        remedy = "give a folder with MNIST's four files, or a file"
        refuse(f"one file *{stems[0]}* in {folder}", got, remedy)
    return found[0]


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What reading raises, as a ValueError of one line."""
    try:
        yield
    except Exception as error:  # a damaged header makes NumPy raise almost anything
        reason = first_line(error, kind=False).rstrip(".")
        if "allow_pickle" in reason:
            refuse("numbers", f"{path}, which holds Python objects", "these are never unpickled: save uint8 or float32")
        refuse("a whole file", f"{path}, which cannot be read ({reason})", "the file may be damaged: copy it again")


def _no_key(key: str | None, data: str | Path) -> None:
    if key is not None:
        raise ValueError(f"key: expected none but for an .npz file, got {key!r} for {data}; leave it out")


def by(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def refuse(expected: str, got: str, remedy: str) -> NoReturn:
    raise ValueError(f"--data: expected {expected}, got {got}; {remedy}")
