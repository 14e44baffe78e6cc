"""The learning rates of the local iterations."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["default_lr_decay", "local_rates"]


def default_lr_decay(t: int, iterations: int) -> float:
    """``max(1 - t/T, 0.25)``: the decay of the paper's experiments over the local iterations ``t = 0 .. T-1``.

    Args:
        t: the local iteration, from 0 on.
        iterations: ``T``, how many local iterations there are.

    Returns:
        The factor that the learning rate is multiplied by in this local iteration.
    """
    return max(1 - t / iterations, 0.25)


def local_rates(
    lr: float,
    iterations: int,
    lr_decay: Callable[[int, int], float] = default_lr_decay,
    steps: int | None = None,
) -> list[float]:
    """The learning rate of each local iteration.

    Args:
        lr: the learning rate that ``lr_decay`` multiplies.
        iterations: ``T``, how many local iterations there are.
        lr_decay: ``(t, T) -> factor``.
        steps: how many of them are taken; ``None`` for all.
    """
    return [lr * lr_decay(t, iterations) for t in range(iterations if steps is None else steps)]
