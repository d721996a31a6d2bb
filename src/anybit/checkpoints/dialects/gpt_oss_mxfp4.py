"""gpt-oss: stacked MXFP4 experts, quant_method "mxfp4" with the tensors below, and OpenAI's own file names.

Stored per parameter P of a layer's experts: P_blocks U8 [E, N, K/32, 16], even column in the low nibble; P_scales U8
[E, N, K/32], e8m0; P_bias [E, N]. OpenAI's original files: mlpI_weight.blocks, mlpI_weight.scales, mlpI_bias. Rows of
gate_up are interleaved (gate 0, up 0, gate 1, ...) and stay so. Rules and sources: docs/formats/gpt_oss_mxfp4.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need
from anybit.checkpoints.contents import FLOAT_DTYPES, Contents, TensorInfo
from anybit.checkpoints.dialects.plain import canonicalize as canonicalize_dense
from anybit.checkpoints.dialects.plain import dense_layers
from anybit.errors import Damaged, Inconsistent
from anybit.schemes import Layer, ScaleLevel, Scheme, group

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, QuantizedWeight

NAME: Final = "gpt_oss_mxfp4"

_GROUP: Final = 32
_BLOCK_BYTES: Final = 16
_SCHEME: Final = Scheme("fp4_e2m1", (ScaleLevel("e8m0", group(_GROUP)),))
# largest magnitude of a code that stays finite in float32 under scale bytes 253 and 254
_LARGEST: Final = {253: 3.0, 254: 1.5}


def recognizes(contents: Contents) -> bool:
    """True for the method "mxfp4", or no method at all (OpenAI's files), where stacked blocks are present."""
    return contents.quant_method in ("mxfp4", "gpt_oss_mxfp4", "") and any(
        name.endswith(("_blocks", ".blocks")) and len(info.shape) == 4 for name, info in contents.tensors.items()
    )


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from headers alone: an expert parameter is quantized iff its blocks are there.

    Raises Inconsistent for blocks without scales or of unlike shapes, each naming the parameter.
    """
    layers = {}
    for name, info in contents.tensors.items():
        stem, separator = name.removesuffix("blocks")[:-1], name.removesuffix("blocks")[-1:]
        if name.endswith("blocks") and separator in ("_", "."):
            layers[stem] = _experts(contents, stem, separator, info)
    taken = {tensor for layer in layers.values() for tensor in layer.tensors.values()}
    return layers | dense_layers(contents, taken)


def _experts(contents: Contents, name: str, separator: str, blocks: TensorInfo) -> Layer:
    scales = need(contents, f"{name}{separator}scales", name)
    for info in (blocks, scales):
        expect_dtype(info, "U8")
    if len(blocks.shape) != 4 or blocks.shape[-1] != _BLOCK_BYTES or 0 in blocks.shape:
        raise Inconsistent("blocks of another shape", where=blocks.name, found=str(list(blocks.shape)),
                           wanted=f"[E, N, K/{_GROUP}, {_BLOCK_BYTES}]",
                           remedy="the file is damaged: download it again")
    expect_shape(scales, blocks.shape[:-1])
    experts, rows, groups, _ = blocks.shape
    names = {"blocks": blocks.name, "scales": scales.name}
    bias = contents.tensors.get(f"{name.removesuffix('_weight')}_bias")
    if bias is not None:
        expect_dtype(bias, *FLOAT_DTYPES)
        expect_shape(bias, (experts, rows))
        names["bias"] = bias.name
    shape = (experts, rows, groups * _GROUP)
    return Layer(name, "experts", shape, _SCHEME, names, {}, contents.bytes_of(*names.values()))


def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical stack [E, N, K], codes packed as stored; raises Damaged for scales that no float32 holds."""
    if not layer.scheme.is_quantized:
        return canonicalize_dense(layer, tensors)
    from anybit.checkpoints.dialects._shared import stored
    from anybit.numerics.packing import PackedCodes
    from anybit.weights import QuantizedWeight

    experts, rows, columns = layer.shape
    scales = stored.scales(tensors["scales"], "e8m0", layer.tensors["scales"])
    _refuse_overflow(layer, tensors["blocks"], scales)
    codes = PackedCodes(tensors["blocks"].reshape(experts, rows, columns // 2), 4, columns)
    return QuantizedWeight(layer.scheme, layer.shape, codes, (scales,), bias=tensors.get("bias"))


def _refuse_overflow(layer: Layer, blocks: Tensor, scales: Tensor) -> None:
    """Refuse codes above 2^127 under the two largest scales (docs/formats/gpt_oss_mxfp4.md §3)."""
    from anybit.numerics.codec import decode
    from anybit.numerics.packing import unpack_stream

    for byte, largest in _LARGEST.items():
        chosen = blocks[scales == byte]  # [blocks with that scale, 16]; none in a sound file
        found = decode("fp4_e2m1", unpack_stream(chosen, 4, _GROUP)).abs() if len(chosen) else None
        if found is not None and bool((found > largest).any()):
            raise Damaged("scales that no float32 holds", where=layer.tensors["scales"],
                          found=f"byte {byte} over a code of magnitude {float(found.max())}",
                          wanted=f"at most {largest}",
                          remedy="the file is damaged: download it again, or get it from its writer")
