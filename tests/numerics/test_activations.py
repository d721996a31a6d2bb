"""Activation recipes: the documents evaluated again in NumPy, and what must hold for every recipe.

The recorded layer values of genuine checkpoints are compared in test_layer_values.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from anybit.errors import Inconsistent
from anybit.numerics.activations import RECIPES, quantize, quantize_dequantize
from anybit.schemes import ActivationSpec

E4M3 = "fp8_e4m3fn"
FP4 = "fp4_e2m1"


def token(recipe: str, element: str = "int8") -> ActivationSpec:
    return ActivationSpec(element, True, "token", recipe)


def group(recipe: str, element: str, size: int) -> ActivationSpec:
    return ActivationSpec(element, True, "group", recipe, group_size=size)


def static(recipe: str, element: str) -> ActivationSpec:
    return ActivationSpec(element, False, "tensor", recipe)


SPECS = {
    spec.recipe: spec
    for spec in (
        static("int8_static", "int8"), static("int8_static_divide", "int8"), static("int8_static_output", "int8"),
        token("int8_token"), token("int8_token_asym"), replace(token("llm_int8"), bound=6.0),
        token("torchao_int8_token"), token("torchao_int8_token_asym"), token("torchao_8da4w"),
        group("int4_group", "int4", 32),
        static("fp8_static", E4M3), static("fp8_static_divide", E4M3),
        ActivationSpec(E4M3, True, "tensor", "fp8_tensor"),
        token("fp8_token", E4M3), token("torchao_fp8_token", E4M3),
        group("fp8_group", E4M3, 128), group("fp8_group_divide", E4M3, 128), group("fp8_group_ue8m0", E4M3, 128),
        group("mxfp4_even", FP4, 32), group("mxfp8_log2", E4M3, 32), group("mx_even", "fp6_e3m2", 32),
        group("mx_floor", FP4, 32), group("mx_ceil", FP4, 32), group("mx_floor_autoround", FP4, 32),
        group("mx_rceil", FP4, 32), group("mx_rceil_torchao", E4M3, 32),
        group("mx_floor_torchao", FP4, 32), group("mx_ceil_torchao", FP4, 32), group("mx_even_torchao", FP4, 32),
        group("nvfp4", FP4, 16), group("nvfp4_reciprocal", FP4, 16), group("nvfp4_token", FP4, 16),
        group("torchao_nvfp4", FP4, 16), group("amdfp4", FP4, 16),
        group("fp4_ue5m3_autoround", FP4, 16),
    )
}  # fmt: skip
STATIC = {
    "scale": torch.tensor([0.03]),
    "global_scale": torch.tensor([600.0]),
    "output_scale": torch.tensor([0.03]),
}
DYNAMIC = {**STATIC, "scale": torch.tensor([1 / 600])}  # nvfp4_reciprocal's decode scale


def tensors(recipe: str) -> dict[str, Tensor]:
    if recipe == "torchao_nvfp4":
        return {}
    return DYNAMIC if recipe == "nvfp4_reciprocal" else STATIC


def inputs(rows: int = 17, columns: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(torch.randn(rows, 1, generator=generator))
    return x.bfloat16().float()


def run(recipe: str, x: Tensor) -> Tensor:
    return quantize_dequantize(x, SPECS[recipe], tensors(recipe))


def test_every_recipe_is_tested_here() -> None:
    assert set(SPECS) == set(RECIPES)


# relative root mean square error on Gaussian rows: 2 bits of significand about .1, 4 bits about .025, int8 about .01
COARSE = {"int4_group": 0.12, "fp6_e3m2": 0.06, FP4: 0.14, E4M3: 0.035, "int8": 0.03}


@pytest.mark.parametrize("recipe", RECIPES)
def test_values_stay_close_to_x(recipe: str) -> None:
    x = inputs()
    error = (run(recipe, x) - x).norm() / x.norm()
    bound = {"int8_static": 0.1, "int8_static_divide": 0.1, "int8_static_output": 0.1, "mx_ceil": 0.2,
             "mx_ceil_torchao": 0.2}.get(
        recipe, COARSE.get(recipe, COARSE.get(SPECS[recipe].element, 0.0))
    )
    assert 0 < error < bound


@pytest.mark.parametrize("recipe", RECIPES)
def test_zero_rows_and_groups_are_exactly_zero(recipe: str) -> None:
    x = inputs(5)
    x[2] = 0
    x[3, :128] = 0
    for case in (x, torch.zeros(2, 256)):
        assert torch.equal(run(recipe, case)[case == 0], torch.zeros(int((case == 0).sum())))


@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_in_a_row_is_neither_lost_nor_spread_to_other_rows(recipe: str) -> None:
    x = inputs(5)
    clean = run(recipe, x)
    x[1, 7] = math.nan
    result = run(recipe, x)
    assert math.isnan(result[1, 7].item())
    if RECIPES[recipe].by_row:
        assert torch.equal(result[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])


@pytest.mark.parametrize("recipe", [name for name, found in RECIPES.items() if found.by_row])
def test_a_token_does_not_depend_on_its_batch(recipe: str) -> None:
    x = inputs(6)
    assert torch.equal(run(recipe, x)[2:3], run(recipe, x[2:3]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_tokens_give_no_values(recipe: str) -> None:
    assert run(recipe, torch.zeros(0, 256)).shape == (0, 256)


@pytest.mark.parametrize("recipe", RECIPES)
def test_leading_dimensions_are_kept(recipe: str) -> None:
    x = inputs(6)
    assert torch.equal(run(recipe, x.view(2, 3, 256)), run(recipe, x).view(2, 3, 256))


@pytest.mark.parametrize("recipe", [name for name, spec in SPECS.items() if spec.granularity == "group"])
def test_a_short_last_group_has_its_own_scale(recipe: str) -> None:
    x = inputs(4)
    short = 256 - SPECS[recipe].group_size // 2
    if recipe in ("nvfp4_token", "torchao_nvfp4"):  # the columns cut off would change the row's own scale
        x[:, short:] = 0
    assert torch.equal(run(recipe, x[:, :short]), run(recipe, torch.cat([x[:, :short], torch.zeros(4, 256 - short)], 1))[:, :short])


@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_have_the_dtype_of_their_element(recipe: str) -> None:
    result = quantize(inputs(2), SPECS[recipe], tensors(recipe))
    assert result.codes.dtype == (torch.int8 if result.element.startswith("int") else torch.uint8)
    assert result.codes.shape == (2, 256)
    assert result.scale.dtype == torch.float32


@pytest.mark.parametrize("recipe", [name for name, found in RECIPES.items() if found.tensors])
def test_a_static_recipe_without_its_tensor_is_refused(recipe: str) -> None:
    with pytest.raises(Inconsistent):
        quantize_dequantize(inputs(1), SPECS[recipe], {})


def test_the_recipe_sees_float32_whatever_the_dtype_of_x() -> None:
    x = inputs(3)
    assert torch.equal(run("fp8_token", x.bfloat16()), run("fp8_token", x))


# --- the documents again, in NumPy ------------------------------------------------------------------------------------


def f32(x: float | np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float32)


def sat8(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -128, 127)


def e4m3(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def e2m1(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)


def row_max(x: np.ndarray) -> np.ndarray:
    return np.abs(x).max(-1, keepdims=True)


def int8_token(x: np.ndarray) -> np.ndarray:
    a = row_max(x)
    return sat8(np.rint(x * (f32(127) / a))) * (a / f32(127))


def int8_token_asym(x: np.ndarray) -> np.ndarray:
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    s = (high - low) / f32(255)
    z = np.rint(f32(-128) - low / s)
    return (sat8(np.rint(x * (f32(1) / s)) + z) - z) * s


def fp8_token(x: np.ndarray) -> np.ndarray:
    s = np.maximum(row_max(x) / f32(448), f32(1 / (448 * 512)))
    return e4m3(x / s) * s


def torchao_int8_token(x: np.ndarray) -> np.ndarray:
    s = np.maximum(row_max(x) / f32(127.5), f32(2.0**-23))
    return sat8(np.rint(x * (f32(1) / s))) * s


def torchao_8da4w(x: np.ndarray) -> np.ndarray:
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    s = np.maximum((high - low) / f32(255), f32(1.17549435e-38))
    z = np.clip(-128 - np.rint(low / s), -128, 127)
    return (sat8(np.rint(x * (f32(1) / s)) + z) - z) * s


def fp8_group_divide(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(len(x), -1, 128)
    s = np.maximum(row_max(groups), f32(1e-10)) / f32(448)
    return (e4m3(groups / s) * s).reshape(x.shape)


def fp8_group(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(len(x), -1, 128)
    s = np.maximum(row_max(groups), f32(1e-10)) / f32(448)
    return (e4m3(groups * (f32(1) / s)) * s).reshape(x.shape)


def mxfp4_even(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(len(x), -1, 32)
    field = (row_max(groups).view(np.int32) + 2**21) >> 23
    s = f32(2.0) ** f32(np.maximum(field - 2, 0) - 127)
    return (e2m1(groups / s) * s).reshape(x.shape)


def nvfp4(x: np.ndarray) -> np.ndarray:
    g, groups = f32(600), x.reshape(len(x), -1, 16)
    s = e4m3(g * (row_max(groups) * f32(1 / 6)))
    return (e2m1(groups * (f32(1) / (s * (f32(1) / g)))) * (s / g)).reshape(x.shape)


def mx_floor_autoround(x: np.ndarray) -> np.ndarray:
    """quant_mx as auto_round.md §5 writes it, element rounding included."""
    groups = x.reshape(len(x), -1, 32)
    e = np.clip(np.floor(np.log2(row_max(groups))) - 2, -127, 127)
    t = np.clip(groups / f32(2) ** e, -6, 6)
    p = np.maximum(np.floor(np.log2(np.maximum(np.abs(t), f32(1e-30)))), 0)
    u = np.abs(t) / f32(2) ** p * 2
    up = np.floor(u + f32(0.5))
    r = np.sign(t) * np.where((u - 0.5) % 2 == 0, up - 1, up)
    return (np.clip(r / 2 * f32(2) ** p, -6, 6) * f32(2) ** e).reshape(x.shape)


@pytest.mark.parametrize(
    "again",
    [int8_token, int8_token_asym, fp8_token, torchao_int8_token, torchao_8da4w, fp8_group, fp8_group_divide, mxfp4_even,
     nvfp4, mx_floor_autoround],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_recipe_equals_its_document_evaluated_in_numpy(again: object) -> None:
    assert callable(again)
    x = inputs(400, seed=5)
    ours = run(again.__name__, x)
    assert torch.equal(ours + 0.0, torch.from_numpy(again(x.numpy())) + 0.0)


# --- worked cases -----------------------------------------------------------------------------------------------------


def test_a_zero_row_of_fp8_token_has_the_floor_as_scale() -> None:  # docs/formats/modelopt.md §10
    result = quantize(torch.zeros(1, 8), SPECS["fp8_token"])
    assert result.scale.item() == pytest.approx(4.3596542e-06, rel=1e-7)
    assert result.codes.tolist() == [[0] * 8]


def test_the_bound_of_fbgemm_limits_the_row_maximum() -> None:  # docs/formats/fbgemm_fp8.md §5
    x = torch.tensor([[100.0, 1.0, -3.0, 5000.0]])
    bounded = replace(SPECS["fp8_token"], bound=1200.0)
    result = quantize(x, bounded)
    assert result.scale.item() == torch.tensor(1200.0 / 448).item()
    assert result.dequantize()[0, 3].item() == (448 * result.scale).item()


def test_zero_points_are_added_after_rounding() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -300.0, 300.0]])
    stored = {"scale": torch.tensor(1.0), "zero_point": torch.tensor([-1], dtype=torch.int8)}
    result = quantize(x, SPECS["int8_static"], stored)
    assert result.codes.tolist() == [[-1, 1, 1, -128, 127]]
    assert result.dequantize().tolist() == [[0, 2, 2, -127, 128]]


def test_reciprocal_and_division_are_different_recipes() -> None:
    x, s = torch.tensor([[45.5]]), {"scale": torch.tensor([7.0])}  # 45.5 / 7 is 6.5; 45.5 * float32(1/7) is above
    assert quantize(x, SPECS["int8_static_divide"], s).codes.item() == 6
    assert quantize(x, SPECS["int8_static"], s).codes.item() == 7


def test_a_constant_row_is_zero_under_asymmetric_token_scales() -> None:  # compressed_tensors.md §7 A2
    x = torch.full((2, 16), 3.0)
    x[1] = inputs(1, 16)
    assert torch.equal(run("int8_token_asym", x)[0], torch.zeros(16))


def test_a_nearly_constant_row_does_not_overflow_its_zero_point() -> None:
    x = torch.full((1, 16), 1.0)
    x[0, 0] = 1.0000001
    result = run("int8_token_asym", x)
    assert bool(result.isfinite().all())


def test_an_output_scale_of_zero_leaves_the_output_alone() -> None:
    y = inputs(3)
    zero = {"output_scale": torch.zeros(1)}
    assert torch.equal(quantize_dequantize(y, SPECS["int8_static_output"], zero), y)


def test_a_dying_mxfp4_group_is_zero_not_a_huge_code() -> None:
    x = torch.zeros(1, 64)
    x[0, 0] = 2.0**-126
    assert torch.equal(run("mxfp4_even", x), torch.zeros(1, 64))


def test_seven_of_mxfp4_goes_up_in_even_and_saturates_in_floor() -> None:
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([7.0, 5.0, 0.5])
    assert run("mxfp4_even", x)[0, :3].tolist() == [8, 4, 0]
    assert run("mx_floor", x)[0, :3].tolist() == [6, 4, 0.5]


def test_a_vanishing_nvfp4_block_is_zero() -> None:
    x = torch.zeros(1, 16)
    x[0, 0] = 2.0**-11 * 6 / 600  # block scale rounds to 0
    for recipe in ("nvfp4", "nvfp4_reciprocal"):
        assert torch.equal(run(recipe, x), torch.zeros(1, 16))


def test_a_block_above_the_calibrated_maximum_saturates() -> None:
    x = torch.full((1, 16), 1000.0)
    assert run("nvfp4", x)[0, 0].item() == pytest.approx(448 * 6 / 600)


def test_nvfp4_by_token_survives_tiny_rows() -> None:
    x = inputs(3)
    x[1] *= 2.0**-130
    result = run("nvfp4_token", x)
    assert bool(result.isfinite().all())
    assert torch.equal(result[[0, 2]], run("nvfp4_token", x[[0, 2]]))


def test_outlier_columns_of_llm_int8_stay_and_count_in_their_rows_maximum() -> None:  # bitsandbytes.md §3
    x = torch.tensor([[1.0, 8.0, -0.5], [2.0, 3.0, 0.25]])
    result = quantize(x, SPECS["llm_int8"])
    assert result.kept_columns is not None
    assert result.kept_columns.tolist() == [1]
    assert result.codes.tolist() == [[127, 0, -64], [85, 0, 11]]  # the second row's maximum is the 3 in column 1
    assert torch.equal(result.dequantize()[:, 1], x[:, 1])


def test_llm_int8_without_a_threshold_has_no_outliers() -> None:
    result = quantize(inputs(2), replace(SPECS["llm_int8"], bound=0.0))
    assert result.kept_columns is not None
    assert result.kept_columns.numel() == 0


def test_the_largest_value_of_torchao_int8_is_clipped() -> None:
    result = quantize(torch.tensor([[127.5, 0.0], [-127.5, 0.0]]), SPECS["torchao_int8_token"])
    assert result.codes[:, 0].tolist() == [127, -128]


def test_torchao_scales_may_cover_the_tensor() -> None:
    x = torch.tensor([[1.0, 0.0], [-4.0, 2.0]])
    spec = replace(SPECS["torchao_int8_token"], granularity="tensor")
    assert quantize(x, spec).scale.tolist() == [[(torch.tensor(4.0) / 127.5).item()]]


def test_ue8m0_scales_are_powers_of_two() -> None:
    result = quantize(inputs(4), SPECS["fp8_group_ue8m0"])
    assert bool((torch.frexp(result.scale)[0] == 0.5).all())


def test_mx_scales_come_with_their_stored_codes() -> None:
    result = quantize(inputs(4), SPECS["mx_even"])
    assert result.scale_format == "e8m0"
    assert result.scale_codes is not None
    assert torch.equal(torch.exp2(result.scale_codes.float() - 127), result.scale)
