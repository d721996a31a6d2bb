"""AMD Quark's own layouts (`quant_method` "quark"): tensors to canonical weights.

Stored per module M: M.weight, M.weight_scale, for integers M.weight_zero_point, for two stages M.weight_scale_2 and
M.weight_zero_point_2, for calibrated inputs M.input_scale, M.input_zero_point or M.input_scale_2. Integers in groups
lie [K, N] with scales [K/g, N]; all else lies [N, K]. Its custom modes fp8 and awq are those dialects' matter.
Rules, worked examples and sources with versions: docs/formats/quark.md. `_shared/quark_config.py` reads the config,
`_shared/quark_headers.py` and `_shared/quark_layouts.py` the headers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.contents import Contents
from anybit.checkpoints.dialects import plain as unquantized
from anybit.checkpoints.dialects._shared.kv_scales import demand_scales, kv_scales
from anybit.checkpoints.dialects._shared.quark_config import WHERE, Config, read_config
from anybit.checkpoints.dialects._shared.quark_headers import quantized_layers
from anybit.errors import Damaged, Unsupported
from anybit.schemes import KVCacheSpec, Layer, Offset

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anybit.weights import Dense, PackedCodes, QuantizedWeight

NAME: Final = "quark"

_NIBBLE_OF_ELEMENT: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # pack method "reorder"
_PROBABILITIES: Final = ".prob_output_scale"
_LATENT: Final = ".kv_b_proj.output_scale"  # DeepSeek: keys and values in one product


def recognizes(contents: Contents) -> bool:
    """True if the configuration names Quark's own mode."""
    return contents.quant_method == "quark"


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from headers and config.

    Raises Unsupported for what docs/formats/quark.md §10 refuses, Inconsistent where no layer config fits the tensors,
    each naming the module.
    """
    layers = quantized_layers(contents, read_config(contents.quantization))
    taken = {name for layer in layers.values() for name in layer.tensors.values()}
    return layers | {n: _with_scale(contents, layer) for n, layer in unquantized.dense_layers(contents, taken).items()}


def _with_scale(contents: Contents, layer: Layer) -> Layer:
    """Claim the scale, always 1, that Quark stores beside a weight of dtype float16 or bfloat16."""
    scale = f"{layer.name}.weight_scale"
    if scale not in contents.tensors:
        return layer
    notes = (*layer.notes, "its dtype is a wide float: the scale beside it is not used")
    return replace(layer, tensors={**layer.tensors, "unused_scale": scale}, notes=notes)


def kv_cache(contents: Contents) -> KVCacheSpec | None:
    """The cache that the config declares or whose scales are stored; a missing scale is 1.0 (§8)."""
    config = read_config(contents.quantization)
    scales = kv_scales(contents, output_scales=True)
    latent = {n.removesuffix(_LATENT): (n, n) for n in contents.tensors if n.endswith(_LATENT)}
    if not scales and not latent and not config.kv_patterns:
        return None
    _refuse_other_caches(config)
    return demand_scales(contents, KVCacheSpec("fp8_e4m3fn", scales | latent, latent=frozenset(latent)))


def _refuse_other_caches(config: Config) -> None:
    other = next((spec for spec in config.kv_specs if spec.dtype != "fp8_e4m3" or spec.qscheme != "per_tensor"), None)
    if other is not None:
        raise Unsupported("a key-value cache in a format that no known runtime keeps",
                          where=f"{WHERE}.kv_cache_quant_config", found=str(other), wanted="fp8_e4m3 per_tensor",
                          remedy="export the model with kv scheme fp8")


def notes(contents: Contents) -> tuple[str, ...]:
    """Remarks on stored scales of queries and attention probabilities, which are shown and not applied."""
    stored = [n for n in contents.tensors if n.endswith((_PROBABILITIES, ".q_proj.output_scale"))]
    return (f"{len(stored)} scales of quantized attention are stored and not applied: {stored[0]}",) if stored else ()


def plain(contents: Contents) -> dict[str, str]:
    """Tensors of the model that belong to no layer, no cache and no quantized attention."""
    used = {name for layer in declare(contents).values() for name in layer.tensors.values()}
    cache = kv_cache(contents)
    used |= {name for pair in (cache.scales.values() if cache else ()) for name in pair}
    attention = (_PROBABILITIES, ".q_proj.output_scale")
    return {name: name for name in contents.tensors if name not in used and not name.endswith(attention)}


# --- tensors to the canonical form ---------------------------------------------------------------------------------

def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical weight; codes stay packed where they are packed along K in the order of the bit stream.

    Zero points of a weight that the config calls symmetric count where they are not 0, as Quark itself counts them.
    Raises Damaged for values that no writer means.
    """
    from anybit.weights import QuantizedWeight

    if not layer.scheme.is_quantized:
        return unquantized.canonicalize(layer, tensors)
    offset, zeros = _zero_points(layer, tensors)
    return QuantizedWeight(
        scheme=replace(layer.scheme, offset=offset),
        shape=layer.shape,
        stored_codes=_CODES[str(layer.storage["codes"])](layer, tensors["weight"]),
        scales=_scales(layer, tensors),
        offset=zeros,
        activation=_activation(layer, tensors),
        bias=_bias(layer, tensors),
    )


def _fp8(layer: Layer, weight: Tensor) -> Tensor:
    from anybit.checkpoints.dialects._shared import stored

    return stored.finite_codes(weight, layer.scheme.element, layer.tensors["weight"])


def _fp4(layer: Layer, weight: Tensor) -> PackedCodes:
    from anybit.numerics.packing import PackedCodes

    return PackedCodes(weight, 4, layer.shape[-1])


def _fp6(layer: Layer, weight: Tensor) -> PackedCodes:
    from anybit.numerics.packing import PackedCodes

    return PackedCodes(weight, 6, layer.shape[-1])


def _fp6_planes(layer: Layer, weight: Tensor) -> Tensor:
    """Codes of the layout before 0.10: byte 0 the top two bits of four codes, first highest; then their low nibbles."""
    import torch

    high, first, second = weight.reshape(len(weight), -1, 3).unbind(-1)
    nibbles = (first >> 4, first & 15, second >> 4, second & 15)
    codes = [(high >> (6 - 2 * i) & 3) << 4 | low for i, low in enumerate(nibbles)]
    return torch.stack(codes, dim=-1).flatten(-2)


def _int8(layer: Layer, weight: Tensor) -> Tensor:
    return weight.view(_torch_dtype(layer.scheme.element))


def _int8_transposed(layer: Layer, weight: Tensor) -> Tensor:
    return _int8(layer, weight).t().contiguous()


def _int4(layer: Layer, weight: Tensor) -> Tensor | PackedCodes:
    """Words along K."""
    from anybit.numerics.packing import PackedCodes, as_bytes

    if layer.storage["order"] == "order":
        is_signed = layer.scheme.element == "int4"
        return PackedCodes(as_bytes(weight), 4, layer.shape[-1], sign="twos_complement" if is_signed else "unsigned")
    return _nibbles(weight, layer, layer.shape[-1])


def _int4_transposed(layer: Layer, weight: Tensor) -> Tensor:
    return _nibbles(weight, layer, layer.shape[-2]).t().contiguous()


def _nibbles(words: Tensor, layer: Layer, count: int) -> Tensor:
    """The first `count` elements of int32 words [.., W] in the layer's pack method; int8 for signed codes."""
    from anybit.numerics.packing import unpack_stream

    codes = unpack_stream(words, 4, 8 * words.shape[-1])
    if layer.storage["order"] == "reorder":
        codes = codes.reshape(*words.shape, 8)[..., list(_NIBBLE_OF_ELEMENT)].flatten(-2)
    return _signed(codes[..., :count], layer.scheme.element)


def _int3(layer: Layer, weight: Tensor) -> PackedCodes:
    from anybit.numerics.packing import PackedCodes

    return PackedCodes(weight, 3, layer.shape[-1], sign="twos_complement")


def _int2_transposed(layer: Layer, weight: Tensor) -> Tensor:
    """One code a word [K, N]."""
    import torch

    if bool(((weight < -2) | (weight > 1)).any()):
        raise Damaged("codes outside int2", where=layer.tensors["weight"],
                      found=f"{int(weight.min())} … {int(weight.max())}", wanted="-2 … 1")
    return weight.to(torch.int8).t().contiguous()


def _uint2_transposed(layer: Layer, weight: Tensor) -> Tensor:
    return _pairs_of_bits(weight)[..., : layer.shape[-2]].t().contiguous()


def _pairs_of_bits(data: Tensor) -> Tensor:
    """Two-bit codes, the first in a byte's top bits."""
    import torch

    return torch.stack([data >> shift & 3 for shift in (6, 4, 2, 0)], dim=-1).flatten(-2)


_CODES: Final[Mapping[str, Callable[[Layer, Tensor], Tensor | PackedCodes]]] = {
    "fp8": _fp8,
    "fp4": _fp4,
    "fp6": _fp6,
    "fp6_planes": _fp6_planes,
    "int8": _int8,
    "int8_transposed": _int8_transposed,
    "int4": _int4,
    "int4_transposed": _int4_transposed,
    "int3": _int3,
    "int2_transposed": _int2_transposed,
    "uint2_transposed": _uint2_transposed,
}


def _torch_dtype(element: str) -> torch.dtype:
    import torch

    return torch.int8 if element.startswith("int") else torch.uint8


def _signed(codes: Tensor, element: str) -> Tensor:
    """Fields of fewer than eight bits in two's complement where the element is signed."""
    import torch

    from anybit.numerics.formats import number_format

    spare = 8 - number_format(element).bits
    if not element.startswith("int"):
        return codes.contiguous()
    extended: Tensor = (codes << spare).view(torch.int8) >> spare  # an arithmetic shift carries the sign
    return extended


def _scales(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Scales of every level on their grid, finest first."""
    from anybit.checkpoints.dialects._shared import stored
    from anybit.weights import block_count

    roles = ("weight_scale", "weight_scale_2")
    if layer.scheme.order == "code_first":
        roles = roles[::-1]  # the second stage is the scale of a row, weight_scale the one above
    made = []
    for level, role in zip(layer.scheme.scales, roles, strict=False):
        scale = tensors[role]
        if layer.storage["order"] == "signed_exponents":
            scale = _biased(scale, layer.tensors[role])
        if layer.storage["has_transposed_scales"]:
            scale = scale.t().contiguous()
        grid = tuple(block_count(size, block) for size, block in zip(layer.shape, level.block, strict=True))
        made.append(stored.scales(scale, level.format, layer.tensors[role]).reshape(grid))
    return tuple(made)


def _biased(exponents: Tensor, where: str) -> Tensor:
    """Exponents in two's complement as e8m0 codes: dtype mx stores no bias (§11, trap 4)."""
    import torch

    signed = exponents.view(torch.int8)
    if bool((signed == -128).any()):
        raise Damaged("an exponent below the format's", where=where, found="-128", wanted="-127 … 127")
    return (signed.to(torch.int16) + 127).to(torch.uint8)


def _zero_points(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[Offset | None, Tensor | None]:
    """Zero points on their grid and what they are; None where none are stored or a symmetric weight stores zeros."""
    role = "weight_zero_point_2" if layer.scheme.order == "code_first" else "weight_zero_point"
    kind = layer.storage["zeros"]
    if not kind or role not in tensors:
        return None, None
    offset = layer.scheme.offset
    if offset is None:
        if not bool((tensors[role] != 0).any()):
            return None, None
        element = "float32" if kind == "integers" else layer.scheme.element
        offset = Offset("zero_point", element, layer.scheme.scales[0].block)
    zeros = _unpacked_zeros(layer, tensors[role], str(kind), offset)
    if layer.storage["has_transposed_scales"]:
        zeros = zeros.t().contiguous()
    if offset.format == "float32":
        return offset, zeros.float()
    return offset, zeros.reshape(1, 1) if zeros.numel() == 1 else zeros.reshape(layer.shape[0], -1)


def _unpacked_zeros(layer: Layer, zeros: Tensor, kind: str, offset: Offset) -> Tensor:
    """Stored zero points one an element, along N as stored."""
    from anybit.numerics.formats import number_format
    from anybit.numerics.packing import unpack_stream

    rows = layer.shape[0]
    if kind == "words":
        return _nibbles(zeros, layer, rows)
    if kind == "bytes" and layer.scheme.element == "int3":
        return _signed(unpack_stream(zeros, 3, rows), "int3")
    if kind == "bytes":
        return _pairs_of_bits(zeros)[..., :rows]
    if kind == "integers":
        return zeros
    if zeros.element_size() == 1:
        return zeros.view(_torch_dtype(offset.format))
    limits = number_format(offset.format)
    if bool(((zeros < limits.minimum) | (zeros > limits.maximum)).any()):
        raise Damaged(f"zero points outside {offset.format}", where=layer.tensors["weight_zero_point"],
                      found=f"{int(zeros.min())} … {int(zeros.max())}", wanted=f"{limits.minimum} … {limits.maximum}")
    return zeros.to(_torch_dtype(offset.format))


def _activation(layer: Layer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from anybit.checkpoints.dialects._shared import stored

    found = {}
    roles = layer.storage["activation"]
    assert isinstance(roles, tuple)
    for role in roles:
        if role == "input_zero_point":
            found["zero_point"] = tensors[role].reshape(1)
        else:
            found["scale"] = stored.one_value(tensors[role], layer.tensors[role])
    return found


def _bias(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The bias, (q - z) * s where it is quantized."""
    bias, scale = tensors.get("bias"), tensors.get("bias_scale")
    if bias is None or scale is None:
        return bias
    from anybit.checkpoints.checks import refuse_bad_scales

    refuse_bad_scales(scale.float(), layer.tensors["bias_scale"], allow_zero=True, allow_negative=False)
    zero = tensors.get("bias_zero_point")
    value = bias.float() if zero is None else bias.float() - zero.float()
    return value * scale.float()
