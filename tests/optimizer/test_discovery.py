"""Which transfer functions are found in a model, and what is said of layers for which none is."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import locoprop_kernels as lk
from locoprop_torch.functions import transfer_of
from tests.helpers import present
from tests.optimizer.finding import check_tanh, find, transfers_in, with_forward


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
    transfer = present(transfer_of(module, -1, 2))
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


def found_before(function):
    """What is found for a linear layer that a module or function follows."""
    if isinstance(function, nn.Module):
        return find(nn.Sequential(nn.Linear(6, 6), function))["0"]
    return find(with_forward(lambda self, x: function(self.layer(x))))["layer"]


@pytest.mark.parametrize("module", [nn.Softplus(2.0, 5.0), lambda x: F.softplus(x, 1, 14)], ids=["module", "function"])
def test_a_softplus_with_a_low_threshold_is_another_function(module, caplog):
    found = found_before(module)
    assert str(found.transfer) == "identity"
    assert re.search("softplus with threshold (5|14) is the identity above it", present(found.reason))
    assert ": softplus with threshold" in caplog.text
    assert transfer_of(nn.Softplus(2.0, 5.0), -1, 2) is None
    higher = found_before(lambda x: F.softplus(x, beta=2, threshold=15))
    assert (str(higher.transfer), higher.reason) == ("softplus(beta=2)", None)


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_a_softmax_that_may_be_over_the_features_is_said_to_be(caplog):
    for softmax in (nn.LogSoftmax(1), nn.Softmax(2), lambda x: F.log_softmax(x, dim=1), lambda x: x.softmax(1)):
        found = found_before(softmax)
        assert str(found.transfer) == "identity"
        assert re.match("softmax over dim [12]: say 'softmax' in transfers if that", present(found.reason))
    assert "layer: softmax over dim 1: say 'softmax'" in caplog.text
    assert "softmax without dim" in present(found_before(lambda x: F.softmax(x)).reason)
    for known in (nn.Softmax(-1), nn.Softmax(0), nn.Softmax(-2), lambda x: x.unflatten(0, (2, -1)).softmax(1)):
        assert found_before(known).reason is None
    convolution = find(nn.Sequential(nn.Conv1d(2, 3, 1), nn.Softmax(1)))["0"]
    assert (str(convolution.transfer), convolution.reason) == ("softmax", None)
    assert find(nn.Sequential(nn.Conv1d(2, 3, 1), nn.Softmax(2)))["0"].reason is None


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
    functions = pytest.importorskip("locoprop_kernels.kernels.device.functions")
    symmetric, other = (present(transfer_of(nn.Hardtanh(least, 2.0), -1, 2)) for least in (-2.0, -1.0))
    assert functions.lookup(symmetric) is not None
    assert functions.lookup(other) is None
    problem = lk.LocalProblem(torch.ones(2, 3), torch.ones(2, 4), torch.ones(4, 3), grad_weight=torch.ones(4, 3))
    problem.transfer = other
    assert lk.local_steps_([problem], lr=[0.1]).backend == "reference"
    with pytest.raises(ValueError, match="hardtanh"):
        lk.local_steps_([problem], lr=[0.1], backend="triton")
