"""The quantization_config of compressed-tensors, checked: groups, args and presets.

Torch-free and without tensors: what the config says. What is true of a module its tensors say
(`compressed_tensors_headers.py`); which modules a group means is `compressed_tensors_targets.py`.
Rules and versions: docs/formats/compressed_tensors.md §1, §3, §6, §11.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from anybit.checkpoints.contents import JSON
from anybit.checkpoints.dialects._shared import config_values as values
from anybit.errors import Damaged, Unsupported

WHERE: Final = "config.json: quantization_config"

FORMATS: Final = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense", "fakequant",
    "nvfp4-e5m3-pack-quantized",  # AutoRound's own
)
_REFUSED_FORMATS: Final = {
    "marlin-24": "2:4 sparse weights in Marlin's order",
    "sparse-bitmask": "sparse weights as bit masks",
    "sparse-24-bitmask": "2:4 sparse weights as bit masks",
}
_STRATEGIES: Final = ("tensor", "channel", "group", "tensor_group", "block", "token", "attn_head")
_ONLINE: Final = ("input", "output", "k_cache", "q_attn")  # where a transform runs at run time
_MERGED: Final = ("weight_input", "weight_output")  # where it is already in the weights


@dataclass(frozen=True)
class Args:
    """How one tensor is quantized: the args of a group's weights or activations.

    group_size   0 where there is none
    block        (rows, cols) of strategy "block", (0, 0) where there is none
    dynamic      "static", "dynamic", or "local" (NVFP4: the block scales only)
    actorder     "group" where columns are scattered over groups, else "" (weight and static leave no trace in files)
    """

    type: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int = 0
    block: tuple[int, int] = (0, 0)
    dynamic: str = "static"
    actorder: str = ""
    scale_dtype: str = ""

    def __str__(self) -> str:
        size = f" {self.group_size}" if self.group_size else ""
        words = [f"{self.type}{self.bits}", self.dynamic, self.strategy + size]
        return " ".join(words if self.symmetric else [*words, "asymmetric"])


@dataclass(frozen=True)
class Group:
    """One config group: whom it targets and how it quantizes them."""

    name: str
    targets: tuple[str, ...]
    weights: Args | None
    inputs: Args | None = None
    outputs: Args | None = None
    format: str = ""


@dataclass(frozen=True)
class Config:
    """The whole quantization_config; `version` is (major, minor) of the writer, () where it is not said."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    format: str
    status: str
    version: tuple[int, ...]
    kv_cache: Args | None = None


def read_config(quantization: JSON) -> Config:
    """The checked config; raises Damaged for unsound values, Unsupported for what §11 of the document refuses."""
    _refuse_transforms(quantization)
    _refuse_sparsity(quantization)
    raw_groups = values.table(quantization, "config_groups", WHERE)
    kv_cache = values.table(quantization, "kv_cache_scheme", WHERE)
    version = _version(quantization)
    return Config(
        groups=tuple(_group(name, raw, version) for name, raw in raw_groups.items()),
        ignore=values.strings(quantization, "ignore", WHERE),
        format=_format(quantization, WHERE),
        status=values.text(quantization, "quantization_status", WHERE) or "",
        version=version,
        kv_cache=_args(kv_cache, f"{WHERE}.kv_cache_scheme") if kv_cache else None,
    )


def _version(quantization: JSON) -> tuple[int, ...]:
    found = re.match(r"(\d{1,6})\.(\d{1,6})", values.text(quantization, "version", WHERE) or "")
    return tuple(int(part) for part in found.groups()) if found else ()


def _group(name: str, raw: object, version: tuple[int, ...]) -> Group:
    where = f"{WHERE}.config_groups.{name}"
    if isinstance(raw, list):  # {"W4A16": ["Linear"]}: the name is a preset
        return _preset(name, values.strings({"targets": raw}, "targets", where), where, version)
    if not isinstance(raw, dict):
        raise Damaged("a config group has no sound value", where=where, found=type(raw).__name__, wanted="an object")
    args = {}
    for key in ("weights", "input_activations", "output_activations"):
        given = values.table(raw, key, where)
        args[key] = _args(given, f"{where}.{key}") if given else None
    return Group(name, values.strings(raw, "targets", where), args["weights"], args["input_activations"],
                 args["output_activations"], _format(raw, where))


def _format(holder: JSON, where: str) -> str:
    name = values.text(holder, "format", where) or ""
    if name in _REFUSED_FORMATS:
        raise Unsupported(f"the format {name} is not read", where=where, found=_REFUSED_FORMATS[name],
                          wanted=" · ".join(FORMATS), remedy="export the model again without sparsity")
    if name and name not in FORMATS:
        raise Unsupported("a format that no known compressed-tensors writes", where=where, found=name,
                          wanted=" · ".join(FORMATS), remedy="export the model again in one of these")
    return name


def _args(raw: JSON, where: str) -> Args:
    group_size = values.integer(raw, "group_size", where, least=-1)
    strategy = values.text(raw, "strategy", where, allowed=_STRATEGIES)
    if strategy is None:
        strategy = "tensor" if not group_size else "channel" if group_size < 0 else "group"
    if strategy == "group" and group_size is not None and group_size < 0:
        strategy = "channel"
    if strategy in ("group", "tensor_group") and not group_size:
        raise Damaged(f"strategy {strategy} without a group size", where=where, found=str(raw.get("group_size")),
                      wanted="group_size, a positive integer")
    return Args(
        type=values.text(raw, "type", where, allowed=("int", "float")) or "int",
        bits=_bits(raw, where),
        symmetric=values.flag(raw, "symmetric", where, default=True),
        strategy=strategy,
        group_size=max(group_size or 0, 0) if strategy in ("group", "tensor_group") else 0,
        block=_block(raw, where) if strategy == "block" else (0, 0),
        dynamic=_dynamic(raw, where),
        actorder="group" if raw.get("actorder") in ("group", "dynamic", True) else "",
        scale_dtype=(values.text(raw, "scale_dtype", where) or "").removeprefix("torch."),
    )


def _bits(raw: JSON, where: str) -> int:
    bits = values.integer(raw, "num_bits", where, least=1, most=64)
    bits = 8 if bits is None else bits
    if bits > 8:
        raise Unsupported("codes wider than 8 bits", where=where, found=f"num_bits {bits}", wanted="1 … 8",
                          remedy="quantize the model to 8 bits or fewer")
    return bits


def _block(raw: JSON, where: str) -> tuple[int, int]:
    """`block_structure`: [rows, cols], in old files "128x128"."""
    given: Any = raw.get("block_structure")
    if isinstance(given, str):
        given = [int(part) if part.isdigit() and len(part) < 7 else None for part in given.split("x")]
    if not isinstance(given, list) or len(given) != 2:
        raise Damaged("strategy block without its block", where=where, found=str(given)[:80],
                      wanted="block_structure, [rows, columns]")
    rows, columns = (values.integer({"block_structure": n}, "block_structure", where, least=1) for n in given)
    if rows is None or columns is None:
        raise Damaged("strategy block without its block", where=where, found=str(raw.get("block_structure"))[:80],
                      wanted="block_structure, [rows, columns]")
    return rows, columns


def _dynamic(raw: JSON, where: str) -> str:
    if raw.get("dynamic") == "local":
        return "local"
    return "dynamic" if values.flag(raw, "dynamic", where, default=False) else "static"


def _refuse_transforms(quantization: JSON) -> None:
    transforms = values.table(quantization, "transform_config", WHERE)
    groups = values.table(transforms, "config_groups", f"{WHERE}.transform_config")
    for name in groups:
        where = f"{WHERE}.transform_config.{name}"
        scheme = values.table(groups, name, where)
        for entry in values.tables(scheme, "apply", where):
            location = values.text(entry, "location", where, allowed=(*_ONLINE, *_MERGED))
            if location not in _MERGED:
                raise Unsupported(
                    "the model rotates activations while it runs", where=where, found=f"a transform at {location}",
                    wanted="transforms merged into the weights only (weight_input, weight_output)",
                    remedy="export the model without online rotations",
                )


def _refuse_sparsity(quantization: JSON) -> None:
    sparsity = values.table(quantization, "sparsity_config", WHERE)
    if sparsity and values.text(sparsity, "format", f"{WHERE}.sparsity_config") not in (None, "dense"):
        raise Unsupported("sparse storage is not read", where=f"{WHERE}.sparsity_config", found=str(sparsity["format"]),
                          wanted="dense", remedy="export the model again without sparsity")
    if values.table(quantization, "moe_sparsity_config", WHERE):
        raise Unsupported("pruned or constant experts are not read", where=f"{WHERE}.moe_sparsity_config",
                          found="expert counts that differ by layer", wanted="all experts in every layer",
                          remedy="export the model with all its experts")


def _w(bits: int, **other: Any) -> Args:
    return Args(**{"type": "int", "bits": bits, "symmetric": True, "strategy": "group", "group_size": 128, **other})


_INT8_TOKEN: Final = Args("int", 8, True, "token", dynamic="dynamic")
_FP8_TOKEN: Final = Args("float", 8, True, "token", dynamic="dynamic")
_MX: Final = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "uint8"}
_MXFP8_INPUT: Final = _w(8, **_MX, dynamic="dynamic")
_NVFP4: Final = _w(4, type="float", strategy="tensor_group", group_size=16, scale_dtype="float8_e4m3fn")
_INT8_CHANNEL: Final = Args("int", 8, True, "channel")
_FP8_CHANNEL: Final = Args("float", 8, True, "channel")

# docs/formats/compressed_tensors.md §6: name -> (weights, input activations)
PRESETS: Final[Mapping[str, tuple[Args, Args | None]]] = {
    **{f"W{bits}A16": (_w(bits), None) for bits in range(2, 9)},
    "W4A16_ASYM": (_w(4, symmetric=False), None),
    "W8A8": (_INT8_CHANNEL, _INT8_TOKEN),
    "INT8": (_INT8_CHANNEL, _INT8_TOKEN),
    **{f"W{bits}A8": (_w(bits), _INT8_TOKEN) for bits in range(2, 8)},
    **{f"W{bits}A4": (_w(bits), Args("int", 4, True, "token", dynamic="dynamic")) for bits in range(2, 5)},
    "W4AFP8": (_w(4), _FP8_TOKEN),
    "FP8": (Args("float", 8, True, "tensor"), Args("float", 8, True, "tensor")),
    "FP8_DYNAMIC": (_FP8_CHANNEL, _FP8_TOKEN),
    "FP8_BLOCK": (Args("float", 8, True, "block", block=(128, 128)), _w(8, type="float", dynamic="dynamic")),
    "NVFP4A16": (_NVFP4, None),
    "NVFP4": (_NVFP4, _w(4, type="float", strategy="tensor_group", group_size=16, dynamic="local",
                         scale_dtype="float8_e4m3fn")),
    "MXFP4A16": (_w(4, **_MX), None),
    "MXFP4": (_w(4, **_MX), _w(4, **_MX, dynamic="dynamic")),
    "MXFP4XFP8": (_w(4, **_MX), _w(8, type="float", dynamic="dynamic")),
    "MXFP6A16": (_w(6, **_MX), None),
    "MXFP6A8": (_w(6, **_MX), _MXFP8_INPUT),
    "MXFP8A16": (_w(8, **_MX), None),
    "MXFP8": (_w(8, **_MX), _MXFP8_INPUT),
}


def _preset(name: str, targets: tuple[str, ...], where: str, version: tuple[int, ...]) -> Group:
    found = PRESETS.get(name.upper())
    if name.upper() == "W8A16" and version < (0, 14):  # no version: before 0.11
        found = (_INT8_CHANNEL, None)
    if found is None:
        raise Unsupported("a preset that is not known", where=where, found=name, wanted=" · ".join(PRESETS),
                          remedy="write the group's args out in config.json")
    return Group(name, targets, *found)
