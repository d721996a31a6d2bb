"""The quantizer kernels that are compiled for each architecture: every recipe, as the products that take it launch it.

Torch-free. What a recipe is stands in kernels/triton/recipes.py. Integer recipes are compiled beside the int8 product,
all others beside the fp8 product, although the weight-only kernels launch them as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from anybit.kernels.compiling import CompileCase
from anybit.kernels.triton.recipes import ARITHMETIC, can_fake_quantize, compile_case
from anybit.platforms.archs import ARCHS
from anybit.schemes import ActivationSpec

__all__ = ["USUAL", "quantizer_cases"]

_FP8: Final = "fp8_e4m3fn"
_FP4: Final = "fp4_e2m1"


def _rows(element: str, recipe: str, *, dynamic: bool = True, symmetric: bool = True) -> ActivationSpec:
    return ActivationSpec(element, dynamic, "token" if dynamic else "tensor", recipe, symmetric=symmetric)


def _groups(element: str, recipe: str, size: int) -> ActivationSpec:
    return ActivationSpec(element, True, "group", recipe, size)


# the form in which checkpoints have each recipe
USUAL: Final[Mapping[str, ActivationSpec]] = MappingProxyType({spec.recipe: spec for spec in (
    _rows("int8", "int8_static", dynamic=False), _rows("int8", "int8_static_divide", dynamic=False),
    _rows("int8", "int8_token"), _rows("int8", "int8_token_asym", symmetric=False),
    _rows("int8", "torchao_int8_token"), _rows("int8", "torchao_int8_token_asym", symmetric=False),
    _rows("int8", "torchao_8da4w", symmetric=False), _groups("int4", "int4_group", 32),
    _rows(_FP8, "fp8_static", dynamic=False), _rows(_FP8, "fp8_static_divide", dynamic=False),
    ActivationSpec(_FP8, True, "tensor", "fp8_tensor"), _rows(_FP8, "fp8_token"),
    _groups(_FP8, "fp8_group", 128), _groups(_FP8, "fp8_group_divide", 128), _groups(_FP8, "fp8_group_ue8m0", 128),
    _rows("fp8_e5m2", "torchao_fp8_token"),
    _groups(_FP8, "mxfp8_log2", 32), _groups("fp6_e2m3", "mx_even", 32), _groups("fp6_e3m2", "mx_ceil", 32),
    *(_groups(_FP4, recipe, 32) for recipe in (
        "mxfp4_even", "mx_floor", "mx_floor_autoround", "mx_rceil", "mx_rceil_torchao", "mx_floor_torchao",
        "mx_ceil_torchao", "mx_even_torchao")),
    *(_groups(_FP4, recipe, 16) for recipe in (
        "nvfp4", "nvfp4_reciprocal", "nvfp4_token", "torchao_nvfp4", "amdfp4", "fp4_ue5m3_autoround")),
)})  # fmt: skip
assert set(USUAL) == set(ARITHMETIC)


def quantizer_cases(kernel: str, arch: str, *, integer: bool) -> list[CompileCase]:
    """Every integer recipe, or every other one: values where products emulate, codes where they multiply codes."""
    return [
        compile_case(kernel, arch, f"quantizer {recipe}{' as values' if values else ''}", spec, values=values)
        for recipe, spec in USUAL.items()
        if spec.element.startswith("int") == integer
        for values in (False, True)
        if (can_fake_quantize(spec) is None if values else _multiplies_codes(spec, arch))
    ]


def _multiplies_codes(spec: ActivationSpec, arch: str) -> bool:
    return spec.element in ("int8", _FP8, "fp8_e5m2") or can_fake_quantize(spec) is not None or bool(ARCHS[arch].scaled)
