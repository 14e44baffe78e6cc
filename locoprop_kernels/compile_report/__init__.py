"""What the compiler makes of every kernel, for GPUs that need not be there.

Exits with status 1 if a default configuration spills registers, needs more shared memory than the target has,
multiplies without matrix instructions where the target has them (IEEE fp32 aside), or waits for every one of them.
What epilogues issue for an element of their tile and how wide they read and write is reported beside what is wanted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from locoprop_kernels.compile_report.inspection import Counts, Record, Variant

__all__ = ["TARGETS", "compile_all", "main"]

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")


@cache
def _variants(target: str, brief: bool, kernels: tuple[str, ...]) -> list[Variant]:
    from locoprop_kernels.compile_report.variants import variants

    return [variant for variant in variants(target, brief) if not kernels or variant.kernel in kernels]


def _compile(target: str, brief: bool, kernels: tuple[str, ...], index: int) -> Record:
    # Compiled functions do not travel between processes; a worker lists the variants again, once, and takes one.
    from locoprop_kernels.compile_report.inspection import compile_variant

    return compile_variant(_variants(target, brief, kernels)[index], target)


def compile_all(
    targets: Sequence[str], jobs: int = 2, brief: bool = False, kernels: Sequence[str] = ()
) -> list[Record]:
    """Compile the default configurations of the kernels for ``targets``, in ``jobs`` processes, with a progress bar.

    Triton keeps what it has compiled in its own cache (``~/.triton``, ``TRITON_CACHE_DIR``), here as elsewhere.

    Args:
        targets: backends and architectures.
        jobs: processes that compile.
        brief: without kernels that differ from others in little.
        kernels: names, to compile only these.

    Raises:
        RuntimeError: a kernel does not compile; says which.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    taken = tuple(kernels)
    found = {target: _variants(target, brief, taken) for target in targets}
    work = [(target, brief, taken, index) for target in targets for index in range(len(found[target]))]
    # The longest first, or one process compiles it at the end while the others have nothing left to do.
    queue = sorted(work, key=lambda item: found[item[0]][item[-1]].kernel != "local_steps")
    records: dict[tuple[str, bool, tuple[str, ...], int], Record] = {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("compiling", total=len(work))
        futures = {pool.submit(_compile, *item): item for item in queue}
        for future in as_completed(futures):
            target, *_, index = item = futures[future]
            try:
                records[item] = future.result()
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                variant = found[target][index]
                message = f"{variant.kernel} [{variant.configuration}] for {target} does not compile: {error}"
                raise RuntimeError(message) from error
            progress.advance(bar)
    return [records[item] for item in work]


def _opcodes(counts: dict[str, int]) -> str:
    return " ".join(f"{opcode}:{count}" for opcode, count in sorted(counts.items(), key=lambda item: -item[1])) or "-"


def _epilogue(counts: Counts | None) -> str:
    """Instructions and special functions for an element, and accesses to global memory by their bits."""
    if counts is None:
        return "-"
    accesses = "; ".join(
        f"{name} {' '.join(f'{bits}:{count}' for bits, count in sorted(found.items(), reverse=True))}"
        for name, found in (("loads", counts.loads), ("stores", counts.stores))
    )
    return f"{counts.per_element:.1f} ({counts.special / counts.elements:.1f}) an element; {accesses}"


def _print_table(records: Sequence[Record]) -> None:
    from rich.console import Console
    from rich.table import Table

    # A file or a pipe has no width; cut nothing off there.
    console = Console(width=None if sys.stdout.isatty() else 300)
    table = Table("kernel", "configuration", "target", title="Default configurations, compiled ahead of time")
    for column in ("registers", "spill_bytes", "shared_bytes"):
        table.add_column(column, justify="right")
    table.add_column("matrix instructions", overflow="fold")
    table.add_column("load instructions", overflow="fold")
    table.add_column("code, KiB", justify="right")
    # Of an element, all instructions and special functions; accesses to global memory by their bits.
    table.add_column("epilogue", overflow="fold")
    for record in records:
        table.add_row(
            record.kernel,
            record.configuration,
            record.target,
            str(record.registers),
            str(record.spill_bytes),
            str(record.shared_bytes),
            _opcodes(record.matrix_instructions),
            _opcodes(record.load_instructions),
            f"{record.code_bytes / 1024:.0f}",
            _epilogue(record.epilogue),
            style="red" if record.violations() else None,
        )
    console.print(table)


def _report(records: Sequence[Record]) -> dict[str, Any]:
    import torch
    import triton

    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "targets": sorted({record.target for record in records}),
        "records": [record.as_dict() for record in records],
    }


def _said_of(records: Sequence[Record], what: Callable[[Record], list[str]]) -> list[str]:
    return [
        f"{record.kernel} [{record.configuration}] for {record.target} {text}"
        for record in records
        for text in what(record)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m locoprop_kernels.compile_report", description=__doc__)
    parser.add_argument("--target", nargs="+", action="extend", help=f"targets (default: {' '.join(TARGETS)})")
    parser.add_argument("--brief", action="store_true", help="leave out kernels that differ from others in little")
    parser.add_argument("--kernel", nargs="+", action="extend", help="names of kernels, to compile only these")
    parser.add_argument("--json", metavar="FILE", help="also write the report to FILE")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes that compile")
    options = parser.parse_args(arguments)
    # Interpreted functions cannot be compiled; it is not too late as long as Triton has not been imported.
    if os.environ.pop("TRITON_INTERPRET", "0") != "0" and "triton" in sys.modules:
        parser.error("Triton was imported with TRITON_INTERPRET set; unset it and start a new process")
    try:
        import rich  # noqa: F401

        from locoprop_kernels.compile_report.inspection import gpu_target
    except ModuleNotFoundError as error:
        parser.error(f"{error}; the report needs Triton's pip wheel and rich (pip install triton rich, on Linux)")
    targets = list(dict.fromkeys(options.target or TARGETS))
    try:
        for target in targets:
            gpu_target(target)
    except ValueError as error:
        parser.error(str(error))
    kernels = tuple(options.kernel or ())
    for name in kernels:
        if not _variants(targets[0], options.brief, (name,)):
            parser.error(f"--kernel must be one of the kernels in the table, got {name!r}")

    records = compile_all(targets, options.jobs, options.brief, kernels)
    _print_table(records)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(_report(records), file, indent=1)
            file.write("\n")
    shortfalls = _said_of(records, lambda record: record.shortfalls())
    for shortfall in shortfalls:
        print(f"not as wanted: {shortfall}", file=sys.stderr)
    violations = _said_of(records, lambda record: record.violations())
    for violation in violations:
        print(f"VIOLATION: {violation}", file=sys.stderr)
    print(f"{len(records)} kernels compiled, {len(violations)} violations, {len(shortfalls)} not as wanted")
    return 1 if violations else 0
