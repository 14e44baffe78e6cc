"""All tasks of a call: the function that every thread enters, which does without Python from task to task."""

from __future__ import annotations

import logging
from functools import lru_cache

import numpy as np
from numba import carray

from locoprop_kernels.cpu_kernels import jit
from locoprop_kernels.cpu_kernels.loop import commit, local_steps
from locoprop_kernels.cpu_kernels.phases import difference, prepare, update_outputs
from locoprop_kernels.cpu_kernels.table import (
    CALL,
    COMMIT,
    DIFFERENCE,
    LOCAL_STEPS,
    PARAMETER,
    PHASE,
    PREPARE,
    PROBLEM,
    TASK,
    pointer,
    take_number,
)

__all__ = ["entry"]

_log = logging.getLogger("locoprop_kernels")


def _run(address):
    """Take tasks of a call one after the other, until there are none.

    Args:
        address: of the call, see :data:`~locoprop_kernels.cpu_kernels.table.CALL`.
    """
    call = carray(address, (1,), CALL)[0]
    results = carray(pointer(call.results), (call.count,), np.float32)
    tasks = carray(pointer(call.tasks), (call.count,), TASK)
    problems = carray(pointer(call.problems), (call.problem_count,), PROBLEM)
    parameters = carray(pointer(call.parameters), (call.problem_count, 2), PARAMETER)
    phases = carray(pointer(call.phase), (1,), PHASE)
    number = take_number(call.next)
    while number < call.count:
        task = tasks[number]
        weight, bias = parameters[task.problem, 0], parameters[task.problem, 1]
        problem = problems[task.problem]
        result = np.float32(0.0)
        if call.work == LOCAL_STEPS:
            result = local_steps(problem, weight, bias, task.first, task.last)
        elif call.work == COMMIT:
            commit(problem, weight, bias, task.first, task.last)
        elif call.work == PREPARE:
            prepare(problem, phases[0], task.first, task.last)
        elif call.work == DIFFERENCE:
            difference(problem, bias, phases[0], task.first, task.last)
        else:
            result = update_outputs(problem, weight, bias, phases[0], task.first, task.last)
        results[number] = result
        number = take_number(call.next)


@lru_cache(maxsize=1)
def entry() -> int:
    """The address of the compiled function ``void (*)(void *)``, to be called with that of a call."""
    _log.info("loading the local loops for CPUs; the first process compiles them, for fifteen to forty seconds")
    return jit.entry(_run)
