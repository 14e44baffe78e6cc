"""Looking for transfer functions leaves no trace, whatever a forward pass of the model does."""

import logging
import random
import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import RECENT
from tests.optimizer.finding import check_tanh, find, transfers_in, with_forward


@pytest.mark.skipif(not RECENT, reason="its torch.fx cannot assign to buffers, which is reported")
def test_a_buffer_that_is_assigned():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("mean", torch.zeros(6))

        mean: torch.Tensor

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return torch.tanh(self.layer(x - self.mean))

    model = Model()
    assert transfers_in(model) == {"layer": "tanh"}
    model(torch.randn(4, 6))
    assert model.mean.shape == (6,)


def test_a_buffer_that_is_changed_in_place():
    def forward(self, x):
        self.steps += 1
        if self.steps.item() < 0:
            return x
        return torch.tanh(self.layer(x))

    model = check_tanh(forward, steps=torch.zeros(()))
    assert model.steps == 0


def test_a_list_that_grows():
    def forward(self, x):
        self.outputs.append(self.layer(x))
        return torch.tanh(self.outputs[-1])

    assert check_tanh(forward, outputs=[]).outputs == []


def test_a_counter():
    def forward(self, x):
        self.calls += 1
        self.new = x
        return torch.tanh(self.layer(x))

    model = check_tanh(forward, calls=0)
    assert model.calls == 0
    assert not hasattr(model, "new")


def test_a_cache_of_tensors():
    def forward(self, x):
        self.cache["x"] += 1
        self.cache["y"] = x
        return torch.tanh(self.layer(x))

    cache = {"x": torch.zeros(2)}
    check_tanh(forward, cache=cache)
    assert list(cache) == ["x"]
    assert torch.equal(cache["x"], torch.zeros(2))


Pair = namedtuple("Pair", "first second")


def test_containers_of_all_kinds():
    def forward(self, x):
        self.ordered["b"] = x
        self.default["b"].append(x)
        self.count["b"] += 1
        self.recent.append(x)
        self.seen.add(x)
        self.pair.first.append(x)
        self.space.calls += 1
        assert self.recent.maxlen == 2
        assert self.nested is self.nested[0]
        return torch.tanh(self.layer(x))

    nested: list[Any] = []
    nested.append(nested)
    attributes = {
        "ordered": OrderedDict(a=1),
        "default": defaultdict(list, a=[1]),
        "count": Counter("a"),
        "recent": deque([1], maxlen=2),
        "seen": {1},
        "pair": Pair([1], 2),
        "space": types.SimpleNamespace(calls=0),
    }
    before = repr(attributes)
    check_tanh(forward, **attributes, nested=nested)
    assert repr(attributes) == before


def test_objects_of_own_classes():
    class Slotted:
        __slots__ = ("calls",)
        calls: int

    class Statistics:
        total = 0

        def __init__(self):
            self.calls, self.slotted, self.me = 0, Slotted(), self
            self.slotted.calls = 0

    def forward(self, x):
        self.statistics.me.calls += 1
        type(self.statistics).total += 1
        self.statistics.slotted.calls += 1
        return torch.tanh(self.layer(x))

    statistics = check_tanh(forward, statistics=Statistics()).statistics
    assert (statistics.calls, statistics.slotted.calls) == (0, 0)
    assert Statistics.total == 0


def test_methods_and_closures_that_hold_the_model():
    def forward(self, x):
        self.count()
        self.closure()
        self.log(x)
        self.me().calls += 1
        return torch.tanh(self.layer(x))

    model = with_forward(forward, calls=0, entries=[])
    type(model).increment = lambda self: setattr(self, "calls", self.calls + 1)
    model.count, model.closure, model.log = model.increment, lambda: model.increment(), model.entries.append
    model.me = weakref.ref(model)
    assert transfers_in(model) == {"layer": "tanh"}
    assert (model.calls, model.entries) == (0, [])


def test_an_array():
    def forward(self, x):
        self.history[0] += 1
        return torch.tanh(self.layer(x))

    assert check_tanh(forward, history=np.zeros(2)).history[0] == 0
    model = with_forward(forward, history=np.zeros(10**6))
    assert "read-only" in find(model)["layer"].reason
    assert model.history[0] == 0
    model.history[0] = 1


def test_a_tensor_with_a_history():
    def forward(self, x):
        return torch.tanh(self.layer(x) * self.scale)

    model = with_forward(forward, scale=torch.ones(6, requires_grad=True) * 2)
    assert transfers_in(model) == {"layer": "identity"}


def test_something_that_cannot_be_copied():
    def forward(self, x):
        with self.lock:
            return torch.tanh(self.layer(x))

    check_tanh(forward, lock=threading.Lock(), lines=(line for line in "ab"))


def test_an_object_with_a_finaliser_is_not_copied():
    ended = []

    class File:
        name: str

        def __del__(self):
            ended.append(self)

    def forward(self, x):
        assert self.file.name == "a"
        return torch.tanh(self.layer(x))

    file = File()
    file.name = "a"
    check_tanh(forward, file=file)
    assert ended == []


def test_a_module_with_a_finaliser_is_not_copied(caplog):
    ended: list[Any] = []

    def forward(self, x):
        return torch.tanh(self.layer(x))

    inner = with_forward(forward)
    type(inner).__del__ = ended.append
    found = find(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), inner))
    assert ended == []
    assert str(found["0"].transfer) == "relu"
    assert "cannot be copied" in found["2.layer"].reason
    del type(inner).__del__


def test_hooks_do_not_run():
    calls = []

    def note(*_):
        calls.append(1)

    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    model[0].register_forward_hook(note)
    model[0].register_forward_pre_hook(note)
    with nn.modules.module.register_module_forward_hook(note):
        assert transfers_in(model) == {"0.0": "tanh"}
        assert calls == []
        model(torch.randn(2, 6))
        assert calls


def test_methods_that_copy_a_module_are_left_out():
    def fail(*_):
        raise AssertionError

    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    model.__dict__["__deepcopy__"] = model.__dict__["__reduce_ex__"] = fail
    assert transfers_in(model) == {"0": "tanh"}


def test_more_attributes_than_can_be_copied():
    def forward(self, x):
        return torch.tanh(self.layer(x))

    inner = with_forward(forward, vocabulary=list(range(10**6)))
    found = find(nn.Sequential(OrderedDict(first=nn.Linear(6, 6), act=nn.Tanh(), inner=inner)))
    assert "more than 100,000 objects" in found["first"].reason
    assert "more than 100,000 objects" in found["inner.layer"].reason


def test_nothing_is_printed_or_logged(capsys, caplog, recwarn):
    def forward(self, x):
        print("forward", x)
        logging.getLogger("user").error("forward")
        __import__("warnings").warn("forward", stacklevel=1)
        return torch.tanh(self.layer(x))

    check_tanh(forward)
    assert capsys.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list
    logging.getLogger("user").error("afterwards")
    assert caplog.messages == ["afterwards"]


def test_random_numbers():
    def forward(self, x):
        x = x + torch.rand(6) * random.random() * np.random.rand() + torch.rand(6, generator=self.generator)
        torch.manual_seed(1)
        return torch.tanh(self.layer(x + float(self.rng.random()) + self.numpy_rng.random()))

    attributes: dict[str, Any] = {
        "generator": torch.Generator(),
        "rng": random.Random(0),
        "numpy_rng": np.random.default_rng(0),
    }
    states = (
        torch.get_rng_state,
        lambda: torch.tensor(random.getstate()[1]),
        lambda: torch.tensor(np.random.get_state(legacy=False)["state"]["key"].astype(np.int64)),
        lambda: torch.tensor(np.random.get_state(legacy=False)["state"]["pos"]),
        attributes["generator"].get_state,
        lambda: torch.tensor(attributes["rng"].getstate()[1]),
        lambda: torch.tensor(attributes["numpy_rng"].bit_generator.state["state"]["state"] % 2**62),
    )
    model = with_forward(forward, **attributes)
    before = [state().clone() for state in states]
    assert transfers_in(model) == {"layer": "tanh"}
    assert all(torch.equal(state(), old) for state, old in zip(states, before, strict=True))


LOG: list[Any] = []
CALLS, TABLE, STEPS = 0, {"calls": {"n": 0}}, torch.zeros(1)


def _note(x):
    LOG.append(x)
    TABLE["calls"]["n"] += 1


NEW_GLOBAL: Any


def test_globals():
    def forward(self, x):
        global CALLS, NEW_GLOBAL, STEPS
        CALLS += 1
        NEW_GLOBAL = x
        STEPS += 1
        _note(x)
        return torch.tanh(self.layer(x))

    check_tanh(forward)
    assert (LOG, CALLS, TABLE, STEPS.item()) == ([], 0, {"calls": {"n": 0}}, 0)
    assert "NEW_GLOBAL" not in globals()


def test_attributes_of_the_class():
    def forward(self, x):
        type(self).calls += 1
        type(self).new = x
        self.shared.append(x)
        return torch.tanh(self.layer(x))

    model = with_forward(forward)
    type(model).calls, type(model).shared = 0, []
    assert transfers_in(model) == {"layer": "tanh"}
    assert (type(model).calls, type(model).shared) == (0, [])
    assert not hasattr(type(model), "new")


def test_closures():
    calls, seen = 0, []

    def forward(self, x):
        nonlocal calls
        calls += 1
        seen.append(x)
        return torch.tanh(self.layer(x))

    check_tanh(forward)
    assert (calls, seen) == (0, [])


def test_grad_mode():
    def forward(self, x):
        torch.set_grad_enabled(False)
        return torch.tanh(self.layer(x))

    check_tanh(forward)
    assert torch.is_grad_enabled()


def test_everything_is_put_back_after_a_failure():
    def forward(self, x):
        self.calls += 1
        LOG.append(torch.rand(1))
        raise RuntimeError("no")

    model, state = with_forward(forward, calls=0), torch.get_rng_state()
    assert "RuntimeError: no" in find(model)["layer"].reason
    assert (model.calls, LOG) == (0, [])
    assert torch.equal(torch.get_rng_state(), state)
