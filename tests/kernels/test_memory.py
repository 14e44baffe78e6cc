"""Where the interpreted kernels read and write, and in which order their programs may run.

Every address that a program really uses is looked up in the tensors that are alive, and pieces of scratch lie apart.
(The sanitizer of triton-viz 3.0 cannot follow these kernels: it knows no integer-to-pointer casts, which the table of
addresses needs, and it runs the body of a loop once, which hides pointers that a loop advances.) All tile sizes are
different, so that a swapped dimension does not go unnoticed.
"""

import contextlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.errors import InterpreterError

import locoprop_kernels as lk
from locoprop_kernels import rules
from locoprop_kernels.kernels import choose, configs, layout, run
from tests.interpreter import checked_addresses, replaced, shuffled_programs
from tests.kernels.plans import forget_plans
from tests.problems import problem_for, random_layer

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")

GAP = 4096
CONFIG = configs.Config(n=16, b=64, k=128, r=32)
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16 operands, traced": {"compute_dtype": torch.float16, "trace": True},
    "float8 operands, traced": {"compute_dtype": torch.float8_e4m3fn, "trace": True},
    "bfloat16 operands, halved epilogues, no state": {
        "compute_dtype": torch.bfloat16,
        "config": configs.Config(n=16, b=64, k=128, r=32, slices=2),
        "rule": rules.SGD(),
    },
    "quartered epilogues, three slots": {
        "config": configs.Config(n=16, b=64, k=128, r=32, slices=4),
        "rule": rules.RMSprop(centered=True),
    },
    "single launch, counted steps": {"driver": "single", "rule": rules.Adam()},
    "batches in parts": {"parts": 3},
    "a program for each n-block": {"driver": "rows", "config": configs.Config(n=16, b=128, k=64, r=32)},
    "a program for each n-block, few rows, float16, traced": {
        "driver": "rows",
        "config": configs.Config(n=16, b=32, k=64, r=32),
        "rule": rules.RMSprop(centered=True),
        "compute_dtype": torch.float16,
        "trace": True,
        "rows": 20,
    },
}
# The other cases differ from these in the operands' type; they are part of the sweeps.
SHORT = (
    "quartered epilogues, three slots",
    "single launch, counted steps",
    "batches in parts",
    "a program for each n-block",
)
RUNS = [pytest.param(case, marks=() if case in SHORT else pytest.mark.sweep) for case in CASES]


def problems():
    """Ragged, exact, one-row and strided layers; without bias, with a frozen weight; for the Gram form; softmax."""
    sizes = (
        (37, 53, 29, "tanh"),
        (64, 128, 16, "relu"),
        (1, 1, 1, "tanh"),
        (65, 129, 17, "sigmoid"),
        (70, 20, 18, "identity"),
        (37, 30, 10, "softmax"),
    )
    made = [
        problem_for(*random_layer(seed, b, k, n, bias=seed != 1, dtype=torch.float32), transfer)
        for seed, (b, k, n, transfer) in enumerate(sizes)
    ]
    strided, frozen = made[0], made[3]
    b, k, _ = strided.shape
    strided.x = torch.randn(k, 2 * b)[:, ::2].t().copy_(strided.x)
    for name in ("preactivation", "weight", "grad_weight"):
        setattr(strided, name, getattr(strided, name).t().contiguous().t())
    frozen.grad_weight = None
    return made


def step(config=CONFIG, driver="grouped", rule=None, parts=1, iterations=3, **options):
    """One step from a fixed start; returns all that it has changed."""

    def cut(original):
        return lambda *arguments: original(*arguments)._replace(splits=(parts,) * len(arguments[1]))

    layers = problems()
    rule = rules.RMSprop() if rule is None else rule
    with configs.use(config, driver, programs=1), replaced(choose, "choose", cut):
        forget_plans()
        report = lk.local_steps_(layers, rule=rule, lr=[1e-3] * iterations, prox=0.1, backend="triton", **options)
    assert report.committed
    assert driver in report.driver
    assert "softmax" in report.driver
    changed = [layer.weight for layer in layers] + [layer.bias for layer in layers if layer.bias is not None]
    changed += [value for layer in layers for slots in layer.state.values() for value in slots.values()]
    return changed + [trace for trace in report.trace if trace is not None]


@contextlib.contextmanager
def gaps_in_scratch(gaps):
    """Pieces of scratch lie ``GAP`` bytes apart; appends the ranges in between, padding for alignment included."""
    arenas = []

    def take_with_gap(take):
        def wrapper(self, elements, itemsize):
            offset = take(self, elements, itemsize)
            self.size += GAP
            if self not in arenas:
                arenas.append(self)
                self.gaps, self.uses = [], 0
            self.gaps.append((offset + elements * itemsize, self.size))
            return offset

        return wrapper

    def find_gaps(allocate):
        def wrapper(size, *args):
            buffer = allocate(size, *args)
            # Buffers are allocated in the order of their arenas; those of one size take turns.
            arena = min((arena for arena in arenas if arena.size == size), key=lambda arena: arena.uses)
            arena.uses += 1
            gaps.extend((buffer.data_ptr() + start, buffer.data_ptr() + end) for start, end in arena.gaps)
            return buffer

        return wrapper

    forget_plans()
    try:
        with replaced(layout._Arena, "take", take_with_gap), replaced(run, "allocate", find_gaps):
            yield
    finally:
        forget_plans()


@pytest.mark.parametrize("case", RUNS)
def test_no_access_is_out_of_bounds(case):
    gaps: list[tuple[int, int]] = []
    with gaps_in_scratch(gaps), checked_addresses(gaps) as counts:
        step(**CASES[case], iterations=2)  # the first has no product, all others have the same addresses
    assert len(gaps) > 20
    assert counts["launches"] >= 6
    assert counts["accesses"] > 10**5


def test_forgotten_padding_is_found():
    """The check itself: a tile that reaches beyond its piece of scratch must not pass."""

    def no_padding(_):
        return lambda size, multiple: size

    gaps: list[tuple[int, int]] = []
    with (
        gaps_in_scratch(gaps),
        checked_addresses(gaps),
        replaced(layout, "_round_up", no_padding),
        pytest.raises(InterpreterError, match="OutOfBounds"),
    ):
        step()


@pytest.mark.parametrize("case", RUNS)
def test_neither_program_order_nor_stale_memory_changes_a_bit(case):
    def zeros(allocate):
        return lambda *args: allocate(*args).zero_()

    with replaced(run, "allocate", zeros):
        expected = step(**CASES[case])
    seed = torch.seed()
    print(f"{seed = }")
    with shuffled_programs(seed) as orders:  # on scratch that is NaN at first, as in all tests
        shuffled = step(**CASES[case])
    assert any(order != sorted(order) for order in orders)
    assert all(map(torch.equal, expected, shuffled))
