"""Every kernel in its default configurations, as it would be launched: what the compile report compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from locoprop_kernels import rules
from locoprop_kernels.compile_report.inspection import Variant
from locoprop_kernels.kernels import columns as c
from locoprop_kernels.kernels import commit, configs, functions, grouped, prepare, rowwise, single, updates
from locoprop_kernels.kernels.plan import Key, Layer, Plan

__all__ = ["of_config", "variants"]

_OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
_RULES: dict[str, rules.Rule] = {"rmsprop": rules.RMSprop(), "rmsprop centered": rules.RMSprop(centered=True)}
_TRANSFERS = ("tanh", "relu", "sigmoid")
_POINTERS = {"table_ptr": "*i64", "rates_ptr": "*fp32", "trace_ptr": "*fp64", "ok_ptr": "*u8"}


def variants(target: str, brief: bool = False) -> list[Variant]:
    """Every kernel in its default configurations for ``target`` (``"sm_90"``, ``"gfx942"``, ...), each once.

    Args:
        target: backend and architecture.
        brief: without kernels that differ from others in little: float16 with the tile sizes of bfloat16 differs in
            the type that the matrix instructions read, a rule of two slots needs fewer registers than one of three,
            and a mask takes a few more.
    """
    found: list[Variant] = []
    for precision in _OPERANDS:
        if precision == "tf32" and target.startswith("gfx"):
            continue
        chosen = configs.candidates(target, precision)
        if brief and precision == "fp16":
            chosen = tuple(config for config in chosen if config not in configs.candidates(target, "bf16"))
        for config in chosen:
            found += of_config(config, precision, brief)
        for config in () if brief else configs.candidates(target, precision, masked=True):
            found += _masked(config, precision)
        if chosen:
            found.append(_prepare(chosen[-1], precision))  # does not depend on the tiles
    return list({_compiled_from(variant): variant for variant in reversed(found)}.values())[::-1]


def _compiled_from(variant: Variant) -> tuple[Any, ...]:
    """What the compiler is given; kernels without products are the same in several precisions."""
    given = (variant.signature, variant.constants, variant.options)
    return (variant.function.__name__, variant.divisible, *(tuple(sorted(part.items())) for part in given))


def of_config(config: configs.Config, precision: str, brief: bool = False) -> Iterator[Variant]:
    """The kernels that depend on the tile sizes."""
    for name, rule in _RULES.items():
        if not config.general if len(rule.slots) > 2 else config.general and brief:
            continue
        plan = _plan(config, precision, rule)
        constants = plan.constants
        if config.general:
            yield _variant("local_steps", single._local_steps_kernel, constants["single"], plan, name)
        yield _variant("update", grouped._update_kernel, constants["update"], plan, name)
    yield _variant("activation", grouped._activation_kernel, constants["activation"], plan, ", ".join(_TRANSFERS))
    yield _variant("commit", commit._commit_kernel, constants["commit"], plan, f"{len(plan.key.slots)} slots")
    in_parts = _plan(config, precision, rules.RMSprop(), splits=2)
    yield _variant("partial", grouped._partial_kernel, in_parts.constants["partial"], in_parts, "")
    yield _variant("update in parts", grouped._update_kernel, in_parts.constants["update"], in_parts, "rmsprop")
    if not config.general:
        return
    if precision != "fp16":
        gram = _plan(config, precision, rules.RMSprop(), "gram")
        yield _variant("gram update", grouped._update_kernel, gram.constants["update"], gram, "rmsprop")
    softmax = _plan(config, precision, rules.RMSprop(), "softmax")
    yield _variant("softmax", rowwise._softmax_kernel, softmax.constants["softmax"], softmax, "")


def _masked(config: configs.Config, precision: str) -> Iterator[Variant]:
    """The kernels of a step in which a parameter has a mask, as far as others do not have them."""
    plan = _plan(config, precision, rules.RMSprop(centered=True), masked=True)
    if precision != "fp16":  # which has no single launch then
        yield _variant("local_steps", single._local_steps_kernel, plan.constants["single"], plan, "masked")
    yield _variant("update", grouped._update_kernel, plan.constants["update"], plan, "masked")
    yield _variant("activation", grouped._activation_kernel, plan.constants["activation"], plan, ", ".join(_TRANSFERS))
    yield _variant("commit", commit._commit_kernel, plan.constants["commit"], plan, f"{len(plan.key.slots)} slots")


def _prepare(config: configs.Config, precision: str) -> Variant:
    plan = _plan(config, precision, rules.RMSprop())
    columns = (c.X_SOURCE, c.INPUTS, c.WEIGHT_STRIDE, c.X, c.XT, c.XT_STRIDE)
    names = [argument for argument in prepare._prepare_kernel.arg_names if argument.endswith("_COLUMN")]
    at = {name: column.value for name, column in zip(names, columns, strict=True)}
    constants = {**plan.constants["prepare_x"], **at}
    return _variant("prepare", prepare._prepare_kernel, constants, plan, "with transpose")


def _plan(
    config: configs.Config,
    precision: str,
    rule: rules.Rule,
    form: str = "product",
    splits: int = 1,
    masked: bool = False,
) -> Plan:
    found = updates.lookup(rule)
    assert found is not None
    layers = tuple(
        Layer(
            batch=1000,
            inputs=784,
            outputs=500,
            function=function,
            divergence=divergence,
            parameter=0.0,
            weight=True,
            bias=True,
            x_in_place=False,
            scale=1.0,
            rows=1000,
            splits=splits,
        )
        for function, divergence in (functions.FUNCTIONS[name] for name in _TRANSFERS)
    )
    return Plan(
        Key(
            layers=layers,
            device=torch.device("cpu"),
            parameter=torch.float32,
            x=torch.float32,
            preactivation=torch.float32,
            operand=_OPERANDS[precision],
            precision=precision,
            rule=found[0],
            hyper=found[1],
            slots=tuple(rule.slots),
            form=form,
            counts_steps=rule.counts_steps,
            regulariser=None,
            masked=masked,
            trace=False,
            transposed=precision == "tf32",
            interpreted=False,
            config=config,
            programs=100 if form == "product" and splits == 1 else 0,
        ),
        resident=100,
    )


def _variant(kernel: str, function: Any, constants: dict[str, Any], plan: Plan, note: str) -> Variant:
    arguments = set(function.arg_names)
    signature = {}
    for name in function.arg_names:
        if name.endswith("_ptr"):
            signature[name] = _POINTERS.get(name, "*i32")
        elif name not in constants:
            signature[name] = "fp32" if name == "prox" else "i32"
    config = plan.key.config
    multiplies = "PARTS" in arguments
    shape = f"{config.n}x{config.b}x{config.k}x{config.r} {config.warps} warps {config.stages} stages, "
    operands = "" if function is commit._commit_kernel else f"{plan.key.precision} "
    return Variant(
        kernel=kernel,
        configuration=f"{operands}{shape if 'BLOCK_N' in arguments else ''}{note}",
        function=function,
        signature=signature,
        constants={name: value for name, value in constants.items() if name in arguments},
        divisible=tuple(name for name in signature if name.endswith("_ptr")),
        precision=plan.key.precision if multiplies else "none",
        options={name: value for name, value in constants.items() if name not in arguments},
    )
