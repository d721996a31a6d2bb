"""fp8 and mxfp8: e4m3 weights with one scale a tensor, or one a block; AutoFP8, DeepSeek, transformers, MiniMax.

Stored per module: weight F8_E4M3 [N, K] and a scale that multiplies, under one of four names: one float, or the ceil
grid of `weight_block_size` in a float or as e8m0 bytes; `input_scale` or `activation_scale` where activations are
static. transformers 5 writes the scales of a layer's experts fused. The tensors decide which modules are quantized.
Rules, worked examples and sources with versions: docs/formats/fp8.md. AutoRound and FBGEMM share `float8_layer`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need, need_all
from anybit.checkpoints.contents import FLOAT_DTYPES, JSON, Contents, TensorInfo
from anybit.checkpoints.dialects._shared import config_values as values
from anybit.checkpoints.dialects._shared.kv_scales import demand_scales, kv_scales
from anybit.checkpoints.dialects.plain import EMBEDDINGS, dense_layers
from anybit.checkpoints.dialects.plain import canonicalize as canonicalize_dense
from anybit.errors import Damaged, Inconsistent, Unsupported
from anybit.schemes import TENSOR, ActivationSpec, Block, KVCacheSpec, Layer, LayerKind, ScaleLevel, Scheme, group

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, QuantizedWeight

NAME: Final = "fp8"

METHODS: Final = ("fp8", "mxfp8", "deepseek_v4_fp8")
WHERE: Final = "config.json: quantization_config"
E4M3: Final = "fp8_e4m3fn"

_FP8: Final = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_E8M0: Final = ("F8_E8M0", "U8")
_SCALES: Final = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")  # all multiply, "inv" too
_STATIC: Final = ("input_scale", "activation_scale", "qscale_act")
_IGNORED: Final = ("ignored_layers", "modules_to_not_convert")
_EXPERT: Final = re.compile(r"(.+\.experts)\.(\d{1,6})\.(gate_proj|up_proj|down_proj)")
_WRONG_CONFIG: Final = "use the config.json that was written with these weights"


@dataclass(frozen=True)
class Config:
    """What the quantization config says, checked.

    block       (rows, cols) that share a scale, None where a scale serves a tensor
    is_static   activation scales are in the file
    is_ue8m0    scales, those of activations too, are powers of two
    ignored     names that the config calls unquantized; the tensors decide
    """

    block: Block | None
    is_static: bool
    is_ue8m0: bool
    ignored: frozenset[str] = frozenset()

    def activation(self, scale_dtype: str) -> ActivationSpec:
        """The activation arithmetic of docs/formats/fp8.md §7 for a module whose scales are stored so."""
        if self.block is None:
            if self.is_static:
                return ActivationSpec(E4M3, False, "tensor", "fp8_static")
            return ActivationSpec(E4M3, True, "token", "fp8_token")
        columns = self.block[1]
        is_ue8m0 = self.is_ue8m0 or scale_dtype in _E8M0
        recipe = "mxfp8_log2" if self.block == (1, 32) else "fp8_group_ue8m0" if is_ue8m0 else "fp8_group_divide"
        return ActivationSpec(E4M3, True, "group", recipe, group_size=columns)


def recognizes(contents: Contents) -> bool:
    """True if the configuration names one of `METHODS`."""
    return contents.quant_method in METHODS


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from headers and configuration.

    Raises Unsupported or Damaged for what docs/formats/fp8.md §10 refuses, Inconsistent for scales that fit no grid.
    """
    config = read_config(contents.quantization)
    _refuse_without_scales(contents)
    layers = {}
    for name, info in contents.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and info.dtype in _FP8:
            layers[module] = _module(contents, module, config)
        elif leaf == "weight" and info.dtype == "I8" and (scale := _scale_of(contents, module)) is not None:
            layers[module] = _fp4_expert(contents, module, scale)
        elif info.dtype in _FP8 and len(info.shape) > 1:
            raise Unsupported("fp8 codes outside a module's weight", where=name,
                              found=f"{info.dtype} {list(info.shape)}", wanted="MODULE.weight with a scale beside it",
                              remedy="save the experts one by one, as every known exporter does")
    taken = {tensor for layer in layers.values() for tensor in layer.tensors.values()}
    return layers | {name: _with_stray_scale(contents, layer) for name, layer in dense_layers(contents, taken).items()}


def _with_stray_scale(contents: Contents, layer: Layer) -> Layer:
    """Claim the scale that transformers leaves, uninitialised, beside a weight that it could not cut into blocks."""
    stray = f"{layer.name}.{_SCALES[0]}"
    if stray not in contents.tensors:
        return layer
    notes = ("an unused scale lies beside this unquantized weight",)
    return replace(layer, tensors={**layer.tensors, "unused_scale": stray}, notes=(*layer.notes, *notes))


def read_config(raw: JSON) -> Config:
    """The checked config; raises Damaged for unsound values, Unsupported for combinations that nobody writes."""
    scheme = values.text(raw, "activation_scheme", WHERE, allowed=("static", "dynamic")) or "dynamic"
    form = values.text(raw, "fmt", WHERE)
    if form not in (None, "e4m3", "float8_e4m3fn"):
        raise Unsupported(f"fp8 weights in the format {form}", where=WHERE, found=f"fmt {form}", wanted="e4m3",
                          remedy="quantize the model in e4m3")
    block = read_block(raw.get("weight_block_size"))
    if block is None and raw.get("quant_method") == "mxfp8":
        block = (1, 32)  # what the name means
    if block is not None and scheme == "static":
        raise Unsupported("block scales with static activations", where=WHERE,
                          found=f"weight_block_size {list(block)}, activation_scheme static",
                          wanted="activation_scheme dynamic", remedy=_WRONG_CONFIG)
    ignored = {name for key in _IGNORED for name in values.strings(raw, key, WHERE)}
    return Config(block, scheme == "static", values.text(raw, "scale_fmt", WHERE) == "ue8m0", frozenset(ignored))


def read_block(value: object) -> Block | None:
    """`weight_block_size`: two positive numbers, rows first; None where it is absent or null."""
    if value is None:
        return None
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**31 for v in sizes):
        raise Damaged("weight_block_size has no sound value", where=WHERE, found=repr(value)[:80],
                      wanted="two positive integers, rows first", remedy=_WRONG_CONFIG)
    return sizes[0], sizes[1]


def kv_cache(contents: Contents) -> KVCacheSpec | None:
    """AutoFP8's cache: declared by `kv_cache_scheme` or by scales beside the attention; a missing scale is 1.0."""
    declared = contents.quantization.get("kv_cache_scheme")
    scales = kv_scales(contents, output_scales=True)
    if not scales and not declared:
        return None
    return demand_scales(contents, KVCacheSpec(E4M3, scales, dynamic=declared == "dynamic" and not scales))


# --- one module from its headers -----------------------------------------------------------------------------------

def _scale_of(contents: Contents, module: str) -> TensorInfo | None:
    return next((contents.tensors[n] for leaf in _SCALES if (n := f"{module}.{leaf}") in contents.tensors), None)


def _refuse_without_scales(contents: Contents) -> None:
    modules = (name.removesuffix(".weight") for name, info in contents.tensors.items()
               if name.endswith(".weight") and info.dtype in _FP8)
    need_all(contents, (f"{module}.{_SCALES[0]}" for module in modules
                        if _scale_of(contents, module) is None and _fused_scale(contents, module) is None))


def _module(contents: Contents, module: str, config: Config) -> Layer:
    scale = _scale_of(contents, module)
    if scale is None and (fused := _fused_scale(contents, module)) is not None:
        return _expert_with_fused_scale(contents, module, fused, config)
    if scale is None:
        scale = need(contents, f"{module}.{_SCALES[0]}", module)
    activation = None if module.rpartition(".")[2] in EMBEDDINGS else config.activation(scale.dtype)
    notes = ("the configuration calls it unquantized; its tensors decide",) if module in config.ignored else ()
    return float8_layer(contents, module, scale, _block_of(scale, config), activation, notes)


def _block_of(scale: TensorInfo, config: Config) -> Block:
    """The whole tensor for a scale of one element that is no grid, else the configured block."""
    return TENSOR if config.block is None or len(scale.shape) < 2 else config.block


def float8_layer(
    contents: Contents, module: str, scale: TensorInfo, block: Block, activation: ActivationSpec | None,
    notes: tuple[str, ...] = (), *, is_flat: bool = False,
) -> Layer:
    """The layer of an e4m3 weight [N, K] whose `scale` multiplies blocks; shapes and dtypes checked.

    Raises Inconsistent for a scale that is not the ceil grid of `block` (one element for TENSOR, [N] or [N, 1] for
    CHANNEL; with `is_flat` also the grid's rows one after another), Damaged for dtypes that no writer means.
    """
    weight = need(contents, f"{module}.weight", module)
    expect_dtype(weight, "F8_E4M3")
    rows, columns = _matrix(weight)
    expect_dtype(scale, *FLOAT_DTYPES, *_E8M0)
    flat = ((math.prod(scale_grid((rows, columns), block)),),) if is_flat else ()
    expect_shape(scale, *_scale_shapes((rows, columns), block), *flat)
    names = {"weight": weight.name, "scale": scale.name}
    names |= _bias(contents, module, rows)
    if activation is not None and not activation.dynamic:
        names["input_scale"] = _static_scale(contents, module)
    scheme = Scheme(E4M3, (ScaleLevel(_scale_format(scale), block),), activation=activation)
    kind: LayerKind = "embedding" if module.rpartition(".")[2] in EMBEDDINGS else "linear"
    return Layer(module, kind, (rows, columns), scheme, names, {}, contents.bytes_of(*names.values()), notes)


def _matrix(info: TensorInfo) -> tuple[int, int]:
    if len(info.shape) != 2 or 0 in info.shape:
        raise Unsupported("codes that are no matrix", where=info.name, found=str(list(info.shape)), wanted="[N, K]",
                          remedy="save the experts one by one, as every known exporter does")
    return info.shape[0], info.shape[1]


def _scale_format(scale: TensorInfo) -> str:
    return FLOAT_DTYPES.get(scale.dtype, "e8m0")


def scale_grid(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """(blocks of rows, blocks of columns), the last ones may be short."""
    rows, columns = (1 if size == 0 else -(-extent // size) for extent, size in zip(shape, block, strict=True))
    return rows, columns


def _scale_shapes(shape: tuple[int, int], block: Block) -> tuple[tuple[int, ...], ...]:
    grid = scale_grid(shape, block)
    if block == TENSOR:
        return (), (1,), (1, 1)
    return (grid, (shape[0],)) if block == (1, 0) else (grid,)


def _bias(contents: Contents, module: str, rows: int) -> dict[str, str]:
    bias = contents.tensors.get(f"{module}.bias")
    if bias is None:
        return {}
    expect_dtype(bias, *FLOAT_DTYPES)
    expect_shape(bias, (rows,))
    return {"bias": bias.name}


def _static_scale(contents: Contents, module: str) -> str:
    found = next((f"{module}.{leaf}" for leaf in _STATIC if f"{module}.{leaf}" in contents.tensors), None)
    scale = need(contents, found or f"{module}.{_STATIC[0]}", module)
    expect_dtype(scale, *FLOAT_DTYPES)
    expect_shape(scale, (), (1,), (1, 1))
    return scale.name


# --- experts: fused scales, fp4 ------------------------------------------------------------------------------------

def _fused_scale(contents: Contents, module: str) -> TensorInfo | None:
    """Scales as transformers 5 saves them: one tensor for gate and up of all experts, beside a weight an expert."""
    found = _EXPERT.fullmatch(module)
    if found is None:
        return None
    part = "down_proj" if found[3] == "down_proj" else "gate_up_proj"
    return contents.tensors.get(f"{found[1]}.{part}_scale_inv")


def _expert_with_fused_scale(contents: Contents, module: str, scale: TensorInfo, config: Config) -> Layer:
    """An expert's matrix whose scales are rows of a grid over [gate; up] (docs/formats/fp8.md §3, kind G)."""
    found = _EXPERT.fullmatch(module)
    assert found is not None
    weight = contents.tensors[f"{module}.weight"]
    expect_dtype(weight, "F8_E4M3")
    expect_dtype(scale, *FLOAT_DTYPES, *_E8M0)
    rows, columns = _matrix(weight)
    parts = 1 if found[3] == "down_proj" else 2
    block = config.block or TENSOR
    down, across = (parts, 1) if block == TENSOR else scale_grid((parts * rows, columns), block)
    expert = int(found[2])
    if len(scale.shape) != 3 or expert >= scale.shape[0] or scale.shape[1:] != (down, across):
        raise Inconsistent("fused scales fit no grid of this expert", where=scale.name, found=str(list(scale.shape)),
                           wanted=f"[more than {expert}, {down}, {across}]", remedy=_WRONG_CONFIG)
    first = rows if found[3] == "up_proj" else 0  # up stands below gate
    is_split = block != TENSOR and first % block[0] != 0
    if is_split:  # a row of scales covers the end of gate and the start of up: a scale for each row instead
        block = (1, block[1])
    names = {"weight": weight.name, "scale": scale.name, **_bias(contents, module, rows)}
    if config.is_static:
        names["input_scale"] = _static_scale(contents, module)
    storage = {"expert": expert, "first_row": first, "block_rows": 0 if config.block is None else config.block[0]}
    scheme = Scheme(E4M3, (ScaleLevel(_scale_format(scale), block),), activation=config.activation(scale.dtype))
    own = scale.nbytes // (scale.shape[0] * parts)
    stored = contents.bytes_of(*names.values()) - scale.nbytes + own
    return Layer(module, "linear", (rows, columns), scheme, names, storage, stored)


def _fp4_expert(contents: Contents, module: str, scale: TensorInfo) -> Layer:
    """DeepSeek-V4's experts: two e2m1 codes an int8, low nibble first, e8m0 scales of 32."""
    weight = contents.tensors[f"{module}.weight"]
    rows, row_bytes = _matrix(weight)
    expect_dtype(scale, *_E8M0)
    expect_shape(scale, (rows, -(-row_bytes // 16)))
    names = {"weight": weight.name, "scale": scale.name, **_bias(contents, module, rows)}
    scheme = Scheme("fp4_e2m1", (ScaleLevel("e8m0", group(32)),))
    notes = ("activation arithmetic of fp4 experts is the host's choice: weight-only",)
    return Layer(module, "linear", (rows, 2 * row_bytes), scheme, names, {}, contents.bytes_of(*names.values()), notes)


# --- tensors to the canonical form ---------------------------------------------------------------------------------

def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical weight; raises Damaged for NaN codes and for NaN, Inf or negative scales."""
    if not layer.scheme.is_quantized:
        return canonicalize_dense(layer, tensors)
    import torch

    from anybit.checkpoints.dialects._shared import stored
    from anybit.numerics.packing import PackedCodes
    from anybit.weights import QuantizedWeight

    codes: Tensor | PackedCodes
    if layer.scheme.element == "fp4_e2m1":
        codes = PackedCodes(tensors["weight"].view(torch.uint8), 4, layer.shape[-1])
    else:
        codes = stored.fp8_codes(tensors["weight"], layer.tensors["weight"])
    level = layer.scheme.scales[0]
    scale = stored.scales(_own_scales(layer, tensors["scale"]), level.format, layer.tensors["scale"])
    activation = {}
    if "input_scale" in tensors:
        activation["scale"] = stored.one_value(tensors["input_scale"], layer.tensors["input_scale"])
    return QuantizedWeight(layer.scheme, layer.shape, codes, (scale,), activation=activation, bias=tensors.get("bias"))


def _own_scales(layer: Layer, scale: Tensor) -> Tensor:
    """The grid of this weight: a fused tensor's rows, or the stored tensor as a matrix."""
    import torch

    level = layer.scheme.scales[0]
    rows, columns = layer.shape
    expert = layer.storage.get("expert")
    if expert is None:
        return scale.reshape(scale_grid((rows, columns), level.block))
    first, size = layer.storage["first_row"], layer.storage["block_rows"]
    assert isinstance(expert, int) and isinstance(first, int) and isinstance(size, int)
    own = scale[expert]
    if size == 0:  # a scale for gate, one for up
        return own[min(first, 1) :][:1]
    if level.block[0] != size:  # one row of scales covers parts of two matrices
        return own.index_select(0, (first + torch.arange(rows)) // size)
    return own[first // size :][: math.ceil(rows / size)].contiguous()
