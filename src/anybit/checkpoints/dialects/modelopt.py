"""NVIDIA ModelOpt's unified Hugging Face checkpoints: tensors to canonical weights.

Stored per module M: M.weight (fp8, int8, or uint8 with two codes), M.weight_scale, and as the algorithm needs
M.weight_scale_2, M.input_scale, M.pre_quant_scale; stacked experts carry the same under `_weight_scale`, ... and lie
[E, in, out]. The algorithm stands in config.json and hf_quant_config.json, which drop keys from each other; group sizes
come from the shapes. Rules, worked examples and sources with versions: docs/formats/modelopt.md. The two files are read
by `_shared/modelopt_config.py`, headers by `_shared/modelopt_headers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.contents import Contents
from anybit.checkpoints.dialects import plain
from anybit.checkpoints.dialects._shared.kv_scales import demand_scales, kv_scales
from anybit.checkpoints.dialects._shared.modelopt_config import read_settings, speaks_modelopt
from anybit.checkpoints.dialects._shared.modelopt_headers import layers_with_codes
from anybit.errors import Unsupported
from anybit.schemes import KVCacheSpec, Layer

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, PackedCodes, QuantizedWeight

NAME: Final = "modelopt"


def recognizes(contents: Contents) -> bool:
    """True if config.json names this method, or names none and hf_quant_config.json lies beside it."""
    return speaks_modelopt(contents)


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from headers and config.

    Raises Unsupported for what docs/formats/modelopt.md §9 refuses, Inconsistent where the two config files, or config
    and tensors, disagree, each naming the module.
    """
    layers = layers_with_codes(contents, read_settings(contents))
    taken = {name for layer in layers.values() for name in layer.tensors.values()}
    return layers | plain.dense_layers(contents, taken)


def kv_cache(contents: Contents) -> KVCacheSpec | None:
    """The key-value cache that the config declares; scales may be missing, then they are 1.0 (§8)."""
    element = read_settings(contents).kv_cache
    affine = [name for name in contents.tensors if name.rpartition(".")[2] in ("k_bias", "v_bias")]
    if element and affine:  # FP8_AFFINE declares plain FP8: the biases tell
        raise Unsupported(
            "an affine key-value cache", where=affine[0], found="a bias of cached keys or values",
            wanted="a cache with scales alone", remedy="export the model again with kv_cache_qformat fp8 or none",
            more=tuple(affine)[1:],
        )
    return demand_scales(contents, KVCacheSpec(element, kv_scales(contents))) if element else None


def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical weight; nibbles stay packed where they are packed along K.

    Raises Damaged for values that no writer means: NaN codes, scales that are NaN, infinite or negative.
    """
    from anybit.weights import QuantizedWeight

    if not layer.scheme.is_quantized:
        return plain.canonicalize(layer, tensors)
    return QuantizedWeight(
        scheme=layer.scheme,
        shape=layer.shape,
        stored_codes=_codes(layer, tensors),
        scales=_scales(layer, tensors),
        pre_scale=_pre_scale(layer, tensors),
        activation=_activation(layer, tensors),
        bias=tensors.get("bias"),
    )


def _codes(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor | PackedCodes:
    from anybit.checkpoints.dialects._shared import stored
    from anybit.numerics.packing import PackedCodes

    weight, kind, stacked = tensors["weight"], layer.storage["codes"], layer.kind == "experts"
    if kind == "fp4_along_n":  # stacked experts of a test export: bytes [E, in, out / 2]
        return _transposed(PackedCodes(weight, 4, layer.shape[-2]).unpack())
    if stacked:
        weight = _transposed(weight)  # [E, in, out] -> [E, out, in]
    if kind == "fp4":
        return PackedCodes(weight, 4, layer.shape[-1])
    if kind == "int4_row_pairs":
        return _unpack_row_pairs(weight)
    return stored.fp8_codes(weight, layer.tensors["weight"]) if kind == "fp8" else weight


def _transposed(stack: Tensor) -> Tensor:
    return stack.transpose(-1, -2).contiguous()


def _unpack_row_pairs(pairs: Tensor) -> Tensor:
    """Bytes [N/2, K]: row 2i in the low nibble, row 2i+1 in the high one, two's complement -> codes [N, K] int8."""
    import torch

    signed = pairs.view(torch.int8)
    low, high = (signed << 4) >> 4, signed >> 4  # arithmetic shifts carry the sign
    return torch.stack((low, high), dim=-2).flatten(-3, -2)


def _scales(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Scales of every level on their grid; stacked experts get one of each tensor-wide scale per expert."""
    from anybit.checkpoints.dialects._shared import stored
    from anybit.weights import block_count

    rows, columns = layer.shape[-2:]
    level = layer.scheme.scales[0]
    grid = (*layer.shape[:-2], block_count(rows, level.block[0]), block_count(columns, level.block[1]))
    finest = stored.scales(tensors["weight_scale"], level.format, layer.tensors["weight_scale"])
    if layer.kind == "experts" and finest.dim() == 3:
        finest = _transposed(finest)
    elif layer.kind == "experts":
        finest = finest.flatten().repeat(grid[0] // finest.numel())
    finest = finest.reshape(grid)
    if len(layer.scheme.scales) == 1:
        return (finest,)
    above = stored.one_value(tensors["weight_scale_2"], layer.tensors["weight_scale_2"])
    return finest, above.reshape(1, 1) if len(layer.shape) == 2 else above.reshape(1, 1, 1).repeat(grid[0], 1, 1)


def _pre_scale(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor | None:
    from anybit.checkpoints.checks import refuse_bad_scales

    given = tensors.get("pre_quant_scale")
    if given is not None:
        refuse_bad_scales(given.float(), layer.tensors["pre_quant_scale"], allow_zero=False, allow_negative=False)
    return given


def _activation(layer: Layer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from anybit.checkpoints.dialects._shared import stored

    if "input_scale" not in tensors or layer.scheme.activation is None:  # W4A16_NVFP4 may carry one unused
        return {}
    return {"scale": stored.one_value(tensors["input_scale"], layer.tensors["input_scale"])}
