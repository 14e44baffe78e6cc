"""The Triton backend on a real GPU against float64: drivers, precisions, transfers, rules, ragged and odd layouts.

Skipped without one. ``LOCOPROP_GPU_TESTS=interpreter TRITON_INTERPRET=1 pytest --noconftest`` runs them on a CPU,
slowly.
"""

import os

import pytest
import torch
from torch import nn

import locoprop_kernels as lk
from locoprop_kernels import rules, transfers
from locoprop_torch import LocoProp, presets
from tests.problems import RULES, copied, problem_for

INTERPRETED = os.environ.get("LOCOPROP_GPU_TESTS") == "interpreter"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU"),
]

# Relative error of the increment after T steps against float64, for problems that are as smooth as a network's.
BUDGET = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
SHAPES = [(1, 1, 1), (33, 65, 17), (200, 130, 70), (257, 128, 129)]


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def problems(shape, transfer, seed=0):
    """The same local problem in float64 on the host, and in float32 on the device."""
    b, k, n = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).float()

    x, weight, bias = randn(b, k), randn(n, k) / k**0.5, randn(n)
    residual = 0.1 * (x @ randn(n, k).t() / k**0.5 + randn(n))
    drawn = problem_for(x, weight, bias, residual, transfer)
    return copied(drawn, torch.float64), copied(drawn, device=DEVICE)


def check(shape, transfer, rule, dtype, prox=0.0, iterations=5, **options):
    exact, device = problems(shape, transfer)
    rates = [1e-3 * (1 - t / (2 * iterations)) for t in range(iterations)]
    for _ in range(2):  # the state persists
        before, before_device = exact.weight.clone(), device.weight.clone()
        options |= {"rule": rule, "lr": rates, "prox": prox}
        lk.local_steps_([exact], backend="reference", **options)
        report = lk.local_steps_([device], backend="triton", compute_dtype=dtype, **options)
        assert report.committed
        expected, actual = exact.weight - before, (device.weight - before_device).cpu().double()
        rounding = 2**-23 * before.norm()  # of the float32 weight that the increment is added to
        assert (actual - expected).norm() <= BUDGET[dtype] * expected.norm() + rounding
        device.preactivation = (device.x @ device.weight.t() + device.bias).contiguous()
        exact.preactivation = exact.x @ exact.weight.t() + exact.bias
    return report.driver


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("transfer", transfers.available())
def test_transfers(transfer, dtype):
    check((200, 130, 70), transfer, rules.RMSprop(eps=1e-3), dtype)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules(rule):
    check((200, 130, 70), "tanh", rule, torch.float32, prox=0.1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("driver", ["single", "grouped"])
def test_drivers(driver, dtype, shape):
    from locoprop_kernels.kernels import configs

    if INTERPRETED and driver == "single":
        pytest.skip("programs of the interpreter run one after another")
    with configs.use(driver=driver):
        assert check(shape, "sigmoid", rules.RMSprop(eps=1e-3), dtype) == driver


@pytest.mark.parametrize("rows", [None, 16, 32, 64])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("transfer", ["tanh", "relu"])
def test_few_rows(rows, dtype, transfer):
    from locoprop_kernels.kernels import configs

    shape = (100, 70, 45) if rows is None else (257, 300, 70)
    with configs.use(driver="rows"):
        assert check(shape, transfer, rules.RMSprop(eps=1e-3), dtype, rows=rows) == "rows"


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_with_few_rows(rule):
    from locoprop_kernels.kernels import configs

    with configs.use(driver="rows"):
        assert check((200, 130, 70), "tanh", rule, torch.float32, prox=0.1, rows=32) == "rows"


def test_layers_together_are_the_layers_alone():
    shapes = [(100, 40, 60), (100, 60, 20), (100, 20, 60), (100, 60, 40)]
    together = [problems(shape, "tanh", seed)[1] for seed, shape in enumerate(shapes)]
    alone = [problems(shape, "tanh", seed)[1] for seed, shape in enumerate(shapes)]
    lk.local_steps_(together, lr=[1e-3] * 4, backend="triton")
    for problem in alone:
        lk.local_steps_([problem], lr=[1e-3] * 4, backend="triton")
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-5, atol=1e-6)


def test_the_same_bits_twice_and_nothing_after_a_divergence():
    results = []
    for _ in range(2):
        problem = problems((300, 200, 100), "tanh")[1]
        lk.local_steps_([problem], lr=[1e-3] * 8, backend="triton", compute_dtype=torch.bfloat16)
        results.append(problem.weight)
    assert torch.equal(*results)
    problem = problems((50, 20, 10), "squared_relu")[1]
    before = problem.weight.clone()
    report = lk.local_steps_([problem], rule="sgd", lr=[1e6] * 30, backend="triton")
    assert not report.committed
    assert torch.equal(problem.weight, before)


def trained(widths, batches, captured, **options):
    """A network after three steps and one for each batch, those replayed from a CUDA graph if asked for."""
    torch.manual_seed(0)
    layers = [part for k, n in zip(widths, widths[1:], strict=False) for part in (nn.Linear(k, n), nn.Tanh())]
    model = nn.Sequential(*layers[:-1]).to(DEVICE)
    optimizer = LocoProp(model, backend="triton", **{**presets["package"], **options})
    x, y = (torch.empty_like(tensor) for tensor in batches[0])

    def step():
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    def load(batch):
        x.copy_(batch[0])
        y.copy_(batch[1])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            load(batches[0])
            step()
    torch.cuda.current_stream().wait_stream(stream)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay
    for batch in batches:
        load(batch)
        step()
    torch.cuda.synchronize()
    state = [optimizer.state[p] for p in model.parameters()]
    return [*model.parameters(), *(value for slots in state for value in slots.values())], optimizer.skipped_steps


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("rule", ["rmsprop", "adam"])
@pytest.mark.parametrize("driver", ["single", "grouped", "rows"])
def test_replayed_steps_are_eager_ones(driver, rule):
    from locoprop_kernels.kernels import configs

    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(64, 70, generator=generator).to(DEVICE), torch.randn(64, 33, generator=generator).to(DEVICE))
        for _ in range(4)
    ]
    with configs.use(driver=driver):
        eager, skipped = trained((70, 130, 33), batches, captured=False, rule=rule)
        replayed, replayed_skipped = trained((70, 130, 33), batches, captured=True, rule=rule)
    assert all(map(torch.equal, eager, replayed))
    assert skipped == replayed_skipped == 0


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_replays_count_the_steps_that_they_skip():
    batches = [(torch.full((64, 70), value, device=DEVICE), torch.zeros(64, 33, device=DEVICE)) for value in (1.0, 1.0)]
    batches[1][1][0, 0] = float("nan")
    before, _ = trained((70, 130, 33), batches[:1], captured=True)
    after, skipped = trained((70, 130, 33), batches, captured=True)
    assert skipped == 1
    assert all(map(torch.equal, before, after))
