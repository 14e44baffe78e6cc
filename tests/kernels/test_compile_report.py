"""The compile report: its reading of machine code, its verdicts, and the verdict on the kernels."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from locoprop_kernels import compile_report
from locoprop_kernels.compile_report import flow
from locoprop_kernels.compile_report.inspection import Counts, Record, gpu_target
from locoprop_kernels.compile_report.variants import variants
from locoprop_kernels.epilogues import EPILOGUES

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
GOOD = Record(
    kernel="kernel",
    configuration="bf16",
    target="sm_90",
    precision="bf16",
    registers=168,
    spill_bytes=0,
    shared_bytes=98304,
    shared_limit=232448,
    matrix_instructions={"HGMMA": 8},
    load_instructions={"LDGSTS": 36},
    instructions=1000,
    scalar_products=0,
    seconds=1.0,
)

COUNT_EPILOGUES = """
import json
from bench import epilogues
print(json.dumps(epilogues.count("sm_90")))
"""

COMPILE_TOYS = """
import json, sys
from tests.kernels.toy_kernels import chain_kernel, copy_kernel, epilogue_kernel, product_kernel
from locoprop_kernels.compile_report.inspection import Epilogue, Variant, compile_variant
from locoprop_kernels.compile_report.variants import variants

def product(precision, dtype, size=64, **options):
    return Variant(
        "product", f"{precision} {size}", product_kernel,
        {"a_ptr": "*" + dtype, "b_ptr": "*" + dtype, "c_ptr": "*fp32", "M": "i32", "N": "i32", "K": "i32"},
        {"BM": size, "BN": size, "BK": 32, "PRECISION": precision if precision in ("ieee", "tf32") else None},
        ("a_ptr", "b_ptr", "c_ptr", "K"), precision, {"num_warps": 4, "num_stages": 3, **options},
    )

def chain(dependent):
    return Variant(
        "chain", "", chain_kernel, {"a_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"},
        {"SIZE": 64, "DEPENDENT": dependent}, ("a_ptr", "c_ptr", "K"), "bf16", {"num_warps": 4},
    )

def epilogue(work, wide=True, paths=False, most=None):
    return Variant(
        "epilogue", "", epilogue_kernel, {"a_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32", "stride": "i32"},
        {"SIZE": 64, "WORK": work, "PATHS": paths}, ("a_ptr", "c_ptr", "K", *(["stride"] if wide else [])), "bf16",
        {"num_warps": 4}, Epilogue("update", 64 * 64, 1, most),
    )

copy = Variant("copy", "", copy_kernel, {"a_ptr": "*fp32", "c_ptr": "*fp32", "N": "i32"}, {"BLOCK": 256})
cases = {
    "good": (product("bf16", "bf16"), "sm_90"),
    "ampere": (product("bf16", "bf16"), "sm_80"),
    "tf32": (product("tf32", "fp32"), "sm_90"),
    "ieee": (product("ieee", "fp32"), "sm_90"),
    "amd": (product("fp16", "fp16"), "gfx942"),
    "copy": (copy, "sm_90"),
    "local_steps": (variants("sm_90")[0], "sm_90"),
    "spill": (product("bf16", "bf16", maxnreg=48), "sm_80"),
    "amd_spill": (product("fp16", "fp16", 128, num_warps=1, waves_per_eu=8), "gfx90a"),
    "shared": (product("tf32", "fp32", 128, num_warps=8, num_stages=8), "sm_90"),
    "in_parallel": (chain(False), "sm_90"),
    "in_turn": (chain(True), "sm_90"),
    "in_turn_on_blackwell": (chain(True), "sm_100"),
    "in_turn_on_ampere": (chain(True), "sm_80"),
    "little": (epilogue(1, most=20.0), "sm_90"),
    "much": (epilogue(8, most=20.0), "sm_90"),
    "much_elsewhere": (epilogue(8, most=20.0), "sm_80"),
    "much_on_amd": (epilogue(8), "gfx942"),
    "narrow": (epilogue(1, wide=False), "sm_90"),
    "paths": (epilogue(4, paths=True), "sm_90"),
    "called_ieee": (__import__("dataclasses").replace(product("tf32", "fp32"), precision="ieee"), "sm_90"),
    "called_tf32": (__import__("dataclasses").replace(product("ieee", "fp32"), precision="tf32"), "sm_90"),
}
print(json.dumps({name: compile_variant(*case).as_dict() for name, case in cases.items()}))
"""


SOUND = ("good", "ampere", "tf32", "ieee", "amd", "copy", "local_steps", "in_parallel", "in_turn_on_ampere", "little")


def printed(script):
    """What a script prints as JSON, in a process of its own that compiles kernels."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=ENVIRONMENT,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@cache
def toys():
    return printed(COMPILE_TOYS)


@pytest.mark.parametrize("name", [*SOUND])
def test_sound_kernels_pass(name):
    assert toys()[name]["violations"] == []
    assert toys()[name]["spill_bytes"] == 0
    assert toys()[name]["registers"] > 0


def test_opcodes_are_read():
    for name in ("good", "tf32", "local_steps"):
        assert set(toys()[name]["matrix_instructions"]) == {"HGMMA"}
    assert set(toys()["ampere"]["matrix_instructions"]) == {"HMMA"}
    assert all(opcode.startswith("v_mfma_f32_") for opcode in toys()["amd"]["matrix_instructions"])
    assert toys()["ieee"]["matrix_instructions"] == toys()["copy"]["matrix_instructions"] == {}
    assert "LDGSTS" in toys()["good"]["load_instructions"]
    assert "LDG" in toys()["copy"]["load_instructions"]
    assert any(opcode.startswith("global_load") for opcode in toys()["amd"]["load_instructions"])
    assert toys()["good"]["shared_bytes"] > 0
    assert toys()["copy"]["shared_bytes"] == 0
    assert toys()["ieee"]["scalar_products"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spill", "spills"),
        ("amd_spill", "spills"),
        ("shared", "shared memory"),
        ("in_turn", "waits more than once"),
        ("in_turn_on_blackwell", "waits more than once"),
        ("called_ieee", "multiplies IEEE fp32 with HGMMA"),
        ("called_tf32", "without matrix instructions"),
    ],
)
def test_unsound_kernels_are_found(name, message):
    assert any(message in violation for violation in toys()[name]["violations"])


def test_the_size_of_the_code_is_read():
    for name in ("good", "ampere"):
        assert toys()[name]["code_bytes"] == 16 * toys()[name]["instructions"]
    # AMD's instructions have four or eight bytes.
    assert 4 <= toys()["amd"]["code_bytes"] / toys()["amd"]["instructions"] <= 8


def test_epilogues_are_counted():
    """32 elements a thread: 8 accesses of 128 bits, or 32 of one number; an exponential is two instructions or more."""
    counts = {name: toys()[name]["epilogue"] for name in toys() if "epilogue" in toys()[name]}
    assert counts["good"] is None
    little, much, narrow = counts["little"], counts["much"], counts["narrow"]
    assert little["elements"] == much["elements"] == narrow["elements"] == 32
    assert (little["special"], much["special"]) == (32, 8 * 32)
    assert little["instructions"] < much["instructions"] - 2 * 7 * 32
    assert little["loads"]["128"] == little["stores"]["128"] == 8
    assert narrow["loads"]["32"] >= 32 <= narrow["stores"]["32"]
    assert toys()["little"]["shortfalls"] == []
    assert [text.split()[0] for text in toys()["much"]["shortfalls"]] == ["issues"]
    assert [text.split()[0] for text in toys()["narrow"]["shortfalls"]] == ["reads", "writes"]
    # What is wanted is wanted of sm_90; lanes of a wave are more elsewhere.
    assert toys()["much_elsewhere"]["shortfalls"] == []
    assert counts["much_on_amd"]["elements"] == 16
    assert counts["much_on_amd"]["special"] == 8 * 16
    # A kernel's own choice among ways: the one on which elements are worked on, and of two such the shorter.
    assert counts["paths"]["special"] == 4 * 32


def test_predictions_count_what_the_compiler_made():
    """To a quarter, as other compilers do not issue the same; after a change, ``python -m bench.epilogues --write``."""
    for phase, (instructions, special) in printed(COUNT_EPILOGUES).items():
        known = EPILOGUES["sm_90"][phase]
        assert instructions == pytest.approx(known.instructions, rel=0.25), phase
        assert special == pytest.approx(known.special, abs=0.2), phase


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/               @P1 BRA 0x90 ;
        /*0050*/                   FADD R0, R1, R2 ;
        /*0060*/                   MUFU.EX2 R0, R0 ;
        /*0070*/               @P2 EXIT ;
        /*0080*/                   BRA.U !UP0, 0x70 ;
        /*0090*/                   STG.E.128 [R2.64], R4 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0 ;
"""


def test_machine_code_becomes_blocks():
    matrix, special = re.compile("HGMMA"), re.compile("MUFU")
    blocks = flow.nvidia_blocks(SASS)
    assert [block.opcodes[-1:] for block in blocks[:-1]] == [
        (last,) for last in ("MOV", "BRA", "BRA", "MUFU.EX2", "EXIT", "BRA.U", "EXIT", "BRA")
    ]
    end = len(blocks) - 1
    assert [block.successors for block in blocks] == [(1,), (1, 2), (6, 3), (4,), (end, 5), (4, 6), (end,), (7,), ()]
    assert flow.product_loops(blocks, matrix) == [frozenset({1})]
    assert flow.product_loops(blocks, re.compile("STG")) == []
    straight = ["BRA", "STG.E.128", "EXIT"]
    assert flow.epilogue_path(blocks, matrix, special, (2, 2)) == straight
    # Where special functions count, the way with them; the loop once, and out of it before its end.
    assert flow.epilogue_path(blocks, matrix, special, (1, 1)) == ["BRA", "FADD", "MUFU.EX2", "EXIT"]
    assert flow.epilogue_path(blocks, re.compile("QGMMA"), special, (1, 1)) is None


def test_amds_code_becomes_blocks():
    text = """
kernel:
	s_load_dword s0, s[4:5], 0x0
.LBB0_1:
	v_mfma_f32_32x32x8_bf16 v[0:15], v16, v17, v[0:15]
	s_cbranch_scc1 .LBB0_1
	s_cbranch_execz .LBB0_3
	global_store_dwordx4 v[0:1], v[2:5], off
.LBB0_3:
	s_endpgm
"""
    blocks = flow.amd_blocks(text)
    assert [block.successors for block in blocks] == [(1,), (1, 2), (3,), (4,), ()]
    path = flow.epilogue_path(blocks, re.compile(r"v_mfma\w+"), re.compile("v_exp"), (1, 1))
    assert path == ["s_cbranch_execz", "global_store_dwordx4", "s_endpgm"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_element": 26}, "issues 26.0 instructions"),
        ({"loads": {128: 8, 32: 17}}, "reads less than 64 bits at a time in 17 of 25 loads"),
        ({"loads": {128: 8, 8: 17}}, "reads less than 64 bits"),
        ({"stores": {128: 8, 64: 5}}, "writes less than 128 bits at a time in 5 of 13 stores"),
    ],
)
def test_what_is_wanted_of_an_epilogue(change, message):
    good: dict[str, Any] = {"per_element": 25, "loads": {128: 8, 64: 40, 32: 16}, "stores": {128: 8, 32: 4}}
    shortfalls: list[list[str]] = []
    for facts in (good, {**good, **change}):
        counts = Counts("update", 32, 32 * facts["per_element"], 64, facts["loads"], facts["stores"], 25.0)
        record = dataclasses.replace(GOOD, epilogue=counts)
        assert record.violations() == []
        shortfalls.append(record.shortfalls())
    assert shortfalls[0] == []
    (text,) = shortfalls[1]
    assert message in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"serial_loops": 1}, "waits more than once for the matrix instructions of 1 loop"),
        ({"spill_bytes": 4}, "spills 4 bytes"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory"),
        ({"matrix_instructions": {}}, "without matrix instructions"),
        ({"scalar_products": 1}, "without matrix instructions in 1 product"),
        ({"precision": "ieee"}, "IEEE fp32 with HGMMA"),
    ],
)
def test_a_bad_record_fails_the_command(change, message, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    records = [GOOD, dataclasses.replace(GOOD, configuration="other", **change)]
    monkeypatch.setattr(compile_report, "compile_all", lambda *_: records)
    path = tmp_path / "report.json"
    assert compile_report.main(["--target", "sm_90", "--json", str(path)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "1 violations" in captured.out
    written = json.loads(path.read_text())["records"]
    assert [bool(record["violations"]) for record in written] == [False, True]

    records.pop()
    assert compile_report.main(["--target", "sm_90"]) == 0


def test_ieee_and_kernels_without_products_need_no_matrix_instructions():
    for precision in ("ieee", "none"):
        assert dataclasses.replace(GOOD, precision=precision, matrix_instructions={}).violations() == []
    exact = {"v_mfma_f32_32x32x2_f32": 4, "v_mfma_f32_32x32x2f32": 4}
    assert dataclasses.replace(GOOD, precision="ieee", matrix_instructions=exact).violations() == []


def test_programs_that_wait_for_each_other_must_fit_a_multiprocessor_together():
    pair = dataclasses.replace(GOOD, registers=255, threads=256, resident=2)
    assert pair.violations() == []
    (registers,) = dataclasses.replace(pair, registers=168, threads=512).violations()
    assert registers == "needs 86016 registers for 2 programs, more than 65536"
    (shared,) = dataclasses.replace(pair, shared_bytes=116_000).violations()
    assert shared == "needs 234048 bytes of shared memory for 2 programs"
    alone = dataclasses.replace(pair, shared_bytes=116_000, threads=512, registers=168, resident=1)
    assert alone.violations() == []


def test_unknown_targets(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="target must be one of sm_80"):
        gpu_target("sm_75")
    with pytest.raises(SystemExit) as stop:
        compile_report.main(["--target", "gfx000"])
    assert stop.value.code == 2
    assert "target must be one of" in capsys.readouterr().err


def test_unknown_kernels(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stop:
        compile_report.main(["--target", "sm_90", "--kernel", "commit", "other"])
    assert stop.value.code == 2
    assert "got 'other'" in capsys.readouterr().err


def test_interpreted_process_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stop:
        compile_report.main(["--target", "sm_90"])
    assert stop.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_is_listed_once(target):
    whole, brief = (
        {(variant.kernel, variant.configuration): variant for variant in variants(target, brief)}
        for brief in (False, True)
    )
    assert len(whole) == len(variants(target))
    assert brief.keys() < whole.keys()
    assert {kernel for kernel, _ in brief} == {kernel for kernel, _ in whole}
    compiled = {(kernel, configuration.split(",")[0]) for kernel, configuration in brief}
    for kernel, configuration in whole:  # what is left out has its like in the brief list
        tiles = configuration.split(",")[0]
        assert (kernel, tiles) in compiled or (kernel, tiles.replace("fp16", "bf16")) in compiled


@pytest.mark.parametrize(
    "arguments",
    [["--brief", "--kernel", "partial", "--jobs", "1"], pytest.param([], marks=pytest.mark.sweep)],
    ids=["one", "all"],
)
def test_kernels_on_hopper(arguments, tmp_path):
    """No spills, warp-group matrix instructions, and loads that run ahead of them; the table names every kernel."""
    path = tmp_path / "hopper.json"
    command = [sys.executable, "-m", "locoprop_kernels.compile_report", "--target", "sm_90", "--json", str(path)]
    done = subprocess.run(
        [*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert set(report["versions"]) == {"python", "torch", "triton"}
    records = report["records"]
    assert all(record["spill_bytes"] == 0 and not record["violations"] for record in records)
    products = [record for record in records if record["precision"] in ("fp8", "bf16", "fp16", "tf32")]
    assert {"fp8", "bf16", "tf32"} <= {record["precision"] for record in products}
    for record in products:
        name = f"{record['kernel']} [{record['configuration']}]"
        # A program of the rows driver has fewer rows of the weight than a warp group multiplies.
        wide = "QGMMA" if record["precision"] == "fp8" else "HGMMA"
        expected = "HMMA" if record["kernel"] == "rows" else wide
        assert expected in record["matrix_instructions"], name
        assert {"LDGSTS", "UTMALDG"} & set(record["load_instructions"]), name
    for column in ("kernel", "configuration", "registers", "spill_bytes", "shared_bytes", "matrix instructions"):
        assert column in done.stdout
    assert all(record["kernel"] in done.stdout for record in records)
