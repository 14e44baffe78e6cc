"""The study's data: tables and digits that ship with scikit-learn, the demo's curves, text of Python's own manual.

Every set is split into train and test examples by a fixed seed. ``mnist`` alone comes from a file.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from locoprop_torch.demo.data import curves_tensors

__all__ = ["ALPHABET", "CONTEXT", "NEEDS_FILE", "SETS", "Split", "load"]

# Printable ASCII and the end of a line; other characters of the text become a space.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 64
NEEDS_FILE = ("mnist", "mnist-images")
_TEST_SHARE = 0.25
_TRAIN_IMAGES, _TEST_IMAGES = 6000, 2000
_TRAIN_TEXT, _TEST_TEXT = 100_000, 15_000


class Split(NamedTuple):
    """Train and test examples: inputs and targets, with examples in the first dimension."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def _split(x: Tensor, y: Tensor) -> Split:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order.split([int(_TEST_SHARE * len(x)), len(x) - int(_TEST_SHARE * len(x))])
    return Split(x[train], y[train], x[test], y[test])


def _standardised(split: Split, targets: bool = False) -> Split:
    """Inputs, and targets if asked for, with the mean and standard deviation of the train examples removed."""
    mean, std = split.x.mean(0), split.x.std(0)
    x, test_x = ((part - mean) / std for part in (split.x, split.test_x))
    if not targets:
        return Split(x, split.y, test_x, split.test_y)
    mean, std = split.y.mean(0), split.y.std(0)
    return Split(x, (split.y - mean) / std, test_x, (split.test_y - mean) / std)


def _table(name: str, column: bool, **options: object) -> Split:
    """A table of scikit-learn; a column of targets is ``[examples, 1]`` float32, classes are ``[examples]`` int64."""
    from sklearn import datasets

    x, y = getattr(datasets, name)(return_X_y=True, **options)
    targets = torch.tensor(y, dtype=torch.float32).unsqueeze(1) if column else torch.tensor(y, dtype=torch.int64)
    return _split(torch.tensor(np.asarray(x), dtype=torch.float32), targets)


def _digits(_: Path | None) -> Split:
    split = _table("load_digits", column=False)
    return split._replace(x=split.x / 16, test_x=split.test_x / 16)


def _digits_images(_: Path | None) -> Split:
    split = _digits(None)
    return Split(split.x, split.x, split.test_x, split.test_x)


def _friedman(_: Path | None) -> Split:
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(n_samples=2000, noise=1.0, random_state=0)
    columns = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32).unsqueeze(1)
    return _standardised(_split(*columns), targets=True)


def _mnist(path: Path | None) -> Split:
    assert path is not None
    with np.load(path, allow_pickle=False) as archive:
        images = {part: archive[f"x_{part}"] for part in ("train", "test")}
        labels = {part: archive[f"y_{part}"] for part in ("train", "test")}
    count = {"train": _TRAIN_IMAGES, "test": _TEST_IMAGES}
    x = {part: torch.from_numpy(images[part][:n].astype(np.float32) / 255).flatten(1) for part, n in count.items()}
    y = {part: torch.from_numpy(labels[part][:n].astype(np.int64)) for part, n in count.items()}
    return Split(x["train"], y["train"], x["test"], y["test"])


def _mnist_images(path: Path | None) -> Split:
    x, _, test_x, _ = _mnist(path)
    return Split(x, x, test_x, test_x)


def _curves(_: Path | None) -> Split:
    train, test = curves_tensors(seed=0, count=2000)
    return Split(train, train, test, test)


def _text(_: Path | None) -> Split:
    """Windows of characters and, shifted by one, what is to be predicted; train and test are parts of one text."""
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    codes = {character: code for code, character in enumerate(ALPHABET)}
    space = codes[" "]
    tokens = torch.tensor([codes.get(character, space) for character in text[: _TRAIN_TEXT + _TEST_TEXT]])
    train, test = (part.unfold(0, CONTEXT + 1, CONTEXT) for part in (tokens[:_TRAIN_TEXT], tokens[_TRAIN_TEXT:]))
    return Split(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:])


SETS: dict[str, Callable[[Path | None], Split]] = {
    "digits": _digits,
    "digits-images": _digits_images,
    "diabetes": lambda _: _standardised(_table("load_diabetes", column=True), targets=True),
    "diabetes-raw": lambda _: _table("load_diabetes", column=True, scaled=False),
    "cancer": lambda _: _standardised(_table("load_breast_cancer", column=True)),
    "wine": lambda _: _standardised(_table("load_wine", column=False)),
    "friedman": _friedman,
    "mnist": _mnist,
    "mnist-images": _mnist_images,
    "curves": _curves,
    "text": _text,
}


@cache
def load(name: str, mnist: Path | None = None) -> Split:
    """The set called ``name``, a key of :data:`SETS`.

    Args:
        name: of the set.
        mnist: an ``.npz`` file with ``x_train``, ``y_train``, ``x_test`` and ``y_test``; read for ``"mnist"`` alone.

    Raises:
        ValueError: the set needs a file, and none was given.
    """
    if name in NEEDS_FILE and mnist is None:
        raise ValueError(f"data set {name!r} needs a file: give --mnist FILE.npz")
    return SETS[name](mnist)
