"""GPTQ, versions 1 and 2, gptqmodel's planar `gptq_p`, and AutoGPTQ's Marlin files: tensors to canonical weights.

Stored per module: qweight [ceil(K*bits/w), N], packed down K in words of w bits; qzeros [G, ceil(N*bits/w)], packed
along N; scales [G, N]; g_idx [K], which some writers leave out. Marlin files: B and s. A module is quantized iff
`qweight` (`B`) is there, whatever the configuration says; bits and group come from the configuration and must fit the
shapes. Rules, worked examples and sources with versions: docs/formats/gptq.md. The configuration is read by
`_shared/gptqmodel_config.py`, what needs the tensors' values stands in `_shared/gptq_tensors.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need
from anybit.checkpoints.contents import FLOAT_DTYPES, Contents, TensorInfo
from anybit.checkpoints.dialects._shared.gptqmodel_config import (
    Config,
    Settings,
    format_name,
    method,
    raw_config,
    read_config,
    refuse_incomplete,
    refuse_run_time_parts,
    says_awq,
)
from anybit.checkpoints.dialects.plain import EMBEDDINGS, dense_layers
from anybit.checkpoints.dialects.plain import canonicalize as canonicalize_dense
from anybit.errors import Damaged, Inconsistent, Unsupported
from anybit.schemes import CHANNEL, Block, Layer, LayerKind, Offset, ScaleLevel, Scheme, group

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, QuantizedWeight

NAME: Final = "gptq"

_PACK_DTYPES: Final = {"int32": "I32", "int16": "I16", "int8": "I8", "int64": "I64"}
_WRONG_CONFIG: Final = "use the config.json that was written with these weights"
_WORDS: Final[Mapping[str, int]] = {"I32": 32, "I16": 16, "I8": 8}  # packing words and their widths
_PLANAR_ONLY: Final = (5, 6, 7)  # gptqmodel packs these in planes, whatever the label says (§3)
_ZEROS: Final = {"": "minus_one", "gptq": "minus_one", "gptq_v2": "as_stored", "gptq_p": "as_stored"}
_FOREIGN: Final = {  # formats under gptqmodel's wrapper that are other dialects or unread
    "marlin_24": "2:4 sparse weights in Marlin's order",
    "bitblas": "BitBLAS layout",
    "exl3": "ExLlamaV3 layout",
    "qqq": "QQQ layout",
    "vptq": "VPTQ layout",
    "paroquant": "ParoQuant layout",
    "fp8": "fp8 in gptqmodel's wrapper",
    "gguf": "GGUF in gptqmodel's wrapper",
    "bitsandbytes": "bitsandbytes in gptqmodel's wrapper",
}


def recognizes(contents: Contents) -> bool:
    """True if the configuration names GPTQ, or a side file without a method lies beside GPTQ's tensors."""
    raw, _ = raw_config(contents)
    named = method(raw)
    if named not in ("", "gptq", "marlin") or says_awq(raw):
        return False
    if named:
        return True
    return bool(raw) and not contents.quantization and any(_is_packed_down(contents, name) for name in contents.tensors)


def _is_packed_down(contents: Contents, name: str) -> bool:
    """True for a qweight packed down K: its columns are the outputs, as those of its scales (AWQ packs along N)."""
    module, _, leaf = name.rpartition(".")
    if leaf == "B":
        return f"{module}.s" in contents.tensors
    scales = contents.tensors.get(f"{module}.scales")
    shapes = (contents.tensors[name].shape, scales.shape if scales else ())
    return leaf == "qweight" and all(len(s) == 2 for s in shapes) and shapes[0][1] == shapes[1][1]


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from headers and configuration.

    Raises Unsupported for the formats of docs/formats/gptq.md §8 and §9 that are not read here, Inconsistent where
    shapes and configuration disagree, each naming the module.
    """
    config = read_config(contents)
    form = _format(config)
    refuse_run_time_parts(contents, config)
    refuse_incomplete(contents, "qweight", "qzeros", "scales")
    if form == "marlin":
        refuse_incomplete(contents, "B", "s")
    layers = {}
    for name in contents.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            layers[module] = _packed(contents, module, config, form)
        elif leaf == "B" and f"{module}.s" in contents.tensors:
            layers[module] = marlin_layer(contents, module, config.settings(module)[0], "B", "s")
    taken = {tensor for layer in layers.values() for tensor in layer.tensors.values()}
    return layers | dense_layers(contents, taken)


def _format(config: Config) -> str:
    """A key of `_ZEROS`, or "marlin"; anything else is refused by name."""
    form = format_name(config.raw, config.where)
    if form == "marlin" or config.raw.get("is_marlin_format") is True or method(config.raw) == "marlin":
        return "marlin"
    if form not in _ZEROS:
        raise Unsupported(f"GPTQ in the format {form}", where=config.where, found=_FOREIGN.get(form, form),
                          wanted="gptq, gptq_v2, gptq_p or marlin", remedy="save the model in one of these formats")
    return form


def _packed(contents: Contents, module: str, config: Config, form: str) -> Layer:
    if form == "marlin":
        raise Inconsistent("a module packed otherwise than the configuration says", where=module, found="qweight",
                           wanted="B and s: the configuration says marlin", remedy=_WRONG_CONFIG)
    settings, is_skipped = config.settings(module)
    notes = []
    if is_skipped:
        notes.append("a dynamic rule skips this module; its tensors are quantized and decide")
    if config.raw.get("activation"):
        notes.append("gptqmodel's run-time activation policy is not applied: weight-only")
    # with static groups desc_act changes the order of quantization only, g_idx stays k // group
    if settings.act_order and config.has_static_groups:
        settings = replace(settings, act_order=False)
    _expect_pack_dtype(contents.tensors[f"{module}.qweight"], config)
    planar = form == "gptq_p" or settings.bits in _PLANAR_ONLY
    storage = {
        "planar": planar,
        "zeros": "as_stored" if planar else _ZEROS[form],
        "lossy_zeros": not config.is_by_gptqmodel,
    }
    return packed_layer(contents, module, settings, storage, tuple(notes))


def _expect_pack_dtype(words: TensorInfo, config: Config) -> None:
    pack = config.raw.get("pack_dtype")
    dtype = _PACK_DTYPES.get(pack) if isinstance(pack, str) else None
    if dtype is not None and dtype != words.dtype:
        raise Inconsistent("words of another width than the configuration says", where=words.name, found=words.dtype,
                           wanted=f"{dtype} (pack_dtype {pack})", remedy=_WRONG_CONFIG)


# --- one module from its headers -----------------------------------------------------------------------------------

def packed_layer(
    contents: Contents, module: str, settings: Settings, storage: Mapping[str, object], notes: tuple[str, ...] = ()
) -> Layer:
    """The layer of a module with qweight packed down K, its shapes checked.

    `storage` says "planar", "zeros" ("minus_one" or "as_stored") and "lossy_zeros" (the writer may have lost zero
    points 0); bits, symmetry and group are added. AutoRound's integer files are read through this too.
    Raises Inconsistent where bits, group and shapes do not fit, Unsupported for words and widths nobody writes.
    """
    names = {role: f"{module}.{role}" for role in ("qweight", "qzeros", "scales")}
    words, zeros, scales = (need(contents, name, module) for name in names.values())
    _refuse_twice(contents, module)
    width = _word_width(words)
    expect_dtype(zeros, words.dtype)
    expect_dtype(scales, *FLOAT_DTYPES)
    sizes = _sizes(contents, module, settings, width)
    if sizes.bits == 3 and width != 32:
        raise Unsupported("3-bit codes in narrow words", where=words.name, found=words.dtype, wanted="I32",
                          remedy="quantize the model with pack_dtype int32")
    if storage["planar"] and (width != 32 or sizes.columns % 32 or sizes.rows % 32):
        raise Inconsistent("planes that are not whole runs of 32", where=module, found=f"{sizes} in {words.dtype}",
                           wanted="int32 words, K and N multiples of 32", remedy=_WRONG_CONFIG)
    expect_shape(zeros, (sizes.groups, -(-sizes.rows * sizes.bits // width)))
    expect_shape(scales, (sizes.groups, sizes.rows))
    names |= _optional(contents, module, sizes)
    is_embedding = module.rpartition(".")[2] in EMBEDDINGS
    act_order = settings.act_order and "g_idx" in names and sizes.groups > 1
    block = CHANNEL if settings.group_size == -1 else group(sizes.group)
    scheme = _scheme(sizes.bits, block, FLOAT_DTYPES[scales.dtype], act_order)
    kind: LayerKind = "linear"
    shape = (sizes.rows, sizes.columns)
    if is_embedding:  # packed down V and not transposed (docs/formats/gptq.md §6)
        kind, shape, scheme = "embedding", (sizes.columns, sizes.rows), _down_rows(scheme)
    facts = {**storage, "bits": sizes.bits, "group": sizes.group, "symmetric": settings.symmetric}
    return Layer(module, kind, shape, scheme, names, facts, contents.bytes_of(*names.values()), notes)


@dataclass(frozen=True)
class _Sizes:
    """What the headers of a module say: codes [columns, rows] of `bits`, `groups` groups of `group`."""

    rows: int
    columns: int
    bits: int
    groups: int
    group: int

    def __str__(self) -> str:
        return f"N {self.rows}, K {self.columns}, {self.bits} bits, {self.groups} groups of {self.group}"


def _word_width(words: TensorInfo) -> int:
    if words.dtype == "I64":
        raise Unsupported("codes in 64-bit words", where=words.name, found="I64", wanted="I32, I16 or I8",
                          remedy="quantize the model with pack_dtype int32")
    expect_dtype(words, *_WORDS)
    if len(words.shape) != 2 or 0 in words.shape:
        raise Inconsistent("packed codes that are no matrix", where=words.name, found=str(list(words.shape)),
                           wanted="[words, N]", remedy="convert the model again, one module a tensor")
    return _WORDS[words.dtype]


def _sizes(contents: Contents, module: str, settings: Settings, width: int) -> _Sizes:
    """N, K, bits and groups that fit every shape; Inconsistent with what would fit where the configuration does not."""
    words, rows = contents.tensors[f"{module}.qweight"].shape
    g_idx = contents.tensors.get(f"{module}.g_idx")
    zeros = contents.tensors[f"{module}.qzeros"].shape
    stated = g_idx.shape[0] if g_idx is not None and len(g_idx.shape) == 1 else None
    fitting = [
        bits
        for bits in range(2, 9)
        if (columns := stated or words * width // bits) and -(-columns * bits // width) == words
        and len(zeros) == 2 and zeros[1] == -(-rows * bits // width)
    ]
    bits = settings.bits if settings.bits is not None else (fitting[0] if len(fitting) == 1 else 0)
    if bits not in fitting:
        raise Inconsistent("packed shapes fit no such width", where=module,
                           found=f"qweight {[words, rows]}, qzeros {list(zeros)}, {stated or 'no'} g_idx entries",
                           wanted=f"{bits or 'some'} bits; these shapes fit {_or(fitting) or 'no'} bits",
                           remedy=_WRONG_CONFIG)
    columns = stated or words * width // bits
    size = settings.group_of(columns)
    groups = -(-columns // size)
    stored = contents.tensors[f"{module}.scales"].shape
    if len(stored) != 2 or stored[0] != groups:
        raise Inconsistent("scales fit no such group size", where=f"{module}.scales", found=str(list(stored)),
                           wanted=f"[{groups}, {rows}] (K {columns}, group size {size})", remedy=_WRONG_CONFIG)
    return _Sizes(rows, columns, bits, groups, size)


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def _optional(contents: Contents, module: str, sizes: _Sizes) -> dict[str, str]:
    names = {}
    g_idx, bias = (contents.tensors.get(f"{module}.{leaf}") for leaf in ("g_idx", "bias"))
    if g_idx is not None:
        if g_idx.dtype not in ("I32", "I64"):
            raise Damaged("group indices that are no integers", where=g_idx.name, found=g_idx.dtype, wanted="I32",
                          remedy="download the file again, or get it from its writer")
        expect_shape(g_idx, (sizes.columns,))
        names["g_idx"] = g_idx.name
    if bias is not None:
        expect_dtype(bias, *FLOAT_DTYPES)
        expect_shape(bias, (sizes.rows,))
        names["bias"] = bias.name
    return names


def _refuse_twice(contents: Contents, module: str) -> None:
    if f"{module}.weight" in contents.tensors:
        raise Inconsistent("a module stored twice", where=module, found="weight and packed codes", wanted="one of them",
                           remedy="remove the one that does not belong to this model")


@cache
def _scheme(bits: int, block: Block, scale: str, act_order: bool) -> Scheme:
    element = f"uint{bits}"
    plain_scheme = Scheme(element, (ScaleLevel(scale, block),), offset=Offset("zero_point", element, block))
    return _gathered(plain_scheme) if act_order else plain_scheme


def _gathered(scheme: Scheme) -> Scheme:
    """The scheme with columns scattered over its groups."""
    assert scheme.offset is not None
    scales = tuple(replace(level, placement="gathered") for level in scheme.scales)
    return replace(scheme, scales=scales, offset=replace(scheme.offset, placement="gathered"), act_order=True)


def _in_order(scheme: Scheme) -> Scheme:
    """The scheme with contiguous groups."""
    assert scheme.offset is not None
    scales = tuple(replace(level, placement="grid") for level in scheme.scales)
    return replace(scheme, scales=scales, offset=replace(scheme.offset, placement="grid"), act_order=False)


def _down_rows(scheme: Scheme) -> Scheme:
    """The scheme of an embedding: groups run down the rows."""
    scheme = _in_order(scheme)
    level, offset = scheme.scales[0], scheme.offset
    assert offset is not None
    block: Block = (level.block[1], 1)
    return replace(scheme, scales=(replace(level, block=block),), offset=replace(offset, block=block))


def marlin_layer(contents: Contents, module: str, settings: Settings, codes: str, scales: str) -> Layer:
    """The layer of a module in Marlin's order, tensors called `codes` and `scales` (docs/formats/gptq.md §8)."""
    names = {"qweight": f"{module}.{codes}", "scales": f"{module}.{scales}"}
    words, scale = (need(contents, name, module) for name in names.values())
    _refuse_twice(contents, module)
    expect_dtype(words, "I32")
    expect_dtype(scale, *FLOAT_DTYPES)
    if len(words.shape) != 2 or 0 in words.shape or words.shape[1] % 128:
        raise Inconsistent("codes that are no Marlin tiles", where=words.name, found=str(list(words.shape)),
                           wanted="[K/16, 2N], N a multiple of 64", remedy=_WRONG_CONFIG)
    rows, columns = words.shape[1] // 2, words.shape[0] * 16
    if settings.bits not in (None, 4):
        raise Inconsistent("Marlin files hold 4-bit codes", where=module, found=f"bits {settings.bits}", wanted="4",
                           remedy=_WRONG_CONFIG)
    size = settings.group_of(columns)
    expect_shape(scale, (-(-columns // size), rows))
    block = CHANNEL if settings.group_size == -1 else group(size)
    sizes = _Sizes(rows, columns, 4, scale.shape[0], size)
    names |= {role: name for role, name in _optional(contents, module, sizes).items() if role == "bias"}
    scheme = Scheme("int4", (ScaleLevel(FLOAT_DTYPES[scale.dtype], block),))
    return Layer(module, "linear", (rows, columns), scheme, names, {"marlin": True}, contents.bytes_of(*names.values()))


# --- tensors to the canonical form ---------------------------------------------------------------------------------

def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical weight; its scheme has act_order iff g_idx really scatters columns, whatever the layer declared.

    Raises Damaged for group indices out of range and unsound scales, Inconsistent where zero points are shifted by one
    against what the configuration says.
    """
    if not layer.scheme.is_quantized:
        return canonicalize_dense(layer, tensors)
    if layer.storage.get("marlin"):
        return canonicalize_marlin(layer, tensors)
    from anybit.checkpoints.checks import refuse_bad_scales
    from anybit.checkpoints.dialects._shared import gptq_tensors
    from anybit.weights import QuantizedWeight

    facts, names = gptq_tensors.Facts.of(layer), layer.tensors
    refuse_bad_scales(tensors["scales"], names["scales"], allow_zero=True, allow_negative=True)
    group_map = gptq_tensors.group_map(tensors.get("g_idx"), tensors["scales"].shape[0], facts, names.get("g_idx", ""))
    is_embedding = layer.kind == "embedding"
    columns, rows = layer.shape if is_embedding else layer.shape[::-1]
    zeros = gptq_tensors.zero_points(tensors["qzeros"], rows, facts, names["qzeros"])
    # packed down K: transpose the words, then unpack along the rows
    codes = gptq_tensors.unpack(tensors["qweight"].t().contiguous(), columns, facts)
    scales = tensors["scales"]
    bias = gptq_tensors.real_bias(tensors.get("bias"))
    if is_embedding:  # [V, H] with groups down V, as stored
        if group_map is not None:
            raise Unsupported("an embedding with scattered groups", where=names["g_idx"], found="act-order",
                              wanted="contiguous groups", remedy="quantize the embedding without desc_act")
        return QuantizedWeight(layer.scheme, layer.shape, codes.t().contiguous(), (scales,), zeros, bias=bias)
    scheme = _in_order(layer.scheme) if group_map is None else _gathered(layer.scheme)
    scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
    return QuantizedWeight(scheme, layer.shape, codes, (scales,), zeros, group_map=group_map, bias=bias)


def canonicalize_marlin(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """The canonical weight of Marlin tiles: signed 4-bit codes, no zero points."""
    import torch

    from anybit.checkpoints.checks import refuse_bad_scales
    from anybit.checkpoints.dialects._shared import gptq_tensors, marlin
    from anybit.weights import QuantizedWeight

    refuse_bad_scales(tensors["scales"], layer.tensors["scales"], allow_zero=True, allow_negative=True)
    codes = marlin.unpack_codes(tensors["qweight"]).view(torch.int8) - 8
    scales = marlin.unpermute_scales(tensors["scales"])
    bias = gptq_tensors.real_bias(tensors.get("bias"))
    return QuantizedWeight(layer.scheme, layer.shape, codes, (scales,), bias=bias)
