"""The threads that run kernels: those of torch, where they can be had.

torch's idle threads do not sleep at once, they wait busily for some milliseconds: threads beside them would share
processors with them, and take about twice as long. So work is given to them, through the function of the OpenMP
runtime that a compiler calls at ``#pragma omp parallel``. GNU's runtime has it, and LLVM's and Intel's have it too.
In a forked process, where GNU's waits for threads that only the parent has, they are Python's.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import torch

__all__ = ["run_all"]

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_PROCESS = os.getpid()
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_all(function: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
    """What a function that lets go of Python's lock returns for each task, run by as many threads as torch uses.

    Raises:
        BaseException: what the function raised, after all threads have ended.
    """
    found: dict[int, _Result] = {}
    failures: list[BaseException] = []
    numbers = itertools.count()

    def work() -> None:
        try:
            while not failures and (number := next(numbers)) < len(tasks):
                found[number] = function(tasks[number])
        except BaseException as failure:
            failures.append(failure)

    threads = min(torch.get_num_threads(), len(tasks))
    if threads > 1 and os.getpid() == _PROCESS and (parallel := _parallel()) is not None:
        parallel(_BODY(lambda _: work()), None, threads, 0)
    else:
        others = [_pool(os.getpid()).submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()
    if failures:
        raise failures[0]
    return [found[number] for number in range(len(tasks))]


@lru_cache(maxsize=1)
def _parallel() -> Any:
    """``GOMP_parallel(body, data, threads, flags)`` of the OpenMP runtime that torch has loaded; or ``None``."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # no such runtime, or a system where there is no such lookup
        return None
    function.argtypes = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


# A forked process has none of its parent's threads.
@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="locoprop")
