"""`--quantization NAME`: unquantized layers quantized while loading, without calibration data.

The table is torch-free: planning asks `scheme_of` from headers alone, the hosts call the quantizer with each weight as
it is read. Activations of a scheme are dynamic and by row: what a token gets does not depend on its batch.
Arithmetic: `numerics/quantize.py` (weights), `numerics/activations.py`. Names that vLLM has too mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from anybit.errors import AnybitError, Unsupported
from anybit.schemes import CHANNEL, TENSOR, ActivationSpec, Layer, Offset, ScaleLevel, Scheme, group

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.numerics.packing import PackedCodes
    from anybit.weights import Dense, QuantizedWeight

__all__ = ["ONLINE", "OnlineQuantizer", "OnlineScheme", "applies_to", "quantize", "quantizer", "why_not"]

# Layers that stay as they are: small, and what they decide is discrete (a token, an expert)
HEADS: Final = frozenset({"lm_head", "embed_out", "output_layer", "score"})
ROUTERS: Final = frozenset({"gate", "router", "wg", "shared_expert_gate"})


@dataclass(frozen=True)
class OnlineScheme:
    """One name of --quantization: the scheme that a layer gets, by a rule of `numerics.quantize.WEIGHT_RULES`."""

    scheme: Scheme
    summary: str
    rule: str

    @property
    def group_size(self) -> int:
        """What K must be a multiple of."""
        level = self.scheme.scales[0]
        if level.block[0] != 1 or self.scheme.element in ("int4", "uint4"):
            return 1  # the last block, or integer group, may be short
        return level.block[1] or 1


def _token(element: str, recipe: str, *, symmetric: bool = True) -> ActivationSpec:
    return ActivationSpec(element, True, "token", recipe, symmetric=symmetric)


def _group(element: str, recipe: str, size: int) -> ActivationSpec:
    return ActivationSpec(element, True, "group", recipe, group_size=size)


def _mx(element: str, recipe: str) -> Scheme:
    return Scheme(element, (ScaleLevel("e8m0", group(32)),), activation=_group(element, recipe, 32))


def _fp8(block: tuple[int, int], activation: ActivationSpec) -> Scheme:
    return Scheme("fp8_e4m3fn", (ScaleLevel("float32", block),), activation=activation)


def _table() -> dict[str, OnlineScheme]:
    fp8_token = _token("fp8_e4m3fn", "fp8_token")
    nvfp4_levels = (ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", TENSOR))
    int8_channel = (ScaleLevel("float32", CHANNEL),)
    lines = [
        ("nvfp4", Scheme("fp4_e2m1", nvfp4_levels, activation=_group("fp4_e2m1", "nvfp4_token", 16)),
         "4-bit floats, groups of 16 under e4m3 scales; activations the same, scaled by row"),
        ("mxfp4", _mx("fp4_e2m1", "mx_even"), "4-bit floats, groups of 32 under powers of two; activations the same"),
        ("mxfp6_e2m3", _mx("fp6_e2m3", "mx_even"), "6-bit floats e2m3, as mxfp4"),
        ("mxfp6_e3m2", _mx("fp6_e3m2", "mx_even"), "6-bit floats e3m2, as mxfp4"),
        ("mxfp8", _mx("fp8_e4m3fn", "mxfp8_log2"), "8-bit floats, as mxfp4"),
        ("fp8_per_tensor", _fp8(TENSOR, fp8_token), "8-bit floats, one scale a matrix; activations by row"),
        ("fp8_per_channel", _fp8(CHANNEL, fp8_token), "8-bit floats, one scale a row; activations by row"),
        ("fp8_per_block", _fp8((128, 128), _group("fp8_e4m3fn", "fp8_group_divide", 128)),
         "8-bit floats, one scale for 128 x 128; activations in groups of 128"),
        ("int8_per_channel", Scheme("int8", int8_channel, activation=_token("int8", "int8_token")),
         "8-bit integers, one scale a row; activations by row"),
        ("int8_per_channel_asym",
         Scheme("int8", int8_channel, offset=Offset("zero_point", "int8", CHANNEL),
                activation=_token("int8", "int8_token_asym", symmetric=False)),
         "as int8_per_channel, with zero points on both sides"),
        ("int4_g128", Scheme("int4", (ScaleLevel("bfloat16", group(128)),)),
         "4-bit integers, groups of 128; weight-only"),
        ("int4_g32_asym",
         Scheme("uint4", (ScaleLevel("bfloat16", group(32)),), offset=Offset("zero_point", "uint4", group(32))),
         "4-bit integers with zero points, groups of 32; weight-only"),
    ]
    table = {name: OnlineScheme(scheme, summary, name) for name, scheme, summary in lines}
    table["online"] = table["fp8_per_tensor"]
    return table


ONLINE: Final[Mapping[str, OnlineScheme]] = _table()


def online_scheme(name: str) -> OnlineScheme:
    """The scheme called `name`; Unsupported with the list of names for any other."""
    found = ONLINE.get(name)
    if found is None:
        raise Unsupported(
            f"no such quantization: {name!r}", wanted=", ".join(ONLINE), remedy="--quantization fp8_per_channel"
        )
    return found


def why_not(layer: Layer, scheme_name: str) -> str | None:
    """Why `layer` stays as it is under --quantization; None if it is quantized.

    From headers alone. A layer that is quantized already is quantized again, from its reference weight. Embeddings,
    output heads and routers stay, and what the scheme's groups do not divide.
    """
    path = layer.name.removesuffix(".weight").split(".")
    size = online_scheme(scheme_name).group_size
    if layer.kind == "embedding":
        return "an embedding"
    if path[-1] in HEADS:
        return "the output head"
    if not ROUTERS.isdisjoint(path[-2:]):  # mlp.gate, block_sparse_moe.router.layer
        return "a router"
    if layer.shape[-1] % size:
        return f"K {layer.shape[-1]} is no multiple of the group size {size}"
    return None


def applies_to(layer: Layer, scheme_name: str) -> bool:
    """True if --quantization changes this layer."""
    return why_not(layer, scheme_name) is None


def quantize(weight: Dense, scheme_name: str) -> QuantizedWeight:
    """A dense weight [.., N, K] quantized; codes of 4 and 6 bits are packed.

    Raises Unsupported where K is no multiple of the group size, Damaged for NaN or infinity in the weight.
    """
    from anybit.numerics.quantize import quantize_weight
    from anybit.weights import QuantizedWeight

    online = online_scheme(scheme_name)
    if weight.shape[-1] % online.group_size:
        raise Unsupported(
            "the groups of the scheme do not divide the weight", found=f"K {weight.shape[-1]}",
            wanted=f"a multiple of {online.group_size}", remedy="leave this layer as it is, or take fp8_per_channel",
        )
    result = quantize_weight(online.rule, weight.tensor)
    codes = _stored(result.codes, online.scheme)
    return QuantizedWeight(online.scheme, weight.shape, codes, result.scales, result.zero_point, bias=weight.bias)


def _stored(codes: Tensor, scheme: Scheme) -> Tensor | PackedCodes:
    import torch

    from anybit.numerics.packing import PackedCodes, pack_stream

    bits = scheme.weight_bits
    if bits == 8:
        return codes
    sign = codes.dtype == torch.int8
    fields = codes.view(torch.uint8) & (2**bits - 1) if sign else codes
    return PackedCodes(pack_stream(fields, bits), bits, codes.shape[-1], sign="twos_complement" if sign else "unsigned")


@dataclass(frozen=True)
class OnlineQuantizer:
    """--quantization NAME as the hosts use it: asked for schemes while planning, called with weights while loading."""

    name: str

    def scheme_of(self, layer: Layer) -> Scheme | None:
        """The scheme that the layer gets, None if it stays as it is; no tensor is read."""
        return online_scheme(self.name).scheme if applies_to(layer, self.name) else None

    def __call__(self, layer: Layer, weight: QuantizedWeight | Dense) -> QuantizedWeight | Dense:
        """The weight quantized, or itself where `why_not` has a reason; errors carry the layer's name."""
        from anybit.schemes import dense
        from anybit.weights import Dense

        if not applies_to(layer, self.name):
            return weight
        if not isinstance(weight, Dense):
            if weight.pre_scale is not None:  # belongs to the input; the new scheme has no place for it
                raise Unsupported(
                    "a layer with an input scale cannot be quantized again", where=layer.name,
                    found=str(layer.scheme), wanted="a layer without pre-quant scale",
                    remedy="run it without --quantization",
                )
            weight = Dense(dense("float32"), weight.dequantize(), weight.bias)
        try:
            return quantize(weight, self.name)
        except AnybitError as error:
            error.where = error.where or layer.name
            raise


def quantizer(name: str) -> OnlineQuantizer:
    """The quantizer of a name in ONLINE; Unsupported for any other."""
    online_scheme(name)
    return OnlineQuantizer(name)
