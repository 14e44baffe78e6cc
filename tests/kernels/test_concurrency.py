"""The single launch with several programs at once: forked interpreter processes on shared memory, with random delays.

What it computes must not depend on who comes first, to the last bit; and without either of its two waits it must.
"""

import contextlib

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton

import locoprop_kernels as lk
from locoprop_kernels import rules
from locoprop_kernels.kernels import configs, single
from locoprop_kernels.schedule import Tiles, build
from tests.interpreter import SharedAllocations, concurrent_programs, replaced
from tests.kernels.plans import forget_plans
from tests.problems import problem_for, random_layer

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")

KERNEL = "_local_steps_kernel"
CONFIG = configs.Config(n=16, b=32, k=64, r=16)
# 2 and 1 n-blocks, each with several activation and update tiles, which different programs take.
SIZES = ((70, 100, 20, "tanh"), (40, 130, 9, "relu"))
ITERATIONS = 3


def step(programs, trace=False, compute_dtype=None):
    """One step from a fixed start; returns all that it has changed, in one vector."""
    layers = [
        problem_for(*random_layer(seed, b, k, n, dtype=torch.float32), transfer)
        for seed, (b, k, n, transfer) in enumerate(SIZES)
    ]
    with configs.use(CONFIG, driver="single", programs=programs):
        report = lk.local_steps_(
            layers,
            rule=rules.RMSprop(),
            lr=[1e-2] * ITERATIONS,
            prox=0.1,
            backend="triton",
            trace=trace,
            compute_dtype=compute_dtype,
        )
    assert report.committed or programs > 1  # what several compute is compared; if not finite, it has changed nothing
    assert report.driver == "single"
    changed = [value for layer in layers for value in (layer.weight, layer.bias)]
    changed += [value for layer in layers for slots in layer.state.values() for value in slots.values()]
    changed += [value for value in report.trace if value is not None]
    return torch.cat([value.flatten().double() for value in changed])


def run(programs, seed, timeout=120.0, **options):
    """The same, with all programs at once."""
    forget_plans()  # tables of other plans are not in shared memory
    with SharedAllocations(), concurrent_programs({KERNEL}, seed, timeout) as launches:
        value = step(programs, **options)
    forget_plans()
    assert launches == [programs]
    return value


def fresh_seed():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"{seed = }")
    return seed


def test_blocks_are_shared_among_programs():
    schedule = build([size[:3] for size in SIZES], Tiles(CONFIG.n, CONFIG.b, CONFIG.k), 3)
    owners: dict[tuple[int, int], set[int]] = {}
    for phase in ("activation", "update"):
        rows, offsets = getattr(schedule, f"{phase}_tiles"), getattr(schedule, f"{phase}_offsets")
        for program in range(3):
            for layer, block, _ in rows[offsets[program] : offsets[program + 1]].tolist():
                owners.setdefault((layer, block), set()).add(program)
    # A program that has all tiles of a block in one phase waits for others' in the other.
    assert len(owners) == 3
    assert all(len(programs) > 1 for programs in owners.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"trace": True}, marks=pytest.mark.sweep),
        pytest.param({"compute_dtype": torch.float16}, marks=pytest.mark.sweep),
        pytest.param({"compute_dtype": torch.float8_e4m3fn}, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_many_programs_compute_what_one_does(options):
    expected, seed = step(1, **options), fresh_seed()
    for programs in (2, 3, 5):
        assert torch.equal(run(programs, seed, **options), expected), programs


@pytest.mark.sweep
def test_many_interleavings():
    expected, seed = step(1), fresh_seed()
    for attempt in range(10):
        assert torch.equal(run(3, seed + attempt), expected), attempt


def without_wait(phase):
    """The kernel without one of its two waits, which are told apart by the counter that is waited for."""
    counters: list[int] = []

    def note_counters(launch):
        def wrapper(table, lists, counters_tensor, *args):
            counters[:] = [counters_tensor.data_ptr(), len(counters_tensor) // 2]
            return launch(table, lists, counters_tensor, *args)

        return wrapper

    def mutate(wait):
        def mutated(counter_ptr, level):
            start, blocks = counters
            counter = (int(np.asarray(counter_ptr.handle.data).item()) - start) // 4
            # Activation tiles wait for updates, whose counters are the second half.
            if (counter >= blocks) != (phase == "activation"):
                wait(counter_ptr, level)

        return mutated

    stack = contextlib.ExitStack()
    stack.enter_context(replaced(single, "launch", note_counters))
    stack.enter_context(replaced(single, "_wait", mutate))
    return stack


@pytest.mark.parametrize("phase", ["activation", "update"])
def test_without_one_of_the_waits_the_result_is_wrong(phase):
    expected, seed = step(1), fresh_seed()
    with without_wait(phase):
        assert any(not torch.equal(run(3, seed + attempt), expected) for attempt in range(10))


def test_without_a_signal_the_launch_hangs():
    def forget(_):
        return lambda counter_ptr: None

    with replaced(single, "_signal", forget), pytest.raises(TimeoutError, match="have not ended"):
        run(2, 0, timeout=3.0)
