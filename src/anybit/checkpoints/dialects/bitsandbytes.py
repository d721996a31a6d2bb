"""bitsandbytes: nf4 and fp4 with block maxima over the flattened weight, and LLM.int8.

Four bits, module X: X.weight (two codes a byte, the first in the high nibble, the bytes under any dtype),
X.weight.absmax (float32, or uint8 with X.weight.nested_absmax and X.weight.nested_quant_map),
X.weight.quant_map, and a JSON of shape, block size and dtype in X.weight.quant_state.bitsandbytes__nf4 or __fp4.
Eight bits: X.weight int8 [N, K], X.SCB float32 [N] (row maxima, not divided by 127), X.weight_format.
The tensors decide which modules are quantized and how; the config gives the threshold of LLM.int8.
Rules, worked examples and sources with versions: docs/formats/bitsandbytes.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need
from anybit.checkpoints.contents import JSON, Contents
from anybit.checkpoints.dialects import plain
from anybit.checkpoints.dialects._shared import config_values as values
from anybit.checkpoints.dialects._shared.small_tensors import SmallTensors
from anybit.checkpoints.jsonfile import parse_json
from anybit.errors import Damaged, Inconsistent, Unsupported
from anybit.schemes import CHANNEL, TENSOR, ActivationSpec, Layer, LayerKind, ScaleLevel, Scheme, group

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, PackedCodes, QuantizedWeight

NAME: Final = "bitsandbytes"

WHERE: Final = "config.json: quantization_config"
METHODS: Final = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
OLD_FLAGS: Final = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
ELEMENTS: Final = {"nf4": "nf4", "fp4": "fp4_bnb"}
BLOCK_SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ROUND_TO: Final = {"bfloat16": "bfloat16", "float16": "float16", "float32": None}
ONE_127TH: Final = 0.007874015718698502  # 1/127 as float32, what bitsandbytes multiplies with
DEFAULT_THRESHOLD: Final = 6.0

_STATE: Final = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
_COMPANIONS: Final = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_STORAGE: Final = ("U8", "I8", "F16", "BF16", "F32", "F64")
_AGAIN: Final = "the file is damaged: download it again, or quantize the model anew"


@dataclass(frozen=True)
class QuantState:
    """The JSON beside a 4-bit weight, checked.

    shape         of the weight, [N, K]
    block_size    consecutive elements of the flattened weight that share a maximum
    round_to      the weight's own dtype, to which its values are rounded; None for float32
    nested_block  consecutive maxima that share one of their own; None where the maxima are float32
    offset        what is added to each decoded maximum
    """

    shape: tuple[int, int]
    block_size: int
    round_to: str | None
    nested_block: int | None
    offset: float

    @property
    def blocks(self) -> int:
        """Number of block maxima; the last block may be short."""
        return -(-self.shape[0] * self.shape[1] // self.block_size)


def recognizes(contents: Contents) -> bool:
    """True if the config names this method, or is an old one that only says load_in_8bit or load_in_4bit."""
    config = contents.quantization
    if "quant_method" in config:
        return contents.quant_method in METHODS
    return any(config.get(key) is True for key in OLD_FLAGS)


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from headers, the quant_state texts and the config.

    Raises Unsupported for what docs/formats/bitsandbytes.md §5 refuses, Inconsistent where companions of a weight are
    missing or do not fit it.
    """
    threshold = _threshold(contents.quantization)
    skipped = frozenset(values.strings(contents.quantization, "llm_int8_skip_modules", WHERE))
    layers: dict[str, Layer] = {}
    states: dict[tuple[str, str], QuantState] = {}  # weights of one shape have one text
    with SmallTensors() as small:
        for name, info in contents.tensors.items():
            if (found := _STATE.fullmatch(name)) is not None:
                layer = _four_bit(contents, found[1], found[2], small, skipped, states)
            elif name.endswith(".weight") and info.dtype == "I8" and f"{name}.absmax" not in contents.tensors:
                layer = _eight_bit(contents, name.removesuffix(".weight"), threshold, small, skipped)
            else:
                continue
            if layer.name in layers:
                raise Inconsistent("more than one quant_state", where=layer.name, found=name, wanted="one",
                                   remedy=_AGAIN)
            layers[layer.name] = layer
    taken = {tensor for layer in layers.values() for tensor in layer.tensors.values()}
    _refuse_orphans(contents, taken)
    return layers | plain.dense_layers(contents, taken)


def notes(contents: Contents) -> tuple[str, ...]:
    """A remark where the config speaks of quantization and no tensor is quantized."""
    if any(_STATE.fullmatch(name) or name.endswith(".SCB") for name in contents.tensors):
        return ()
    return ("no weight is quantized: the config asks bitsandbytes to do it while loading, which is not done here",)


def _threshold(config: JSON) -> float:
    """`llm_int8_threshold`; raises Damaged for flags or a threshold that mean nothing."""
    flags = {key: values.flag(config, key, WHERE, default=False) for key in OLD_FLAGS}
    if (flags["load_in_4bit"] or flags["_load_in_4bit"]) and (flags["load_in_8bit"] or flags["_load_in_8bit"]):
        raise Damaged("both 4 and 8 bits are asked for", where=WHERE, found="load_in_4bit and load_in_8bit",
                      wanted="at most one", remedy="use the config.json that was written with these weights")
    found = config.get("llm_int8_threshold")
    if found is None:
        return DEFAULT_THRESHOLD
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < float("inf"):
        raise Damaged("llm_int8_threshold has no sound value", where=WHERE, found=repr(found)[:80],
                      wanted="a number, 0 or more", remedy="use the config.json that was written with these weights")
    return float(found)


def _refuse_orphans(contents: Contents, taken: set[str]) -> None:
    """Raise Inconsistent for companions of a weight whose quant_state or codes are not there, and for bare codes."""
    for name, info in contents.tensors.items():
        if name in taken:
            continue
        if name.endswith(_COMPANIONS):
            raise Inconsistent("a tensor of a 4-bit weight without its quant_state", where=name, found=info.dtype,
                               wanted=f"{name.rpartition('.')[0]}.quant_state.bitsandbytes__nf4 or __fp4",
                               remedy=_AGAIN)
        if name.endswith(".SCB"):
            need(contents, f"{name.removesuffix('.SCB')}.weight", name.removesuffix(".SCB"))
        if name.endswith(".weight") and info.dtype == "U8":
            raise Inconsistent("codes without a quant_state", where=name, found=f"U8 {list(info.shape)}",
                               wanted=f"{name}.quant_state.bitsandbytes__nf4 or __fp4", remedy=_AGAIN)


def _kind(module: str) -> LayerKind:
    return "embedding" if module.rpartition(".")[2] in plain.EMBEDDINGS else "linear"


def _remarks(module: str, skipped: frozenset[str]) -> tuple[str, ...]:
    is_named = module in skipped or module.rpartition(".")[2] in skipped
    return ("the config calls it unquantized; its tensors decide",) if is_named else ()


# --- four bits -------------------------------------------------------------------------------------------------------

def _four_bit(
    contents: Contents, weight: str, quant_type: str, small: SmallTensors, skipped: frozenset[str],
    states: dict[tuple[str, str], QuantState],
) -> Layer:
    if quant_type not in ELEMENTS:
        raise Unsupported(f"the 4-bit type {quant_type[:40]}", where=weight, found=quant_type[:40],
                          wanted=" or ".join(ELEMENTS), remedy="quantize the model to nf4")
    if not weight.endswith(".weight"):
        raise Unsupported("a 4-bit parameter that is no module's weight", where=weight, found=weight,
                          wanted="MODULE.weight", remedy="save the experts one by one")
    module = weight.removesuffix(".weight")
    tensors = {"weight": weight, "quant_state": f"{weight}.quant_state.bitsandbytes__{quant_type}",
               "absmax": f"{weight}.absmax", "quant_map": f"{weight}.quant_map"}
    for name in tensors.values():
        need(contents, name, module)
    text = small.text(contents.tensors[tensors["quant_state"]])
    if (state := states.get((text, quant_type))) is None:
        state = states[text, quant_type] = read_state(text, quant_type, tensors["quant_state"])
    if state.nested_block is not None:
        tensors |= {role: f"{weight}.{role}" for role in ("nested_absmax", "nested_quant_map")}
    _check_four_bit(contents, tensors, state)
    is_cut_by_rows = state.shape[1] % state.block_size == 0
    level = ScaleLevel("float32", group(state.block_size), placement="grid" if is_cut_by_rows else "flat")
    scheme = Scheme(ELEMENTS[quant_type], (level,), round_to=state.round_to)
    remarks = _remarks(module, skipped)
    if state.nested_block is not None:
        remarks += ("block maxima are stored as 8-bit codes with maxima of their own",)
    return _layer(contents, module, state.shape, scheme, tensors, {"state": state}, remarks)


def _layer(
    contents: Contents, module: str, shape: tuple[int, int], scheme: Scheme, tensors: dict[str, str],
    storage: Mapping[str, object], remarks: tuple[str, ...],
) -> Layer:
    bias = contents.tensors.get(f"{module}.bias")
    if bias is not None:
        expect_shape(bias, (shape[0],))
        tensors["bias"] = bias.name
    return Layer(module, _kind(module), shape, scheme, tensors, storage, contents.bytes_of(*tensors.values()), remarks)


def read_state(text: str, quant_type: str, where: str) -> QuantState:
    """The checked JSON of a quant_state tensor called `where`. Raises Damaged, Unsupported, Inconsistent."""
    raw = parse_json(text.encode(), where)
    told = values.text(raw, "quant_type", where)
    if told != quant_type:
        raise Inconsistent("the name and the text of a quant_state disagree", where=where, found=str(told)[:40],
                           wanted=quant_type, remedy=_AGAIN)
    size = values.integer(raw, "blocksize", where, least=1)
    if size not in BLOCK_SIZES:
        raise Unsupported("a block size that bitsandbytes does not write", where=where, found=str(size),
                          wanted=", ".join(map(str, BLOCK_SIZES)), remedy=_AGAIN)
    dtype = values.text(raw, "dtype", where, allowed=tuple(ROUND_TO))
    if dtype is None:
        raise Damaged("dtype is missing", where=where, wanted=" or ".join(ROUND_TO), remedy=_AGAIN)
    nested = values.integer(raw, "nested_blocksize", where, least=1)
    return QuantState(_shape(raw.get("shape"), where), size, ROUND_TO[dtype], nested, _offset(raw, nested, where))


def _shape(found: object, where: str) -> tuple[int, int]:
    sizes = found if isinstance(found, list) else []
    if len(sizes) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**31 for v in sizes):
        raise Damaged("shape has no sound value", where=where, found=repr(found)[:80], wanted="[outputs, inputs]",
                      remedy=_AGAIN)
    return sizes[0], sizes[1]


def _offset(raw: JSON, nested_block: int | None, where: str) -> float:
    if nested_block is None:
        return 0.0
    values.text(raw, "nested_dtype", where, allowed=("float32",))
    found = raw.get("nested_offset")
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < 3e38:
        raise Damaged("nested_offset has no sound value", where=where, found=repr(found)[:80], wanted="a number",
                      remedy=_AGAIN)
    return float(found)


def _check_four_bit(contents: Contents, names: Mapping[str, str], state: QuantState) -> None:
    info = {role: need(contents, name, names["weight"]) for role, name in names.items()}
    wanted = -(-state.shape[0] * state.shape[1] // 2)
    expect_dtype(info["weight"], *_STORAGE)
    if info["weight"].nbytes != wanted:
        raise Inconsistent("packed bytes do not fit the shape", where=names["weight"],
                           found=f"{info['weight'].nbytes:,} bytes", wanted=f"{wanted:,} for {list(state.shape)}",
                           remedy=_AGAIN)
    expect_dtype(info["quant_map"], "F32")
    expect_shape(info["quant_map"], (16,))
    is_nested = state.nested_block is not None
    if is_nested != (f"{names['weight']}.nested_absmax" in contents.tensors):
        raise Inconsistent("quant_state and tensors disagree about nested maxima", where=names["weight"],
                           found="nested_blocksize " + ("given" if is_nested else "absent"),
                           wanted="nested_blocksize exactly where nested_absmax is stored", remedy=_AGAIN)
    expect_dtype(info["absmax"], "U8" if is_nested else "F32")
    expect_shape(info["absmax"], (state.blocks,), (state.blocks, 1))
    if state.nested_block is not None:
        expect_dtype(info["nested_absmax"], "F32")
        expect_shape(info["nested_absmax"], (-(-state.blocks // state.nested_block),))
        expect_dtype(info["nested_quant_map"], "F32")
        expect_shape(info["nested_quant_map"], (256,))


# --- eight bits ------------------------------------------------------------------------------------------------------

def _eight_bit(
    contents: Contents, module: str, threshold: float, small: SmallTensors, skipped: frozenset[str]
) -> Layer:
    weight, maxima = contents.tensors[f"{module}.weight"], need(contents, f"{module}.SCB", module)
    if len(weight.shape) != 2:
        raise Unsupported("int8 codes that are no matrix", where=weight.name, found=str(list(weight.shape)),
                          wanted="[outputs, inputs]", remedy="save the experts one by one")
    rows, columns = weight.shape
    expect_dtype(maxima, "F32")
    expect_shape(maxima, (rows,))
    tensors = {"weight": weight.name, "row_maxima": maxima.name}
    order = contents.tensors.get(f"{module}.weight_format")
    if order is not None:
        tensors["weight_format"] = order.name
        found = small.numbers(order)
        if found != [0]:
            raise Unsupported("int8 codes in a tiled order", where=order.name, found=str(found[:4]),
                              wanted="0, row by row", remedy="save the model with bitsandbytes 0.45 or later")
    kind = _kind(module)
    activation = None if kind == "embedding" else ActivationSpec("int8", True, "token", "llm_int8", bound=threshold)
    levels = (ScaleLevel("float32", CHANNEL), ScaleLevel("float32", TENSOR))
    scheme = Scheme("int8", levels, "code_first", activation=activation)
    return _layer(contents, module, (rows, columns), scheme, tensors, {}, _remarks(module, skipped))


# --- tensors ---------------------------------------------------------------------------------------------------------

def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical weight; nibbles stay packed where a row ends with a byte.

    Raises Damaged for maxima that are not finite or negative, and for another code table than the format's.
    """
    import torch

    from anybit.checkpoints.dialects._shared import stored
    from anybit.weights import QuantizedWeight

    if not layer.scheme.is_quantized:
        return plain.canonicalize(layer, tensors)
    rows, columns = layer.shape
    state = layer.storage.get("state")
    if not isinstance(state, QuantState):
        maxima = stored.scales(tensors["row_maxima"], "float32", layer.tensors["row_maxima"]).reshape(rows, 1)
        return QuantizedWeight(layer.scheme, layer.shape, tensors["weight"], (maxima, torch.full((1, 1), ONE_127TH)),
                               bias=tensors.get("bias"))
    _refuse_other_table(layer, tensors["quant_map"])
    maxima = _block_maxima(layer, state, tensors)
    if layer.scheme.scales[0].placement == "grid":
        maxima = maxima.reshape(rows, columns // state.block_size)
    return QuantizedWeight(layer.scheme, layer.shape, _codes(tensors["weight"], rows, columns), (maxima,),
                           bias=tensors.get("bias"))


def _codes(weight: Tensor, rows: int, columns: int) -> Tensor | PackedCodes:
    """Bytes with the first code in the high nibble, under whatever dtype, as codes [rows, columns]."""
    import torch

    from anybit.numerics.packing import PackedCodes

    packed = weight.contiguous().flatten().view(torch.uint8)
    if columns % 2 == 0:
        return PackedCodes((packed << 4 | packed >> 4).view(rows, columns // 2), 4, columns)
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: rows * columns].view(rows, columns)


def _block_maxima(layer: Layer, state: QuantState, tensors: Mapping[str, Tensor]) -> Tensor:
    """Maxima of the blocks, float32 [blocks]; nested ones are decoded with a rounding after each step."""
    import torch

    from anybit.checkpoints.checks import refuse_bad_scales

    absmax = tensors["absmax"].flatten()
    if state.nested_block is not None:
        above = tensors["nested_absmax"].repeat_interleave(state.nested_block)[: state.blocks]
        absmax = tensors["nested_quant_map"][absmax.long()] * above
        absmax = absmax + torch.tensor(state.offset, dtype=torch.float32)
    # a decoded maximum of a block of zeros may fall below 0
    refuse_bad_scales(absmax, layer.tensors["absmax"], allow_zero=True, allow_negative=state.nested_block is not None)
    return absmax


def _refuse_other_table(layer: Layer, quant_map: Tensor) -> None:
    import torch

    from anybit.numerics.formats import number_format

    if not torch.equal(quant_map, torch.tensor(number_format(layer.scheme.element).values)):
        raise Damaged("another code table than the format's", where=layer.tensors["quant_map"],
                      found=str([round(v, 4) for v in quant_map.tolist()[:4]]), wanted=layer.scheme.element,
                      remedy=_AGAIN)
