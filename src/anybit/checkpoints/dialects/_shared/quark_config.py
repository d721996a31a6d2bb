"""The quantization_config of AMD Quark, checked: specs, layer configs, export block, algorithms.

Torch-free and without tensors: what the config says. Which of its layer configs a module has, its tensors decide
(`quark_headers.py`). Rules and versions: docs/formats/quark.md §1, §2, §8-§10.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from anybit.checkpoints.contents import JSON
from anybit.checkpoints.dialects._shared import config_values as values
from anybit.errors import Damaged, Unsupported

WHERE: Final = "config.json: quantization_config"

DTYPES: Final = frozenset(
    {"int2", "uint2", "int3", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "fp4", "fp6_e2m3",
     "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "fp8_e5m3", "bfloat16", "float16", "mx", "mx6", "mx9", "bfp16"}
)
_SCHEMES: Final = ("per_tensor", "per_channel", "per_group", "per_block")
_MODES: Final = ("even", "floor", "ceil")
_FOLDED: Final = frozenset(  # algorithms that leave nothing to do at run time; rotations are looked at more closely
    {"smooth", "smoothquant", "autosmoothquant", "awq", "gptq", "gptaq", "autoround", "qronos", "rotation", "quarot"}
)
_ROTATIONS: Final = ("rotation", "quarot")
_EXPORT_AGAIN: Final = "export the model again with a current Quark"


@dataclass(frozen=True)
class Spec:
    """How one tensor is quantized, or one stage of it.

    qscheme      "" where the file says none (wide floats, dtype mx)
    axis         ch_axis, None where absent
    block        (rows, cols), (0, 0) where there is none
    symmetric    null counts as symmetric for float formats, as asymmetric for integers
    mode         the recipe of a shared MX exponent: even, floor, ceil
    element      element format of dtype "mx", "" where the file says none
    """

    dtype: str
    qscheme: str
    axis: int | None = None
    group_size: int = 0
    block: tuple[int, int] = (0, 0)
    dynamic: bool = False
    symmetric: bool = True
    scale_format: str = ""
    mode: str = "even"
    element: str = ""
    is_scale_quant: bool = False

    def __str__(self) -> str:
        size = f" {self.group_size}" if self.group_size else f" {list(self.block)}" if any(self.block) else ""
        words = [self.dtype, self.element, "dynamic" if self.dynamic else "", self.qscheme + size, self.scale_format]
        return " ".join(word for word in words if word)


Stages = tuple[Spec, ...]  # () where a tensor is not quantized


@dataclass(frozen=True)
class LayerConfig:
    """How a layer is quantized: the stages of its weight, input, output and bias."""

    name: str
    weight: Stages = ()
    inputs: Stages = ()
    outputs: Stages = ()
    bias: Stages = ()


@dataclass(frozen=True)
class Config:
    """The whole quantization_config.

    layers       by name or pattern, in file order
    types        by class name
    version      (major, minor) of the writer; () where none is said, which means 0.8 or older
    kv_patterns  whose outputs are the key-value cache
    kv_specs     the specs that the cache itself declares
    """

    default: LayerConfig
    layers: Mapping[str, LayerConfig]
    types: Mapping[str, LayerConfig]
    exclude: tuple[str, ...]
    version: tuple[int, ...]
    pack_method: str
    kv_patterns: tuple[str, ...]
    kv_specs: Stages
    unknown_algorithms: tuple[str, ...]

    @property
    def has_old_fp6(self) -> bool:
        """True if six-bit codes lie in the planes that Quark wrote before 0.10."""
        return self.version < (0, 10)


def read_config(raw: JSON) -> Config:
    """The checked config; raises Damaged for unsound values, Unsupported for what §10 of the document refuses."""
    export = values.table(raw, "export", WHERE)
    place = f"{WHERE}.export"
    if values.text(export, "weight_format", place, allowed=("real_quantized", "fake_quantized")) == "fake_quantized":
        raise Unsupported("fake_quantized weights: the unquantized masters beside float scales", where=place,
                          found="weight_format fake_quantized", wanted="real_quantized",
                          remedy="export the model again with weight_format real_quantized")
    kv_configs = _configs(raw, "kv_cache_quant_config")
    return Config(
        default=_layer_config(values.table(raw, "global_quant_config", WHERE), "global_quant_config"),
        layers=_configs(raw, "layer_quant_config"),
        types=_configs(raw, "layer_type_quant_config"),
        exclude=values.strings(raw, "exclude", WHERE),
        version=_version(raw),
        pack_method=values.text(export, "pack_method", place, allowed=("order", "reorder")) or "reorder",
        kv_patterns=(*values.strings(export, "kv_cache_group", place), *kv_configs),
        kv_specs=tuple(spec for config in kv_configs.values() for spec in config.outputs),
        unknown_algorithms=_algorithms(raw),
    )


def _version(raw: JSON) -> tuple[int, ...]:
    text = values.text(raw, "version", WHERE)
    if text is None:
        return ()
    found = re.match(r"(\d{1,6})\.(\d{1,6})", text)
    if found is None:  # the layout of six-bit codes hangs on it
        raise Damaged("version has no sound value", where=WHERE, found=repr(text)[:80], wanted="MAJOR.MINOR",
                      remedy="use the config.json that was written with these weights")
    return int(found[1]), int(found[2])


def _configs(raw: JSON, key: str) -> dict[str, LayerConfig]:
    """Layer configs by name or pattern; null entries are left out."""
    table = values.table(raw, key, WHERE)
    place = f"{WHERE}.{key}"
    given = {name: values.table(table, name, place) for name in table}
    return {name: _layer_config(entry, f"{key}.{name}") for name, entry in given.items() if entry}


def _layer_config(raw: JSON, name: str) -> LayerConfig:
    keys = ("weight", "input_tensors", "output_tensors", "bias")
    return LayerConfig(name, *(_stages(raw, key, f"{WHERE}.{name}") for key in keys))


def _stages(raw: JSON, key: str, where: str) -> Stages:
    given = raw.get(key)
    if given is None or given == []:
        return ()
    listed = (values.table(raw, key, where),) if not isinstance(given, list) else values.tables(raw, key, where)
    return tuple(_spec(entry, f"{where}.{key}") for entry in listed)


def _spec(raw: JSON, where: str) -> Spec:
    dtype = _known(raw, "dtype", where, DTYPES)
    element = _known(raw, "mx_element_dtype", where, DTYPES)
    is_integer = dtype.removeprefix("u").startswith("int")
    axis = "ch_axis" if "ch_axis" in raw else "axis"  # the legacy name
    dynamic = "is_dynamic" if "is_dynamic" in raw else "dynamic"
    size = values.integer(raw, "group_size", where, least=-1)
    return Spec(
        dtype=dtype,
        qscheme=_known(raw, "qscheme", where, _SCHEMES),
        axis=values.integer(raw, axis, where, least=-8, most=8),
        group_size=size or 0,
        block=_block(raw, where),
        dynamic=values.flag(raw, dynamic, where, default=False),
        symmetric=values.flag(raw, "symmetric", where, default=not is_integer),
        scale_format=values.text(raw, "scale_format", where) or "",
        mode=values.text(raw, "scale_calculation_mode", where, allowed=_MODES) or "even",
        element=element,
        is_scale_quant=values.flag(raw, "is_scale_quant", where, default=False),
    )


def _known(raw: JSON, key: str, where: str, known: frozenset[str] | tuple[str, ...]) -> str:
    """The string `key`, "" where it is absent or null; refused with key and value where it is not known."""
    value = values.text(raw, key, where) or ""
    if value and value not in known:
        raise Unsupported(f"an unknown {key}", where=where, found=f"{key} {value[:80]}",
                          wanted=" · ".join(sorted(known)), remedy="a newer anybit may read it")
    return value


def _block(raw: JSON, where: str) -> tuple[int, int]:
    value = raw.get("block_size")
    if value is None:
        return 0, 0
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**31 for v in sizes):
        raise Damaged("block_size has no sound value", where=where, found=repr(value)[:80],
                      wanted="two positive integers, rows first", remedy=_EXPORT_AGAIN)
    return sizes[0], sizes[1]


def _algorithms(raw: JSON) -> tuple[str, ...]:
    """Names of algorithms that no known Quark folds into the weights; what is applied at run time is refused."""
    given = raw.get("algo_config")  # a dict up to 0.9, then a list of dicts
    entries = (given,) if isinstance(given, dict) else values.tables(raw, "algo_config", WHERE)
    place = f"{WHERE}.algo_config"
    unknown = []
    for entry in entries:
        name = (values.text(entry, "name", place) or "").lower()
        if name == "svdquant":
            raise Unsupported("svdquant: a weight plus a low-rank branch is not read", where=place, found=name,
                              wanted=" · ".join(sorted(_FOLDED)), remedy="quantize the model without svdquant")
        if name in _ROTATIONS:
            _refuse_online_rotation(entry, name, place)
        elif name and name not in _FOLDED:
            unknown.append(name)
    return tuple(unknown)


def _refuse_online_rotation(entry: JSON, name: str, place: str) -> None:
    online = [key for key in ("r3", "r4") if entry.get(key)]
    settings = entry.get("online_config")
    is_off = isinstance(settings, dict) and any(settings.get(key) is False for key in ("enabled", "enable"))
    online += ["online_config"] if settings and not is_off else []
    if online:
        raise Unsupported(f"{name}: online rotations are applied at run time and not read", where=place,
                          found=" · ".join(f"{key} {entry.get(key)!r}"[:80] for key in online),
                          wanted="offline rotations only (r1, r2)", remedy="quantize the model without them")
