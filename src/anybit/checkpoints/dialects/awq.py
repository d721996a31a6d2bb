"""AWQ in the layouts gemm, gemv, gemv_fast, llm-awq and marlin: tensors to canonical weights.

Stored per module (K in, N out, G groups): gemm: qweight [K, N*bits/32], qzeros [G, N*bits/32] packed along N, scales
[G, N]. gemv: qweight [N, K/8], qzeros [N, W] packed along K, scales [N, 8W]. gemv_fast and llm-awq: int16 qweight
[N/4, K] in blocks of 4 x 64, scales and float "zeros" [8W, N] that are already -(scale * zero). W is padded, unused
scales are 0. A module is quantized iff `qweight` is there.
Rules, worked examples and sources with versions: docs/formats/awq.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need
from anybit.checkpoints.contents import FLOAT_DTYPES, Contents, TensorInfo
from anybit.checkpoints.dialects import gptq
from anybit.checkpoints.dialects._shared.gptqmodel_config import (
    Config,
    Settings,
    format_name,
    method,
    raw_config,
    read_config,
    refuse_run_time_parts,
    says_awq,
)
from anybit.checkpoints.dialects.plain import canonicalize as canonicalize_dense
from anybit.checkpoints.dialects.plain import dense_layers
from anybit.errors import Inconsistent, Unsupported
from anybit.schemes import CHANNEL, Block, Layer, Offset, ScaleLevel, Scheme, group

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, QuantizedWeight

NAME: Final = "awq"

ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a gemm word holds output column ORDER[i] of its eight
_NIBBLE_OF_COLUMN: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse
_GEMM_RUNTIMES: Final = ("exllama", "exllamav2", "ipex")  # transformers' versions that run files of the gemm layout
_WRONG_CONFIG: Final = "use the config.json that was written with these weights"


def recognizes(contents: Contents) -> bool:
    """True if the configuration names AWQ, or a side file without a method lies beside tensors packed along N."""
    raw, _ = raw_config(contents)
    named = method(raw)
    if named not in ("", "gptq"):
        return named == "awq"
    if says_awq(raw):
        return bool(named) or any(name.endswith(".qweight") for name in contents.tensors)
    return not named and bool(raw) and not contents.quantization and any(_is_awq(contents, n) for n in contents.tensors)


def _is_awq(contents: Contents, name: str) -> bool:
    """True for a qweight whose columns are not the outputs (scales [G, N]), without g_idx: not GPTQ's."""
    module, _, leaf = name.rpartition(".")
    scales = contents.tensors.get(f"{module}.scales")
    if leaf != "qweight" or scales is None or f"{module}.g_idx" in contents.tensors:
        return False
    shape = contents.tensors[name].shape
    return len(shape) == 2 and len(scales.shape) == 2 and shape[1] != scales.shape[1]


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from headers and configuration.

    Raises Unsupported for what docs/formats/awq.md §7 refuses, Inconsistent where shapes and configuration disagree,
    each naming the module.
    """
    config = read_config(contents)
    layout = layout_of(config)
    refuse_run_time_parts(contents, config)
    layers = {}
    for name in contents.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            settings, is_skipped = config.settings(module)
            notes = ("a dynamic rule skips this module; its tensors are quantized and decide",) if is_skipped else ()
            layers[module] = packed_layer(contents, module, settings, layout, _writer(config), notes)
    taken = {tensor for layer in layers.values() for tensor in layer.tensors.values()}
    return layers | dense_layers(contents, taken)


def layout_of(config: Config) -> str:
    """A key of `_LAYOUTS`; backend llm-awq means its layout whatever `version` says, as for transformers, gptqmodel."""
    if config.raw.get("backend") == "llm-awq":
        return "llm-awq"
    layout = format_name(config.raw, config.where) or "gemm"
    if layout in _GEMM_RUNTIMES:
        return "gemm"
    if layout not in _LAYOUTS:
        raise Unsupported(f"AWQ in the layout {layout}", where=config.where, found=layout, wanted=" · ".join(_LAYOUTS),
                          remedy="save the model again in the gemm layout")
    return layout


def _writer(config: Config) -> str:
    """Who packed widths other than 4 bits: their streams differ (docs/formats/awq.md §2)."""
    if config.is_by_auto_round:
        return "auto-round"
    return "gptqmodel" if config.is_by_gptqmodel else ""


# --- one module from its headers -----------------------------------------------------------------------------------

def packed_layer(
    contents: Contents, module: str, settings: Settings, layout: str, writer: str, notes: tuple[str, ...] = ()
) -> Layer:
    """The layer of a module with AWQ's qweight in one of `_LAYOUTS`, its shapes checked.

    writer  "auto-round", "gptqmodel" or "" (unknown): decides the order of widths other than 4
    Raises Inconsistent where bits, group and shapes do not fit, Unsupported for widths that nobody is known to write.
    """
    if f"{module}.g_idx" in contents.tensors:
        raise Inconsistent("an AWQ module with group indices", where=f"{module}.g_idx", found="qweight and g_idx",
                           wanted="quant_method gptq for such a module", remedy=_WRONG_CONFIG)
    if f"{module}.weight" in contents.tensors:
        raise Inconsistent("a module stored twice", where=module, found="weight and qweight", wanted="one of them",
                           remedy="remove the one that does not belong to this model")
    return _LAYOUTS[layout](contents, module, settings, writer, notes)


def _leaf(contents: Contents, module: str, leaf: str) -> TensorInfo:
    """The tensor of a module; Quark 0.13 beside a new transformers wrote "qscales" and "qqzeros" (quark.md §9)."""
    corrupted = f"{module}.q{leaf}"
    if f"{module}.{leaf}" not in contents.tensors and corrupted in contents.tensors:
        return contents.tensors[corrupted]
    return need(contents, f"{module}.{leaf}", module)


def _gemm(contents: Contents, module: str, settings: Settings, writer: str, notes: tuple[str, ...]) -> Layer:
    words = need(contents, f"{module}.qweight", module)
    zeros, scales = (_leaf(contents, module, leaf) for leaf in ("qzeros", "scales"))
    columns, width = _matrix(words, "I32")
    expect_dtype(zeros, "I32")
    expect_dtype(scales, *FLOAT_DTYPES)
    if len(scales.shape) != 2:
        raise Inconsistent("scales that are no grid", where=scales.name, found=str(list(scales.shape)), wanted="[G, N]",
                           remedy=_WRONG_CONFIG)
    rows = scales.shape[1]
    fitting = [bits for bits in range(2, 9) if -(-rows * bits // 32) == width]
    bits = settings.bits if settings.bits is not None else (4 if 4 in fitting else 0)
    if bits not in fitting:
        fits = " or ".join(map(str, fitting)) or "no"
        raise Inconsistent("packed shapes fit no such width", where=module,
                           found=f"qweight {[columns, width]}, scales {list(scales.shape)}",
                           wanted=f"{bits or 'some'} bits; these shapes fit {fits} bits", remedy=_WRONG_CONFIG)
    size = settings.group_of(columns)
    groups = -(-columns // size)
    expect_shape(zeros, (groups, width))
    expect_shape(scales, (groups, rows))
    storage = {"layout": "gemm", "bits": bits, "order": _order(bits, writer, module), "groups": groups}
    if storage["order"] != "stream" and rows % 8:
        raise Inconsistent("outputs that are no whole eights", where=module, found=f"N {rows}",
                           wanted="a multiple of 8", remedy=_WRONG_CONFIG)
    block = CHANNEL if settings.group_size == -1 else group(size)
    return _layer(contents, module, (rows, columns), (words, zeros, scales), f"uint{bits}", block, storage, notes)


def _order(bits: int, writer: str, module: str) -> str:
    """How columns lie in gemm words: nibbles in ORDER, a plain stream, or eights in ORDER and then a stream."""
    if bits == 4:
        return "nibbles"
    if writer == "gptqmodel":
        return "stream"
    if writer == "auto-round" and bits in (5, 6, 7):
        return "ordered_stream"
    raise Unsupported(f"AWQ with {bits} bits by {writer or 'an unknown writer'}", where=module,
                      found="writers differ in the order of such codes", wanted="4 bits, or a known writer",
                      remedy="restore provider or meta.quantizer in config.json")


def _gemv(contents: Contents, module: str, settings: Settings, writer: str, notes: tuple[str, ...]) -> Layer:
    words, zeros, scales = (need(contents, f"{module}.{leaf}", module) for leaf in ("qweight", "qzeros", "scales"))
    _expect_4_bits(settings, module)
    rows, width = _matrix(words, "I32")
    columns = 8 * width
    size, groups, padded = _padded_groups(settings, columns, module)
    expect_dtype(zeros, "I32")
    expect_shape(zeros, (rows, padded))
    expect_dtype(scales, *FLOAT_DTYPES)
    expect_shape(scales, (rows, 8 * padded))
    storage = {"layout": "gemv", "bits": 4, "groups": groups}
    return _layer(contents, module, (rows, columns), (words, zeros, scales), "uint4", size, storage, notes)


def _gemv_fast(contents: Contents, module: str, settings: Settings, writer: str, notes: tuple[str, ...]) -> Layer:
    words, scales = (need(contents, f"{module}.{leaf}", module) for leaf in ("qweight", "scales"))
    has_name = f"{module}.scaled_zeros" in contents.tensors  # the name that llm-awq gives the same values
    zeros = need(contents, f"{module}.{'scaled_zeros' if has_name else 'qzeros'}", module)
    _expect_4_bits(settings, module)
    packed_rows, columns = _matrix(words, "I16")
    rows = 4 * packed_rows
    if columns % 64:
        raise Inconsistent("codes that are no blocks of 64", where=words.name, found=f"K {columns}",
                           wanted="a multiple of 64", remedy=_WRONG_CONFIG)
    size, groups, padded = _padded_groups(settings, columns, module)
    for info in (zeros, scales):
        expect_dtype(info, *FLOAT_DTYPES)
        expect_shape(info, (8 * padded, rows))
    storage = {"layout": "gemv_fast", "bits": 4, "groups": groups}
    return _layer(contents, module, (rows, columns), (words, zeros, scales), "uint4", size, storage, notes)


def _marlin(contents: Contents, module: str, settings: Settings, writer: str, notes: tuple[str, ...]) -> Layer:
    if f"{module}.qzeros" in contents.tensors:
        raise Unsupported("Marlin tiles with zero points", where=f"{module}.qzeros", found="qzeros",
                          wanted="symmetric codes", remedy="save the model again in the gemm layout")
    return gptq.marlin_layer(contents, module, settings, "qweight", "scales")


_LAYOUTS: Final[Mapping[str, Callable[[Contents, str, Settings, str, tuple[str, ...]], Layer]]] = {
    "gemm": _gemm,
    "gemv": _gemv,
    "gemv_fast": _gemv_fast,
    "llm-awq": _gemv_fast,
    "marlin": _marlin,
}


def _matrix(words: TensorInfo, dtype: str) -> tuple[int, int]:
    if words.dtype != dtype or len(words.shape) != 2 or 0 in words.shape:
        raise Inconsistent("packed codes of another layout than the configuration says", where=words.name,
                           found=f"{words.dtype} {list(words.shape)}", wanted=f"a matrix of {dtype}",
                           remedy=_WRONG_CONFIG)
    return words.shape[0], words.shape[1]


def _expect_4_bits(settings: Settings, module: str) -> None:
    if settings.bits not in (None, 4):
        raise Unsupported(f"this AWQ layout with {settings.bits} bits", where=module, found=f"bits {settings.bits}",
                          wanted="4", remedy="save the model again in the gemm layout")


def _padded_groups(settings: Settings, columns: int, module: str) -> tuple[Block, int, int]:
    """Block, groups in use, and width W of the zero points in words (docs/formats/awq.md §4); 8W groups are stored."""
    size = settings.group_of(columns)
    if columns % size:
        raise Inconsistent("the group size does not divide the inputs", where=module,
                           found=f"K {columns}, group size {size}", wanted="whole groups", remedy=_WRONG_CONFIG)
    groups = columns // size
    multiple = next((m for least, m in ((128, 1), (64, 2), (32, 4)) if size >= least), 8)
    words = -(-groups // 8)
    width = -(-words // multiple) * multiple
    return (CHANNEL if settings.group_size == -1 else group(size)), groups, width


def _layer(
    contents: Contents, module: str, shape: tuple[int, int], infos: tuple[TensorInfo, TensorInfo, TensorInfo],
    element: str, block: Block, storage: Mapping[str, object], notes: tuple[str, ...],
) -> Layer:
    words, zeros, scales = infos
    names = {"qweight": words.name, "qzeros": zeros.name, "scales": scales.name}
    bias = contents.tensors.get(f"{module}.bias")
    if bias is not None:
        expect_dtype(bias, *FLOAT_DTYPES)
        expect_shape(bias, (shape[0],))
        names["bias"] = bias.name
    if zeros.dtype in FLOAT_DTYPES:
        offset = Offset("minimum", FLOAT_DTYPES[zeros.dtype], block)
    else:
        offset = Offset("zero_point", element, block)
    scheme = Scheme(element, (ScaleLevel(FLOAT_DTYPES[scales.dtype], block),), offset=offset)
    return Layer(module, "linear", shape, scheme, names, storage, contents.bytes_of(*names.values()), notes)


# --- tensors to the canonical form ---------------------------------------------------------------------------------

def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical weight; zero points are stored as they are, nothing is subtracted. Raises Damaged for NaN, Inf."""
    if not layer.scheme.is_quantized:
        return canonicalize_dense(layer, tensors)
    if layer.storage.get("marlin"):
        return gptq.canonicalize_marlin(layer, tensors)
    from anybit.checkpoints.checks import refuse_bad_scales
    from anybit.weights import QuantizedWeight

    codes, zeros, scales = _READERS[str(layer.storage["layout"])](layer, tensors)
    refuse_bad_scales(scales, layer.tensors["scales"], allow_zero=True, allow_negative=True)
    if zeros.is_floating_point():
        refuse_bad_scales(zeros, layer.tensors["qzeros"], allow_zero=True, allow_negative=True)
    return QuantizedWeight(layer.scheme, layer.shape, codes, (scales,), zeros, bias=tensors.get("bias"))


def _read_gemm(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], zero points [N, G], scales [N, G] of words packed along N."""
    rows = layer.shape[0]
    codes, zeros = (_columns(tensors[role], rows, layer.storage) for role in ("qweight", "qzeros"))
    return codes.t().contiguous(), zeros.t().contiguous(), tensors["scales"].t().contiguous()


def _columns(words: Tensor, count: int, storage: Mapping[str, object]) -> Tensor:
    """Codes [R, N] of gemm words [R, W]."""
    from anybit.numerics.packing import unpack_stream

    bits, order = storage["bits"], storage["order"]
    assert isinstance(bits, int)
    codes = unpack_stream(words, bits, count)
    if order == "stream":
        return codes
    # for 4 bits a word is one eight; wider codes were ordered in eights before they became a stream
    return codes.reshape(len(codes), count // 8, 8)[..., list(_NIBBLE_OF_COLUMN)].flatten(1)


def _read_gemv(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same of words packed along K in natural order; columns beyond the last group are padding."""
    from anybit.numerics.packing import unpack_stream

    groups = layer.storage["groups"]
    assert isinstance(groups, int)
    codes = unpack_stream(tensors["qweight"], 4, layer.shape[1])
    zeros = unpack_stream(tensors["qzeros"], 4, groups)
    return codes, zeros.contiguous(), tensors["scales"][:, :groups].contiguous()


def _read_gemv_fast(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], minima [N, G], scales [N, G] of int16 words in blocks of 4 rows x 64 columns.

    Word c of block B of packed row R, nibble i: n = 4R + c // 16, k = 64B + 32 (c // 8 % 2) + c % 8 + 8i.
    """
    import torch

    groups = layer.storage["groups"]
    assert isinstance(groups, int)
    words = tensors["qweight"]
    packed_rows, columns = words.shape
    data = words.contiguous().view(torch.uint8)
    data = data.view(packed_rows, columns // 64, 4, 2, 8, 2)  # R, B, row, half, e, byte
    nibbles = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)  # R, B, row, half, e, i
    codes = nibbles.permute(0, 2, 1, 3, 5, 4).reshape(4 * packed_rows, columns)
    zeros, scales = (tensors[role][:groups].t().contiguous() for role in ("qzeros", "scales"))
    return codes, zeros, scales


_READERS: Final = {"gemm": _read_gemm, "gemv": _read_gemv, "gemv_fast": _read_gemv_fast}
