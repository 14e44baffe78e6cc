"""Which rows of the batch a local step works on, where it does not take all of them.

In increment form ``G_t = G_0 + E_tᵀ X + λ Δ_t`` the gradient of the whole batch is there from the start, and
``E_tᵀ X`` is a correction that few rows estimate. The batch falls into ``S`` sets, of every ``S``-th row each: rows of
one sequence or image are alike, so a set is spread over the batch. A local step takes one set, and counts it ``S``
times: over all sets the average is the full sum exactly. Sets are taken in random order, and none is taken again before
all have been.

``S = ⌈B / rows⌉``. A batch that comes in parts begins with that of its first part, and ``S`` is doubled until
``S · rows`` is no less than all rows. For the rows of earlier parts need not be kept for it: the orders are *nested*.
A local step's set among ``2 S`` is one of the two halves of its set among ``S``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

__all__ = ["Sampling", "count_sets", "count_sets_of_parts", "set_order", "set_size"]

_WORD = 2**32
_MIXINGS = 4
# Local steps whose sets are put in order together, and seeds: those of the next steps of training come next.
_AT_ONCE = 16
_SEEDS = 8


class Sampling(NamedTuple):
    """What says, before a step, which rows its local steps will take.

    Attributes:
        rows: of the batch in a local step, at most.
        seed: of the step, see :func:`set_order`.
        steps: how many local steps take a set.
    """

    rows: int
    seed: int
    steps: int


def count_sets(batch: int, rows: int | None) -> int:
    """``S``, into how many sets a batch falls; 1 where all rows are taken."""
    return 1 if rows is None or rows >= batch else -(-batch // rows)


def count_sets_of_parts(sizes: Iterable[int], rows: int | None) -> int:
    """``S`` of a batch that comes in parts of these sizes, in order; never so many that a set would be empty."""
    filled = [size for size in sizes if size]
    if rows is None or not filled:
        return 1
    sets, batch = count_sets(filled[0], rows), sum(filled)
    while sets * rows < batch and 2 * sets <= batch:
        sets *= 2
    return sets


def set_size(batch: int, sets: int, number: int) -> int:
    """How many rows the set ``number`` has: row ``number`` of the batch and every ``sets``-th after it."""
    return -(-(batch - number) // sets)


def set_order(seed: int, sets: int, count: int) -> tuple[int, ...]:
    """The sets that ``count`` local steps take, in order: a function of its arguments, the same on every machine.

    With ``sets = d · 2^j`` for an odd ``d``, a local step takes set ``o + d q``. ``o`` runs through the numbers below
    ``d`` in random order, and in another one each time; ``q`` through those below ``2^j`` in an order that
    :func:`_scrambled` makes random. As it never depends on the upper bits of what it scrambles, the lower bits of ``q``
    are the same for all ``j``: so the sets for ``sets`` and ``2 * sets`` are nested.

    Args:
        seed: of the step of training; other seeds give other orders.
        sets: ``S``.
        count: how many local steps take a set.
    """
    # Those who keep rows and those who use them ask for counts that differ by one.
    return _orders(seed // _SEEDS, sets, -(-count // _AT_ONCE) * _AT_ONCE)[seed % _SEEDS][:count]


@lru_cache(maxsize=64)
def _orders(block: int, sets: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Those of several seeds at once: alone, each would find nothing of what makes it in the processor's caches."""
    return tuple([_order(block * _SEEDS + number, sets, count) for number in range(_SEEDS)])


def _order(seed: int, sets: int, count: int) -> tuple[int, ...]:
    powers = sets & -sets
    odd = sets // powers
    places = [0] * count
    if odd > 1:
        generator = np.random.Generator(np.random.PCG64([seed, odd]))
        rounds = [generator.permutation(odd) for _ in range(-(-count // odd))]
        places = np.concatenate([*rounds, np.zeros(0, np.int64)])[:count].tolist()
    if powers == 1:
        return tuple(places)
    # Another generator, as this must not depend on the number of rounds.
    generator = np.random.Generator(np.random.PCG64([seed, odd, 1]))
    factors = [2 * int(number) for number in generator.integers(_WORD // 2, size=_MIXINGS)]
    shifts = generator.integers(_WORD, size=odd)
    return tuple(
        place + odd * (_scrambled(t // odd + int(shifts[place]), factors) % powers) for t, place in enumerate(places)
    )


def _scrambled(number: int, factors: Iterable[int]) -> int:
    """A bijection of words, and of their lowest ``j`` bits for every ``j``: each bit depends on those below it alone.

    It is a nested uniform scrambling (Owen 1995), made by multiplications with even numbers (Laine and Karras 2011).
    """
    number %= _WORD
    for factor in factors:
        number ^= number * factor % _WORD
    return number
