"""The tests that need a GPU, and compiling kernels beside them."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench import cases

if TYPE_CHECKING:
    from locoprop_kernels.kernels.configs import Config

__all__ = ["Compiling", "numerics"]

ROOT = Path(__file__).resolve().parents[2]


def numerics(limit: float, console: Console, collect_only: bool = False) -> dict[str, Any]:
    """Run the tests that are marked ``gpu``; which files could not be taken is part of the result.

    Args:
        limit: seconds that they may take.
        console: where their failures go.
        collect_only: find the tests of one file, and run none.
    """
    files: list[str] = []
    without: list[str] = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "mark.gpu" in text:
            missing = "hypothesis" in text and importlib.util.find_spec("hypothesis") is None
            (without if missing else files).append(path.relative_to(ROOT).as_posix())
    facts: dict[str, Any] = {"files": files, "left_out_without_hypothesis": without}
    if not files:
        console.print("no test file has tests marked gpu that can run here")
        return {**facts, "exit_code": 0, "summary": "nothing to run"}
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--collect-only", files[0]] if collect_only else files
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        raw = expired.stdout or b""
        code, output = 124, raw.decode() if isinstance(raw, bytes) else raw
    # pytest's code 5 says that nothing was collected.
    code = 0 if code == 5 else code
    lines = output.strip().splitlines()
    if code:
        console.print("\n".join(lines[-60:]), markup=False)
    summary = lines[-1] if lines else ""
    console.print(f"numerics: {summary}", markup=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    return {**facts, "exit_code": code, "seconds": time.monotonic() - begin, **counts}


def _compile(case: cases.Case, config: Config | None, driver: str | None) -> None:
    """Run once what will be timed, so that Triton's cache has its kernels."""
    import torch

    from bench.contestants import with_config
    from bench.work import Work

    with_config(config, driver=driver).build(Work(case, torch.device("cuda"))).run()
    torch.cuda.synchronize()


class Compiling:
    """Processes that compile what will be timed, while the tests run.

    Args:
        wanted: cases, configurations and drivers.
    """

    def __init__(self, wanted: Iterable[tuple[cases.Case, Config | None, str | None]]) -> None:
        workers = max(1, min(8, (os.cpu_count() or 1) - 1))
        self._pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        self._futures: list[Future[None]] = [self._pool.submit(_compile, *one) for one in wanted]

    def finish(self, seconds: float) -> str:
        """Wait that long at most, and say how it went; what has not been compiled is compiled when it is timed."""
        done, _ = wait(self._futures, seconds)
        failed = sum(future.exception() is not None for future in done)
        # Nobody may share the GPU with what is timed from now on.
        workers = list(getattr(self._pool, "_processes", {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(5)
        return f"{len(done)} of {len(self._futures)} compiled ahead, {failed} with an error"
