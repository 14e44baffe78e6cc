"""The examples run as their users run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers import present

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def test_torchrun(tmp_path):
    """As many processes as there are, the result is the same to rounding."""
    losses = []
    for count in ("1", "2"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
        done = subprocess.run(
            [*launch, str(ROOT / "examples/ddp.py")],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses.append(float(present(re.search(r"loss ([\d.]+)", done.stdout))[1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] < 1.2
