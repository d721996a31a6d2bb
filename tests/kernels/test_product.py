"""Layers as the plan runs them on this machine, in every dtype: within the derived bound of the float64 product.

Operands are exact (the float32 reference weight, the float32 value of the quantized activations), so what remains is
accumulation in float32, at most K * 2^-24 * |x| |W| in any order of summation, and the rounding to the dtype of x:
half an ulp, 2^-8 of the value for bfloat16, 2^-11 for float16.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import anybit
from anybit.checkpoints.checkpoint import Checkpoint
from anybit.kernels.catalogue import implementation
from anybit.kernels.product import Product, product_of
from anybit.kernels.request import REGIMES, Request
from anybit.numerics.activations import RECIPES, quantize_dequantize
from anybit.planning.choose import Choice, choose
from anybit.platforms import detect
from anybit.weights import Weight
from conftest import CHECKPOINTS, genuine

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FOLDERS = genuine("ct-*", "modelopt-*", "gptq-*", "awq-*", "gguf-q*", "gguf-nvfp4-*", "fp8-*")


@cache
def opened(name: str) -> Checkpoint:
    return anybit.open(CHECKPOINTS / name)


def first_layers(name: str) -> list[str]:
    """One layer of each scheme."""
    seen = {str(layer.scheme): layer.name for layer in opened(name).layers.values()
            if layer.kind == "linear" and layer.scheme.is_quantized}
    return list(seen.values())


def planned(name: str, layer: str, dtype: torch.dtype, kernel: str | None) -> tuple[Product, Weight]:
    weight = opened(name).read(layer)
    request = Request("linear", weight.scheme, weight.shape, str(dtype).removeprefix("torch."))
    choice = choose(request, detect("cpu"), kernel)
    assert isinstance(choice, Choice)
    kernels = {regime: spec.name for regime, (spec, _) in choice.kernels.items()}
    stored = implementation(choice.kernels["decode"][0]).prepare(weight, dtype, kernels)
    return product_of(weight, stored, "cpu"), weight


def wanted_and_bound(weight: Weight, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 product of the quantized operands, and the bound on the difference for x's dtype."""
    rows = x.float()
    if getattr(weight, "pre_scale", None) is not None:
        rows = rows * weight.pre_scale.float()
    if weight.scheme.activation is not None:
        rows = quantize_dequantize(rows, weight.scheme.activation, weight.activation)
    w = weight.dequantize().double()
    y = rows.double() @ w.T
    magnitude = rows.double().abs() @ w.abs().T
    if weight.bias is not None:
        y = y + weight.bias.double()
        magnitude = magnitude + weight.bias.double().abs()
    accumulated = (w.shape[1] + 1) * 2.0**-24 * magnitude
    return y, accumulated + (y.abs() + accumulated) * ROUNDING[x.dtype] + 1e-37


@pytest.mark.parametrize("kernel", [None, "torch-tiled"], ids=["planned", "reference"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_layer_stays_within_the_bound_of_the_float64_product(name: str, dtype: torch.dtype, kernel: str | None) -> None:
    torch.manual_seed(len(name))
    for layer in first_layers(name):
        product, weight = planned(name, layer, dtype, kernel)
        if weight.scheme.output is not None:
            continue  # the output's own quantization is compared with the record elsewhere
        for tokens in (0, 1, 3, 17, 130):
            x = (torch.randn(tokens, weight.shape[-1]) * 2).to(dtype)
            y = product(x)
            assert y.dtype == dtype
            assert y.shape == (tokens, weight.shape[-2])
            wanted, bound = wanted_and_bound(weight, x)
            assert ((y.double() - wanted).abs() <= bound).all(), (layer, tokens)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_nan_row_stays_in_its_row(name: str) -> None:
    for layer in first_layers(name):
        product, weight = planned(name, layer, torch.float32, None)
        activation = weight.scheme.activation
        if activation is not None and not RECIPES[activation.recipe].by_row:
            continue  # a scale of the whole call spreads a NaN by definition
        for tokens in (2, 70):
            x = torch.randn(tokens, weight.shape[-1])
            x[1, 5] = torch.nan
            y = product(x)
            assert torch.isnan(y[1]).any()
            assert not torch.isnan(torch.cat([y[:1], y[2:]])).any()


@pytest.mark.parametrize("name", FOLDERS[:3])
def test_any_leading_shape_and_stride_of_x_is_taken(name: str) -> None:
    layer = first_layers(name)[0]
    product, weight = planned(name, layer, torch.float32, None)
    x = torch.randn(4, weight.shape[-1], 6).transpose(1, 2)
    flat = product(x.reshape(-1, weight.shape[-1]))
    assert torch.equal(product(x).reshape(flat.shape), flat)


def test_at_float32_no_kernel_rounds_operands_lower() -> None:
    """Every kernel of the catalogue forms the float32 reference weight: what it stores decodes to it bit for bit."""
    for name in FOLDERS:
        for layer in first_layers(name):
            product, weight = planned(name, layer, torch.float32, None)
            assert torch.equal(product.stored.dequantize(), weight.dequantize()), (name, layer)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_row_of_the_batch_equals_the_row_alone_within_the_bound(regime: str) -> None:
    name = FOLDERS[0]
    layer = first_layers(name)[0]
    product, weight = planned(name, layer, torch.float32, None)
    tokens = {"decode": 8, "small": 64, "prefill": 128}[regime]
    x = torch.randn(tokens, weight.shape[-1])
    together = product(x)
    wanted, bound = wanted_and_bound(weight, x)
    for row in (0, tokens - 1):
        assert ((product(x[row : row + 1]).double() - wanted[row]).abs() <= bound[row]).all()
        assert ((together[row].double() - wanted[row]).abs() <= bound[row]).all()


def act_ordered(groups: list[int]) -> Weight:
    """A weight [24, sum of groups] whose columns are scattered over groups of these sizes."""
    from anybit.schemes import Offset, ScaleLevel, Scheme
    from anybit.weights import QuantizedWeight

    torch.manual_seed(3)
    group_map = torch.cat([torch.full((size,), i) for i, size in enumerate(groups)])
    group_map = group_map[torch.randperm(len(group_map))]
    scheme = Scheme("uint4", (ScaleLevel("float16", (1, 32), placement="gathered"),), act_order=True,
                    offset=Offset("zero_point", "uint4", (1, 32), placement="gathered"))
    codes = torch.randint(0, 16, (24, len(group_map)), dtype=torch.uint8)
    scales, zeros = torch.rand(24, len(groups)).half(), torch.randint(0, 16, (24, len(groups)), dtype=torch.uint8)
    return QuantizedWeight(scheme, tuple(codes.shape), codes, (scales,), zeros, group_map=group_map)


@pytest.mark.parametrize(("groups", "name"), [([32] * 4, "StoredPlanes"), ([32] * 3 + [17], "StoredPlanes"),
                                              ([20, 44, 32], "StoredCanonical")], ids=str)
def test_act_order_is_sorted_where_groups_are_of_one_size(groups: list[int], name: str) -> None:
    from anybit.kernels.catalogue import KERNELS

    weight = act_ordered(groups)
    spec = next(k for k in KERNELS if k.name == "native-matvec")
    if "native" not in detect("cpu").providers:
        pytest.skip("the compiled library is not built")
    stored = implementation(spec).prepare(weight, torch.float32, {"prefill": "native-expand"})
    assert type(stored).__name__ == name
    assert torch.equal(stored.dequantize(), weight.dequantize())
    assert torch.equal(stored.rows(torch.tensor([3, 1]), torch.float32), weight.dequantize()[[3, 1]])
    for tokens in (1, 5, 100):
        x = torch.randn(tokens, weight.shape[-1])
        wanted, bound = wanted_and_bound(weight, x)
        assert ((product_of(weight, stored, "cpu")(x).double() - wanted).abs() <= bound).all()
