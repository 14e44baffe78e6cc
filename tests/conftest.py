"""How tests run: one thread a process; kernels interpreted where there is no GPU, on scratch that is NaN at first."""

import os
import tempfile
from pathlib import Path

# Read when torch, NumPy and Triton are imported, here and by the commands that tests start. The products of the tests
# are small, and the other cores have tests of their own (pytest -n auto).
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# One for all processes of a run, which then take the same routes; the user's own is left alone.
if "LOCOPROP_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory()
    os.environ["LOCOPROP_CACHE_DIR"] = CACHE.name

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    from locoprop_kernels.kernels import run, target
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    run = target = None  # type: ignore[assignment]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which need not be installed
def pytest_xdist_auto_num_workers():
    """Cores, not hardware threads; ``None``, where Linux does not tell, leaves the number to pytest-xdist."""
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(topology.format(cpu)).read_text() for cpu in os.sched_getaffinity(0)})
    except (AttributeError, OSError):
        return None


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """Bytes of ones are NaN in every format: whatever a kernel reads before it was written spoils the result."""
    if run is not None:
        allocate = run.allocate
        monkeypatch.setattr(run, "allocate", lambda *arguments: allocate(*arguments).fill_(0xFF))


@pytest.fixture(autouse=True, scope="session")
def language_is_patched_once():
    """Saves half the time of interpreted kernels.

    Triton's interpreter replaces the functions of ``triton.language`` when a kernel is launched, and again, with the
    same ones, whenever a device function is called. Here only those are replaced that have not been yet.
    """
    if target is None or not target.interpreted():
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    def once(patch):
        def patch_once(function):
            modules = [value for value in function.__globals__.values() if value is language or value is language.core]
            if any(language.core.is_builtin(module.load) for module in modules):
                return patch(function)
            return interpreter._LangPatchScope()

        return patch_once

    with pytest.MonkeyPatch.context() as monkeypatch:
        if hasattr(interpreter, "_LangPatchScope"):  # not in every version
            monkeypatch.setattr(interpreter, "_patch_lang", once(interpreter._patch_lang))
        yield
