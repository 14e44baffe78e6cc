"""What a step makes is where it belongs, whatever ``torch.set_default_device`` says: on "meta" nothing has values."""

import pytest
import torch
from torch import nn

from locoprop_torch import LocoProp, presets

SETTINGS = {
    "defaults": {},
    "rows": {"rows": 4},
    "all rows": {"rows": None},
    "traced": {"rows": None, "trace": True},
    "package": {**presets["package"], "compute_dtype": torch.bfloat16},
    "masked": {"rows": 4, "masks": {"4.weight": torch.ones(5, 54)}},
}


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_no_tensor_is_made_on_the_default_device(backend, settings):
    if backend == "triton":
        triton = pytest.importorskip("triton")
        if not hasattr(triton, "knobs") or not triton.knobs.runtime.interpret:
            pytest.skip("needs a recent Triton, and TRITON_INTERPRET=1")
    found = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Tanh(), nn.Linear(54, 5))
        inputs = [(torch.randn(12, 1, 8, 8), torch.randint(5, (12,))) for _ in range(3)]
        with torch.device(default):
            opt = LocoProp(model, transfers={"4": "softmax"}, backend=backend, **settings)
            for x, y in inputs:
                opt.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                opt.step()
            saved = opt.state_dict()
            opt.load_state_dict(saved)
        assert opt.skipped_steps == 0
        found.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
