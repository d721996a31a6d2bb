"""Shared exponents on their boundaries, NVFP4's two levels by tool, integer scales."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from anybit.numerics.codec import decode
from anybit.numerics.scales import (
    NVFP4_RECIPES,
    SHARED_EXPONENTS,
    asymmetric_scale,
    largest_exponent,
    quotient,
    shared_exponent,
    symmetric_scale,
)


def amax(name: str) -> float:
    """A boundary value as the document writes it: "6", "6+" (the next float32), "7-" (the one before)."""
    value = torch.tensor(float(name.rstrip("+-")))
    towards = {"+": math.inf, "-": -math.inf}.get(name[-1])
    return value.item() if towards is None else torch.nextafter(value, torch.tensor(towards)).item()


# docs/formats/numerics.md §5, both tables, literally
FP4_AMAX = "4 4+ 5 6 6+ 7- 7 7.5 8- 8"
FP4_ROWS = {
    "floor": "0 0 0 0 0 0 0 0 0 1",
    "even": "0 0 0 0 0 0 1 1 1 1",
    "ceil": "0 1 1 1 1 1 1 1 1 1",
    "rceil": "0 0 0 0 1 1 1 1 1 1",
    "round_down": "-1 -1 -1 0 0 0 0 0 0 0",
    "quark_floor": "0 0 0 0 0 0 0 0 1 1",
}
OTHER_AMAX = {
    "fp6_e2m3": "7.5 7.5+ 7.75- 7.75",
    "fp6_e3m2": "28 28+ 30- 30",
    "fp8_e4m3fn": "448 448+ 496- 496",
}
OTHER_ROWS = {"floor": "0 0 0 0", "even": "0 0 0 1", "ceil": "1 1 1 1", "rceil": "0 1 1 1", "round_down": "0 0 0 0"}


def exponents(recipe: str, values: str, element: str) -> list[int]:
    absmax = torch.tensor([amax(name) for name in values.split()])
    return [int(code) - 127 for code in shared_exponent(recipe, absmax, element)]


@pytest.mark.parametrize("recipe", FP4_ROWS)
def test_fp4_exponents_on_the_boundaries(recipe: str) -> None:
    assert exponents(recipe, FP4_AMAX, "fp4_e2m1") == [int(x) for x in FP4_ROWS[recipe].split()]


@pytest.mark.parametrize("recipe", OTHER_ROWS)
@pytest.mark.parametrize("element", OTHER_AMAX)
def test_wider_exponents_on_the_boundaries(recipe: str, element: str) -> None:
    assert exponents(recipe, OTHER_AMAX[element], element) == [int(x) for x in OTHER_ROWS[recipe].split()]


def test_largest_exponents_are_those_of_the_document() -> None:
    found = [largest_exponent(f) for f in ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3fn", "fp8_e5m2")]
    assert found == [2, 2, 4, 8, 15]


@pytest.mark.parametrize("recipe", ["floor", "even", "ceil", "rceil", "round_down"])
@pytest.mark.parametrize("element", ["fp4_e2m1", "fp6_e3m2", "fp8_e4m3fn"])
def test_exponents_follow_the_power_of_two_exactly(recipe: str, element: str) -> None:
    """Scaling amax by 2^k moves the exponent by k: no float logarithm is involved."""
    base = torch.rand(500, generator=torch.Generator().manual_seed(0)) + 1
    base = torch.cat([base, torch.tensor([1.0, 1.5, 1.75, 1.9999999])])
    here = shared_exponent(recipe, base, element).int()
    for k in (-100, -7, 1, 60):
        assert torch.equal(shared_exponent(recipe, base * 2.0**k, element).int(), here + k)


@pytest.mark.parametrize("element", ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3fn"])
def test_rceil_is_the_smallest_exponent_that_does_not_saturate(element: str) -> None:
    top = {"fp4_e2m1": 6.0, "fp6_e2m3": 7.5, "fp6_e3m2": 28.0, "fp8_e4m3fn": 448.0}[element]
    absmax = torch.exp2(torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 40 - 20)
    scale = decode("e8m0", shared_exponent("rceil", absmax, element)).double()
    assert bool((absmax / scale <= top).all())
    assert bool((absmax / (scale / 2) > top).all())


@pytest.mark.parametrize("recipe", SHARED_EXPONENTS)
def test_nan_infinity_and_the_ends_of_the_range(recipe: str) -> None:
    absmax = torch.tensor([math.nan, math.inf, 2.0**-140, 2.0**-126])
    codes = shared_exponent(recipe, absmax, "fp4_e2m1").tolist()
    assert codes[0] == 255
    assert codes[1] >= 252  # infinity saturates, at the end of e8m0 or of float32's exponents
    assert codes[2] == 0
    assert codes[3] <= 1


@pytest.mark.parametrize(("recipe", "code"), [
    ("floor", 0), ("even", 0), ("ceil", 0), ("rceil", 0), ("modelopt_rceil", 0),
    ("quark_floor", 104), ("quark_ceil", 104), ("autoround_floor", 125), ("vllm_mxfp8", 0),
])  # fmt: skip
def test_a_zero_block_gets_the_code_that_its_tool_stores(recipe: str, code: int) -> None:
    element = "fp8_e4m3fn" if recipe == "vllm_mxfp8" else "fp4_e2m1"
    assert shared_exponent(recipe, torch.zeros(1), element).item() == code


def test_log2_recipes_step_where_the_float_logarithm_does() -> None:  # docs/formats/fp8.md §7
    just_above = torch.nextafter(torch.tensor(448 * 2.0**-20), torch.tensor(1.0))
    assert shared_exponent("rceil", just_above, "fp8_e4m3fn").item() == 127 - 19
    assert shared_exponent("vllm_mxfp8", just_above, "fp8_e4m3fn").item() == 127 - 20


def test_quotients_of_numbers_and_tensors_are_rounded_once() -> None:
    """`127 / x` in torch is the reciprocal times 127: it differs for one x in four."""
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 0.01
    assert torch.equal(quotient(127, x), torch.from_numpy(np.float32(127) / x.numpy()))
    assert not torch.equal(127 / x, quotient(127, x))
    for number in (6, 127, 127.5, 255, 448, 2688, 7.5):
        assert torch.equal(quotient(x, number), torch.from_numpy(x.numpy() / np.float32(number)))


# --- NVFP4 ------------------------------------------------------------------------------------------------------------


def f32(x: float | np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float32)


def e4m3(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def e2m1(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)


def oracle(tool: str, x: np.ndarray) -> np.ndarray:
    """numerics.md §6 again in NumPy: x [G, 16] float32 -> values."""
    big, a = f32(np.abs(x).max()), np.abs(x).max(-1, keepdims=True)
    if tool == "modelopt":
        s2 = big / f32(2688)
        s1 = e4m3(np.clip(a / (f32(6) * s2), f32(2.0**-9), f32(448)))
        return e2m1(x / (s1 * s2)) * s1 * s2
    if tool == "compressed-tensors":
        g = f32(2688) / big
        s1 = e4m3(g * a / f32(6))
        return e2m1(x / (s1 / g)) * (s1 / g)
    if tool == "vllm":
        g = f32(2688) / big
        s1 = e4m3(g * (a * f32(1 / 6)))
        return e2m1(x * (f32(1) / (s1 * (f32(1) / g)))) * (s1 / g)
    if tool == "torchao":
        s2 = big / f32(2688)
        s1 = e4m3(np.clip(a / f32(6) / s2, f32(2.0**-6), f32(448)))
        return e2m1(x * ((f32(1) / s2) / s1)) * (s1 * s2)
    if tool == "torchao-single":
        s1 = e4m3(np.clip(a / f32(6), f32(2.0**-6), f32(448)))
        return e2m1(x * (f32(1) / s1)) * s1
    s2 = big / f32(2688)
    s1 = e4m3(a / f32(6) / s2)
    return e2m1(x / (s1 * s2)) * (s1 * s2)


def blocks(count: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 16, generator=generator) * torch.exp2(torch.randn(count, 1, generator=generator))


@pytest.mark.parametrize("tool", NVFP4_RECIPES)
def test_nvfp4_of_each_tool_equals_the_document_evaluated_in_numpy(tool: str) -> None:
    x = blocks()
    recipe = NVFP4_RECIPES[tool]
    ours = recipe.dequantize(*recipe.quantize(x))
    assert torch.equal(ours, torch.from_numpy(oracle(tool, x.numpy())))


@pytest.mark.parametrize("tool", NVFP4_RECIPES)
def test_a_zero_block_beside_others_is_exactly_zero(tool: str) -> None:
    x = blocks(4)
    x[2] = 0
    recipe = NVFP4_RECIPES[tool]
    assert torch.equal(recipe.dequantize(*recipe.quantize(x))[2], torch.zeros(16))
    assert torch.equal(recipe.dequantize(*recipe.quantize(torch.zeros(2, 16))), torch.zeros(2, 16))


@pytest.mark.parametrize(("tool", "byte"), [("modelopt", 0x38), ("compressed-tensors", 0x20), ("quark", 0x38), ("vllm", 0)])
def test_a_zero_block_stores_the_scale_that_its_tool_stores(tool: str, byte: int) -> None:
    x = blocks(4)
    x[2] = 0
    assert NVFP4_RECIPES[tool].quantize(x)[1][2].item() == byte


# --- integers ---------------------------------------------------------------------------------------------------------


def test_symmetric_scales_divide_by_the_largest_code_or_by_half_the_range() -> None:
    absmax = torch.tensor([12.7])
    assert torch.equal(symmetric_scale(absmax, 8), absmax / 127)
    assert torch.equal(symmetric_scale(absmax, 8, half=True), absmax / 127.5)
    assert torch.equal(symmetric_scale(absmax, 4, half=True), absmax / 7.5)


def test_asymmetric_scales_force_zero_into_the_range() -> None:
    low, high = torch.tensor([-1.0, 1.0, -5.0, 0.0]), torch.tensor([1.55, 2.55, -2.55, 0.0])
    scale, zero_point = asymmetric_scale(low, high, 8)
    assert torch.equal(scale, torch.tensor([2.55, 2.55, 5.0, 0.0]) / 255)
    assert zero_point.tolist() == [-28, -128, 127, 0]
