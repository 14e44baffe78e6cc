"""What checks of arguments have in common: which values are numbers, and how a value is shown in a message."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["as_flag", "check_choice", "is_finite", "is_number", "shown"]


def shown(value: Any) -> str:
    """``value`` for an error message: tensors and arrays by their shapes, long texts cut."""
    if isinstance(shape := getattr(value, "shape", None), tuple) and shape:
        return f"a {type(value).__name__} of shape {list(shape)}"
    text = repr(value.item()) if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number, of Python's or NumPy's, and no bool."""
    # The first answer is the usual one, and isinstance() of an abstract class takes long.
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def is_finite(number: Any) -> bool:
    """Whether a number is neither infinite nor NaN, nor an integer that no float can be."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def as_flag(name: str, value: Any) -> bool:
    """A bool of Python's or NumPy's, as Python's.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a ``ValueError`` unless ``value`` is one of ``choices``."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {shown(value)}")
