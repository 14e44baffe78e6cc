"""The quick cases under pytest-benchmark: ``pytest bench --benchmark-only`` (needs pytest-benchmark).

Its clock is the host's; on a GPU every round waits for the device. ``python -m bench`` interleaves contestants and is
what ratios should be taken from. Times decide nothing here, results do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import Case, select
from bench.contestants import Contestant, all_contestants
from bench.device import synchronize
from bench.work import Work

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", params=select([], quick=True), ids=lambda case: case.name)
def work(request: pytest.FixtureRequest) -> Work:
    return Work(request.param, DEVICE)


@pytest.mark.parametrize(
    "contestant", [one for one in all_contestants(DEVICE) if not one.slow_start], ids=lambda one: one.name
)
def test_speed(benchmark: Any, work: Work, contestant: Contestant) -> None:
    case: Case = work.case
    if reason := contestant.unavailable(case, DEVICE):
        pytest.skip(reason)
    entry = contestant.build(work)
    entry.run()
    if entry.parameters is not None:
        error = work.error(entry.parameters())
        assert error <= contestant.tolerance
        benchmark.extra_info["error"] = error

    def run() -> None:
        entry.run()
        synchronize(DEVICE)

    benchmark.group = case.name
    benchmark.extra_info["flops"] = case.flops()
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
