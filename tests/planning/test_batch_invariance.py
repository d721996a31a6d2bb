"""Batch invariance on a CPU, carried out: a row's bits are the same in every batch, for every kernel that claims it."""

from __future__ import annotations

import pytest
import torch

import anybit
from anybit.hosts.modules import AnybitLinear
from anybit.kernels.catalogue import KERNELS, implementation, kernel
from anybit.kernels.request import REGIMES, KernelSpec, Request, regime_of
from anybit.planning.choose import Choice, Policy, choose
from anybit.platforms import detect
from anybit.schemes import CHANNEL, Offset, ScaleLevel, Scheme, dense, group
from anybit.weights import Dense, QuantizedWeight, Weight
from conftest import TRIMMED

HERE = detect("cpu")
INT4 = Scheme("uint4", (ScaleLevel("float16", group(32)),), offset=Offset("zero_point", "uint4", group(32)))
ODD = Scheme("uint3", (ScaleLevel("float32", group(24)),))
FP8 = Scheme("fp8_e4m3fn", (ScaleLevel("float32", CHANNEL),))
ACT_ORDER = Scheme("uint4", (ScaleLevel("float16", group(32), placement="gathered"),), act_order=True)
BATCHES = [(0, 1), (3, 1), (0, 2), (0, 7), (1, 8), (5, 9), (0, 16), (2, 64), (0, 65), (1, 70)]  # first row, rows


def weight_of(scheme: Scheme, n: int, k: int) -> Weight:
    if not scheme.is_quantized:
        return Dense(scheme, torch.randn(n, k).to(getattr(torch, scheme.element)))
    level = scheme.scales[0]
    groups = -(-k // (level.block[1] or k))
    codes = torch.randint(0, 2 ** min(scheme.weight_bits, 6), (n, k), dtype=torch.uint8)
    scales = torch.rand(n, groups).to(getattr(torch, level.format)) + 0.1
    zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8) if scheme.offset else None
    map_ = torch.randperm(k) // 32 if scheme.act_order else None
    return QuantizedWeight(scheme, (n, k), codes, (scales.to(getattr(torch, level.format)),), zeros, group_map=map_)


def able(spec: KernelSpec, scheme: Scheme, shape: tuple[int, int]) -> bool:
    verdict = spec.can_implement(Request("linear", scheme, shape), HERE)
    return spec.is_batch_invariant and verdict.ok


@pytest.mark.parametrize("shape", [(64, 96), (577, 576), (129, 1000)], ids=str)
@pytest.mark.parametrize("scheme", [INT4, ODD, FP8, ACT_ORDER, dense("float32"), dense("bfloat16")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_the_same_bits_in_every_batch(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    group_size = scheme.scales[0].block[1] if scheme.scales else 0
    if scheme.act_order and shape[1] % group_size:
        shape = (shape[0], 960)
    weight = weight_of(scheme, *shape)
    names = [spec.name for spec in KERNELS if able(spec, scheme, shape)]
    assert names
    x = torch.randn(80, shape[1]).to(dtype)
    for name in names:
        stored = implementation(kernel(name)).prepare(weight, dtype, dict.fromkeys(REGIMES, name), pinned=True)
        whole = stored.linear(x, "prefill", None, dtype)
        for first, rows in BATCHES:
            alone = stored.linear(x[first : first + rows], regime_of(rows), None, dtype)
            assert torch.equal(alone, whole[first : first + rows]), (name, first, rows)


def test_the_pinned_product_is_the_exact_one() -> None:
    weight = weight_of(INT4, 64, 96)
    x = torch.randn(9, 96)
    for name in ("native-matvec", "torch-tiled"):
        if name.startswith("native") and "native" not in HERE.providers:
            continue
        stored = implementation(kernel(name)).prepare(weight, torch.float32, dict.fromkeys(REGIMES, name), pinned=True)
        exact = x.double() @ weight.dequantize().double().T
        bound = 98 * 2.0**-23 * (x.double().abs() @ weight.dequantize().double().abs().T)  # K + 2 roundings of a sum
        assert ((stored.linear(x, "small", None, torch.float32) - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", ["ct-llama-w4a16-g128", "modelopt-nvfp4-llama", "gguf-q4_k_m-llama"])
def test_every_layer_of_a_loaded_model_is_batch_invariant(name: str) -> None:
    model = anybit.load(TRIMMED / "checkpoints" / name, device="cpu", batch_invariant=True)
    ours = [(path, m) for path, m in model.named_modules() if isinstance(m, AnybitLinear)]
    plain = [path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert ours
    assert not plain  # a product of the host's own is not invariant
    for path, module in ours:
        x = torch.randn(70, module.in_features)
        whole = module(x)
        for first, rows in BATCHES:
            assert torch.equal(module(x[first : first + rows]), whole[first : first + rows]), (path, first, rows)


def test_a_batch_invariant_choice_on_this_machine_has_one_kernel() -> None:
    choice = choose(Request("linear", INT4, (576, 576)), HERE, policy=Policy(batch_invariant=True))
    assert isinstance(choice, Choice)
    assert len(set(choice.names.values())) == 1
