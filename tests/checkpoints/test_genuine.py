"""Every genuine checkpoint of the dialects at hand: reading equals the tool that wrote it, bit for bit."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors import safe_open

import anybit
from anybit.checkpoints.checkpoint import Checkpoint
from anybit.kernels.linear.tiled_torch import StoredCanonical, compact
from anybit.weights import Dense
from conftest import CHECKPOINTS, EXPECTED, digest, expected, genuine

# folders that a dialect of this version reads; a new dialect is a line
READ = (
    "gguf-*", "modelopt-*", "ct-*", "gptq-*", "awq-*", "autoround-*", "fp8-*", "fbgemm-*", "gptoss-*", "quark-*",
    "bnb-*", "torchao-*", "hqq-*",
)


@cache
def opened(name: str) -> Checkpoint:
    return anybit.open(CHECKPOINTS / name)


def modules() -> list[tuple[str, str]]:
    return [(name, module) for name in genuine(*READ) for module in expected(name)["weights"]]


@pytest.mark.parametrize("name", genuine(*READ))
def test_reading_equals_the_genuine_tool_bit_for_bit(name: str) -> None:
    checkpoint = opened(name)
    for module, wanted in expected(name)["weights"].items():
        weight = checkpoint.read(module).dequantize()
        assert weight.dtype == torch.float32
        assert list(weight.shape) == wanted["shape"] == list(checkpoint.layers[module].shape), module
        assert digest(weight) == wanted["sha256"], module


@pytest.mark.parametrize("name", genuine(*READ))
def test_the_reference_kernel_stores_and_decodes_the_same_weight(name: str) -> None:
    checkpoint = opened(name)
    for module, wanted in expected(name)["weights"].items():
        weight = checkpoint.read(module)
        if not isinstance(weight, Dense):
            stored = StoredCanonical(compact(weight))
            stored.bind(stored.tensors())
            assert digest(stored.dequantize()) == wanted["sha256"], module


def cuts(name: str) -> list[tuple[str, int, int]]:
    """(module, dimension, where) of cuts in two: outputs, inputs and experts, at a half and after one."""
    shapes = {module: wanted["shape"] for module, wanted in list(expected(name)["weights"].items())[:7]}
    return [(module, dim - len(shape), at) for module, shape in shapes.items() for dim, size in enumerate(shape)
            for at in sorted({size // 2, 1} - {0, size})]


@pytest.mark.parametrize("name", genuine(*READ))
def test_cutting_then_dequantizing_equals_dequantizing_then_cutting(name: str) -> None:
    checkpoint = opened(name)
    weights = {module: checkpoint.read(module) for module, _, _ in cuts(name)}
    wholes = {module: weight.dequantize() for module, weight in weights.items()}
    for module, dim, at in cuts(name):
        weight, whole = weights[module], wholes[module]
        try:
            parts = [weight.narrow(dim, 0, at), weight.narrow(dim, at, whole.shape[dim] - at)]
        except anybit.AnybitError as refusal:
            assert refusal.kind == "unsupported"
            assert refusal.found and refusal.wanted
            continue
        joined = torch.cat([part.dequantize() for part in parts], dim=dim)
        assert torch.equal(joined, whole), (module, dim, at)


@pytest.mark.parametrize("name", [n for n in genuine(*READ) if any(len(w["shape"]) == 3 for w in expected(n)["weights"].values())])
def test_a_stack_can_be_cut_into_its_experts(name: str) -> None:
    """Whatever its format, one expert stands alone: none of its scales is another's."""
    checkpoint = opened(name)
    for module, wanted in expected(name)["weights"].items():
        if len(wanted["shape"]) == 3:
            weight = checkpoint.read(module)
            whole = weight.dequantize()
            for expert in range(len(whole)):
                assert torch.equal(weight.narrow(0, expert, 1).dequantize()[0], whole[expert]), (module, expert)


@pytest.mark.parametrize("name", genuine("ct-*", "modelopt-*", "autoround-*", "quark-*", "fp8-*", "fbgemm-*"))
def test_every_weight_of_these_dialects_can_be_cut_between_its_outputs(name: str) -> None:
    """At half the rows, as tensor parallelism cuts q, k, v, gate and up: refused only inside a block of rows."""
    checkpoint = opened(name)
    for module in list(expected(name)["weights"])[:7]:
        weight = checkpoint.read(module)
        rows = weight.dequantize().shape[-2]
        blocks = [level.block[0] for level in checkpoint.layers[module].scheme.scales]
        if all(block in (0, 1) or (rows // 2) % block == 0 for block in blocks):
            assert weight.narrow(-2, 0, rows // 2).dequantize().shape[-2] == rows // 2, module


def layers_with_values() -> list[str]:
    names = []
    for name in genuine(*READ):
        with safe_open(EXPECTED / f"{name}.safetensors", "pt") as file:
            names += [name] * any(key.startswith("layer/") for key in file.keys())  # noqa: SIM118
    return names


@pytest.mark.parametrize("name", layers_with_values())
def test_a_layer_alone_gives_the_recorded_output(name: str) -> None:
    """x̂ as the dialect's recipe says, then the product in float64: 1e-5 of the largest output."""
    from anybit.numerics.activations import quantize_dequantize

    checkpoint = opened(name)
    with safe_open(EXPECTED / f"{name}.safetensors", "pt") as file:
        for key in [k for k in file.keys() if k.startswith("layer/") and k.endswith("/x")]:  # noqa: SIM118
            module = key.removeprefix("layer/").removesuffix("/x")
            x, wanted = file.get_tensor(key).float(), file.get_tensor(f"layer/{module}/y").double()
            weight = checkpoint.read(module)
            scheme = weight.scheme
            if getattr(weight, "pre_scale", None) is not None:
                x = x * weight.pre_scale.float()
            if scheme.activation is not None:
                x = quantize_dequantize(x, scheme.activation, weight.activation)
            y = x.double() @ weight.dequantize().double().T
            y = y if weight.bias is None else y + weight.bias.double()
            if scheme.output is None:
                assert (y - wanted).norm() <= 1e-5 * wanted.norm(), module
