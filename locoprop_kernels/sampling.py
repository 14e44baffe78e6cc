"""Which rows of the batch a local step works on, where it does not take all of them.

In increment form ``G_t = G_0 + E_tᵀ X + λ Δ_t`` the gradient of the whole batch is there from the start, and
``E_tᵀ X`` is a correction that few rows estimate. With ``S = ⌈B / rows⌉`` the batch falls into ``S`` sets, of every
``S``-th row each: rows of one sequence or image are alike, so a set is spread over the batch. A local step takes one
set, and counts it ``S`` times: over all sets the average is the full sum exactly. Sets are taken in random order, and
none is taken again before all have been.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = ["count_sets", "set_order", "set_size"]


def count_sets(batch: int, rows: int | None) -> int:
    """``S``, into how many sets a batch falls; 1 where all rows are taken."""
    return 1 if rows is None or rows >= batch else -(-batch // rows)


def set_size(batch: int, sets: int, number: int) -> int:
    """How many rows the set ``number`` has: row ``number`` of the batch and every ``sets``-th after it."""
    return -(-(batch - number) // sets)


@lru_cache(maxsize=256)
def set_order(seed: int, sets: int, count: int) -> tuple[int, ...]:
    """The sets that ``count`` local steps take, in order: a function of its arguments, the same on every machine.

    Args:
        seed: of the step of training; other seeds give other orders.
        sets: ``S``.
        count: how many local steps take a set.
    """
    generator = np.random.Generator(np.random.PCG64([seed, sets]))
    rounds = [generator.permutation(sets) for _ in range(-(-count // sets))]
    return tuple(int(number) for number in np.concatenate([*rounds, np.zeros(0, np.int64)])[:count])
