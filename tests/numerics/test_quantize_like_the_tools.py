"""Online recipes against the genuine tools' formulas (docs/formats/numerics.md §5, §6, §8) in numpy and ml_dtypes.

Nothing of anybit but the function under test: scales in float32 as the tools compute them, casts by ml_dtypes.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from anybit.numerics.quantize import quantize_weight

F32 = NDArray[np.float32]
ROWS, COLUMNS = 160, 320


def weight(spread: float) -> torch.Tensor:
    """bfloat16 weights; rows of very different size, one of zeros, blocks of zeros."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(ROWS, COLUMNS, generator=generator) * torch.exp(torch.randn(ROWS, 1, generator=generator) * spread)
    w[7] = 0
    w[9, 32:96] = 0
    return w.bfloat16()


def both(spread: float) -> tuple[torch.Tensor, F32]:
    w = weight(spread)
    return w, w.float().numpy()


def cast(x: F32, dtype: type, largest: float) -> F32:
    """x rounded to a narrow float, half to even, saturating."""
    return np.clip(x, -largest, largest).astype(dtype).astype(np.float32)


def safe(scale: F32) -> F32:
    return np.where(scale == 0, np.float32(1), scale)


def codes_as(result: torch.Tensor, dtype: type) -> F32:
    return result.numpy().astype(np.uint8).view(dtype).astype(np.float32)


def nibbles_as_fp4(result: torch.Tensor) -> F32:
    return result.numpy().astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


SPREADS = pytest.mark.parametrize("spread", [0.0, 3.0])


@SPREADS
def test_fp8_per_channel_is_llm_compressors_dynamic_recipe(spread: float) -> None:
    w, x = both(spread)
    scale = np.abs(x).max(1, keepdims=True) / np.float32(448)
    result = quantize_weight("fp8_per_channel", w)
    assert np.array_equal(result.scales[0].numpy(), scale)
    assert np.array_equal(codes_as(result.codes, ml_dtypes.float8_e4m3fn),
                          cast(x / safe(scale), ml_dtypes.float8_e4m3fn, 448))


@SPREADS
def test_fp8_per_tensor_is_vllms_but_for_ties_of_the_reciprocal(spread: float) -> None:
    w, x = both(spread)
    scale = np.abs(x).max() / np.float32(448)
    result = quantize_weight("fp8_per_tensor", w)
    assert result.scales[0].item() == scale
    found = codes_as(result.codes, ml_dtypes.float8_e4m3fn)
    assert np.array_equal(found, cast(x / scale, ml_dtypes.float8_e4m3fn, 448))
    kernels = cast(x * (np.float32(1) / scale), ml_dtypes.float8_e4m3fn, 448)  # vLLM multiplies by the reciprocal
    assert (found != kernels).mean() < 1e-4


@SPREADS
def test_fp8_per_block_is_deepseeks_for_whole_and_short_blocks(spread: float) -> None:
    w, x = both(spread)
    result = quantize_weight("fp8_per_block", w)
    found = codes_as(result.codes, ml_dtypes.float8_e4m3fn)
    for i in range(0, ROWS, 128):
        for j in range(0, COLUMNS, 128):
            block = x[i : i + 128, j : j + 128]
            scale = np.abs(block).max() / np.float32(448)
            assert result.scales[0][i // 128, j // 128].item() == scale
            assert np.array_equal(found[i : i + 128, j : j + 128], cast(block / scale, ml_dtypes.float8_e4m3fn, 448))


@SPREADS
def test_int8_per_channel_is_vllms_online_recipe_in_float32(spread: float) -> None:
    w, x = both(spread)
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    result = quantize_weight("int8_per_channel", w)
    assert np.array_equal(result.scales[0].numpy(), scale)
    assert np.array_equal(result.codes.numpy(), np.clip(np.round(x / safe(scale)), -127, 127))


@SPREADS
def test_int8_asym_keeps_zero_and_spans_the_range(spread: float) -> None:
    w, x = both(spread)
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    scale = (high - low) / np.float32(255)
    zero = np.where(scale == 0, 0, np.clip(np.round(-128 - low / safe(scale)), -128, 127))
    result = quantize_weight("int8_per_channel_asym", w)
    assert result.zero_point is not None
    is_row = scale[:, 0] != 0
    assert np.array_equal(result.scales[0].numpy(), scale)
    assert np.array_equal(result.zero_point.numpy()[is_row], zero[is_row])
    wanted = np.clip(np.round(x / safe(scale)) + zero, -128, 127)
    assert np.array_equal(result.codes.numpy()[is_row], wanted[is_row])


@pytest.mark.parametrize(("rule", "dtype", "largest", "mantissa", "power"), [
    ("mxfp4", ml_dtypes.float4_e2m1fn, 6.0, 1, 2), ("mxfp6_e2m3", ml_dtypes.float6_e2m3fn, 7.5, 3, 2),
    ("mxfp6_e3m2", ml_dtypes.float6_e3m2fn, 28.0, 2, 4),
])  # fmt: skip
@SPREADS
def test_mx_below_8_bits_takes_quarks_even_exponent(
    spread: float, rule: str, dtype: type, largest: float, mantissa: int, power: int
) -> None:
    w, x = both(spread)
    blocks = x.reshape(ROWS, -1, 32)
    bits = np.abs(blocks).max(-1).view(np.int32) + (1 << (22 - mantissa))
    exponent = ((bits >> 23) & 255) - 127 - power
    result = quantize_weight(rule, w)
    scale = result.scales[0].numpy().astype(np.int32) - 127
    is_block = np.abs(blocks).max(-1) > 0
    assert np.array_equal(scale[is_block], exponent[is_block])
    wanted = cast(blocks / np.exp2(scale[..., None]).astype(np.float32), dtype, largest)
    assert np.array_equal(codes_as(result.codes, dtype).reshape(blocks.shape), wanted)


@SPREADS
def test_mxfp8_takes_the_exponent_of_modelopt_and_vllm(spread: float) -> None:
    w, x = both(spread)
    blocks = x.reshape(ROWS, -1, 32)
    largest = np.abs(blocks).max(-1)
    result = quantize_weight("mxfp8", w)
    scale = result.scales[0].numpy().astype(np.int32) - 127
    power = np.exp2(scale.astype(np.float64))
    is_block = largest > 0
    assert (largest / power <= 448)[is_block].all()  # nothing saturates
    assert (largest / power > 224)[is_block].all()  # and half the scale would
    wanted = cast(blocks / power[..., None].astype(np.float32), ml_dtypes.float8_e4m3fn, 448)
    assert np.array_equal(codes_as(result.codes, ml_dtypes.float8_e4m3fn).reshape(blocks.shape), wanted)


@SPREADS
def test_nvfp4_is_modelopts(spread: float) -> None:
    w, x = both(spread)
    blocks = x.reshape(ROWS, -1, 16)
    whole = np.abs(x).max() / np.float32(6 * 448)
    largest = np.abs(blocks).max(-1)
    raw = np.where(largest == 0, np.float32(1), largest / (np.float32(6) * whole))
    scale = np.clip(raw, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    result = quantize_weight("nvfp4", w)
    assert result.scales[1].item() == whole
    assert np.array_equal(codes_as(result.scales[0], ml_dtypes.float8_e4m3fn), scale)
    wanted = cast(blocks / (scale * whole)[..., None], ml_dtypes.float4_e2m1fn, 6)
    assert np.array_equal(nibbles_as_fp4(result.codes).reshape(blocks.shape), wanted)


@pytest.mark.parametrize("size", [32, 64, 128])
@SPREADS
def test_asymmetric_int4_has_the_scale_and_zero_point_of_the_tools(spread: float, size: int) -> None:
    w, x = both(spread)
    short = np.pad(x, ((0, 0), (0, -COLUMNS % size))).reshape(ROWS, -1, size)
    low, high = np.minimum(short.min(-1), 0), np.maximum(short.max(-1), 0)
    scale = ((high - low) / np.float32(15)).astype(ml_dtypes.bfloat16).astype(np.float32)
    result = quantize_weight(f"int4_g{size}_asym", w)
    assert np.array_equal(result.scales[0].float().numpy(), scale)
    zero = np.clip(np.round(-low / safe(scale)), 0, 15)
    assert result.zero_point is not None
    assert np.array_equal(result.zero_point.numpy(), zero)
    wanted = np.clip(np.round(short / safe(scale)[..., None]) + zero[..., None], 0, 15)
    assert np.array_equal(result.codes.numpy(), wanted.reshape(ROWS, -1)[:, :COLUMNS])


@pytest.mark.parametrize("size", [32, 64, 128])
def test_symmetric_int4_is_no_worse_than_each_tools_choice(size: int) -> None:
    """absmax / 7.5 is compressed-tensors' and Quark's, / 7 and / 8 are others'; the rule takes the best of 7, 8 and 9."""
    w, x = both(0.0)
    result = quantize_weight(f"int4_g{size}", w)
    groups = np.pad(x, ((0, 0), (0, -COLUMNS % size))).reshape(ROWS, -1, size)
    made = np.pad(result.codes.numpy().astype(np.float32), ((0, 0), (0, -COLUMNS % size))).reshape(groups.shape)
    error = ((made * result.scales[0].float().numpy()[..., None] - groups) ** 2).sum()
    for divisor in (7.0, 7.5, 8.0):
        raw = np.abs(groups).max(-1, keepdims=True) / np.float32(divisor)
        scale = raw.astype(ml_dtypes.bfloat16).astype(np.float32)
        tool = np.clip(np.round(groups / safe(scale)), -8, 7) * scale
        assert error <= ((tool - groups) ** 2).sum()
