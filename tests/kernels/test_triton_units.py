"""Layers joined for a decoder block on a GPU: the same weights, held once, each layer a window on the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anybit.checkpoints.online import quantizer
from anybit.hosts.modules import AnybitLinear
from anybit.kernels.catalogue import Stored, implementation, kernel
from anybit.kernels.product import product_of
from anybit.kernels.trials import sample_weight
from anybit.schemes import CHANNEL, TENSOR, Layer, Offset, ScaleLevel, Scheme, dense, group
from anybit.weights import Dense

pytest.importorskip("triton")
from anybit.kernels.triton.units import join

K = 256
ROWS = (128, 64, 64)
SCHEMES = {
    "int4 g128": (Scheme("int4", (ScaleLevel("bfloat16", group(128)),)), "triton-fused"),
    "uint4 g32 zp": (Scheme("uint4", (ScaleLevel("float16", group(32)),), offset=Offset("zero_point", "uint4", group(32))),
                     "triton-fused"),
    "q4_k": (Scheme("uint4", (ScaleLevel("uint6", group(32)), ScaleLevel("float16", group(256))), offset=Offset(
        "minimum", "uint6", group(32), (ScaleLevel("float16", group(256)),), subtract=True)), "triton-fused"),
    "int3 g128": (Scheme("int3", (ScaleLevel("bfloat16", group(128)),)), "triton-fused"),
    "nvfp4 weights": (Scheme("fp4_e2m1", (ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", TENSOR))),
                      "triton-fused"),
    "nf4 g64": (Scheme("nf4", (ScaleLevel("float32", group(64)),)), "triton-fused"),
    "int8 channel": (Scheme("int8", (ScaleLevel("float32", CHANNEL),)), "triton-fused"),
    **{name: (quantizer(name).scheme_of(Layer("x", "linear", (128, K), dense("bfloat16"))), chosen)
       for name, chosen in (("nvfp4", "triton-fused"), ("fp8_per_channel", "triton-w8a8-fp8"),
                            ("int8_asym", "triton-w8a8-int8"), ("int8_per_channel", "triton-w8a8-int8"))},
}


def layer(scheme: Scheme, chosen: str, rows: int, seed: int) -> AnybitLinear:
    """A packed layer [rows, K], every global scale another one."""
    weight = sample_weight(scheme, (rows, K), seed)
    stored = implementation(kernel(chosen)).prepare(weight, torch.bfloat16, dict.fromkeys(
        ("decode", "small", "prefill"), chosen))
    return AnybitLinear(product_of(weight, stored))


def joined(layers: list[AnybitLinear]) -> Stored:
    """The whole; the layers are windows on it afterwards."""
    found = join([module.product.stored for module in layers])
    assert found is not None
    for module, window in zip(layers, found[1], strict=True):
        module.rebind(window)
    return found[0]


def held(tensors: dict[str, Tensor]) -> int:
    """Bytes of the storages that large tensors are in."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    return sum(storages.values())


@pytest.mark.parametrize("name", SCHEMES)
def test_layers_are_what_they_were_and_lie_in_the_whole(name: str) -> None:
    scheme, chosen = SCHEMES[name]
    layers = [layer(scheme, chosen, rows, seed) for seed, rows in enumerate(ROWS)]
    before = [module.product.stored.dequantize() for module in layers]
    index = torch.tensor([3, 0, 63])
    some = [module.product.stored.rows(index, torch.float32) for module in layers]
    whole = joined(layers)
    assert whole.shape == (sum(ROWS), K)
    for module, weight, few in zip(layers, before, some, strict=True):
        assert torch.equal(module.product.stored.dequantize(), weight)
        assert torch.equal(module.product.stored.rows(index, torch.float32), few)
    of_whole = {t.untyped_storage().data_ptr() for t in whole.tensors().values()}
    large = [t for module in layers for n, t in module.product.stored.tensors().items()
             if n.startswith(("plane", "codes", "scale", "row", "factor", "addend", "zeros", "sums")) and t.numel() >= 64
             and not (n.startswith("scale_") and chosen.startswith("triton-w8a8"))]
    assert large
    assert all(t.untyped_storage().data_ptr() in of_whole for t in large)


@pytest.mark.parametrize("name", ["int4 g128", "fp8_per_channel"])
def test_the_wholes_rows_are_the_layers_rows_in_their_order(name: str) -> None:
    scheme, chosen = SCHEMES[name]
    layers = [layer(scheme, chosen, rows, seed) for seed, rows in enumerate(ROWS)]
    before = [dict(module.product.stored.tensors()) for module in layers]
    tensors = joined(layers).tensors()
    for key, axis in (("plane_0", 0), ("scale", -1), ("row", 0), ("codes", 0), ("factor", 0)):
        if key in tensors:
            assert torch.equal(tensors[key], torch.cat([t[key] for t in before], axis))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["int4 g128", "uint4 g32 zp", "nvfp4 weights", "nvfp4"])
@pytest.mark.parametrize("tokens", [1, 64, 256])
def test_a_window_is_read_at_the_pitch_of_the_whole(
    name: str, arch: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever kernel a layer alone is given for many tokens: its groups lie as far apart as the whole is wide."""
    from anybit.kernels.triton import planes, planes_hopper_run, planes_one_run

    scheme, chosen = SCHEMES[name]
    layers = [layer(scheme, chosen, rows, seed) for seed, rows in enumerate((512, 256, 256))]
    joined(layers)
    launched: list[list[int]] = []

    def note(kernel: object, arguments: list[object], *more: object, **options: object) -> None:
        numbers = [a for a in arguments if type(a) is int]
        # rows, rows of the whole, how far zero points of a group lie apart
        places = (0, 2, 4) if "roles" in str(kernel) else (0, 1, 4) if "one_kernel" in str(kernel) else (0, 1, 5)
        launched.append([numbers[i] for i in places])

    for module in (planes, planes_hopper_run, planes_one_run):
        monkeypatch.setattr(module, "Launch", note)
        if hasattr(module, "arch_of"):
            monkeypatch.setattr(module, "arch_of", lambda device: arch)
    stored = layers[1].product.stored
    stored._launched(torch.empty(tokens, K).bfloat16(), None, None, torch.bfloat16)
    assert launched[0][:2] == [256, 1024]
    assert launched[0][2] in (0, 1024)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU answers to torch")
@pytest.mark.parametrize("name", SCHEMES)
def test_a_window_multiplies_bit_for_bit_as_the_layer_alone_did(name: str) -> None:
    scheme, chosen = SCHEMES[name]
    layers = [layer(scheme, chosen, rows, seed).cuda() for seed, rows in enumerate((512, 256, 256))]
    inputs = [torch.randn(m, K, device="cuda", dtype=torch.bfloat16) for m in (1, 3, 16, 17, 33, 64, 70, 130, 300)]
    before = [[module(x) for x in inputs] for module in layers]
    joined(layers)
    for module, wanted in zip(layers, before, strict=True):
        for x, y in zip(inputs, wanted, strict=True):
            assert torch.equal(module(x), y), len(x)


def test_moving_a_joined_layer_leaves_its_weight_as_it_is() -> None:
    scheme, chosen = SCHEMES["int4 g128"]
    layers = [layer(scheme, chosen, rows, seed) for seed, rows in enumerate(ROWS)]
    before = layers[1].product.stored.dequantize()
    joined(layers)
    layers[1]._apply(lambda t: t.clone())
    assert torch.equal(layers[1].product.stored.dequantize(), before)


def test_unquantized_layers_are_joined_whatever_kernel_each_has() -> None:
    tensors = [torch.randn(rows, K).bfloat16() for rows in ROWS]
    names = ("torch-dense", "triton-skinny", "triton-skinny")
    layers = []
    for tensor, name in zip(tensors, names, strict=True):
        weight = Dense(dense("bfloat16"), tensor)
        stored = implementation(kernel(name)).prepare(weight, torch.bfloat16, dict.fromkeys(
            ("decode", "small", "prefill"), name))
        layers.append(AnybitLinear(product_of(weight, stored)))
    whole = joined(layers)
    assert torch.equal(whole.dequantize(), torch.cat(tensors).float())
    x = torch.randn(3, K).bfloat16()
    assert torch.equal(layers[0](x), torch.nn.functional.linear(x, tensors[0]))


@pytest.mark.parametrize("difference", ["rows", "scheme", "act order", "one layer", "static scale", "columns"])
def test_layers_that_do_not_fit_below_each_other_stay_alone(difference: str) -> None:
    scheme, chosen = SCHEMES["int4 g128"]
    other, rows = scheme, 64
    if difference == "rows":
        rows = 40
    elif difference == "scheme":
        other = replace(scheme, scales=(ScaleLevel("float16", group(128)),))
    elif difference == "act order":
        other = scheme = replace(scheme, act_order=True, scales=(ScaleLevel("bfloat16", group(128), placement="gathered"),))
    elif difference == "static scale":
        from anybit.schemes import ActivationSpec

        spec = ActivationSpec("fp4_e2m1", False, "group", "nvfp4", 16)
        other = scheme = replace(SCHEMES["nvfp4 weights"][0], activation=spec)
    layers = [layer(scheme, chosen, 64, 0)]
    if difference != "one layer":
        layers.append(layer(other, chosen, rows, 1))
    if difference == "static scale":
        layers[1].product.stored._activation["global_scale"] = torch.tensor([77.0])
    if difference == "columns":
        weight = sample_weight(scheme, (64, 2 * K), 3)
        stored = implementation(kernel(chosen)).prepare(weight, torch.bfloat16, {"decode": chosen})
        layers[1] = AnybitLinear(product_of(weight, stored))
    assert join([module.product.stored for module in layers]) is None
