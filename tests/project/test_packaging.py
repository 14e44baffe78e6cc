"""What is published: every package with its type marker, nothing of tests and benchmarks, one version everywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import locoprop_kernels
import locoprop_torch

ROOT = Path(__file__).parents[2]
# Where the packages are in the repository and in a source distribution; a wheel has them at its top.
PACKAGES = ("locoprop_kernels", "python/locoprop_torch")
# Not part of a clean checkout.
LEFT_OVERS = (".*", "__pycache__", "*.egg-info", "build", "dist", "site", "*_out")
# An isolated build environment has no torch: the version must be found without it.
BUILD = """
import sys
sys.modules["torch"] = None
from setuptools import build_meta
folder = sys.argv[1]
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""


class Distributions(NamedTuple):
    wheel: Path
    source: Path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The files in the folder that ``LOCOPROP_DISTRIBUTIONS`` names, or else those of a build from a clean copy."""
    given = os.environ.get("LOCOPROP_DISTRIBUTIONS")
    folder = Path(given) if given else tmp_path_factory.mktemp("distributions")
    if given is None:
        copy = tmp_path_factory.mktemp("copy") / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OVERS, "oracles", "results"))
        done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    (source,) = folder.glob("*.tar.gz")
    return Distributions(wheel, source)


def package_files() -> set[str]:
    """Modules and type markers of both packages, relative to the repository."""
    found = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    return found | {f"{package}/py.typed" for package in PACKAGES}


def test_the_wheel_holds_the_packages_and_nothing_else(distributions: Distributions) -> None:
    names = {name for name in zipfile.ZipFile(distributions.wheel).namelist() if ".dist-info/" not in name}
    assert names == {name.removeprefix("python/") for name in package_files()}


def test_the_source_distribution_holds_the_packages_but_no_tests(distributions: Distributions) -> None:
    with tarfile.open(distributions.source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {*package_files(), "pyproject.toml", "README.md", "LICENSE"}
    assert not {name.partition("/")[0] for name in names} & {"tests", "bench", "docs"}


def test_the_unpacked_wheel_is_imported(distributions: Distributions, tmp_path: Path) -> None:
    zipfile.ZipFile(distributions.wheel).extractall(tmp_path)
    program = "import locoprop_torch as lt, locoprop_kernels as lk; print(lt.__file__, lk.__file__, lt.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [tmp_path / package / "__init__.py" for package in ("locoprop_torch", "locoprop_kernels")]
    assert done.stdout.split() == [*map(str, expected), locoprop_kernels.__version__]


def test_there_is_one_version(distributions: Distributions) -> None:
    version = locoprop_kernels.__version__
    assert locoprop_torch.__version__ == version
    citation = re.search(r'^version: "?([^"\s]+)', (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation is not None
    assert changes is not None
    assert (citation[1], changes[1]) == (version, version)
    assert distributions.wheel.name.startswith(f"locoprop_kernels-{version}-")
    assert distributions.source.name == f"locoprop_kernels-{version}.tar.gz"
