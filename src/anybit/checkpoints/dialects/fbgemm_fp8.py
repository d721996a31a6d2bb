"""fbgemm_fp8: e4m3 weights with a scale for each output, activations quantized a token with a bound; Llama 3.1 and 4.

Stored per module: weight F8_E4M3 [N, K], weight_scale [N, 1]. Llama 4's experts are stored [E, in, out] with the scale
of output n at [e, 0, n] (gate_up) or [e, n, 0] (down). Rules and sources with versions: docs/formats/fbgemm_fp8.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need, need_all
from anybit.checkpoints.contents import FLOAT_DTYPES, Contents
from anybit.checkpoints.dialects.fp8 import E4M3, WHERE, float8_layer
from anybit.checkpoints.dialects.plain import canonicalize as canonicalize_dense
from anybit.checkpoints.dialects.plain import dense_layers
from anybit.errors import Damaged, Unsupported
from anybit.schemes import CHANNEL, ActivationSpec, Layer, ScaleLevel, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, QuantizedWeight

NAME: Final = "fbgemm_fp8"

_DEFAULT_BOUND: Final = 1200.0  # transformers' default for a missing activation_scale_ub


def recognizes(contents: Contents) -> bool:
    """True if the configuration names the method."""
    return contents.quant_method == NAME


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from headers and configuration; raises Damaged for an unsound bound, Inconsistent without scales."""
    bound, notes = _bound(contents)
    weights = (n for n, info in contents.tensors.items() if n.endswith(".weight") and info.dtype.startswith("F8_"))
    need_all(contents, (f"{name}_scale" for name in weights))
    activation = ActivationSpec(E4M3, True, "token", "fp8_token", bound=bound)
    layers = {}
    for name, info in contents.tensors.items():
        module, _, leaf = name.rpartition(".")
        if not info.dtype.startswith("F8_"):
            continue
        if leaf == "weight":
            scale = need(contents, f"{module}.weight_scale", module)
            expect_dtype(scale, *FLOAT_DTYPES)
            layers[module] = float8_layer(contents, module, scale, CHANNEL, activation, notes)
        elif len(info.shape) == 3 and leaf in _EXPERTS:
            layers[name] = _experts(contents, name, leaf, activation, notes)
        elif len(info.shape) > 1:
            raise Unsupported("fp8 codes outside a module's weight", where=name,
                              found=f"{info.dtype} {list(info.shape)}", wanted="MODULE.weight, or Llama 4's experts",
                              remedy="this layout is not known; report it")
    taken = {tensor for layer in layers.values() for tensor in layer.tensors.values()}
    return layers | dense_layers(contents, taken)


def _bound(contents: Contents) -> tuple[float, tuple[str, ...]]:
    """The bound on a token's largest magnitude (not on its scale), and a note where it is assumed."""
    value = contents.quantization.get("activation_scale_ub")
    if value is None:
        return _DEFAULT_BOUND, (f"activation_scale_ub is missing: {_DEFAULT_BOUND}, as transformers assumes",)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise Damaged("activation_scale_ub has no sound value", where=WHERE, found=repr(value)[:80],
                      wanted="a positive number", remedy=f"restore it; the usual value is {_DEFAULT_BOUND}")
    return float(value), ()


# parameter of Llama 4's experts, [E, in, out] -> which of its dimensions its scales have (None = 1)
_EXPERTS: Final[Mapping[str, tuple[int | None, ...]]] = {
    "gate_up_proj": (0, None, 2),
    "down_proj": (0, 2, None),  # the index of the output, in the place of the rows
}


def _experts(contents: Contents, name: str, leaf: str, activation: ActivationSpec, notes: tuple[str, ...]) -> Layer:
    weight, scale = contents.tensors[name], need(contents, f"{name}_scale", name)
    expect_dtype(weight, "F8_E4M3")
    expect_dtype(scale, *FLOAT_DTYPES)
    expect_shape(scale, tuple(1 if dim is None else weight.shape[dim] for dim in _EXPERTS[leaf]))
    experts, columns, rows = weight.shape
    names = {"weight": name, "scale": scale.name}
    scheme = Scheme(E4M3, (ScaleLevel(FLOAT_DTYPES[scale.dtype], CHANNEL),), activation=activation)
    stored_bytes = contents.bytes_of(*names.values())
    return Layer(name, "experts", (experts, rows, columns), scheme, names, {}, stored_bytes, notes)


def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical weight; raises Damaged for NaN codes and for scales that are not positive."""
    if not layer.scheme.is_quantized:
        return canonicalize_dense(layer, tensors)
    from anybit.checkpoints.dialects._shared import stored
    from anybit.weights import QuantizedWeight

    codes = stored.fp8_codes(tensors["weight"], layer.tensors["weight"])
    if layer.kind == "experts":
        codes = codes.transpose(1, 2).contiguous()
    scale = stored.scales(tensors["scale"], layer.scheme.scales[0].format, layer.tensors["scale"], allow_zero=False)
    scale = scale.reshape(*layer.shape[:-1], 1)
    return QuantizedWeight(layer.scheme, layer.shape, codes, (scale,), bias=tensors.get("bias"))
