"""The ways of running interpreted kernels find the faults that they are for."""

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.errors import InterpreterError

from tests.interpreter import SharedAllocations, checked_addresses, concurrent_programs, shuffled_programs
from tests.kernels.toy_kernels import append_kernel, ring_kernel, table_copy_kernel

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")
PROGRAMS = 4


def ring(seed, wait=True, level=1, timeout=60.0):
    with SharedAllocations(), concurrent_programs({"ring_kernel"}, seed, timeout) as launches:
        x, y = torch.arange(PROGRAMS).float(), torch.zeros(PROGRAMS)
        counter = torch.full((1,), level - 1, dtype=torch.int32)
        ring_kernel[(PROGRAMS,)](x, y, counter, 4, P=PROGRAMS, WAIT=wait)
    assert launches == [PROGRAMS]
    return x


def ring_reference():
    x = torch.arange(PROGRAMS).float()
    for _ in range(4):
        x = (x.sum() + torch.arange(PROGRAMS)).roll(-1)
    return x


def test_programs_run_concurrently():
    for seed in range(4):
        assert torch.equal(ring(seed), ring_reference())


def test_a_missing_wait_is_found():
    assert any(not torch.equal(ring(seed, wait=False), ring_reference()) for seed in range(8))


def test_a_hang_is_found_and_ended():
    with pytest.raises(TimeoutError, match="have not ended"):
        ring(0, level=-10, timeout=1.0)


def test_an_error_of_a_program_is_reported():
    with SharedAllocations(), concurrent_programs({"ring_kernel"}, 0), pytest.raises(RuntimeError, match="Traceback"):
        ring_kernel[(3,)](torch.zeros(3), torch.zeros(3), torch.zeros(1, dtype=torch.int32), 1, P=3, WAIT=True)


def test_programs_are_shuffled():
    with shuffled_programs(0) as orders:
        log, counter = torch.full((20,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        append_kernel[(20,)](log, counter)
    assert log.tolist() == [program for program, _, _ in orders[0]]
    assert log.tolist() != sorted(log.tolist()) == list(range(20))


def copy_through_table(excess):
    sources = [torch.arange(float(n)) for n in (10, 37, 16)]
    targets = [torch.full_like(source, -1) for source in sources]
    rows = [(s.data_ptr(), t.data_ptr(), len(s)) for s, t in zip(sources, targets, strict=True)]
    with checked_addresses() as counts:
        table_copy_kernel[(len(rows),)](torch.tensor(rows), excess, BLOCK=16)
    assert all(map(torch.equal, sources, targets))
    assert counts == {"launches": 1, "accesses": 3 * 3 + 2 * (10 + 37 + 16)}


def test_accesses_within_tensors_pass():
    copy_through_table(0)


def test_an_access_out_of_bounds_is_found():
    with pytest.raises(InterpreterError, match="OutOfBounds"):
        copy_through_table(1)
