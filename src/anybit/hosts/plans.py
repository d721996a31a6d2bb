"""The plan of a checkpoint with a user's options: what `load`, `run` and `explain` share. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from anybit.checkpoints.checkpoint import Checkpoint
from anybit.checkpoints.dialects._shared.kv_scales import remarks
from anybit.checkpoints.jsonfile import read_json
from anybit.checkpoints.online import Quantization, online, quantizer
from anybit.errors import Unsupported
from anybit.limits import MAX_INDEX_JSON
from anybit.planning import measured
from anybit.planning.choose import Policy
from anybit.planning.measured import Measured
from anybit.planning.memory import cache_bytes
from anybit.planning.overrides import VARIABLE, Overrides
from anybit.planning.plan import Plan, plan_layers, with_notes
from anybit.planning.replay import demand_same, pinned_kernels
from anybit.platforms import Platform, detect

DTYPES: Final = ("float32", "bfloat16", "float16")
KV_CACHES: Final = ("auto", "none")
Written = Plan | Mapping[str, Any] | str | os.PathLike[str]
"""A plan made before: itself, its document, or the path of its file."""


def choose_dtype(wanted: object, checkpoint: Checkpoint, platform: Platform) -> str:
    """The dtype of activations: as asked; else float32 on a CPU (exact, and as fast), the model's own on a GPU."""
    name = "auto" if wanted is None else str(wanted).removeprefix("torch.")
    if name == "auto":
        own = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
        name = "float32" if platform.vendor == "cpu" else (str(own) if own in DTYPES else "bfloat16")
    if name not in DTYPES:
        raise Unsupported(f"no such dtype: {name!r}", wanted=", ".join(DTYPES), remedy="--dtype float32")
    return name


def make_plan(
    checkpoint: Checkpoint,
    platform: Platform | None = None,
    *,
    dtype: object = None,
    quantization: Quantization | None = None,
    kernel: str | Sequence[str] | None = None,
    kv_cache: str = "auto",
    strict: bool = False,
    batch_invariant: bool = False,
    plan: Written | None = None,
    known: Measured | None = None,
) -> Plan:
    """The plan for `checkpoint` here, or on a described platform, with these options.

    kernel           rules such as "torch-tiled", "linear=NAME", "re:.*down_proj=NAME" (`planning/overrides.py`)
    kv_cache         "auto" carries out a quantized key-value cache that the checkpoint declares, "none" leaves it as it
                     is
    strict           only kernels that carry out the declared arithmetic; `Plan.demand_complete` refuses every change
    batch_invariant  one kernel for all M
    plan             a plan made before, which is followed to the letter; excludes quantization and kernel
    known            times measured on this machine and kernels found wrong on it; default what is stored

    Raises Unsupported for rules that cannot be followed, Inconsistent if `plan` does not fit.
    """
    platform = platform or detect()
    known = known if known is not None else measured.read(platform)
    if plan is not None:
        _demand_alone(quantization, kernel)
        written = read_plan(plan)
        chosen = written.dtype if dtype is None else choose_dtype(dtype, checkpoint, platform)
        policy = known.policy(chosen, strict=strict, batch_invariant=batch_invariant)
        return with_notes(_replayed(written, checkpoint, platform, chosen, policy), *known.remarks)
    chosen = choose_dtype(dtype, checkpoint, platform)
    policy = known.policy(chosen, strict=strict, batch_invariant=batch_invariant)
    asked = online(quantization)
    rules = quantizer(asked) if asked is not None else None
    texts = [kernel] if isinstance(kernel, str) else list(kernel or ())
    made = plan_layers(
        checkpoint,
        platform,
        dtype=chosen,
        kernel=Overrides.parse(texts, os.environ.get(VARIABLE, "")),
        quantize=rules.scheme_of if rules is not None else None,
        quantization=str(rules) if rules is not None else None,
        policy=policy,
    )
    if rules is not None:
        made = with_notes(made, *rules.notes(checkpoint.layers.values()))
    return _with_cache(with_notes(made, *known.remarks), checkpoint, kv_cache)


def read_plan(plan: Written) -> Plan:
    """A plan from its file, its document, or as it is. Raises AnybitErrors for what is no sound plan."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        return Plan.from_dict(plan)
    return Plan.from_dict(read_json(Path(plan), limit=MAX_INDEX_JSON))


def _demand_alone(quantization: Quantization | None, kernel: str | Sequence[str] | None) -> None:
    given = [name for name, value in (("--quantization", quantization), ("--kernel", kernel)) if value]
    if given:
        raise Unsupported(f"{' and '.join(given)} beside --plan", wanted="a plan, or options that make one",
                          remedy=f"leave {' and '.join(given)} out")


def _replayed(written: Plan, checkpoint: Checkpoint, platform: Platform, dtype: str, policy: Policy) -> Plan:
    """The written plan made again with its own kernels. Raises Inconsistent where anything differs."""
    policy = replace(policy, strict=policy.strict or written.policy.strict,
                     batch_invariant=policy.batch_invariant or written.policy.batch_invariant)
    rules = quantizer(written.quantization) if written.quantization is not None else None
    here = plan_layers(
        checkpoint,
        platform,
        dtype=dtype,
        quantize=rules.scheme_of if rules is not None else None,
        quantization=written.quantization,
        policy=policy,
        pinned=pinned_kernels(written),
    )
    cache = written.kv_cache
    here = _with_cache(here, checkpoint, "auto" if cache is None or cache["is_executed"] else "none")
    demand_same(written, here)
    return with_notes(replace(here, is_replayed=True), f"kernels as written in a plan of {written.platform.title}")


def _with_cache(plan: Plan, checkpoint: Checkpoint, wanted: str) -> Plan:
    """The plan with what happens to a declared key-value cache."""
    if wanted not in KV_CACHES:
        raise Unsupported(f"no such treatment of the key-value cache: {wanted!r}", wanted=", ".join(KV_CACHES),
                          remedy="--kv-cache auto")
    cache = checkpoint.kv_cache
    if cache is None:
        return plan
    is_executed = wanted == "auto"
    words = f"{cache.element} codes, decoded to {plan.dtype} where attention reads them"
    memory = plan.memory
    if is_executed:
        per_token, windows = cache_bytes(checkpoint.config, plan.dtype, cache.row_bytes)
        memory = replace(memory, cache_per_token=per_token, windows=windows)
    told = {
        "declared": str(cache),
        "executed": words if is_executed else f"{plan.dtype}, not quantized",
        "element": cache.element,
        "is_executed": is_executed,
        "layers_with_scales": len(cache.scales),
        "notes": list(remarks(cache)),
    }
    plan = replace(plan, memory=memory, kv_cache=told)
    note = f"declares a key-value cache in {cache.element}; as asked (--kv-cache none) it stays in {plan.dtype}"
    return plan if is_executed else with_notes(plan, note)
