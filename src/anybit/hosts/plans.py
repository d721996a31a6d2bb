"""The plan of a checkpoint with a user's options: what `load`, `run` and `explain` share. Torch-free."""

from __future__ import annotations

from typing import Final

from anybit.checkpoints.checkpoint import Checkpoint
from anybit.checkpoints.online import quantizer
from anybit.errors import Unsupported
from anybit.planning.plan import Plan, plan_layers, with_notes
from anybit.platforms import Platform, detect

DTYPES: Final = ("float32", "bfloat16", "float16")


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
    quantization: str | None = None,
    kernel: str | None = None,
) -> Plan:
    """The plan for `checkpoint` here, or on a described platform, with these options."""
    platform = platform or detect()
    chosen = choose_dtype(dtype, checkpoint, platform)
    plan = plan_layers(
        checkpoint,
        platform,
        dtype=chosen,
        kernel=kernel,
        quantize=quantizer(quantization).scheme_of if quantization else None,
        quantization=quantization,
    )
    cache = checkpoint.kv_cache
    if cache is not None:
        plan = with_notes(plan, f"declares a key-value cache in {cache.element}; here the cache stays in {chosen}")
    return plan
