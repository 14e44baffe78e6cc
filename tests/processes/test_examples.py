"""The examples run as their users run them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers import RECENT, present

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}, of the extra [ecosystem]")


def environment():
    """That of a user who has installed the packages."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}


def run(example, count, folder, *arguments):
    """The loss that an example prints in the end, with so many processes."""
    folder.mkdir(exist_ok=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*launch, str(ROOT / "examples" / example), *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(present(re.search(r"^loss ([\d.]+)$", done.stdout, re.MULTILINE))[1])


@pytest.mark.parametrize(
    ("example", "most"),
    [
        ("ddp.py", 1.2),
        pytest.param("with_accelerate.py", 1.1, marks=needs("accelerate")),
        pytest.param("with_lightning.py", 0.9, marks=needs("lightning")),
        pytest.param("with_trainer.py", 2.9, marks=needs("transformers")),
    ],
)
def test_torchrun(example, most, tmp_path):
    """As many processes as there are, the result is the same to rounding."""
    alone, two = (run(example, count, tmp_path / str(count)) for count in (1, 2))
    assert alone == pytest.approx(two, rel=1e-4)
    assert alone < most


@pytest.mark.skipif(not RECENT, reason="older FSDP2 needs a GPU")
@pytest.mark.sweep
def test_a_sharded_run_goes_on_with_other_processes(tmp_path):
    whole = run("fsdp.py", 1, tmp_path / "whole", "40")
    parts = [run("fsdp.py", count, tmp_path / "parts", steps) for count, steps in ((2, "25"), (1, "40"))]
    assert 1.2 > parts[0] > parts[1] == pytest.approx(whole, rel=1e-4)
