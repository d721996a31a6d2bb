"""The schemes of `--quantization` by name: what a layer becomes, without calibration data. Torch-free.

Activations of a scheme are dynamic and by row: what a token gets does not depend on its batch. Arithmetic:
`numerics/quantize.py` (weights), `numerics/activations.py`. Names that vLLM has too mean the same; where vLLM's own
choice depends on the chip (fp8_per_tensor: by tensor or by row) it is the one by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Final

from anybit.errors import Unsupported
from anybit.schemes import CHANNEL, TENSOR, ActivationSpec, Offset, ScaleLevel, Scheme, group

__all__ = ["ALIASES", "ONLINE", "WEIGHT_ONLY", "OnlineScheme", "online_scheme"]

WEIGHT_ONLY: Final = "_a16"  # after a name: the same weights, activations not quantized


@dataclass(frozen=True)
class OnlineScheme:
    """One name of --quantization: the scheme that a layer gets, by a rule of `numerics.quantize.WEIGHT_RULES`.

    experts_only  for routed experts alone; other layers stay (two of vLLM's names are so)
    """

    scheme: Scheme
    summary: str
    rule: str
    experts_only: bool = False

    @property
    def group_size(self) -> int:
        """What K must be a multiple of."""
        level = self.scheme.scales[0]
        if level.block[0] != 1 or self.scheme.element in ("int4", "uint4"):
            return 1  # the last block, or integer group, may be short
        return level.block[1] or 1

    def weight_only(self) -> OnlineScheme:
        """The same weights without activation quantization."""
        return replace(self, scheme=self.scheme.weight_only(), summary=f"{self.summary.partition(';')[0]}; weight-only")


def _token(element: str, recipe: str, *, symmetric: bool = True) -> ActivationSpec:
    return ActivationSpec(element, True, "token", recipe, symmetric=symmetric)


def _group(element: str, recipe: str, size: int) -> ActivationSpec:
    return ActivationSpec(element, True, "group", recipe, group_size=size)


def _mx(element: str, recipe: str) -> Scheme:
    return Scheme(element, (ScaleLevel("e8m0", group(32)),), activation=_group(element, recipe, 32))


def _fp8(block: tuple[int, int], activation: ActivationSpec) -> Scheme:
    return Scheme("fp8_e4m3fn", (ScaleLevel("float32", block),), activation=activation)


def _int4(size: int) -> Scheme:
    return Scheme("int4", (ScaleLevel("bfloat16", group(size)),))


def _uint4(size: int) -> Scheme:
    level = ScaleLevel("bfloat16", group(size))
    return Scheme("uint4", (level,), offset=Offset("zero_point", "uint4", group(size)))


GROUP_SIZES: Final = (128, 64, 32)  # of the 4-bit integers


def _table() -> dict[str, OnlineScheme]:
    fp8_token = _token("fp8_e4m3fn", "fp8_token")
    nvfp4_levels = (ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", TENSOR))
    int8_channel = (ScaleLevel("float32", CHANNEL),)
    lines = [
        ("nvfp4", Scheme("fp4_e2m1", nvfp4_levels, activation=_group("fp4_e2m1", "nvfp4_token", 16)),
         "4-bit floats, groups of 16 under e4m3 scales; activations the same, scaled by row"),
        *((name, _mx(element, recipe), f"{words}, groups of 32 under powers of two; activations the same")
          for name, element, recipe, words in (
              ("mxfp4", "fp4_e2m1", "mx_even", "4-bit floats"),
              ("mxfp6_e2m3", "fp6_e2m3", "mx_even", "6-bit floats e2m3"),
              ("mxfp6_e3m2", "fp6_e3m2", "mx_even", "6-bit floats e3m2"),
              ("mxfp8", "fp8_e4m3fn", "mxfp8_log2", "8-bit floats"))),
        ("fp8_per_tensor", _fp8(TENSOR, fp8_token), "8-bit floats, one scale a matrix; activations by row"),
        ("fp8_per_channel", _fp8(CHANNEL, fp8_token), "8-bit floats, one scale a row; activations by row"),
        ("fp8_per_block", _fp8((128, 128), _group("fp8_e4m3fn", "fp8_group_divide", 128)),
         "8-bit floats, one scale for 128 x 128; activations in groups of 128"),
        ("int8_per_channel", Scheme("int8", int8_channel, activation=_token("int8", "int8_token")),
         "8-bit integers, one scale a row; activations by row"),
        ("int8_per_channel_asym",
         Scheme("int8", int8_channel, offset=Offset("zero_point", "int8", CHANNEL),
                activation=_token("int8", "int8_token_asym", symmetric=False)),
         "8-bit integers with zero points, one scale a row; activations the same way, by row"),
        *((f"int4_g{size}", _int4(size), f"4-bit integers, groups of {size}; weight-only") for size in GROUP_SIZES),
        *((f"int4_g{size}_asym", _uint4(size), f"4-bit integers with zero points, groups of {size}; weight-only")
          for size in GROUP_SIZES),
    ]  # fmt: skip
    table = {name: OnlineScheme(scheme, summary, name) for name, scheme, summary in lines}
    int8 = table["int8_per_channel"].weight_only()
    table["int8_per_channel_weight_only"] = replace(
        int8, experts_only=True, summary="routed experts alone: 8-bit integers, one scale a row; weight-only"
    )
    table["nvfp4_per_token"] = replace(
        table["nvfp4"], experts_only=True, summary="routed experts alone: as nvfp4"
    )
    return table


ALIASES: Final[Mapping[str, str]] = MappingProxyType({
    "online": "fp8_per_tensor",  # vLLM's "as the configuration says"; without rules the first of its list
    "fp8": "fp8_per_tensor",  # vLLM's --quantization fp8 on an unquantized model
    "ptpc_fp8": "fp8_per_channel",  # vLLM on ROCm: per token, per channel
    "experts_int8": "int8_per_channel_weight_only",
    "int8_asym": "int8_per_channel_asym",
    "mxfp6": "mxfp6_e2m3",  # compressed-tensors' MXFP6; half the error of e3m2
})  # fmt: skip


def _with_aliases(table: dict[str, OnlineScheme]) -> Mapping[str, OnlineScheme]:
    return MappingProxyType(table | {name: table[meant] for name, meant in ALIASES.items()})


ONLINE: Final[Mapping[str, OnlineScheme]] = _with_aliases(_table())


def online_scheme(name: str) -> OnlineScheme:
    """The scheme called `name`, in any case; `NAME_a16` is NAME with activations left alone.

    Raises Unsupported with the nearest names, and the list, for any other.
    """
    key = name.strip().lower()
    found = ONLINE.get(key)
    if found is not None:
        return found
    base = ONLINE.get(key.removesuffix(WEIGHT_ONLY)) if key.endswith(WEIGHT_ONLY) else None
    if base is not None and base.scheme.activation is not None:
        return base.weight_only()
    near = get_close_matches(key, ONLINE, n=3, cutoff=0.5)
    raise Unsupported(
        f"no such quantization: {name!r}", wanted=", ".join(ONLINE),
        remedy="perhaps " + " or ".join(near) if near else "--quantization fp8_per_channel",
    )
