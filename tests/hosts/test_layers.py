"""`anybit.linear`: one layer as a module, for engines that have their own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import anybit
from anybit.checkpoints.online import quantizer
from anybit.errors import Inconsistent, Unsupported
from anybit.kernels.trials import compare
from anybit.schemes import Layer, dense

TRIMMED = Path(__file__).parent.parent / "checkpoints" / "trimmed" / "checkpoints"
FOLDERS = sorted(p.name for p in TRIMMED.iterdir() if p.is_dir())


@pytest.mark.parametrize("name", FOLDERS)
def test_a_layer_of_every_trimmed_checkpoint_multiplies_as_its_reference_weight(name: str) -> None:
    checkpoint = anybit.open(TRIMMED / name)
    layers = [n for n, layer in checkpoint.layers.items() if layer.kind == "linear" and layer.scheme.is_quantized]
    if not layers:
        pytest.skip("no quantized linear layer of its own")
    weight = checkpoint.read(layers[0])
    module = anybit.linear(weight, device="cpu")
    x = torch.randn(5, weight.shape[-1], generator=torch.Generator().manual_seed(7))
    found = compare(weight, module, x)
    assert not found.fault
    assert module(x).dtype == torch.float32
    assert set(module.kernels) == {"decode", "small", "prefill"}


@pytest.mark.parametrize("scheme", ["int4_g128", "nvfp4", "fp8_per_channel", "int8_per_channel", "mxfp4_a16"])
def test_a_float_tensor_is_quantized_by_the_named_scheme(scheme: str) -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    bias = torch.arange(96.0)
    module = anybit.linear(weight, scheme, bias=bias, dtype=torch.bfloat16)
    assert module.product.scheme == quantizer(scheme).scheme_of(Layer("l", "linear", (96, 256), dense("bfloat16")))
    zero = module(torch.zeros(2, 256, dtype=torch.bfloat16))
    assert torch.equal(zero, bias.to(torch.bfloat16).expand(2, -1))


def test_an_unquantized_tensor_multiplies_as_it_is() -> None:
    weight = torch.eye(32)
    x = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(anybit.linear(weight)(x), x)


def test_a_bias_of_another_size_is_named() -> None:
    with pytest.raises(Inconsistent, match="bias"):
        anybit.linear(torch.eye(32), bias=torch.zeros(31))


def test_a_stack_of_experts_is_not_one_layer() -> None:
    with pytest.raises(Inconsistent, match=r"weight\.expert"):
        anybit.linear(torch.zeros(2, 32, 32))


def test_a_kernel_of_another_chip_says_why_it_cannot() -> None:
    with pytest.raises(Unsupported, match="runs on a GPU"):
        anybit.linear(torch.randn(64, 128), "int4_g128", kernel="triton-matvec", device="cpu")


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(Unsupported, match="nvfp5"):
        anybit.linear(torch.randn(64, 128), "nvfp5")


@pytest.mark.parametrize("scheme", ["int4_g128", "int8_asym"])
def test_a_compiled_layer_has_the_gradient_of_an_eager_one(scheme: str) -> None:
    made = torch.Generator().manual_seed(3)
    module = anybit.linear(torch.randn(48, 256, generator=made), scheme, device="cpu")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, grad = torch.randn(2, 3, 256, generator=made), torch.randn(2, 3, 48, generator=made)
    want = grad.double() @ module.product.stored.dequantize().double()  # straight through the quantization of x
    allowed = 48 * 2.0**-23 * (grad.double().abs() @ module.product.stored.dequantize().double().abs())
    for call in (module, compiled):
        leaf = x.clone().requires_grad_()
        call(leaf).backward(grad)
        assert leaf.grad is not None
        assert bool(((leaf.grad.double() - want).abs() <= allowed).all())


def test_the_operator_of_a_layer_passes_torchs_own_check() -> None:
    module = anybit.linear(torch.randn(48, 256, generator=torch.Generator().manual_seed(4)), "nvfp4_a16", device="cpu")
    for x in (torch.randn(5, 256), torch.randn(2, 3, 256, requires_grad=True)):
        torch.library.opcheck(torch.ops.anybit.product, (x, module.key, 48))  # schema, fake tensors, autograd, compiling
