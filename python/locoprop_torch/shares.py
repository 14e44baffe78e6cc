"""With ``rows``: which rows the passes of a layer keep, so that all together have those that a step will take.

The passes of a step lie one after another, and each has an *offset*, the number of rows before it. Its row ``i``
belongs to the set ``(offset + i) mod S``, as if all rows were in one tensor. ``S`` grows with the passes that count,
and those that have been cut down to their share already are thinned, as sets are nested
(:mod:`locoprop_kernels.sampling`).

A pass is cut down in the forward pass if it is known then which rows it will have to give: if all earlier passes of the
layer that may still count do count already. Otherwise (several calls in one forward pass, a call that has not been
differentiated yet) it stays whole until it counts. So a pass that never counts changes nothing for others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn

from locoprop_kernels.sampling import Sampling, count_sets, count_sets_of_parts
from locoprop_torch.kept import KeptRows
from locoprop_torch.layouts import Layout
from locoprop_torch.passes import Pass

__all__ = ["Shares"]


class Shares:
    """What the passes of a layer keep of their rows.

    Args:
        name: the layer's, for messages.
        layout: makes the layout of a module.
    """

    def __init__(self, name: str, layout: Callable[[nn.Module], Layout]) -> None:
        self._name, self._layout = name, layout
        # The passes that may still count.
        self._open: list[weakref.ref[Pass]] = []

    def begin(self, captured: Pass, before: Sequence[Pass], sampling: Sampling) -> None:
        """Cut a new pass down to its share, if that is known.

        Args:
            captured: the pass.
            before: those that count.
            sampling: which rows the next step takes.
        """
        # Only the last are looked at, so that a thousand calls before a backward pass do not cost a million looks.
        while self._open and not _waits(self._open[-1]()):
            self._open.pop()
        waiting = bool(self._open)
        self._open.append(weakref.ref(captured))
        assert captured.x is not None
        assert captured.preactivation is not None
        x, a = self._layout(captured.module).rows(captured.x, captured.preactivation)
        captured.size = x.shape[-2]
        if waiting:
            return
        sampling = next((other.kept.sampling for other in before if other.kept), sampling)
        sets = _sets([*before, captured], sampling)
        # With fewer rows than sets, it might have nothing to give if the others were forgotten.
        if sampling.steps < sets <= captured.size:
            captured.offset = _end(before)
            captured.keep_rows(KeptRows.of(x, a, sampling, sets, captured.offset))
        captured.settled = not before and sets <= captured.size

    @staticmethod
    def settle_alone(passes: Sequence[Pass]) -> bool:
        """Give a pass that is alone its place, if it has what it will have to give.

        Returns:
            Whether that is so: there is nothing to even out then until another pass counts, or the step.
        """
        if len(passes) == 1 and passes[0].settled:
            passes[0].offset = 0
            return True
        return False

    def even_out(self, passes: list[Pass], sampling: Sampling, dtype: torch.dtype, at_step: bool = False) -> None:
        """Bring the passes that count into their order, and cut them down to their shares.

        Args:
            passes: all passes that count; they are sorted.
            sampling: which rows the step takes.
            dtype: of the weight.
            at_step: whether no more passes are to come.

        Raises:
            ValueError: at a step, and an input was overwritten.
        """
        waiting = self._waiting()
        self._open = [weakref.ref(one) for one in waiting]
        # Where one that has its place already may still count, others cannot know theirs.
        if not passes or (any(one.kept for one in waiting) and not at_step):
            return
        end = _end(passes)
        for captured in passes:
            if captured.offset is None:
                if captured.x is not None:  # its size is not known if ``rows`` was set after the forward pass
                    captured.size = self._layout(captured.module).inputs(captured.x).shape[-2]
                captured.offset, end = end, end + captured.size
        passes.sort(key=lambda one: one.offset or 0)
        sets = _sets(passes, sampling)
        if sets <= sampling.steps and not any(captured.kept for captured in passes):
            return
        with torch.no_grad():
            for captured in passes:
                if captured.kept is not None:
                    captured.kept.thin(sets)
                # A step refuses what was overwritten; until then the gradient may be discarded.
                elif at_step or not captured.overwritten:
                    x, a = self._layout(captured.module).rows(*captured.restored(self._name, dtype))
                    captured.keep_rows(KeptRows.of(x, a, sampling, sets, captured.offset or 0))

    def leave_all(self, only: Pass, sampling: Sampling) -> bool:
        """Whether a step takes rows of all sets, so that all are kept, where the pass ``only`` is all that counts."""
        return bool(only.size) and count_sets(only.size, sampling.rows) <= sampling.steps

    def end(self) -> None:
        """A step has been made: of what was called before it, nothing is expected to count any more."""
        self._open = []

    def _waiting(self) -> list[Pass]:
        """The passes that may still count."""
        found = [captured() for captured in self._open]
        return [captured for captured in found if captured is not None and _waits(captured)]


def _waits(captured: Pass | None) -> bool:
    """Whether a pass, if it is still there, may count and does not yet."""
    return captured is not None and not captured.counted and not captured.released


def _end(passes: Sequence[Pass]) -> int:
    """How many rows there are before the next pass."""
    return max((captured.offset + captured.size for captured in passes if captured.offset is not None), default=0)


def _sets(passes: Sequence[Pass], sampling: Sampling) -> int:
    """``S`` for all rows of these passes: no less than what one of them has been cut down for."""
    sets = count_sets_of_parts([captured.size for captured in passes], sampling.rows)
    most = max((captured.kept.sets for captured in passes if captured.kept), default=1)
    while sets < most:
        sets *= 2
    return sets
