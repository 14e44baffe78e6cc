"""Which transfer functions are found in a model, and that looking for them leaves no trace."""

import logging
import random
import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import locoprop_kernels as lk
from locoprop_torch import GroupedLinear
from locoprop_torch.discovery import find_transfers, transfer_of
from tests.helpers import RECENT

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, GroupedLinear)


def contents(model):
    """Every entry of the ``__dict__`` of every module, and of its tables of parameters, buffers and modules."""
    entries = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            entries[name, key] = value
            if key in ("_parameters", "_buffers", "_modules"):
                entries.update({(name, key, inner): member for inner, member in value.items()})
    return entries


def find(model):
    """What is found for the layers of ``model``, which is made of the same objects as before."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    before, state = contents(model), {name: value.clone() for name, value in model.state_dict().items()}
    found = find_transfers(model, layers)
    after = contents(model)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return found


def transfers_in(model):
    return {name: str(found.transfer) for name, found in find(model).items()}


def with_forward(forward, **attributes):
    """A model with a ``layer`` of six units, and with these attributes."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            for name, value in attributes.items():
                setattr(self, name, value)

    Model.forward = forward
    return Model()


def check_tanh(forward, **attributes):
    """``forward`` can be followed, whatever else it does; returns the model."""
    model = with_forward(forward, **attributes)
    found = find(model)["layer"]
    assert (str(found.transfer), found.reason) == ("tanh", None)
    return model


# --- what belongs to the model


@pytest.mark.skipif(not RECENT, reason="its torch.fx cannot assign to buffers, which is reported")
def test_a_buffer_that_is_assigned():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("mean", torch.zeros(6))

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

    nested = []
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
    ended = []

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


# --- what does not


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

    attributes = {
        "generator": torch.Generator(),
        "rng": random.Random(0),
        "numpy_rng": np.random.default_rng(0),
    }
    states = (
        torch.get_rng_state,
        lambda: torch.tensor(random.getstate()[1]),
        lambda: torch.tensor(np.random.get_state()[1].astype(np.int64)),
        lambda: torch.tensor(np.random.get_state()[2]),
        attributes["generator"].get_state,
        lambda: torch.tensor(attributes["rng"].getstate()[1]),
        lambda: torch.tensor(attributes["numpy_rng"].bit_generator.state["state"]["state"] % 2**62),
    )
    model = with_forward(forward, **attributes)
    before = [state().clone() for state in states]
    assert transfers_in(model) == {"layer": "tanh"}
    assert all(torch.equal(state(), old) for state, old in zip(states, before, strict=True))


LOG, CALLS, TABLE, STEPS = [], 0, {"calls": {"n": 0}}, torch.zeros(1)


def _note(x):
    LOG.append(x)
    TABLE["calls"]["n"] += 1


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


# --- what can be followed


def test_eval_and_train_are_the_same():
    def forward(self, x):
        x = self.layer(x)
        if not self.training:
            return x
        return F.dropout(torch.tanh(x))

    model = with_forward(forward)
    assert transfers_in(model.train()) == transfers_in(model.eval()) == {"layer": "tanh"}
    assert not model.training


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.body = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.body(x) if x.sum() > 0 else x


REASON = (
    "Branching.forward could not be traced: TraceError: symbolically traced variables cannot be used as inputs to "
    "control flow"
)


def test_a_branch_on_data_is_reported_once(caplog):
    found = find(Branching())
    assert {name: str(f.transfer) for name, f in found.items()} == {
        "first": "identity", "body.0": "relu", "body.2": "identity",
    }  # fmt: skip
    assert found["first"].reason == found["body.2"].reason == REASON
    assert found["body.0"].reason is None
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("locoprop_torch", "WARNING")
    assert "first, body.2: Branching.forward could not be traced" in record.message
    assert "transfers=" in record.message


def test_a_part_that_branches_on_data_hides_nothing_else(caplog):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), Branching(), nn.Linear(6, 6), nn.Sigmoid())
    found = find(model)
    assert {name: str(f.transfer) for name, f in found.items()} == {
        "0": "tanh", "2": "identity", "3.first": "identity", "3.body.0": "relu", "3.body.2": "identity",
        "4": "sigmoid",
    }  # fmt: skip
    assert [name for name, f in found.items() if f.reason] == ["3.first", "3.body.2"]
    assert len(caplog.records) == 1


def test_a_long_list_of_layers_is_cut(caplog):
    class Data(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    find(Data(*(nn.Linear(6, 6) for _ in range(30))))
    assert "8, 9 and 20 more: Data.forward could not be traced" in caplog.text


def test_nothing_is_logged_when_all_is_followed(caplog):
    find(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    assert not caplog.records


def test_different_functions_are_no_failure(caplog):
    def forward(self, x):
        return torch.tanh(self.layer(torch.relu(self.layer(x))))

    found = find(with_forward(forward))["layer"]
    assert (str(found.transfer), found.reason) == ("identity", None)


def test_a_sequential_with_a_forward_of_its_own():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + self[0](x)

    class Data(nn.Sequential):
        def forward(self, x):
            return self[0](x) if x.sum() > 0 else x

    assert transfers_in(Residual(nn.Linear(6, 6), nn.Tanh())) == {"0": "identity"}
    found = find(Data(nn.Linear(6, 6), nn.Tanh()))["0"]
    assert str(found.transfer) == "identity"
    assert "Data.forward could not be traced" in found.reason


def test_containers_without_forward():
    found = find(nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6)]))
    assert (str(found["0.0"].transfer), found["0.0"].reason) == ("tanh", None)
    assert found["1"].reason == "ModuleList has no forward"


MODULES = {
    "selu": nn.SELU(),
    "celu(alpha=0.5)": nn.CELU(0.5),
    "softsign": nn.Softsign(),
    "hardtanh(min_val=-1, max_val=1)": nn.Hardtanh(),
    "hardtanh(min_val=-2, max_val=3)": nn.Hardtanh(-2, 3),
    "relu6": nn.ReLU6(),
    "mish": nn.Mish(),
    "logsigmoid": nn.LogSigmoid(),
}
FUNCTIONS = [
    ("selu", torch.selu),
    ("selu", F.selu),
    ("celu(alpha=1)", torch.celu),
    ("celu(alpha=0.5)", lambda x: F.celu(x, alpha=0.5)),
    ("celu(alpha=0.5)", lambda x: torch.celu(x, 0.5)),
    ("softsign", F.softsign),
    ("hardtanh(min_val=-1, max_val=1)", F.hardtanh),
    ("hardtanh(min_val=-1, max_val=2)", lambda x: F.hardtanh(x, max_val=2)),
    ("hardtanh(min_val=-2, max_val=3)", lambda x: F.hardtanh(x, -2.0, 3.0)),
    ("relu6", F.relu6),
    ("mish", F.mish),
    ("logsigmoid", F.logsigmoid),
    ("softmax", lambda x: F.log_softmax(x, -1)),
    ("softmax", lambda x: torch.log_softmax(x, dim=-1)),
    ("softmax", lambda x: x.log_softmax(-1)),
    ("identity", lambda x: F.log_softmax(x, 0)),
]


@pytest.mark.parametrize(("name", "module"), MODULES.items(), ids=list(MODULES))
def test_modules(name, module):
    assert transfers_in(nn.Sequential(nn.Linear(6, 6), module)) == {"0": name}
    transfer = transfer_of(module, -1, 2)
    assert str(transfer) == name
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(transfer(x), module(x))


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_functions(name, function):
    assert transfers_in(with_forward(lambda self, x: function(self.layer(x)))) == {"layer": name}


def test_log_softmax():
    assert transfers_in(nn.Sequential(nn.Linear(6, 6), nn.LogSoftmax(-1))) == {"0": "softmax"}
    assert transfers_in(nn.Sequential(nn.Linear(6, 6), nn.LogSoftmax(0))) == {"0": "identity"}
    assert transfers_in(nn.Sequential(nn.Conv2d(3, 6, 1), nn.LogSoftmax(1))) == {"0": "softmax"}
    assert transfer_of(nn.LogSoftmax(-1), -1, 2) is None
    assert transfer_of(F.log_softmax, -1, 2) is None
    assert str(transfer_of(nn.Softmax(-1), -1, 2)) == "softmax"


def test_subclasses_of_layers():
    class Own(nn.Linear):
        pass

    assert transfers_in(nn.Sequential(Own(6, 6), nn.Tanh())) == {"0": "tanh"}


def test_pruned_and_parametrised_layers():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Sigmoid())
    prune.random_unstructured(model[0], "weight", 0.5)
    parametrize.register_parametrization(model[2], "weight", Double())
    nn.utils.parametrizations.weight_norm(model[4])
    assert transfers_in(model) == {"0": "tanh", "2": "relu", "4": "sigmoid"}
    model(torch.randn(2, 6)).sum().backward()


def test_a_parametrised_module_of_the_users():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = with_forward(lambda self, x: torch.tanh(self.layer(x * self.scale)), scale=nn.Parameter(torch.ones(6)))
    parametrize.register_parametrization(model, "scale", Double())
    assert transfers_in(nn.Sequential(model)) == {"0.layer": "tanh"}


def test_compiled_models():
    def forward(self, x):
        return F.mish(self.part(torch.tanh(self.layer(x))))

    part = torch.compile(nn.Linear(6, 6), backend="eager")
    model = with_forward(forward, part=part)
    found = {"layer": "tanh", "part._orig_mod": "mish"}
    assert transfers_in(model) == found
    compiled = torch.compile(model, backend="eager")
    assert transfers_in(compiled) == {f"_orig_mod.{name}": function for name, function in found.items()}
    model.compile(backend="eager")
    assert transfers_in(nn.Sequential(model)) == {f"0.{name}": function for name, function in found.items()}


def test_shared_modules_and_weights():
    def forward(self, x):
        return torch.tanh(self.layer(torch.tanh(self.again(x)))) @ self.twin.weight

    model = with_forward(forward, twin=nn.Linear(6, 6))
    model.again, model.twin.weight = model.layer, model.layer.weight
    assert transfers_in(model) == {"layer": "tanh", "twin": "identity"}


def test_values_of_small_buffers_are_known():
    def forward(self, x):
        if self.flag.item() > 0:
            return torch.tanh(self.layer(x))
        return x

    check_tanh(forward, flag=torch.ones(()))


def test_transformer_layers(caplog):
    layer = nn.TransformerEncoderLayer(6, 2, 8, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    found = {name: f for name, f in find(model).items() if "linear" in name}
    assert {name: str(f.transfer) for name, f in found.items()} == {
        f"layers.{i}.linear{j}": {1: "gelu", 2: "identity"}[j] for i in (0, 1) for j in (1, 2)
    }
    assert not caplog.records


def test_only_a_symmetric_hardtanh_has_a_kernel():
    functions = pytest.importorskip("locoprop_kernels.kernels.functions")
    symmetric, other = (transfer_of(nn.Hardtanh(least, 2.0), -1, 2) for least in (-2.0, -1.0))
    assert functions.lookup(symmetric) is not None
    assert functions.lookup(other) is None
    problem = lk.LocalProblem(torch.ones(2, 3), torch.ones(2, 4), torch.ones(4, 3), grad_weight=torch.ones(4, 3))
    problem.transfer = other
    assert lk.local_steps_([problem], lr=[0.1]).backend == "reference"
    with pytest.raises(ValueError, match="hardtanh"):
        lk.local_steps_([problem], lr=[0.1], backend="triton")
