"""Trials find wrong kernels and pass right ones: the judge of `prove`, `tune` and `bench` is judged here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from anybit.checkpoints.online import quantizer
from anybit.kernels.catalogue import implementation, kernel
from anybit.kernels.product import Product, product_of
from anybit.kernels.request import NARROW_ADDER, REGIMES
from anybit.kernels.trials import compare, copies_for, probes, sample_weight
from anybit.schemes import Layer, Offset, ScaleLevel, Scheme, dense, group
from anybit.weights import QuantizedWeight

SCHEMES: Mapping[str, Scheme] = {
    **{name: quantizer(name).scheme_of(Layer(name, "linear", (96, 256), dense("bfloat16")))  # type: ignore[misc]
       for name in ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8_per_channel", "mxfp8", "mxfp4", "nvfp4",
                    "int4_g128", "int4_g32_asym")},
    "q4_k": Scheme("uint4", (ScaleLevel("uint6", group(32)), ScaleLevel("float16", group(256))),
                   offset=Offset("minimum", "uint6", group(32), (ScaleLevel("float16", group(256)),), subtract=True)),
    "act-order": Scheme("uint4", (ScaleLevel("float16", group(64), placement="gathered"),),
                        offset=Offset("zero_point", "uint4", group(64), placement="gathered"), act_order=True),
    "nf4": Scheme("nf4", (ScaleLevel("float32", (1, 64), placement="flat"),)),
}


def reference(weight: QuantizedWeight) -> Product:
    stored = implementation(kernel("torch-tiled")).prepare(weight, torch.float32, dict.fromkeys(REGIMES, "torch-tiled"))
    return product_of(weight, stored)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_sample_of_any_scheme_is_finite_and_its_reference_product_is_within_the_bound(name: str) -> None:
    weight = sample_weight(SCHEMES[name], (96, 256), seed=3)
    assert isinstance(weight, QuantizedWeight)
    assert torch.isfinite(weight.dequantize()).all()
    assert weight.dequantize().abs().max() > 0
    for label, x in probes(256, torch.float32, "cpu"):
        assert compare(weight, reference(weight), x).ok, label


def test_samples_differ_by_seed() -> None:
    first, second = (sample_weight(SCHEMES["int4_g128"], (96, 256), seed) for seed in (1, 2))
    assert not torch.equal(first.dequantize(), second.dequantize())


def test_probes_hold_outliers_zero_rows_and_constant_rows() -> None:
    found = dict(probes(128, torch.float32, "cpu"))
    assert sorted(x.shape[0] for label, x in found.items() if label.startswith("normal")) == [
        1, 3, 17, 40, 65, 130, 300]
    outliers = found["outlier columns, M = 17"].abs()
    assert outliers.max() > 50 * outliers.median()
    special = found["zero and constant rows, M = 9"]
    assert (special[0] == 0).all()
    assert (special[1] == special[1, 0]).all()


@pytest.mark.parametrize("change", ["one code", "one scale", "a swapped row", "a NaN"])
def test_a_wrong_kernel_is_outside_the_bound(change: str) -> None:
    weight = sample_weight(SCHEMES["int4_g128"], (96, 256), seed=5)
    assert isinstance(weight, QuantizedWeight)
    right = reference(weight)

    def wrong(x: torch.Tensor) -> torch.Tensor:
        if change == "one code":
            codes = weight.codes.clone()
            codes[7, 9] = -codes[7, 9] if codes[7, 9] not in (0, -8) else 3
            return reference(replace(weight, stored_codes=codes))(x)
        if change == "one scale":
            scale = weight.scales[0].clone()
            scale[5, 1] *= 1.25
            return reference(replace(weight, scales=(scale,)))(x)
        y = right(x)
        if change == "a NaN":
            y[0, 3] = torch.nan
            return y
        y[:, [1, 2]] = y[:, [2, 1]]
        return y

    x = next(x for label, x in probes(256, torch.float32, "cpu") if x.shape[0] == 17)
    assert not compare(weight, wrong, x).ok
    assert compare(weight, right, x).ok


def in_a_narrow_adder(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x W^T with sums of 128 products as Hopper adds fp8: 32 products and the sum so far, to 13 bits of the largest."""
    total = x.new_zeros(len(x), len(w), dtype=torch.float64)
    for block in range(0, x.shape[1], 128):
        held = torch.zeros_like(total)
        for k in range(block, block + 128, 32):
            terms = torch.cat([x[:, None, k : k + 32].double() * w[None, :, k : k + 32].double(), held[..., None]], -1)
            step = torch.exp2(terms.abs().amax(-1, keepdim=True).clamp(min=2.0**-80).log2().floor() - 13)
            held = ((terms / step).trunc() * step).sum(-1)
        total += held
    return total


def test_sums_in_a_narrow_adder_are_within_the_bound_of_a_kernel_that_says_so() -> None:
    weight = sample_weight(SCHEMES["fp8_per_channel"].weight_only(), (96, 256), seed=3)
    for label, x in probes(256, torch.float16, "cpu"):
        x = x[:20] / 8
        found = in_a_narrow_adder(x, weight.dequantize()).half()
        assert compare(weight, lambda _, y=found: y, x, rounds=f"sums of 128 products in {NARROW_ADDER}").worst <= 1, label
    assert not compare(weight, lambda _: found, x).ok


def test_a_kernel_that_rounds_weights_is_outside_the_bound_unless_it_says_so() -> None:
    weight = sample_weight(SCHEMES["int4_g128"], (96, 256), seed=6)

    def rounding(x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ weight.dequantize().to(torch.bfloat16).float().T).to(x.dtype)

    x = torch.randn(33, 256)
    assert not compare(weight, rounding, x).ok
    half = x.to(torch.bfloat16)
    assert compare(weight, rounding, half, rounds="weights to bfloat16").ok


def test_large_weights_are_compared_on_a_sample_that_holds_the_last_row() -> None:
    weight = sample_weight(dense("bfloat16"), (40000, 2048))
    y_of = weight.dequantize()

    def wrong(x: torch.Tensor) -> torch.Tensor:
        y = x @ y_of.T
        y[:, -1] += 1.0
        return y

    found = compare(weight, wrong, torch.randn(2, 2048))
    assert not found.ok
    assert found.place[1] == 39999


def test_copies_outgrow_the_cache() -> None:
    assert copies_for(2**30) == 2
    assert copies_for(10**6) * 10**6 >= 190e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_weights_in_silence_is_found_at_large_k_too(dtype: torch.dtype) -> None:
    weight = sample_weight(SCHEMES["int4_g128"], (256, 8192), seed=7)
    exact = weight.dequantize()

    def right(x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ exact.T).to(x.dtype)

    def rounding(x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ exact.to(torch.bfloat16).float().T).to(x.dtype)

    x = torch.randn(64, 8192).to(dtype)
    assert compare(weight, right, x).ok
    found = compare(weight, rounding, x)
    assert found.worst <= 1.0 or dtype != torch.bfloat16
    assert not found.ok
    assert "relative error" in found.fault or "bound" in found.fault
    assert compare(weight, rounding, x.to(torch.bfloat16), rounds="weights to bfloat16").ok


@pytest.mark.parametrize("between", [(1, 1), (2, 8), (9, 16 + 1), (33, 64), (65, 128), (129, 256), (257, 512)])
def test_every_range_of_rows_that_kernels_have_tiles_for_is_probed(between: tuple[int, int]) -> None:
    low, high = between
    assert any(low <= x.shape[0] <= high for _, x in probes(64, torch.float32, "cpu"))
