"""torchao's safetensors: tensor subclasses taken apart, each with its class and attributes in the header.

The config says how the model was quantized; the header says what is in the file, and alone decides. Classes:
Int8Tensor, IntxUnpackedToInt8Tensor, Int4Tensor, Int4TilePackedTo4dTensor, Float8Tensor, MXTensor, NVFP4Tensor. The
header is read by `_shared/torchao_header.py`, activation arguments by `_shared/torchao_activations.py`, tiles and
swizzled scales by `_shared/torchao_tensors.py`. Rules, sources with versions and traps: docs/formats/torchao.md.
torchao's own rounding of a dequantized weight to its `dtype` is not part of the format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from anybit.checkpoints.checks import expect_dtype, expect_shape
from anybit.checkpoints.contents import FLOAT_DTYPES, Contents, TensorInfo
from anybit.checkpoints.dialects import plain
from anybit.checkpoints.dialects._shared import torchao_activations as activations
from anybit.checkpoints.dialects._shared.torchao_header import (
    HEADER,
    Parameter,
    has_parameters,
    parameters,
    with_current_names,
)
from anybit.errors import Damaged, Inconsistent, Unsupported
from anybit.schemes import CHANNEL, TENSOR, Block, Layer, LayerKind, Offset, ScaleLevel, Scheme, group

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, PackedCodes, QuantizedWeight

NAME: Final = "torchao"

_AGAIN: Final = "the file is damaged: download it again, or quantize the model anew"
_MX_ELEMENTS: Final = {
    "float8_e4m3fn": "fp8_e4m3fn", "float8_e5m2": "fp8_e5m2", "float4_e2m1fn_x2": "fp4_e2m1", "fp4_e2m1": "fp4_e2m1",
}
_FP8_ELEMENTS: Final = {"F8_E4M3": "fp8_e4m3fn", "F8_E5M2": "fp8_e5m2"}
_INTS: Final = tuple(f"int{bits}" for bits in range(1, 9))


def recognizes(contents: Contents) -> bool:
    """True if the configuration names torchao."""
    return "torchao" in contents.quant_method


def with_known_names(contents: Contents) -> Contents:
    """The contents with the names that `declare` reads, whatever version of torchao gave them."""
    return with_current_names(contents)


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from the headers alone.

    Raises Unsupported for what docs/formats/torchao.md §6 refuses, Inconsistent or Damaged where header and tensors
    contradict each other.
    """
    if not has_parameters(contents):
        raise Unsupported("plain weights that torchao would quantize while loading", where="config.json",
                          found=f"quant_method {contents.quant_method}, no classes in {HEADER}",
                          wanted="a checkpoint saved after quantizing",
                          remedy="remove quantization_config to use the weights as they are")
    layers = {}
    for parameter in parameters(contents):
        layer = _with_bias(contents, _CLASSES[parameter.kind](parameter))
        layers[layer.name] = layer
    taken = {tensor for layer in layers.values() for tensor in layer.tensors.values()}
    return layers | plain.dense_layers(contents, taken)


# --- classes, from their headers -------------------------------------------------------------------------------------

def _layer(parameter: Parameter, shape: tuple[int, ...], scheme: Scheme, **storage: object) -> Layer:
    """The layer of checked pieces. A parameter that is no module's weight keeps its own name."""
    name = parameter.name.removesuffix(".weight")
    kind: LayerKind = "experts" if len(shape) == 3 else "linear"
    if len(shape) == 2 and name.rpartition(".")[2] in plain.EMBEDDINGS:
        kind, scheme = "embedding", replace(scheme, activation=None)
    tensors = {piece: info.name for piece, info in parameter.pieces.items()}
    pre_scale = parameter.pieces.get("act_pre_scale")
    if pre_scale is not None:
        if pre_scale.elements != shape[-1]:
            raise _unfit(pre_scale, [shape[-1]])
        scheme = replace(scheme, pre_scale=True)
    size = sum(info.nbytes for info in parameter.pieces.values())
    return Layer(name, kind, shape, scheme, tensors, {"class": parameter.kind, **storage}, size)


def _with_bias(contents: Contents, layer: Layer) -> Layer:
    bias = contents.tensors.get(f"{layer.name}.bias" if layer.kind != "experts" else f"{layer.name}_bias")
    if bias is None:
        return layer
    expect_shape(bias, (*layer.shape[:-2], layer.shape[-2]))
    return replace(layer, tensors={**layer.tensors, "bias": bias.name}, stored_bytes=layer.stored_bytes + bias.nbytes)


def _int8(parameter: Parameter) -> Layer:
    """Codes one a byte with a scale a block, of int8 or of any narrower integer (Int8Tensor, IntxUnpackedToInt8)."""
    codes, scale = parameter.pieces["qdata"], parameter.pieces["scale"]
    expect_dtype(codes, "I8")
    shape = _weight_shape(codes)
    is_narrow = parameter.kind == "IntxUnpackedToInt8Tensor"
    element = _word(parameter, "target_dtype", _INTS) if is_narrow else "int8"
    sizes, block = _blocks(parameter, shape)
    _expect_grid(scale, shape, sizes)
    offset = None
    zero = parameter.pieces.get("zero_point")
    if zero is not None:
        _expect_grid(zero, shape, sizes)
        expect_dtype(zero, "I8", *FLOAT_DTYPES)
        # zeros are stored for symmetric weights too: int8 ones count when they are read
        offset = Offset("zero_point", FLOAT_DTYPES[zero.dtype], block) if zero.dtype in FLOAT_DTYPES else None
    static = _static_scale(parameter, "act_quant_scale")
    activation = activations.intx(parameter) if is_narrow else activations.int8(parameter, is_static=static)
    scheme = Scheme(element, (_float_level(scale, block),), offset=offset, activation=activation)
    return _layer(parameter, shape, scheme)


def _int4(parameter: Parameter) -> Layer:
    """Two signed codes a byte; scales and float zero points transposed, [K/g, N]."""
    codes = parameter.pieces["qdata"]
    expect_dtype(codes, "I8", "U8")
    stored = _weight_shape(codes)
    shape = (*stored[:-1], stored[-1] * 2)
    told = parameter.data.get("shape")
    if isinstance(told, list) and tuple(told) != shape:
        raise _unfit(codes, told)
    sizes, block = _blocks(parameter, shape)
    _demand_group(parameter, sizes)
    grid = _grid(shape, sizes)
    scale, zero = parameter.pieces["scale"], parameter.pieces["zero_point"]
    for info in (scale, zero):
        expect_shape(info, (*grid[:-2], grid[-1], grid[-2]))
    scheme = Scheme("int4", (_float_level(scale, block),), offset=_minimum(zero, block),
                    activation=activations.int4(parameter))
    return _layer(parameter, shape, scheme)


def _int4_tiles(parameter: Parameter) -> Layer:
    """Tensor-core tiles of unsigned codes around 8, padded; scales and float zero points side by side."""
    told = parameter.data.get("shape")
    if not isinstance(told, list) or len(told) != 2 or not all(type(v) is int and 0 < v < 2**31 for v in told):
        raise Damaged("shape has no sound value", where=parameter.where, found=repr(told)[:80],
                      wanted="[outputs, inputs]", remedy=_AGAIN)
    shape = (told[0], told[1])
    sizes, block = _blocks(parameter, shape)
    _demand_group(parameter, sizes)
    rows, columns = -(-shape[0] // 8) * 8, -(-shape[1] // 1024) * 1024
    codes, scales = parameter.pieces["qdata"], parameter.pieces["scale_and_zero"]
    expect_dtype(codes, "I32")
    expect_shape(codes, (rows // 8, columns // 128, 32, 4))
    expect_shape(scales, (columns // sizes[-1], rows, 2))
    # in the padded weight a group may run over the end of a row; cut, it is a short block like any other
    scheme = Scheme("int4", (_float_level(scales, block),), offset=_minimum(scales, block))
    return _layer(parameter, shape, scheme)


def _float8(parameter: Parameter) -> Layer:
    codes, scale = parameter.pieces["qdata"], parameter.pieces["scale"]
    expect_dtype(codes, *_FP8_ELEMENTS)
    shape = _weight_shape(codes)
    sizes, block = _blocks(parameter, shape)
    _expect_grid(scale, shape, sizes)
    scheme = Scheme(_FP8_ELEMENTS[codes.dtype], (_float_level(scale, block),),
                    activation=activations.float8(parameter))
    return _layer(parameter, shape, scheme, lower_bound=activations.float8_lower_bound(parameter))


def _mx(parameter: Parameter) -> Layer:
    element = _MX_ELEMENTS[_word(parameter, "elem_dtype", tuple(_MX_ELEMENTS))]
    codes = parameter.pieces["qdata"]
    expect_dtype(codes, *(("U8",) if element == "fp4_e2m1" else ("F8_E4M3", "F8_E5M2", "U8")))
    if codes.dtype in _FP8_ELEMENTS and _FP8_ELEMENTS[codes.dtype] != element:
        raise Inconsistent("header and tensor disagree about the element", where=codes.name, found=codes.dtype,
                           wanted=element, remedy=_AGAIN)
    stored = _weight_shape(codes)
    shape = (*stored[:-1], stored[-1] * (2 if element == "fp4_e2m1" else 1))
    size = _block_size(parameter, 32)
    expect_dtype(parameter.pieces["scale"], "F8_E8M0", "U8")
    is_swizzled = _swizzled(parameter, shape, size)
    scheme = Scheme(element, (ScaleLevel("e8m0", group(size)),), activation=activations.mx(parameter, element, size))
    return _layer(parameter, shape, scheme, swizzled=is_swizzled)


def _nvfp4(parameter: Parameter) -> Layer:
    codes = parameter.pieces["qdata"]
    expect_dtype(codes, "U8")
    stored = _weight_shape(codes)
    shape = (*stored[:-1], stored[-1] * 2)
    size = _block_size(parameter, 16)
    expect_dtype(parameter.pieces["scale"], "F8_E4M3")
    is_swizzled = _swizzled(parameter, shape, size)
    levels = [ScaleLevel("fp8_e4m3fn", group(size))]
    above = parameter.pieces.get("per_tensor_scale")
    if above is not None:
        expect_dtype(above, "F32")
        if above.elements not in (1, math.prod(shape[:-2])):
            raise _unfit(above, [math.prod(shape[:-2]), 1, 1])
        levels.append(ScaleLevel("float32", TENSOR))
    activation = activations.nvfp4(parameter, size, is_static=_static_scale(parameter, "act_per_tensor_scale"))
    return _layer(parameter, shape, Scheme("fp4_e2m1", tuple(levels), activation=activation), swizzled=is_swizzled)


_CLASSES: Final[Mapping[str, Callable[[Parameter], Layer]]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _int8,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4_tiles,
    "Float8Tensor": _float8,
    "MXTensor": _mx,
    "NVFP4Tensor": _nvfp4,
}


# --- shapes and attributes -------------------------------------------------------------------------------------------

def _unfit(info: TensorInfo, wanted: Any) -> Inconsistent:
    return Inconsistent("stored shapes contradict the header", where=info.name, found=str(list(info.shape)),
                        wanted=str(wanted)[:80], remedy=_AGAIN)


def _weight_shape(codes: TensorInfo) -> tuple[int, ...]:
    if len(codes.shape) not in (2, 3):
        raise _unfit(codes, "[N, K], or [E, N, K] for experts")
    return codes.shape


def _blocks(parameter: Parameter, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Block]:
    """`block_size`, checked against the shape, and the block of rows and columns that it means."""
    found = parameter.data.get("block_size")
    sizes = found if isinstance(found, list) else []
    if len(sizes) != len(shape) or not all(type(v) is int and v > 0 for v in sizes) or any(v != 1 for v in sizes[:-2]):
        raise Damaged("block_size has no sound value", where=parameter.where, found=repr(found)[:80],
                      wanted=f"{len(shape)} positive integers", remedy=_AGAIN)
    rows, columns = sizes[-2:]
    if (rows, columns) == shape[-2:]:
        return tuple(sizes), CHANNEL if rows == 1 else TENSOR
    return tuple(sizes), CHANNEL if (rows, columns) == (1, shape[-1]) else (rows, columns)


def _grid(shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // block) for size, block in zip(shape, sizes, strict=True))


def _expect_grid(info: TensorInfo, shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Raise Inconsistent unless a tensor has one value a block; a single one may lack its dimensions."""
    grid = _grid(shape, sizes)
    expect_shape(info, grid, *(((), (1,)) if math.prod(grid) == 1 else ()))


def _demand_group(parameter: Parameter, sizes: tuple[int, ...]) -> None:
    if any(size != 1 for size in sizes[:-1]):
        raise Unsupported("4-bit blocks over several rows", where=parameter.where, found=str(list(sizes)),
                          wanted="[1, group size]", remedy=_AGAIN)


def _block_size(parameter: Parameter, usual: int) -> int:
    found = parameter.data.get("block_size")
    if found != usual:
        raise Unsupported("a block size of another format", where=parameter.where, found=repr(found)[:80],
                          wanted=str(usual), remedy="quantize the model anew")
    return usual


def _word(parameter: Parameter, key: str, allowed: tuple[str, ...]) -> str:
    found = parameter.data.get(key)
    if not isinstance(found, str) or found.removeprefix("torch.") not in allowed:
        raise Unsupported(f"{key} is none that is read here", where=parameter.where, found=repr(found)[:80],
                          wanted=", ".join(allowed), remedy="quantize the model anew")
    return found.removeprefix("torch.")


def _swizzled(parameter: Parameter, shape: tuple[int, ...], size: int) -> bool:
    """`is_swizzled_scales`, with the scales' count checked against it."""
    found, scale = parameter.data.get("is_swizzled_scales", False), parameter.pieces["scale"]
    if not isinstance(found, bool):
        raise Damaged("is_swizzled_scales has no sound value", where=parameter.where, found=repr(found)[:80],
                      wanted="true or false", remedy=_AGAIN)
    if shape[-1] % size:
        raise _unfit(parameter.pieces["qdata"], f"a multiple of {size} inputs")
    rows, columns = math.prod(shape[:-1]), shape[-1] // size
    if not found:
        expect_shape(scale, (*shape[:-1], columns))
    elif scale.elements != -(-rows // 128) * 128 * -(-columns // 4) * 4:
        raise _unfit(scale, f"{-(-rows // 128)} x {-(-columns // 4)} tiles of 512 scales")
    return found


def _static_scale(parameter: Parameter, piece: str) -> bool:
    """True if a scale of the activations is stored; it is one number."""
    info = parameter.pieces.get(piece)
    if info is not None and info.elements != 1:
        raise Unsupported("static activation scales for single tokens", where=info.name, found=str(list(info.shape)),
                          wanted="one number", remedy="quantize the model anew with PerTensor activations")
    return info is not None


def _float_level(info: TensorInfo, block: Block) -> ScaleLevel:
    expect_dtype(info, *FLOAT_DTYPES)
    return ScaleLevel(FLOAT_DTYPES[info.dtype], block)


def _minimum(info: TensorInfo, block: Block) -> Offset:
    """torchao's float zero point: added after scaling."""
    expect_dtype(info, *FLOAT_DTYPES)
    return Offset("minimum", FLOAT_DTYPES[info.dtype], block)


# --- tensors ---------------------------------------------------------------------------------------------------------

def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical weight. Int8 zero points that are all 0 leave the weight symmetric.

    Raises Damaged for codes or scales that no writer means.
    """
    from anybit.weights import QuantizedWeight

    if not layer.scheme.is_quantized:
        return plain.canonicalize(layer, tensors)
    scheme, offset = _offset(layer, tensors)
    return QuantizedWeight(
        scheme=scheme,
        shape=layer.shape,
        stored_codes=_codes(layer, tensors["qdata"]),
        scales=_scales(layer, tensors),
        offset=offset,
        pre_scale=_pre_scale(layer, tensors),
        activation=_activation(layer, tensors),
        bias=tensors.get("bias"),
    )


def _codes(layer: Layer, stored_codes: Tensor) -> Tensor | PackedCodes:
    import torch

    from anybit.checkpoints.dialects._shared import stored
    from anybit.checkpoints.dialects._shared.torchao_tensors import untile
    from anybit.numerics.packing import PackedCodes

    where, element = layer.tensors["qdata"], layer.scheme.element
    if layer.storage["class"] == "Int4TilePackedTo4dTensor":
        rows, columns = layer.shape
        return untile(stored_codes)[:rows, :columns].contiguous().view(torch.int8) - 8
    if layer.storage["class"] == "Int4Tensor":
        return PackedCodes(stored_codes.view(torch.uint8), 4, layer.shape[-1], sign="twos_complement")
    if element == "fp4_e2m1":
        return PackedCodes(stored_codes.view(torch.uint8), 4, layer.shape[-1])
    if element.startswith("fp8"):
        return stored.finite_codes(stored_codes, element, where)
    return stored.int_codes(stored_codes, int(element.removeprefix("int")), where)


def _scales(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Scales of every level on their grid."""
    from anybit.checkpoints.dialects._shared import stored
    from anybit.checkpoints.dialects._shared.torchao_tensors import unswizzle

    level = layer.scheme.scales[0]
    if layer.storage["class"] == "Int4TilePackedTo4dTensor":
        found = tensors["scale_and_zero"][..., 0]
        return (_untransposed(layer, stored.scales(found, level.format, layer.tensors["scale_and_zero"])),)
    scale = tensors["scale"]
    if layer.storage["class"] == "Int4Tensor":
        return (_untransposed(layer, stored.scales(scale, level.format, layer.tensors["scale"])),)
    if layer.storage.get("swizzled"):
        scale = unswizzle(scale, math.prod(layer.shape[:-1]), layer.shape[-1] // level.block[1])
    finest = stored.scales(scale, level.format, layer.tensors["scale"]).reshape(_level_grid(layer))
    if len(layer.scheme.scales) == 1:
        return (finest,)
    above = stored.scales(tensors["per_tensor_scale"], "float32", layer.tensors["per_tensor_scale"])
    return finest, above.reshape(-1, *(1,) * (len(layer.shape) - 1)).expand(*layer.shape[:-2], 1, 1).contiguous()


def _level_grid(layer: Layer) -> tuple[int, ...]:
    from anybit.weights import block_count

    block = layer.scheme.scales[0].block
    rows, columns = layer.shape[-2:]
    return (*layer.shape[:-2], block_count(rows, block[0]), block_count(columns, block[1]))


def _untransposed(layer: Layer, values: Tensor) -> Tensor:
    """Values [.., K/g, N], padding included, as [.., N, blocks]."""
    rows, columns = _level_grid(layer)[-2:]
    return values.transpose(-1, -2)[..., :rows, :columns].contiguous()


def _offset(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[Scheme, Tensor | None]:
    """The scheme that the tensors turn out to have, and its offset."""
    from anybit.checkpoints.checks import refuse_bad_scales

    scheme = layer.scheme
    is_tiled = "scale_and_zero" in tensors
    zero = tensors["scale_and_zero"][..., 1] if is_tiled else tensors.get("zero_point")
    if zero is None:
        return scheme, None
    refuse_bad_scales(zero, layer.tensors["scale_and_zero" if is_tiled else "zero_point"], allow_zero=True,
                      allow_negative=True)
    if scheme.offset is not None and scheme.offset.kind == "minimum":
        return scheme, _untransposed(layer, zero)
    if not bool(zero.any()):
        return replace(scheme, offset=None), None
    format = scheme.offset.format if scheme.offset is not None else "int8"
    offset = Offset("zero_point", format, scheme.scales[0].block)
    return replace(scheme, offset=offset), zero.reshape(_level_grid(layer))


def _pre_scale(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor | None:
    from anybit.checkpoints.checks import refuse_bad_scales

    given = tensors.get("act_pre_scale")
    if given is None:
        return None
    refuse_bad_scales(given, layer.tensors["act_pre_scale"], allow_zero=False, allow_negative=False)
    return given.reshape(-1)


def _activation(layer: Layer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Static tensors and constants of the activation, under the names of its recipe."""
    import torch

    from anybit.checkpoints.dialects._shared import stored

    if layer.scheme.activation is None or layer.scheme.activation.dynamic:
        bound = layer.storage.get("lower_bound")
        return {} if layer.scheme.activation is None or bound is None else {"lower_bound": torch.tensor([bound])}
    role = "act_per_tensor_scale" if layer.storage["class"] == "NVFP4Tensor" else "act_quant_scale"
    if role not in tensors:  # NVFP4 of one level: block scales alone
        return {"scale": torch.ones(1)}
    found = {"scale": stored.one_value(tensors[role], layer.tensors[role])}
    if (zero := tensors.get("act_quant_zero_point")) is not None and bool(zero.any()):
        found["zero_point"] = zero.reshape(1)
    return found
