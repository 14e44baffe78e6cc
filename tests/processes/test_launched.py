"""Processes that a launcher has started, and that have not been told of each other: none of them trains alone."""

import subprocess
import sys

import pytest
import torch.distributed as dist

from locoprop_torch import LocoProp
from tests.helpers import backward, mlp, moved, weights
from tests.processes.test_examples import environment

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

#: What one of them says in its first step, and whether it trains once it has said that it is to be alone.
PROGRAM = """
import os
import torch
from torch import nn
from locoprop_torch import LocoProp

model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
opt = LocoProp(model)
before = model[0].weight.detach().clone()
for size in (os.environ["WORLD_SIZE"], "1"):
    os.environ["WORLD_SIZE"] = size
    opt.zero_grad()
    model(torch.randn(8, 6)).square().mean().backward()
    try:
        opt.step()
    except ValueError as error:
        print(f"{error}, moved: {not torch.equal(model[0].weight, before)}")
print(f"alone, moved: {not torch.equal(model[0].weight, before)}")
"""


def test_processes_of_torchrun_without_a_group(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "program.py")], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("alone, moved: True") == 2
    for rank in range(2):
        assert f"this is process {rank} of 2 (RANK and WORLD_SIZE in its environment)" in done.stdout
    assert done.stdout.count('init_process_group() and wrap the model in DistributedDataParallel, or use fully_shard; '
                             'to train a model of its own in every process, set os.environ["WORLD_SIZE"] = "1", '
                             "moved: False") == 2  # fmt: skip


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),
        # What init_process_group() could not do with either.
        ({"WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "two"}, False),
    ],
)
def test_which_processes_are_launched_together(monkeypatch, given, refused):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    model = mlp()
    opt = LocoProp(model)
    backward(model, opt)
    before = weights(model)
    if refused:
        with pytest.raises(ValueError, match="their process group is not initialised, so each would train alone"):
            opt.step()
    else:
        opt.step()
    assert any(moved(model, before)) == (not refused)
