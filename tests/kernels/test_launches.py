"""Plans, scratch, addresses and the order of programs, and what the kernels refuse."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

import locoprop_kernels as lk
from locoprop_kernels import rules
from locoprop_kernels.kernels import configs, phases, run, target
from locoprop_kernels.kernels.device import columns as c
from locoprop_kernels.kernels.spec import NOWHERE, Copy, Products, Spec, StepArguments, Update
from tests.interpreter import checked_addresses, replaced, shuffled_programs
from tests.kernels.comparison import SMALL, cut_batches, twins
from tests.kernels.plans import keep_at_most, kept_plans

pytestmark = pytest.mark.skipif(not target.interpreted(), reason="needs TRITON_INTERPRET=1")


# tests/kernels/test_memory.py has two orders of larger models.
@pytest.mark.sweep
@pytest.mark.parametrize(("driver", "parts"), [("single", 1), ("grouped", 1), ("grouped", 3)])
def test_same_bits_twice_and_in_any_order(driver, parts, monkeypatch):
    cut_batches(monkeypatch, parts)
    results = []
    for seed in range(3):
        problems = [twins(8, 37, 19, 21)[0], twins(9, 20, 33, 5, transfer="relu")[0]]
        with configs.use(SMALL, driver), shuffled_programs(seed):
            lk.local_steps_(problems, lr=[0.01] * 3, backend="triton")
        results.append([problem.weight for problem in problems])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# All tests run on scratch that is NaN at first; tests/kernels/test_memory.py compares bits in fewer cases.
@pytest.mark.sweep
@pytest.mark.parametrize(("driver", "parts"), [("single", 1), ("grouped", 1), ("grouped", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uninitialised_scratch_is_never_read(monkeypatch, driver, parts, dtype):
    cut_batches(monkeypatch, parts)
    clean, poisoned = twins(10, 37, 19, 11, transfer="relu")
    poisoned.x = poisoned.x.clone()
    arguments = {"lr": [0.01] * 3, "rule": "adam", "backend": "triton", "compute_dtype": dtype}
    with configs.use(SMALL, driver):
        assert lk.local_steps_([poisoned], **arguments).committed  # on scratch that is NaN at first, as in all tests
        allocate = run.allocate
        monkeypatch.setattr(run, "allocate", lambda *a: allocate(*a).zero_())
        lk.local_steps_([clean], **arguments)
    assert torch.equal(clean.weight, poisoned.weight)


# tests/kernels/test_memory.py checks the addresses of larger models, and the gaps between pieces of scratch.
@pytest.mark.sweep
@pytest.mark.parametrize(("driver", "parts"), [("single", 1), ("grouped", 1), ("grouped", 3)])
def test_addresses_stay_within_tensors(driver, parts, monkeypatch):
    cut_batches(monkeypatch, parts)
    problems = [twins(11, 37, 19, 11)[0], twins(12, 5, 33, 7, bias=False, transfer="relu")[0]]
    with configs.use(SMALL, driver), checked_addresses() as counts:
        lk.local_steps_(problems, lr=[0.01] * 2, rule="adam", backend="triton", trace=True)
    assert counts["accesses"] > 1000


def test_plans_that_a_cuda_graph_reads_are_kept(monkeypatch):
    keep_at_most(monkeypatch, 2)
    plans = []
    for n in range(3, 8):
        lk.local_steps_(twins(28, 6, 5, n)[:1], lr=[0.01], backend="triton")
        plans.append(kept_plans()[-1])
        plans[0].captured = True  # as the table's upload does in a capture
    assert kept_plans() == [plans[0], plans[-1]]


def test_plans_are_reused():
    ours, _ = twins(20, 9, 8, 7)
    plans = []
    with configs.use(SMALL):
        for rate in (0.01, 0.01, 0.02):
            lk.local_steps_([ours], lr=[rate] * 2, backend="triton")
            plans.append(kept_plans())
    assert plans[0] == plans[1] == plans[2]


def test_out_of_memory_names_the_size(monkeypatch):
    ours, _ = twins(21, 9, 8, 7)
    before = ours.weight.clone()

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    with configs.use(SMALL):
        # What is kept from one step to the next is there: the buffer of the step is all that asks for memory.
        lk.local_steps_([twins(21, 9, 8, 7)[0]], lr=[0.01] * 2, backend="triton")
        monkeypatch.setattr(run.torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError, match=r"MiB .*nothing was changed"):
            lk.local_steps_([ours], lr=[0.01] * 2, backend="triton")
    assert torch.equal(ours.weight, before)
    assert ours.state == {}


class Own(rules.Rule):
    """A rule without a Triton function."""

    @property
    def slots(self):
        return {}

    def update_(self, delta, grad, state, lr, step):
        delta.sub_(grad, alpha=lr)


def test_what_is_unsupported_says_what_works():
    ours, _ = twins(22, 9, 8, 7)
    double, _ = twins(22, 9, 8, 7, dtype=torch.float64)
    for problem, arguments, message in (
        (ours, {"rule": Own()}, "triton_fn"),
        (double, {}, "float64"),
        (ours, {"compute_dtype": torch.float64}, "float64"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            lk.local_steps_([problem], lr=[0.01], backend="triton", **arguments)
        assert "backend='reference'" in str(error.value)


def test_offsets_beyond_32_bits():
    """Addresses of a layer of 2^35 elements, on a made-up table: nothing there is allocated, read or written."""
    stride, n_block, base, touched = 2**24, 300, 2**44, []
    row = torch.zeros(c.WIDTH.value, dtype=torch.int64)
    for name in ("X", "A0", "E", "ROW_SUMS", "WEIGHT_COPY"):
        row[getattr(c, name).value] = base
    for name in ("X_STRIDE", "E_STRIDE", "WEIGHT_STRIDE"):
        row[getattr(c, name).value] = stride
    row[c.BATCH.value] = row[c.OUTPUTS.value] = 2**24
    row[c.REDUCED.value], row[c.TRANSFER.value] = SMALL.r, -1

    def real(pointers):
        return np.max(pointers.data) < base or np.min(pointers.data) > 2**46

    def load(original):
        def wrapper(pointers, mask, other, *rest):
            if real(pointers):
                return original(pointers, mask, other, *rest)
            touched.append(pointers.data)
            return TensorHandle(np.zeros(pointers.data.shape, np.float32), tl.float32)

        return wrapper

    def store(original):
        def wrapper(pointers, *rest):
            if real(pointers):
                return original(pointers, *rest)
            touched.append(pointers.data)

        return wrapper

    products = Products(SMALL.n, SMALL.b, SMALL.k, SMALL.r, interpreted=True, slices=2)
    update = Update(slots=0, counts_steps=False)
    no_copy = Copy(
        NOWHERE, NOWHERE, NOWHERE, NOWHERE, NOWHERE, NOWHERE, NOWHERE, tl.float32, tl.float32, "ieee", True, 64
    )
    spec = Spec(products, update, products, update, no_copy, no_copy, no_copy)
    tiles = torch.tensor([[0, n_block, 5]], dtype=torch.int32)
    nothing = torch.zeros(1)
    step = StepArguments(row, nothing, 2, 0.0, nothing, nothing, nothing, 0)
    with (
        replaced(interpreter_builder, "create_masked_load", load),
        replaced(interpreter_builder, "create_masked_store", store),
    ):
        phases.launch_activation(step, tiles, 1, spec)
    last_row, last_example = (n_block + 1) * SMALL.n - 1, 6 * SMALL.b - 1
    furthest = max(int(np.max(addresses)) for addresses in touched)
    assert furthest == base + 4 * (last_row * stride + last_example) > base + 2**32
    assert min(int(np.min(addresses)) for addresses in touched) >= base
