"""The threads that run kernels: those of torch, where they can be had.

torch's idle threads do not sleep at once, they wait busily for some milliseconds: threads beside them would share
processors with them, and take about twice as long. So work is given to them, through the function of the OpenMP
runtime that a compiler calls at ``#pragma omp parallel``. GNU's runtime has it, and LLVM's and Intel's have it too.
In a forked process, where GNU's waits for threads that only the parent has, they are Python's.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

from locoprop_kernels.cpu_kernels import PROCESS

__all__ = ["run_all"]

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_all(function: int, data: int, tasks: int) -> None:
    """Call a function in as many threads as torch uses, which share the tasks among them; returns when all have ended.

    Args:
        function: address of a C function ``void (*)(void *)``.
        data: what it is called with.
        tasks: how many there are: no more threads are needed.
    """
    body = _BODY(function)
    threads = min(torch.get_num_threads(), tasks)
    if threads > 1 and os.getpid() == PROCESS and (parallel := _parallel()) is not None:
        parallel(body, data, threads, 0)
        return
    others = [_pool(os.getpid()).submit(body, data) for _ in range(threads - 1)]
    body(data)
    for other in others:
        other.result()


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
