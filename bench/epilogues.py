"""Count what the epilogues issue on every target, for the predictions: the table ``locoprop_kernels/epilogues.py``.

Compiles two kernels for each target, the activation with tanh and the update of RMSprop, with bfloat16 operands and the
target's first configuration, and prints the table; ``--write`` puts it into the file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from locoprop_kernels import devices, epilogues
from locoprop_kernels.epilogues import Issued

__all__ = ["count", "main", "table"]

_FILE = Path(epilogues.__file__)
_START = "EPILOGUES = {\n"


def count(target: str) -> dict[str, Issued]:
    """Instructions and special functions for an element of each phase's tile, compiled for ``target``."""
    from locoprop_kernels.compile_report.inspection import compile_variant
    from locoprop_kernels.compile_report.variants import variants

    found: dict[str, Issued] = {}
    for variant in variants(target):
        wanted = variant.epilogue is not None and variant.precision == "bf16" and variant.kernel not in found
        if wanted and variant.configuration.endswith((", tanh", ", rmsprop")):
            counts = compile_variant(variant, target).epilogue
            assert counts is not None
            special = counts.special / counts.elements
            found[variant.kernel] = Issued(round(counts.per_element, 1), round(special, 1))
    return dict(sorted(found.items()))


def table(found: dict[str, dict[str, Issued]]) -> str:
    """The table as it stands in the file."""
    lines = []
    for target, phases in found.items():
        entries = ", ".join(f'"{phase}": Issued{tuple(issued)}' for phase, issued in phases.items())
        lines.append(f'    "{target}": {{{entries}}},\n')
    return _START + "".join(lines) + "}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m bench.epilogues``."""
    parser = argparse.ArgumentParser(prog="python -m bench.epilogues", description=__doc__)
    targets = list(dict.fromkeys(device.target for device in devices.DEVICES))
    parser.add_argument("--target", nargs="+", choices=targets, default=targets, help="default: all that are known")
    parser.add_argument("--write", action="store_true", help="replace the table, or the entries of these targets")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    found = dict(epilogues.EPILOGUES) if options.write else {}
    for target in options.target:
        found[target] = count(target)
        print(f"{target}: {found[target]}", file=sys.stderr)
    text = table({target: found[target] for target in targets if target in found})
    if options.write:
        head, _, _ = _FILE.read_text().partition(_START)
        _FILE.write_text(head + text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
