"""Images and labels by name or path, and what to do where they are missing."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.autoencoder.protocol import Protocol
from locoprop_torch.demo import data as files
from locoprop_torch.demo.data import TEST_CURVES, TRAIN_CURVES, curves_tensors

__all__ = ["FASHION", "Images", "load", "load_labels"]

#: Where Debian's package puts it.
FASHION = Path("/usr/share/datasets/fashion-mnist")
_MEND = {
    "fashion-mnist": "apt-get install dataset-fashion-mnist",
    "mnist": "curl -LO https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
}
_IDX_LABELS_MAGIC = 0x00000801


@dataclass(frozen=True)
class Images:
    """Train and test images ``[count, 784]`` in [0, 1].

    Attributes:
        name: what the data are called in results: a name, or the stem of a file.
        digest: the beginning of the SHA-256 of all pixels, so that results say what they are of.
    """

    name: str
    train: Tensor
    test: Tensor
    digest: str

    def to(self, device: torch.device) -> Images:
        return Images(self.name, self.train.to(device), self.test.to(device), self.digest)


def load(source: str, protocol: Protocol) -> Images:
    """The images of ``source``: ``"curves"``, ``"fashion-mnist"``, an npz file or a folder of IDX files.

    Raises:
        ValueError: missing or corrupt files, or fewer images than the protocol takes; names the file, and the command
            that mends it.
    """
    if source == "curves":
        train, test = curves_tensors(0, protocol.images or 5 * TRAIN_CURVES)
        test = test[: min(protocol.test_images or TEST_CURVES, TEST_CURVES)]
        return Images("curves", train, test, _digest(train, test))
    path = _path(source)
    try:
        train, test = files.file_tensors(str(path), protocol.images)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}\n{_mended(path)}") from error
    if protocol.test_images is not None:
        test = test[: protocol.test_images]
    return Images(_name(path), train, test, _digest(train, test))


def load_labels(source: str, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Train and test labels ``[count]`` of a file or folder that has some, in the order of :func:`load`.

    Raises:
        ValueError: missing or corrupt files; names the file, and the command that mends it.
    """
    path = _path(source)
    try:
        if path.is_dir():
            train, test = (_read_idx_labels(path, stem) for stem in ("train", "t10k"))
        else:
            with np.load(path, allow_pickle=False) as archive:
                train, test = archive["y_train"], archive["y_test"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path}: expected labels y_train and y_test; {error}\n{_mended(path)}") from error
    counts = (protocol.images, protocol.test_images)
    first, second = (
        torch.from_numpy(part.astype(np.int64))[:count] for part, count in zip((train, test), counts, strict=True)
    )
    return first, second


def _path(source: str) -> Path:
    return FASHION if source == "fashion-mnist" else Path(source)


def _name(path: Path) -> str:
    return path.stem if path.is_file() else path.name


def _mended(path: Path) -> str:
    name = "fashion-mnist" if path == FASHION else "mnist"
    return f"To get {name}: {_MEND[name]}"


def _digest(*parts: Tensor) -> str:
    content = hashlib.sha256()
    for part in parts:
        content.update(part.numpy().tobytes())
    return content.hexdigest()[:16]


def _read_idx_labels(folder: Path, stem: str) -> np.ndarray:
    for name in (f"{stem}-labels{dot}idx1-ubyte{end}" for end in (".gz", "") for dot in "-."):
        path = folder / name
        if path.is_file():
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            magic, count = (int(number) for number in np.frombuffer(content[:8], dtype=">u4"))
            if magic != _IDX_LABELS_MAGIC or count != len(content) - 8:
                raise ValueError(f"{name} is not an IDX file of labels")
            return np.frombuffer(content, dtype=np.uint8, offset=8)
    raise FileNotFoundError(f"no file {stem}-labels-idx1-ubyte(.gz)")
