"""Weight quantization: zeros, errors, NaN, and each rule's codes on cases small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from anybit.errors import Damaged
from anybit.numerics import quantize as module
from anybit.numerics.codec import decode
from anybit.numerics.quantize import WEIGHT_RULES, quantize_weight


def weight(rows: int = 256, columns: int = 384, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("rule", WEIGHT_RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_damage_not_codes(rule: str, value: float) -> None:
    w = weight(4)
    w[1, 3] = value
    with pytest.raises(Damaged) as caught:
        quantize_weight(rule, w)
    assert caught.value.found == "1 of 1536 elements"


@pytest.mark.parametrize("rows", [257, 300])  # the last slab: a row, or 44
@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_slabs_give_what_the_whole_gives(rule: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(rows)
    whole = quantize_weight(rule, w)
    monkeypatch.setattr(module, "SLAB", 1)  # 128 rows at a time
    slabs = quantize_weight(rule, w)
    assert torch.equal(whole.codes, slabs.codes)
    assert len(whole.scales) == len(slabs.scales)
    assert all(torch.equal(a, b) for a, b in zip(whole.scales, slabs.scales, strict=True))


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_experts_are_quantized_one_by_one(rule: str) -> None:
    stack = torch.stack([weight(seed=1), weight(seed=2) * 5])
    whole, second = quantize_weight(rule, stack), quantize_weight(rule, stack[1])
    assert torch.equal(whole.codes[1], second.codes)
    assert all(torch.equal(a[1], b) for a, b in zip(whole.scales, second.scales, strict=True))


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_bfloat16_weights_are_taken_as_they_are(rule: str) -> None:
    w = weight(130).bfloat16()
    assert torch.equal(quantize_weight(rule, w).codes, quantize_weight(rule, w.float()).codes)


def test_nvfp4_fills_both_levels() -> None:
    w = torch.zeros(1, 32)
    w[0, :3] = torch.tensor([12.0, 6.0, -1.0])
    w[0, 16] = 2688.0
    result = quantize_weight("nvfp4", w)
    block, whole = result.scales
    assert whole.tolist() == [[1.0]]  # 2688 / (6 * 448)
    assert decode("fp8_e4m3fn", block).tolist() == [[2.0, 448.0]]
    assert decode("fp4_e2m1", result.codes)[0, [0, 1, 2, 16]].tolist() == [6, 3, -0.5, 6]


def test_mxfp4_takes_the_even_exponent_and_mxfp8_the_rounded_up_one() -> None:
    w = torch.zeros(1, 64)
    w[0, 0], w[0, 32] = 6.9, 7.0
    assert quantize_weight("mxfp4", w).scales[0].tolist() == [[127, 128]]
    w[0, 0], w[0, 32] = 448.0, 449.0
    assert quantize_weight("mxfp8", w).scales[0].tolist() == [[127, 128]]


def test_fp8_scales_have_the_shape_of_their_granularity() -> None:
    w = weight(300, 200)
    shapes = {rule: tuple(quantize_weight(rule, w).scales[0].shape) for rule in WEIGHT_RULES if rule.startswith("fp8")}
    assert shapes == {"fp8_per_tensor": (1, 1), "fp8_per_channel": (300, 1), "fp8_per_block": (3, 2)}


def test_a_block_scale_is_the_maximum_of_its_block() -> None:
    w = weight(300, 200)
    scale = quantize_weight("fp8_per_block", w).scales[0]
    assert scale[2, 1].item() == (w[256:, 128:].abs().max() / torch.tensor(448.0)).item()


def test_int8_uses_127_codes_on_both_sides() -> None:
    w = torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    result = quantize_weight("int8_per_channel", w)
    assert result.codes.tolist() == [[127, -127, 64], [0, 0, 0]]
    assert result.scales[0][1].item() == 0


def test_asymmetric_int8_reaches_both_ends() -> None:
    result = quantize_weight("int8_per_channel_asym", torch.tensor([[-1.0, 0.0, 1.55]]))
    assert result.zero_point is not None
    assert result.zero_point.tolist() == [[-28]]
    assert result.codes.tolist() == [[-128, -28, 127]]


def test_asymmetric_int4_holds_zero_exactly() -> None:
    w = weight(64, 64)
    w[:, ::7] = 0
    result = quantize_weight("int4_g32_asym", w)
    assert result.zero_point is not None
    spread = result.zero_point.repeat_interleave(32, dim=1)
    assert torch.equal(result.codes[w == 0], spread[w == 0])


def test_int4_chooses_the_divisor_with_the_least_error() -> None:
    w = weight(64, 256)
    result = quantize_weight("int4_g128", w)
    groups = w.view(64, 2, 128)
    absmax = groups.abs().amax(-1, keepdim=True)
    errors = []
    for divisor in (7.0, 8.0, 9.0):
        s = (absmax / torch.tensor(divisor)).bfloat16().float()
        errors.append(((groups / s).round().clamp(-8, 7) * s - groups).square().sum(-1))
    chosen = (result.codes.view(64, 2, 128).float() * result.scales[0].float()[..., None] - groups).square().sum(-1)
    assert torch.allclose(chosen, torch.stack(errors).amin(0), rtol=1e-5, atol=0)
    assert bool((result.scales[0] > 0).all())
