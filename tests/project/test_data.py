"""The images of the demo: the CURVES problem, and the readers of MNIST-like files."""

import gzip
import struct
import time

import numpy as np
import pytest

from locoprop_torch.demo.data import curves, load, load_idx, load_npz

STEMS = ("train-images", "t10k-images")


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=(count, 28, 28), dtype=np.uint8)


def idx_bytes(images, magic=0x803):
    return struct.pack(">4I", magic, *images.shape) + images.tobytes()


def write_idx(folder, train, test, separator="-", compressed=False):
    for stem, images in zip(STEMS, (train, test), strict=True):
        content = idx_bytes(images)
        name = f"{stem}{separator}idx3-ubyte" + (".gz" if compressed else "")
        (folder / name).write_bytes(gzip.compress(content) if compressed else content)


def test_curves_are_images_of_strokes():
    images = curves(500, seed=3)
    assert images.shape == (500, 28, 28)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    brightest = images.max(axis=(1, 2))
    assert brightest.min() > 0.9  # every image has a stroke ...
    assert images.mean(axis=(1, 2)).max() < 0.25  # ... on paper that is mostly empty,
    assert ((images > 0.1) & (images < 0.9)).any(axis=(1, 2)).all()  # antialiased,
    assert images[:, [0, -1]].max() < 0.1  # and within its margins
    assert images[:, :, [0, -1]].max() < 0.1


def test_curves_depend_on_the_seed_alone():
    images = curves(1500, seed=7)
    np.testing.assert_array_equal(images, curves(1500, seed=7))
    np.testing.assert_array_equal(images[:40], curves(40, seed=7))
    assert not np.array_equal(images[:40], curves(40, seed=8))


def test_curves_vary():
    images = curves(1000, seed=1).reshape(1000, -1)
    assert len(np.unique(images, axis=0)) == 1000
    used = (images.max(axis=0) > 0.5).reshape(28, 28)
    assert used[4:24, 4:24].all()  # strokes go everywhere
    spectrum = np.linalg.svd(images - images.mean(0), compute_uv=False) ** 2
    assert spectrum[:6].sum() < 0.7 * spectrum.sum()  # far from linear in its six degrees of freedom


def test_curves_are_drawn_fast():
    start = time.process_time()
    curves(3000, seed=0)
    assert time.process_time() - start < 10  # a fraction of a second; time of this process, so others may be busy


def test_no_curves():
    assert curves(0).shape == (0, 28, 28)


@pytest.mark.parametrize(("count", "seed"), [(-1, 0), (3, -1)])
def test_negative_arguments_of_curves(count, seed):
    with pytest.raises(ValueError, match=f"count={count} and seed={seed}"):
        curves(count, seed)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx_round_trip(tmp_path, separator, compressed):
    train, test = random_images(5), random_images(3, seed=1)
    write_idx(tmp_path, train, test, separator, compressed)
    loaded = load(tmp_path)
    np.testing.assert_array_equal(loaded.train, train)
    np.testing.assert_array_equal(loaded.test, test)


def test_npz_round_trip(tmp_path):
    train, test = random_images(5), random_images(3, seed=1)
    labels = {"y_train": np.zeros(5, np.uint8), "y_test": np.zeros(3, np.uint8)}
    arrays = {"x_train": train, "x_test": test, **labels}
    np.savez_compressed(tmp_path / "digits.npz", **arrays)
    loaded = load(tmp_path / "digits.npz")
    np.testing.assert_array_equal(loaded.train, train)
    np.testing.assert_array_equal(loaded.test, test)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header of 16 bytes, got 0"),
        (idx_bytes(random_images(2))[:11], "header of 16 bytes, got 11"),
        (idx_bytes(random_images(2), magic=0x801), "0x00000803.*got 0x00000801"),
        (idx_bytes(random_images(2))[:-1], r"1568 bytes of pixels \(2 images of 28 x 28\), got 1567"),
        (idx_bytes(random_images(2)) + b"x", "1568 bytes of pixels.*got 1569"),
        (idx_bytes(random_images(2)[:, :14]), r"\[count >= 1, 28, 28\], got uint8 \[2, 14, 28\]"),
        (idx_bytes(random_images(0)), r"got uint8 \[0, 28, 28\]"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_broken_idx_file(tmp_path, content, message, compressed):
    write_idx(tmp_path, random_images(2), random_images(2), compressed=compressed)
    name = "t10k-images-idx3-ubyte" + (".gz" if compressed else "")
    (tmp_path / name).write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        load_idx(tmp_path)


@pytest.mark.parametrize("damage", [lambda c: c[:-20], lambda c: b"plain" + c, lambda c: c[:60] + b"\0" * 40 + c[100:]])
def test_broken_gzip_file(tmp_path, damage):
    write_idx(tmp_path, random_images(2), random_images(2), compressed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: expected gzip data"):
        load_idx(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file train-images-idx3-ubyte or"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz: no such file or folder"):
        load(tmp_path / "nothing.npz")


def test_broken_npz_files(tmp_path):
    path = tmp_path / "digits.npz"
    np.savez_compressed(path, x_train=random_images(4), x_test=random_images(4))
    whole = path.read_bytes()
    for content in (b"", b"not an archive", whole[:-30], whole[:200] + b"\0" * 50 + whole[250:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"digits\.npz: expected an \.npz file"):
            load_npz(path)
    np.save(tmp_path / "digits.npy", random_images(4))
    with pytest.raises(ValueError, match=r"digits\.npy: expected an \.npz file"):
        load_npz(tmp_path / "digits.npy")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": random_images(4)}, "expected arrays x_train and x_test; x_test"),
        ({"x_train": random_images(4), "x_test": random_images(4).astype(np.float32)}, "x_test: .*got float32"),
        ({"x_train": random_images(4).reshape(4, 784), "x_test": random_images(4)}, r"x_train: .*got uint8 \[4, 784\]"),
        ({"x_train": random_images(4), "x_test": np.array([object()])}, "cannot be read"),
    ],
)
def test_npz_with_other_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "digits.npz", **arrays)
    with pytest.raises(ValueError, match=rf"digits\.npz: .*{message}"):
        load_npz(tmp_path / "digits.npz")
