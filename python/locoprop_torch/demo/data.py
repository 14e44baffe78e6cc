"""Grey images for the demo: the CURVES problem, drawn here, and readers for MNIST-like files.

Images are ``[count, 28, 28]`` arrays. The readers look at images only: an autoencoder needs no labels.
"""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "SIDE",
    "TRAIN_CURVES",
    "ImageData",
    "curves",
    "curves_tensors",
    "file_tensors",
    "load",
    "load_idx",
    "load_npz",
]

SIDE = 28
# Images of CURVES unless the command line says otherwise.
TRAIN_CURVES, TEST_CURVES = 4000, 1000
# Curves are drawn block by block, so the first images of a seed do not depend on how many follow.
_BLOCK = 1024
# The standard deviation of the pen, in pixels.
_PEN = 0.5
# The ink on the middle of a stroke; it covers 1 - exp(-ink) of the paper.
_INK = 4.0
# Unsigned bytes in three dimensions.
_IDX_IMAGES_MAGIC = 0x00000803


class ImageData(NamedTuple):
    """Train and test images, ``[count, 28, 28]`` each; uint8 from files."""

    train: NDArray[np.uint8]
    test: NDArray[np.uint8]


def curves(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Images of random smooth curves, after the CURVES data of Hinton & Salakhutdinov (2006) and Martens (2010).

    Each image shows the parabola through three random points, drawn with a soft round pen; curves that leave the paper
    are drawn again. ``curves(n, seed)`` begins with the images of ``curves(m, seed)`` for ``m < n``.

    Args:
        count: number of images, >= 0.
        seed: seed of numpy's generator, >= 0.

    Returns:
        ``[count, 28, 28]`` in [0, 1], float32; paper is 0.

    Raises:
        ValueError: ``count`` or ``seed`` is negative.
    """
    if count < 0 or seed < 0:
        raise ValueError(f"count and seed must be >= 0, got count={count} and seed={seed}")
    rng = np.random.default_rng(seed)
    images = np.empty((count, SIDE, SIDE), dtype=np.float32)
    done = 0
    while done < count:
        block = _draw(_control_points(rng))[: count - done]
        images[done : done + len(block)] = block
        done += len(block)
    return images


def _control_points(rng: np.random.Generator) -> NDArray[np.float64]:
    """Quadratic Bézier curves through three random points that stay on the paper: ``[n <= _BLOCK, 3, 2]`` in pixels."""
    margin = 2.0
    points = rng.uniform(margin, SIDE - 1 - margin, size=(_BLOCK, 3, 2))
    chords = np.linalg.norm(np.diff(points, axis=1), axis=2)
    # Where the middle point lies on the curve.
    t = (chords[:, 0] / chords.sum(axis=1))[:, None]
    points[:, 1] = (points[:, 1] - (1 - t) ** 2 * points[:, 0] - t**2 * points[:, 2]) / (2 * t * (1 - t))
    path = _path(points)
    return points[((path >= margin) & (path <= SIDE - 1 - margin)).all(axis=(1, 2))]


def _path(points: NDArray[np.float64], steps: int = 64) -> NDArray[np.float64]:
    """Points along each curve at ``steps`` equal intervals' midpoints of t: ``[n, steps, 2]``."""
    t = (np.arange(steps) + 0.5) / steps
    basis = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1)
    return basis @ points


def _draw(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ink left by a Gaussian pen: a line integral, which is a product of matrices as the pen is separable."""
    path = _path(points)
    # The length of each piece, in pixels.
    length = np.linalg.norm(np.gradient(path, axis=1), axis=2)
    # [n, steps, (x, y), SIDE]
    pen = np.exp(-((path[:, :, :, None] - np.arange(SIDE)) ** 2) / (2 * _PEN**2))
    columns, rows = pen[:, :, 0], pen[:, :, 1]
    ink = rows.transpose(0, 2, 1) @ (columns * length[:, :, None])
    return 1 - np.exp(-_INK * ink / (_PEN * math.sqrt(2 * math.pi)))


def load(path: str | Path) -> ImageData:
    """Read a folder of IDX files with :func:`load_idx`, anything else with :func:`load_npz`."""
    return load_idx(path) if Path(path).is_dir() else load_npz(path)


def load_npz(path: str | Path) -> ImageData:
    """Read ``x_train`` and ``x_test`` (``[count, 28, 28]`` uint8) of a file laid out like Keras' ``mnist.npz``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an npz file, a broken one, or one with other arrays; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder; expected an .npz file or a folder of IDX files")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name")
        with archive:
            arrays = {name: archive[name] for name in ("x_train", "x_test")}
    except KeyError as error:
        raise ValueError(f"{path}: expected arrays x_train and x_test; {error.args[0]}") from error
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected an .npz file with x_train and x_test; it cannot be read: {error}"
        ) from error
    for name, array in arrays.items():
        _check_images(array, f"{path}: {name}")
    return ImageData(arrays["x_train"], arrays["x_test"])


def load_idx(folder: str | Path) -> ImageData:
    """Read ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, plain or ``.gz``, as (Fashion-)MNIST ships.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: a broken file; names it, what was expected and what came.
    """
    return ImageData(_read_idx(_find_idx(folder, "train-images")), _read_idx(_find_idx(folder, "t10k-images")))


def _find_idx(folder: str | Path, stem: str) -> Path:
    names = [f"{stem}{separator}idx3-ubyte{suffix}" for suffix in ("", ".gz") for separator in "-."]
    for name in names:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise FileNotFoundError(f"{folder}: expected a file {' or '.join(names)}, found none")


def _read_idx(path: Path) -> NDArray[np.uint8]:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected gzip data; it cannot be read: {error}") from error
    if len(content) < 16:
        raise ValueError(f"{path}: expected an IDX header of 16 bytes, got {len(content)} bytes")
    magic, count, height, width = (int(number) for number in np.frombuffer(content, dtype=">u4", count=4))
    if magic != _IDX_IMAGES_MAGIC:
        raise ValueError(f"{path}: expected magic number {_IDX_IMAGES_MAGIC:#010x} (IDX images), got {magic:#010x}")
    expected = count * height * width
    if len(content) - 16 != expected:
        shape = f"{count} images of {height} x {width}"
        raise ValueError(f"{path}: expected {expected} bytes of pixels ({shape}), got {len(content) - 16}")
    images = np.frombuffer(content, dtype=np.uint8, offset=16).reshape(count, height, width)
    _check_images(images, str(path))
    return images


def _check_images(array: NDArray[np.uint8], label: str) -> None:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[1:] != (SIDE, SIDE) or len(array) == 0:
        raise ValueError(
            f"{label}: expected uint8 images of shape [count >= 1, {SIDE}, {SIDE}], "
            f"got {array.dtype} {list(array.shape)}"
        )


def curves_tensors(seed: int, count: int = TRAIN_CURVES) -> tuple[Tensor, Tensor]:
    """``count`` train images and the test images of CURVES, ``[count, 784]`` in [0, 1], disjoint draws of one seed."""
    images = torch.from_numpy(curves(count + TEST_CURVES, seed)).flatten(1)
    return images[TEST_CURVES:], images[:TEST_CURVES]


def file_tensors(path: str, count: int | None) -> tuple[Tensor, Tensor]:
    """The train images of a file or folder, or the first ``count``, and its test images; ``[..., 784]`` in [0, 1].

    Raises:
        FileNotFoundError, ValueError: see :func:`load`; or there are fewer than ``count`` train images.
    """
    images = load(path)
    if count is not None and count > len(images.train):
        raise ValueError(f"--images must be at most {len(images.train)}, the train images in {path}; got {count}")
    train_images, test_images = (
        torch.from_numpy(part.astype(np.float32) / 255).flatten(1) for part in (images.train[:count], images.test)
    )
    return train_images, test_images
