"""Data for VAEs: every kind of file, splits, what is drawn; and every bad file with its one line."""

import gzip
import io
import math
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch

from vi_flows.vae.data import load

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (60, 6, 4), dtype=np.uint8)
BITS = RNG.integers(0, 2, (60, 24), dtype=np.uint8)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def splits(rows):
    return {"train": rows[:40], "valid": rows[40:50], "test": rows[50:]}


def idx(array, kind=8):
    """The bytes of an IDX file, from the description of the format."""
    sizes = b"".join(struct.pack(">I", n) for n in array.shape)
    return bytes([0, 0, kind, array.ndim]) + sizes + array.tobytes()


def rows_of(images):
    return sorted(map(tuple, torch.cat([images.train, images.valid, images.test]).tolist()))


def test_three_arrays_of_bits(tmp_path):
    images = load(npz(tmp_path / "bits.npz", **splits(BITS)))
    assert (images.name, images.shape, images.levels, images.noise, images.dim) == ("bits", (1, 1, 24), 2, "none", 24)
    assert images.train.dtype == torch.uint8
    for got, want in zip((images.train, images.valid, images.test), splits(BITS).values(), strict=True):
        assert np.array_equal(got, want)
        assert torch.equal(images.values(got, training=True), got.float())
    assert images.centre == pytest.approx(BITS[:40].mean()) and images.spread == pytest.approx(BITS[:40].std())


@pytest.mark.parametrize("same", [BITS.astype(bool), BITS.astype(float), 255 * BITS, BITS.astype(np.int64)])
def test_bits_by_other_names_are_bits(tmp_path, same):
    images = load(npz(tmp_path / "bits.npz", **splits(same)))
    assert images.levels == 2 and np.array_equal(images.train, BITS[:40])


def test_grey_bytes(tmp_path):
    images = load(npz(tmp_path / "grey.npz", **splits(GREY)))
    assert (images.shape, images.levels) == ((1, 6, 4), 256)
    assert np.allclose(images.values(images.test), GREY[50:].reshape(10, 24) / 255, atol=1e-7)
    assert images.values(images.test).dtype == torch.float32
    assert images.centre == pytest.approx(GREY[:40].mean() / 255)
    assert images.spread == pytest.approx(GREY[:40].std() / 255)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int64, np.float32, np.float64])
def test_grey_levels_by_other_types_are_bytes(tmp_path, dtype):
    same = GREY.astype(dtype) if np.dtype(dtype).kind != "f" else (GREY / 255).astype(dtype)
    images = load(npz(tmp_path / "grey.npz", **splits(same)))
    assert images.levels == 256 and np.array_equal(images.train, GREY[:40].reshape(40, 24))


def test_real_numbers_stay_as_they_are(tmp_path):
    x = 1e5 + 1e3 * RNG.standard_normal((60, 7))
    images = load(npz(tmp_path / "real.npz", **splits(x)))
    assert images.levels is None and images.train.dtype == torch.float32 and images.shape == (1, 1, 7)
    assert np.array_equal(images.values(images.train, training=True), x[:40].astype(np.float32))
    assert images.centre == pytest.approx(x[:40].mean(), rel=1e-6)
    assert images.spread == pytest.approx(x[:40].std(), rel=1e-4)


def test_axes_and_shapes(tmp_path):
    colour = RNG.integers(0, 256, (30, 3, 5, 4), dtype=np.uint8)
    first = load(npz(tmp_path / "a.npz", x=colour))
    last = load(npz(tmp_path / "b.npz", x=np.moveaxis(colour, 1, -1)))
    assert first.shape == last.shape == (3, 5, 4)
    assert torch.equal(first.train, last.train)
    assert rows_of(first) == sorted(map(tuple, colour.reshape(30, 60).tolist()))
    given = load(npz(tmp_path / "c.npz", x=np.asfortranarray(colour.reshape(30, 60))), shape=(3, 5, 4))
    assert given.shape == (3, 5, 4) and torch.equal(given.train, first.train)
    assert load(npz(tmp_path / "d.npz", x=colour.reshape(30, 60)[:, :49])).shape == (1, 7, 7)


def test_one_array_is_split_by_the_seed(tmp_path):
    path = tmp_path / "one.npy"
    np.save(path, GREY)
    images, again, other = load(path), load(str(path)), load(path, seed=1)
    assert [len(rows) for rows in (images.train, images.valid, images.test)] == [48, 6, 6]
    assert rows_of(images) == rows_of(other) == sorted(map(tuple, GREY.reshape(60, 24).tolist()))
    assert torch.equal(images.train, again.train) and not torch.equal(images.train, other.train)


def test_validation_is_split_off_train(tmp_path):
    images = load(npz(tmp_path / "two.npz", train=GREY[:48], test=GREY[48:]))
    assert [len(rows) for rows in (images.train, images.valid, images.test)] == [40, 8, 12]
    assert np.array_equal(images.test, GREY[48:].reshape(12, 24))
    assert rows_of(images) == sorted(map(tuple, GREY.reshape(60, 24).tolist()))


def test_an_array_by_its_key(tmp_path):
    path = npz(tmp_path / "mixed.npz", x=GREY, y=np.arange(60))
    assert rows_of(load(path, key="x")) == sorted(map(tuple, GREY.reshape(60, 24).tolist()))


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path, packed):
    path = tmp_path / ("images-idx3-ubyte" + (".gz" if packed else ""))
    path.write_bytes(gzip.compress(idx(GREY)) if packed else idx(GREY))
    images = load(path)
    assert images.shape == (1, 6, 4) and images.levels == 256
    assert rows_of(images) == sorted(map(tuple, GREY.reshape(60, 24).tolist()))


def test_idx_floats_are_big_endian(tmp_path):
    x = RNG.standard_normal((20, 3, 2))
    path = tmp_path / "floats"
    path.write_bytes(idx(x.astype(">f4"), kind=13))
    assert rows_of(load(path)) == sorted(map(tuple, x.reshape(20, 6).astype(np.float32).tolist()))


def test_the_folder_of_mnist(tmp_path):
    """Its four files, two of them also unpacked; labels are left alone."""
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(GREY[:48])))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"damaged, but the plain one is there")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(GREY[48:]))
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(idx(np.arange(10, dtype=np.uint8)))
    images = load(tmp_path)
    assert [len(rows) for rows in (images.train, images.valid, images.test)] == [40, 8, 12]
    assert np.array_equal(images.test, GREY[48:].reshape(12, 24))


def test_digits_come_with_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    images = load("digits")
    assert (images.name, images.shape, images.levels) == ("digits", (1, 8, 8), 256)
    assert [len(rows) for rows in (images.train, images.valid, images.test)] == [1439, 179, 179]
    assert len(images.train.unique()) == 17 and images.train.max() == 255


def test_threshold(tmp_path):
    images = load(npz(tmp_path / "grey.npz", **splits(GREY)), binarise="threshold")
    assert (images.levels, images.noise) == (2, "none")
    assert np.array_equal(images.train, GREY[:40].reshape(40, 24) >= 128)


@pytest.fixture
def ramp(tmp_path):
    """20,000 rows of five pixels: 0, 1, 100, 254 and 255; a frequency p has standard error √(p (1 − p)/20,000)."""
    levels = np.tile(np.array([0, 1, 100, 254, 255], dtype=np.uint8), (20_000, 1))
    return npz(tmp_path / "ramp.npz", train=levels, valid=levels, test=levels), levels[0] / 255


def within(frequency, p, n=20_000):
    return bool((np.abs(np.asarray(frequency) - p) <= 4.5 * np.sqrt(p * (1 - p) / n)).all())


def test_static_binarisation_draws_once(ramp):
    path, p = ramp
    images = load(path, binarise="static")
    assert (images.levels, images.noise) == (2, "none")
    for rows in (images.train, images.valid, images.test):
        assert rows.dtype == torch.uint8 and rows.max() == 1
        assert within(rows.double().mean(0), p)
        assert torch.equal(images.values(rows, training=True), rows.float())
    assert not torch.equal(images.train, images.test)
    assert torch.equal(images.train, load(path, binarise="static").train)
    assert not torch.equal(images.train, load(path, binarise="static", seed=1).train)


def test_dynamic_binarisation_draws_each_time(ramp):
    path, p = ramp
    images = load(path, binarise="dynamic")
    assert (images.levels, images.noise) == (2, "dynamic")
    first, second = (images.values(images.train, training=True) for _ in range(2))
    for x in (first, second, images.values(images.valid), images.values(images.test, training=True)):
        assert x.dtype == torch.float32 and ((x == 0) | (x == 1)).all()
        assert within(x.double().mean(0), p)
    # two draws of a pixel are independent: they differ with probability 2 p (1 − p)
    assert within((first != second).double().mean(0), 2 * p * (1 - p))
    assert torch.equal(images.values(images.test), load(path, binarise="dynamic").values(images.test))
    assert np.allclose(images.values(images.train)[0], p)
    generator = torch.Generator().manual_seed(3)
    drawn = images.values(images.train, training=True, generator=generator)
    assert torch.equal(drawn, images.values(images.train, training=True, generator=generator.manual_seed(3)))
    assert images.centre == pytest.approx(p.mean()) and images.spread == pytest.approx(
        math.sqrt(p.mean() * (1 - p.mean()))
    )


def test_dequantisation_is_uniform_in_the_bin(ramp):
    """u = 256 x − k: mean ½ ± 1/√(12 n), mean of squares ⅓ ± √(4/45 n), within 4.5 of these; below 1 throughout."""
    path, _ = ramp
    images = load(path, dequantise=True)
    assert (images.levels, images.noise) == (None, "dequantise")
    k, n = images.train[0], 20_000
    first, second = (images.values(images.train, training=True) for _ in range(2))
    assert not torch.equal(first, second)
    for x in (first, second, images.values(images.valid), images.values(images.test)):
        u = 256 * x.double() - k
        assert (u >= 0).all() and (u < 1).all()
        assert ((u.mean(0) - 1 / 2).abs() < 4.5 / (12 * n) ** 0.5).all()
        assert ((u.square().mean(0) - 1 / 3).abs() < 4.5 * (4 / 45 / n) ** 0.5).all()
    assert torch.allclose(images.values(images.train)[0], (k + 0.5) / 256)


def test_the_largest_dequantised_value_is_below_one(ramp, monkeypatch):
    path, _ = ramp
    images = load(path, dequantise=True)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(*shape, 1 - 2.0**-24))
    assert images.values(images.train[:1], training=True).max() < 1


def test_loading_leaves_the_global_generator(ramp):
    state = torch.get_rng_state()
    load(ramp[0], binarise="dynamic")
    assert torch.equal(state, torch.get_rng_state())


def refused(data, message, **options):
    with pytest.raises(ValueError, match=message) as error:
        load(data, **options)
    assert "\n" not in str(error.value)


LABELLED = np.hstack([RNG.random((60, 49)), RNG.integers(0, 10, (60, 1))])
HOLED = np.where(np.arange(60 * 24).reshape(60, 24) == 51, np.nan, RNG.random((60, 24)))
BAD_ARRAYS = {
    "labels as an array": ({"train": GREY, "test": GREY, "y_train": np.arange(60)}, "got y_train, which looks like"),
    "labels under a longer name": ({"x": GREY, "digit_labels": np.arange(60)}, "got digit_labels, which looks like"),
    "labels alone": ({"x": np.arange(60)}, r"expected rows of pixels \(N, dim\) .*\(60,\) in x; are these labels"),
    "labels in a column": ({"x": LABELLED}, r"such as 7 × 7, got 50 columns in x, the last one like labels; take that"),
    "labels in front": ({"x": LABELLED[:, ::-1]}, "got 50 columns in x, the first one like labels"),
    "other arrays": (
        {"train": GREY, "test": GREY, "ids": GREY},
        "expected arrays train, valid, test .* got train, test",
    ),
    "no test": ({"train": GREY, "valid": GREY}, "expected arrays train, valid, test .* got train, valid; rename"),
    "nothing": ({}, "expected arrays train, valid, test .* got none"),
    "an empty split": (splits(GREY) | {"valid": GREY[:0]}, r"at least one row of pixels, got .*\(0, 6, 4\) in valid"),
    "differing sizes": (splits(GREY) | {"test": GREY[:, :5]}, "rows of one size, got .* 1 × 5 × 4 in test; save"),
    "differing types": (splits(GREY) | {"test": GREY / 7.0}, "pixels of one type, got bytes in train.* floats in test"),
    "too few": ({"x": GREY[:9]}, "expected at least 10 rows to split, got 9 in x; give arrays"),
    "NaN": ({"x": HOLED}, "expected finite numbers, got nan in x, row 2, column 3; leave such rows out"),
    "infinite": ({"x": np.nan_to_num(HOLED, nan=-np.inf)}, "finite numbers, got -inf in x, row 2, column 3"),
    "too large for float32": ({"x": HOLED.astype(np.float64) * 0 + 1e39}, "expected finite numbers, got 1e.39 in x"),
    "above 255": ({"x": GREY.astype(np.int32) * 2}, "expected whole numbers from 0 to 255, got 0 to 510 in x; rescale"),
    "negative": ({"x": GREY.astype(np.int32) - 9}, "whole numbers from 0 to 255, got -9 to 246 in x"),
    "text": ({"x": np.array([["a", "b"]] * 20)}, "expected bytes or floats, got <U1 in x; save the array as uint8"),
    "complex": ({"x": GREY[:, 0] * 1j}, "expected bytes or floats, got complex128 in x"),
    "objects": ({"x": np.array([[None, 1]] * 20)}, "expected numbers, got .*x.npz, which holds Python objects; these"),
    "constant": ({"x": 0 * GREY + 7}, "expected pixels that vary, got 7 everywhere in the training rows; check"),
    "five axes": ({"x": GREY.reshape(5, 2, 2, 18, 4)[:, :, :, :, None]}, r"got an array of shape .* in x; reshape it"),
    "no colours": ({"x": GREY.reshape(10, 6, 6, 4)}, "images .* of 1 or 3 colours, got .*; save rows, and give shape="),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path, case):
    arrays, message = BAD_ARRAYS[case]
    refused(npz(tmp_path / "x.npz", **arrays), "--data: .*" + message if message.startswith("expected") else message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"binarise": "often"}, "binarise: expected one of none, static, dynamic, threshold, got 'often'"),
        (
            {"binarise": "static", "dequantise": True},
            "dequantise: expected no binarisation beside it, got static; choose",
        ),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"key": "y"}, "--data: expected an array 'y' in .*, got only x; give key= one of these"),
        ({"shape": (6, 4)}, r"shape: expected \(colours, height, width\), got \(6, 4\); such as"),
        (
            {"shape": (1, 4, 6)},
            "--data: expected images of 1 × 4 × 6, as shape says, got 1 × 6 × 4 in x; leave shape out",
        ),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    refused(npz(tmp_path / "x.npz", x=GREY), message, **options)


def test_options_that_need_grey_bytes(tmp_path):
    bits, real = npz(tmp_path / "b.npz", x=BITS), npz(tmp_path / "r.npz", x=GREY / 7.0)
    refused(
        bits, "binarise: expected grey bytes in --data, got pixels that are 0 or 1 already; leave", binarise="static"
    )
    refused(bits, "dequantise: expected grey bytes in --data, got pixels that are 0 or 1 already", dequantise=True)
    refused(
        real, "binarise: expected grey bytes in --data, got real numbers; leave it out, or save", binarise="dynamic"
    )
    refused(real, "dequantise: expected grey bytes in --data, got real numbers", dequantise=True)


def test_shapes_that_do_not_fit_rows(tmp_path):
    path = npz(tmp_path / "x.npz", x=GREY.reshape(60, 24))
    refused(path, "--data: expected 25 = 1 × 5 × 5 columns, as shape says, got 24 columns in x; give", shape=(1, 5, 5))
    refused(
        path,
        "--data: expected 23 = 1 × 1 × 23 columns, got 24 columns in x, one more; take the labels out",
        shape=(1, 1, 23),
    )
    # what the guard against labels refuses can be had by saying so
    labelled = npz(tmp_path / "y.npz", x=LABELLED)
    assert load(labelled, shape=(1, 1, 50)).dim == 50


def test_files_that_are_not_there_or_not_data(tmp_path):
    refused(tmp_path / "none.npz", "--data: expected a file or a folder, got .*none.npz, which does not exist; check")
    (tmp_path / "notes.npz").write_text("pixels")
    refused(tmp_path / "notes.npz", "--data: expected an .npz, .npy or IDX file, got .*notes.npz, which is none; save")
    (tmp_path / "empty").write_bytes(b"")
    refused(tmp_path / "empty", "expected an .npz, .npy or IDX file, got .*empty, which is none")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as file:
        file.writestr("x.txt", "pixels")
    refused(tmp_path / "zip.npz", "--data: expected arrays, got x.txt in .*zip.npz, which is none; write the file with")
    np.save(tmp_path / "objects.npy", np.array([[None, 1]] * 20), allow_pickle=True)
    refused(
        tmp_path / "objects.npy", "--data: expected numbers, got .*objects.npy, which holds Python objects; these are"
    )
    np.save(tmp_path / "x.npy", GREY)
    refused(tmp_path / "x.npy", "key: expected none but for an .npz file, got 'x' for .*x.npy; leave it out", key="x")
    refused("digits", "key: expected none but for an .npz file, got 'x' for digits", key="x")


def test_idx_files_that_are_none(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(idx(np.arange(50, dtype=np.uint8)))
    refused(
        path, r"--data: expected images, got .*data, which holds labels \(one number a row\); give the file of images"
    )
    path.write_bytes(gzip.compress(b"not IDX at all"))
    refused(path, "--data: expected an IDX file, got .*data, which does not begin like one; check the file")
    path.write_bytes(idx(GREY, kind=7))
    refused(path, "which does not begin like one")
    path.write_bytes(idx(GREY) + b"more")
    refused(path, "--data: expected 1440 bytes of 60 × 6 × 4 in .*data, got 1444; the file is damaged: copy it again")


def test_folders_without_the_files(tmp_path):
    refused(
        tmp_path, r"--data: expected one file \*train-images\* in .*, got none; give a folder with MNIST's four files"
    )
    for name in ("a-train-images", "b-train-images"):
        (tmp_path / name).write_bytes(idx(GREY))
    refused(tmp_path, r"expected one file \*train-images\* in .*, got a-train-images, b-train-images")


@pytest.mark.parametrize("kind", ["npz", "packed npz", "npy", "idx", "packed idx"])
def test_truncated_files_are_refused_wherever_they_end(tmp_path, kind):
    buffer = io.BytesIO()
    {"npz": np.savez, "packed npz": np.savez_compressed}.get(kind, lambda *_, **__: None)(buffer, **splits(GREY))
    if kind == "npy":
        np.save(buffer, GREY)
    whole = {"idx": idx(GREY), "packed idx": gzip.compress(idx(GREY))}.get(kind) or buffer.getvalue()
    path = tmp_path / "data"
    path.write_bytes(whole)
    assert load(path).shape == (1, 6, 4)
    for length in [*range(0, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, "^--data: expected ")


@pytest.mark.parametrize("kind", ["npz", "npy", "packed idx"])
def test_damaged_bytes_are_refused_or_harmless(tmp_path, kind):
    buffer = io.BytesIO()
    (np.savez_compressed(buffer, **splits(GREY)) if kind == "npz" else np.save(buffer, GREY))
    whole = gzip.compress(idx(GREY)) if kind == "packed idx" else buffer.getvalue()
    path, rng = tmp_path / "data", np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.integers(0, len(whole) if kind == "packed idx" else 128)] ^= 1 << rng.integers(0, 8)
        path.write_bytes(damaged)
        try:
            load(path)
        except ValueError as error:
            assert "\n" not in str(error) and "--data: expected " in str(error)
