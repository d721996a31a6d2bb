"""AutoRound's own format: GPTQ's and AWQ's layouts without their configuration, and floating formats beside them.

Integers: `packing_format` says GPTQ's layout with zero points minus one, the same with zero points as they are, or
AWQ's; 5, 6 and 7 bits are a plain stream there, never planes, and g_idx is absent. Floats: MXFP4, MXFP8, MXINT4, NVFP4
(its scales e4m3 under a global one, or ue5m3 alone), and e4m3 by blocks, groups, rows or whole. What the tool writes
as quant_method gptq or awq belongs to those dialects.
Rules, worked examples and sources with versions: docs/formats/auto_round.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need
from anybit.checkpoints.contents import FLOAT_DTYPES, JSON, Contents, TensorInfo
from anybit.checkpoints.dialects import awq, fp8, gptq
from anybit.checkpoints.dialects._shared import config_values as values
from anybit.checkpoints.dialects._shared.gptqmodel_config import Settings, refuse_incomplete
from anybit.checkpoints.dialects.plain import canonicalize as canonicalize_dense
from anybit.checkpoints.dialects.plain import dense_layers
from anybit.checkpoints.patterns import Patterns
from anybit.errors import Damaged, Inconsistent, Unsupported
from anybit.schemes import CHANNEL, TENSOR, ActivationSpec, Block, Layer, ScaleLevel, Scheme, group

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, QuantizedWeight

NAME: Final = "auto-round"

METHODS: Final = ("auto-round", "auto_round", "intel/auto-round")
SIDE_FILE: Final = "quantization_config.json"
_REGEX_SIGNS: Final = frozenset("*+?^$()[]{}|\\")  # a key with one of these is a regular expression
_REFUSED: Final = ("mlx", "fake")
_PLAIN_BITS: Final = 16
_WRONG_CONFIG: Final = "use the config.json that was written with these weights"


def recognizes(contents: Contents) -> bool:
    """True if config.json, or without its word the side file, names the method."""
    return _method(_raw(contents)[0]) in METHODS


def _raw(contents: Contents) -> tuple[JSON, str]:
    if contents.quantization:
        return contents.quantization, "config.json: quantization_config"
    return contents.side.get(SIDE_FILE, {}), SIDE_FILE


def _method(raw: JSON) -> str:
    value = raw.get("quant_method")
    return value.lower() if isinstance(value, str) else ""


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from headers and configuration.

    Raises Unsupported for what docs/formats/auto_round.md §6 refuses, Inconsistent where shapes fit no width or group.
    """
    config = _read_config(contents)
    refuse_incomplete(contents, "qweight", "qzeros", "scales")
    layers = {}
    for name, info in contents.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            layers[module] = _integer(contents, module, config)
        elif leaf == "weight_packed":
            layers[module] = _four_bit_float(contents, module, config)
        elif leaf == "weight" and info.dtype.startswith("F8_"):
            layers[module] = _eight_bit_float(contents, module, config)
    taken = {tensor for layer in layers.values() for tensor in layer.tensors.values()}
    return layers | dense_layers(contents, taken)


# --- the configuration ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Config:
    """The configuration: `zeros` is None for AWQ's layout, else how GPTQ's zero points are stored."""

    raw: JSON
    where: str
    zeros: str | None
    entries: Mapping[str, JSON]  # extra_config
    regexes: tuple[str, ...]
    patterns: Patterns

    def of(self, module: str) -> JSON:
        """The keys that hold for a module: its exact entry, else one for its last names, else the first regex to hit.

        Keys that an entry leaves out keep their top-level value (docs/formats/auto_round.md §4).
        """
        return {**self.raw, **self._entry(module)}

    def _entry(self, module: str) -> JSON:
        tails = [module, *(module.split(".", cut)[-1] for cut in range(1, module.count(".") + 1))]
        for name in tails:
            if name in self.entries and not _REGEX_SIGNS & set(name):
                return self.entries[name]
        found = self.patterns.first(module)
        return {} if found is None else self.entries[self.regexes[found]]


def _read_config(contents: Contents) -> _Config:
    raw, where = _raw(contents)
    packing = (values.text(raw, "packing_format", where) or "auto_round:auto_gptq").lower()
    if packing.rpartition(":")[2] in _REFUSED:
        raise Unsupported(f"AutoRound's packing {packing}", where=where, found=f"packing_format {packing}",
                          wanted="auto_round, auto_round:auto_gptq, auto_round:auto_awq or a float packing",
                          remedy="export the model again with format auto_round")
    for key in ("rotation_config", "spinquant_config"):
        if raw.get(key):
            raise Unsupported("weights that need rotated inputs at run time", where=where, found=key, wanted="none",
                              remedy="quantize the model without rotation")
    entries = values.table(raw, "extra_config", where)
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise Damaged("an entry of extra_config has no sound value", where=f"{where}.extra_config[{name!r}]",
                          found=repr(entry)[:80], wanted="an object")
        if entry.get("rotation_config"):
            raise Unsupported("weights that need rotated inputs at run time", where=f"{where}.extra_config[{name!r}]",
                              found="rotation_config", wanted="none", remedy="quantize the model without rotation")
    regexes = tuple(name for name in entries if _REGEX_SIGNS & set(name))
    patterns = Patterns.search(list(regexes), where=f"{where}.extra_config")
    return _Config(raw, where, _zeros(packing, where), entries, regexes, patterns)


def _zeros(packing: str, where: str) -> str | None:
    """How zero points are stored, None for AWQ's layout. `auto_round:gptqmodel` is raw though it contains "gptq"."""
    if "awq" in packing:
        return None
    if "gptqmodel" in packing:
        return "as_stored"
    if "gptq" in packing or packing == "auto":
        return "minus_one"
    if packing == "auto_round" or packing.startswith("auto_round:"):
        return "as_stored"
    raise Unsupported(f"AutoRound's packing {packing}", where=where, found=f"packing_format {packing}",
                      wanted="auto_round, auto_round:auto_gptq or auto_round:auto_awq",
                      remedy="export the model again with format auto_round")


def _settings(keys: JSON, where: str) -> Settings:
    bits = values.integer(keys, "bits", where, least=1, most=32)
    size = values.integer(keys, "group_size", where, least=-1)
    symmetric = values.flag(keys, "sym", where, default=True)
    return Settings(bits, 128 if size is None else size or -1, symmetric, act_order=False)


# --- integers ------------------------------------------------------------------------------------------------------

def _integer(contents: Contents, module: str, config: _Config) -> Layer:
    """GPTQ's or AWQ's layout; where a rule and the tensors disagree about the width, the tensors decide."""
    keys = config.of(module)
    settings = _settings(keys, f"{config.where}, {module}")
    words, zeros, scales = (need(contents, f"{module}.{leaf}", module) for leaf in ("qweight", "qzeros", "scales"))
    packed = zeros if config.zeros is not None else words  # packed along N, a multiple of 32
    if len(packed.shape) != 2 or len(scales.shape) != 2 or 0 in scales.shape:
        raise Inconsistent("packed codes that are no matrix", where=packed.name, found=str(list(packed.shape)),
                           wanted="two dimensions", remedy=_WRONG_CONFIG)
    bits = 32 * packed.shape[1] // scales.shape[1]
    notes = []
    if settings.bits not in (None, bits):
        notes.append(f"the configuration says {settings.bits} bits, the tensors hold {bits}: they decide")
    if (values.integer(keys, "act_bits", config.where, least=1, most=32) or _PLAIN_BITS) < _PLAIN_BITS:
        notes.append("declared activations are not quantized beside integer weights: weight-only")
    settings = replace(settings, bits=bits)
    if config.zeros is None:
        return awq.packed_layer(contents, module, settings, "gemm", "auto-round", tuple(notes))
    storage = {"planar": False, "zeros": config.zeros, "lossy_zeros": True}
    return gptq.packed_layer(contents, module, settings, storage, tuple(notes))


# --- floats --------------------------------------------------------------------------------------------------------

def _four_bit_float(contents: Contents, module: str, config: _Config) -> Layer:
    """MXFP4, MXINT4 or NVFP4: two codes a byte, low nibble first."""
    keys = config.of(module)
    packed, scale = (need(contents, f"{module}.{leaf}", module) for leaf in ("weight_packed", "weight_scale"))
    expect_dtype(packed, "U8")
    if len(packed.shape) != 2 or 0 in packed.shape:
        raise Inconsistent("packed codes that are no matrix", where=packed.name, found=str(list(packed.shape)),
                           wanted="[N, K/2]", remedy=_WRONG_CONFIG)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    names = {"weight": packed.name, "scale": scale.name}
    levels: tuple[ScaleLevel, ...]
    if f"{module}.weight_global_scale" in contents.tensors:
        names["global_scale"] = _one_float(contents, module, "weight_global_scale")
        expect_dtype(scale, "F8_E4M3")
        element, size = "fp4_e2m1", 16
        levels = (ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", TENSOR, divide=True))
    elif scale.dtype == "U8" and scale.shape == (rows, -(-columns // 16)):  # data_type nvfp4_v2
        element, size = "fp4_e2m1", 16
        levels = (ScaleLevel("ue5m3", group(16)),)
    else:
        expect_dtype(scale, "U8", "F8_E8M0")
        data_type = values.text(keys, "data_type", config.where) or ""
        element, size = ("mxint4" if data_type.startswith("mx_int") else "fp4_e2m1"), 32
        levels = (ScaleLevel("e8m0", group(32)),)
    expect_shape(scale, (rows, -(-columns // size)))
    names |= _bias(contents, module, rows)
    activation, notes = _activation(keys, config.where)
    if activation is not None and activation.recipe == "nvfp4":
        names["input_scale"] = _one_float(contents, module, "input_global_scale")
    scheme = Scheme(element, levels, activation=activation)
    return Layer(module, "linear", (rows, columns), scheme, names, {}, contents.bytes_of(*names.values()), notes)


def _eight_bit_float(contents: Contents, module: str, config: _Config) -> Layer:
    """MXFP8, or e4m3 with a scale a block (weight_scale_inv); one for all, one a row or one a group (weight_scale)."""
    keys = config.of(module)
    activation, notes = _activation(keys, config.where)
    inverse = contents.tensors.get(f"{module}.weight_scale_inv")
    scale = inverse or need(contents, f"{module}.weight_scale", module)
    block: Block
    if scale.dtype in ("U8", "F8_E8M0"):
        block = (1, 32)
    elif inverse is not None:
        block = fp8.read_block(keys.get("weight_block_size", keys.get("group_size"))) or (128, 128)
    else:
        block = _block_of_flat_scales(contents, module, scale)
    return fp8.float8_layer(contents, module, scale, block, activation, notes, is_flat=inverse is None)


def _block_of_flat_scales(contents: Contents, module: str, scale: TensorInfo) -> Block:
    """Whom a scale serves: the tool stores all of a weight's scales in one row, so their number tells (§5)."""
    weight = need(contents, f"{module}.weight", module)
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    if scale.elements == 1:
        return TENSOR
    if not rows or scale.elements % rows or columns % (scale.elements // rows):
        raise Inconsistent("scales that serve neither the whole, nor rows, nor groups", where=scale.name,
                           found=f"{list(scale.shape)} for {list(weight.shape)}", wanted=f"1, {rows} or whole groups",
                           remedy=_WRONG_CONFIG)
    groups = scale.elements // rows
    return CHANNEL if groups == 1 else group(columns // groups)


def _one_float(contents: Contents, module: str, leaf: str) -> str:
    info = need(contents, f"{module}.{leaf}", module)
    expect_dtype(info, *FLOAT_DTYPES)
    expect_shape(info, (1,), ())
    return info.name


def _bias(contents: Contents, module: str, rows: int) -> dict[str, str]:
    info = contents.tensors.get(f"{module}.bias")
    if info is None:
        return {}
    expect_dtype(info, *FLOAT_DTYPES)
    expect_shape(info, (rows,))
    return {"bias": info.name}


_MX_ELEMENTS: Final = {4: "fp4_e2m1", 8: "fp8_e4m3fn"}
_MX_RECIPES: Final = {"mx_fp": "mx_floor_autoround", "mx_fp_rceil": "mx_rceil"}  # act_data_type -> recipe


def _activation(keys: JSON, where: str) -> tuple[ActivationSpec | None, tuple[str, ...]]:
    """The activation arithmetic that the configuration declares, and a note where it is not carried out."""
    bits = values.integer(keys, "act_bits", where, least=1, most=32) or _PLAIN_BITS
    if bits >= _PLAIN_BITS:
        return None, ()
    kind = values.text(keys, "act_data_type", where) or values.text(keys, "data_type", where) or "int"
    is_dynamic = values.flag(keys, "act_dynamic", where, default=True)
    recipe = _MX_RECIPES.get(kind.replace(f"mx_fp{bits}", "mx_fp"))
    if recipe is not None and bits in _MX_ELEMENTS and is_dynamic:
        return ActivationSpec(_MX_ELEMENTS[bits], True, "group", recipe, group_size=32), ()
    if kind == "nvfp4_v2" and bits == 4:
        return ActivationSpec("fp4_e2m1", True, "group", "fp4_ue5m3_autoround", group_size=16), ()
    if kind.startswith("nv_fp") and bits == 4:
        return ActivationSpec("fp4_e2m1", True, "group", "nvfp4", group_size=16), ()  # the global scale is static
    if kind == "fp" and bits == 8:
        return _fp8_activation(keys, is_dynamic, where), ()
    return None, (f"activations declared as {kind} of {bits} bits are not quantized: weight-only",)


def _fp8_activation(keys: JSON, is_dynamic: bool, where: str) -> ActivationSpec:
    if not is_dynamic:
        return ActivationSpec(fp8.E4M3, False, "tensor", "fp8_static")
    size = values.integer(keys, "act_group_size", where, least=-1) or 0
    if size > 0:
        return ActivationSpec(fp8.E4M3, True, "group", "fp8_group_divide", group_size=size)
    return ActivationSpec(fp8.E4M3, True, "token", "fp8_token")


# --- tensors to the canonical form ---------------------------------------------------------------------------------

def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical weight, by the dialect whose layout it has."""
    if not layer.scheme.is_quantized:
        return canonicalize_dense(layer, tensors)
    if "layout" in layer.storage:
        return awq.canonicalize(layer, tensors)
    if "zeros" in layer.storage:
        return gptq.canonicalize(layer, tensors)
    if layer.scheme.element == fp8.E4M3:
        return fp8.canonicalize(layer, tensors)
    return _canonical_four_bit_float(layer, tensors)


def _canonical_four_bit_float(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    from anybit.checkpoints.dialects._shared import stored
    from anybit.numerics.packing import PackedCodes
    from anybit.weights import QuantizedWeight

    names = layer.tensors
    scales = [stored.scales(tensors["scale"], layer.scheme.scales[0].format, names["scale"])]
    if "global_scale" in tensors:
        scales.append(stored.one_value(tensors["global_scale"], names["global_scale"]).reshape(1, 1))
    activation = {}
    if "input_scale" in tensors:
        activation["global_scale"] = stored.one_value(tensors["input_scale"], names["input_scale"])
    codes = PackedCodes(tensors["weight"], 4, layer.shape[-1])
    return QuantizedWeight(layer.scheme, layer.shape, codes, tuple(scales), activation=activation,
                           bias=tensors.get("bias"))
