"""Every kernel in its default configurations, as it would be launched: what the compile report compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from locoprop_kernels import devices, rules, transfers
from locoprop_kernels.compile_report.inspection import Epilogue, Variant
from locoprop_kernels.kernels import commit, configs, phases, prepare, rows, single, softmax
from locoprop_kernels.kernels.decide import SCALED, LayerShape, Machine, task_of
from locoprop_kernels.kernels.plan import Plan
from locoprop_kernels.kernels.spec import Spec
from locoprop_kernels.kernels.target import no_float8
from locoprop_kernels.settings import Settings
from locoprop_kernels.solution import Decision

__all__ = ["of_config", "variants"]

_OPERANDS = {name: dtype for dtype, name in configs.PRECISIONS.items()} | dict.fromkeys(("tf32", "ieee"), torch.float32)
_RULES: dict[str, rules.Rule] = {"rmsprop": rules.RMSprop(), "rmsprop centered": rules.RMSprop(centered=True)}
_TRANSFERS = ("tanh", "relu", "sigmoid")
# Instructions for an element that an epilogue with 16-bit operands should not exceed on sm_90, by kernel and note.
_MOST = {("activation", "tanh"): 15.0, ("update", "rmsprop"): 25.0}
_POINTERS = {"table_ptr": "*i64", "rates_ptr": "*fp32", "trace_ptr": "*fp64", "ok_ptr": "*u8"}
_PROGRAMS = 100
_BATCH, _SETS = 1000, 32


def variants(target: str, brief: bool = False) -> list[Variant]:
    """Every kernel in its default configurations for ``target`` (``"sm_90"``, ``"gfx942"``, ...), each once.

    Args:
        target: backend and architecture.
        brief: without kernels that differ from others in little: float16 with the tile sizes of bfloat16 differs in
            the type that the matrix instructions read, a rule of two slots needs fewer registers than one of three,
            and a mask takes a few more,
            where it does not have tiles of its own; and so do rows of the batch that a local step has to itself.
    """
    found: list[Variant] = []
    for precision in _OPERANDS:
        if (precision == "tf32" and target.startswith("gfx")) or (precision == "fp8" and no_float8(target)):
            continue
        chosen = configs.candidates(target, precision)
        if brief and precision == "fp16":
            chosen = tuple(config for config in chosen if config not in configs.candidates(target, "bf16"))
        for config in chosen:
            found += of_config(target, config, precision, brief)
            if precision == "bf16" and config.driver != "single":
                found.append(_one_transfer(target, config, precision))
        for config in configs.candidates(target, precision, lean=True):
            if not brief or config not in configs.candidates(target, precision):
                found += _masked(target, config, precision)
                if precision != "fp8":  # few rows have bfloat16 in its place
                    found += _with_rows(target, config, precision)
        for config in configs.for_rows(target, precision):
            if not (brief and precision == "fp16" and config in configs.for_rows(target, "bf16")):
                found += _rows_driver(target, config, precision, brief)
        if chosen:
            found += _prepare(target, chosen[-1], precision)  # does not depend on the tiles
    return list({_compiled_from(variant): variant for variant in reversed(found)}.values())[::-1]


def _compiled_from(variant: Variant) -> tuple[Any, ...]:
    """What the compiler is given; kernels without products are the same in several precisions."""
    given = (variant.signature, variant.constants, variant.options)
    return (variant.function.__name__, variant.divisible, *(tuple(sorted(part.items())) for part in given))


def of_config(target: str, config: configs.Config, precision: str, brief: bool = False) -> Iterator[Variant]:
    """The kernels that depend on the tile sizes."""
    for name, rule in _RULES.items():
        if not config.general if len(rule.slots) > 2 else config.general and brief:
            continue
        plan = _plan(target, config, precision, rule)
        if config.driver != "grouped":
            yield _variant("local_steps", single._local_steps_kernel, plan, name)
        if config.driver != "single":
            yield _variant("update", phases._update_kernel, plan, name)
    yield _variant("commit", commit._commit_kernel, plan, f"{plan.spec.U.slots} slots")
    if config.driver == "single":
        return
    yield _variant("activation", phases._activation_kernel, plan, ", ".join(_TRANSFERS))
    in_splits = _plan(target, config, precision, rules.RMSprop(), splits=2)
    yield _variant("partial", phases._partial_kernel, in_splits, "")
    yield _variant("update in splits", phases._update_kernel, in_splits, "rmsprop")
    if not config.general:
        return
    if precision not in SCALED:  # which take products, or bfloat16
        yield _variant(
            "gram update", phases._update_kernel, _plan(target, config, precision, rules.RMSprop(), "gram"), "rmsprop"
        )
    yield _variant("softmax", softmax._softmax_kernel, _plan(target, config, precision, rules.RMSprop(), "softmax"), "")


def _one_transfer(target: str, config: configs.Config, precision: str) -> Variant:
    """The activation of layers with tanh alone, for the instructions of its epilogue."""
    plan = _plan(target, config, precision, rules.RMSprop(), names=("tanh",))
    return _variant("activation", phases._activation_kernel, plan, "tanh")


def _masked(target: str, config: configs.Config, precision: str) -> Iterator[Variant]:
    """The kernels of a step in which a parameter has a mask, as far as others do not have them."""
    plan = _plan(target, config, precision, rules.RMSprop(centered=True), masked=True)
    if precision not in SCALED:  # which have no single launch then
        yield _variant("local_steps", single._local_steps_kernel, plan, "masked")
    yield _variant("update", phases._update_kernel, plan, "masked")
    yield _variant("activation", phases._activation_kernel, plan, ", ".join(_TRANSFERS))
    yield _variant("commit", commit._commit_kernel, plan, f"{plan.spec.U.slots} slots")


def _with_rows(target: str, config: configs.Config, precision: str) -> Iterator[Variant]:
    """The kernels of a step in which each local step has rows of its own, as far as others do not have them."""
    rule = rules.RMSprop(centered=True)
    plan = _plan(target, config, precision, rule, sets=_SETS)
    if precision not in SCALED:  # which have no single launch then
        yield _variant("local_steps", single._local_steps_kernel, plan, "few rows")
    softmax_plan = _plan(target, config, precision, rule, "softmax", sets=_SETS)
    yield _variant("softmax", softmax._softmax_kernel, softmax_plan, "few rows")
    yield _variant("update", phases._update_kernel, plan, "few rows")
    yield _variant("activation", phases._activation_kernel, plan, "few rows")


def _rows_driver(target: str, config: configs.Config, precision: str, brief: bool) -> Iterator[Variant]:
    """The kernel of the rows driver: each local step with rows of its own, or all with those of a small batch."""
    centered = rules.RMSprop(centered=True)
    masked = _plan(target, config, precision, centered, driver="rows", masked=True, sets=_SETS)
    yield _variant("rows", rows._rows_kernel, masked, "masked")
    if not brief:
        few = _plan(target, config, precision, rules.RMSprop(), driver="rows", sets=_SETS)
        yield _variant("rows", rows._rows_kernel, few, "few rows")
        yield _variant(
            "rows", rows._rows_kernel, _plan(target, config, precision, centered, driver="rows"), "small batch"
        )


def _prepare(target: str, config: configs.Config, precision: str) -> Iterator[Variant]:
    plan = _plan(target, config, precision, rules.RMSprop())
    if precision == "fp8":
        yield _variant("largest", prepare._largest_kernel, plan, "")
    yield _variant("prepare", prepare._prepare_kernel, plan, "with transpose" if plan.spec.P.transposed else "")


def _plan(
    target: str,
    config: configs.Config,
    precision: str,
    rule: rules.Rule,
    form: str = "product",
    splits: int = 1,
    masked: bool = False,
    sets: int = 1,
    driver: str = "",
    names: tuple[str, ...] = _TRANSFERS,
) -> Plan:
    """A plan of a step as a GPU would get it: of layers with these transfers, or of one in the other forms."""
    size = _BATCH if driver != "rows" else config.b * sets
    operand = _OPERANDS[precision]
    names = {"gram": ("identity",), "softmax": ("softmax",)}.get(form, names)
    shapes = [
        LayerShape(
            batch=size,
            inputs=784,
            outputs=500,
            groups=1,
            transfer=transfers.get(name),
            own_function=None,
            weight=True,
            bias=True,
            masked=masked,
            scale=1.0,
            parameter=torch.float32,
            x=torch.float32,
            preactivation=torch.float32,
            x_aligned=False,
            x_chunks=False,
            a0_chunks=False,
            sets=sets,
        )
        for name in names
    ]
    programs = _PROGRAMS if form == "product" and splits == 1 and not driver else 0
    rows = None if sets == 1 else -(-size // sets)
    decision = Decision(form, driver or form, config, programs, splits, rows)
    settings = Settings.checked(rule, [1.0] * 10, 0.0, "mean", operand, trace=False, regulariser=None)
    float32 = "ieee" if precision == "ieee" else "tf32"
    machine = Machine(target, devices.UNKNOWN, available=_PROGRAMS, float32=float32)
    return Plan(range(len(shapes)), shapes, [decision] * len(shapes), task_of(settings), machine, torch.device("cpu"))


def _constants(spec: Spec, function: Any) -> dict[str, Any]:
    """The compile-time arguments of a kernel."""
    P, U = (spec.tiles, spec.stored) if function is commit._commit_kernel else (spec.P, spec.U)
    found = {"P": P, "U": U, "C": spec.copy_x, "STRIP": commit.strip(spec)}
    return {name: value for name, value in found.items() if name in function.arg_names}


def _variant(kernel: str, function: Any, plan: Plan, note: str) -> Variant:
    spec, config = plan.spec, plan.layout.kind.config
    constants = _constants(spec, function)
    signature = {}
    for name in function.arg_names:
        if name.endswith("_ptr"):
            signature[name] = _POINTERS.get(name, "*i32")
        elif name not in constants:
            signature[name] = "fp32" if name == "prox" else "i32"
    options: dict[str, Any] = spec.options
    if kernel in ("commit", "softmax"):
        options = spec.wide
    elif kernel in ("prepare", "largest"):
        options = {}
    elif kernel == "local_steps":
        options = {**spec.options, **single.COOPERATIVE}
    precision = configs.PRECISIONS.get(plan.layout.kind.operand, spec.P.precision)
    shape = f"{config.n}x{config.b}x{config.k}x{config.r} {config.warps} warps {config.stages} stages, "
    operands = "" if kernel == "commit" else f"{precision} "
    return Variant(
        kernel=kernel,
        configuration=f"{operands}{'' if kernel in ('prepare', 'largest') else shape}{note}",
        function=function,
        signature=signature,
        constants=constants,
        divisible=tuple(name for name in signature if name.endswith("_ptr")),
        precision="none" if kernel in ("commit", "largest", "prepare", "softmax") else precision,
        options=options,
        resident=config.occupancy if kernel == "local_steps" else 1,
        epilogue=_epilogue(kernel, plan, note),
    )


def _epilogue(kernel: str, plan: Plan, note: str) -> Epilogue | None:
    """What is counted: the epilogues of the tile kernels, in product form."""
    config, width = plan.layout.kind.config, {"activation": plan.spec.P.block_b, "update": plan.spec.P.block_k}
    operand = plan.layout.kind.operand
    if kernel not in width or (operand == torch.float32 and plan.spec.P.precision == "ieee"):
        return None
    most = _MOST.get((kernel, note)) if operand == torch.bfloat16 else None
    return Epilogue(kernel, config.n * width[kernel], config.slices, most)
