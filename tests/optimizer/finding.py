"""What is found for the layers of a model, and that looking leaves the model as it was."""

from typing import Any

import torch
from torch import nn

from locoprop_torch import GroupedLinear
from locoprop_torch.discovery import find_transfers

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, GroupedLinear)


def contents(model):
    """Every entry of the ``__dict__`` of every module, and of its tables of parameters, buffers and modules."""
    entries: dict[tuple[str, ...], Any] = {}
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
