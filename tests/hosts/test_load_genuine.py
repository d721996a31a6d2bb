"""Both doors on genuine checkpoints: logits of weight-only schemes, layers with activation quantization, no losses."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import anybit
from anybit.hosts.modules import AnybitLinear
from conftest import CHECKPOINTS, EXPECTED, genuine

READ = ("gguf-*", "modelopt-*", "ct-*", "gptq-*", "awq-*", "autoround-*", "fp8-*", "fbgemm-*", "gptoss-*", "quark-*",
        "bnb-*", "torchao-*", "hqq-*")


def has(name: str, start: str) -> bool:
    with safe_open(EXPECTED / f"{name}.safetensors", "pt") as file:
        return any(key.startswith(start) for key in file.keys())  # noqa: SIM118


def quantizes_activations(name: str) -> bool:
    return any(layer.scheme.activation for layer in anybit.open(CHECKPOINTS / name).layers.values())


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def unquantized(model: torch.nn.Module) -> None:
    """Switch activation quantization off, as the recorded logits were made."""
    from dataclasses import replace

    for module in model.modules():
        product = getattr(module, "product", None)
        if product is not None:
            product.scheme = replace(product.scheme, activation=None, output=None)


@pytest.mark.parametrize("name", [n for n in genuine(*READ) if has(n, "logits")])
def test_float32_logits_equal_the_record(name: str) -> None:
    model = anybit.load(CHECKPOINTS / name, dtype="float32", device="cpu")
    unquantized(model)
    record = load_file(EXPECTED / f"{name}.safetensors")
    with torch.no_grad():
        logits = model(record["input_ids"]).logits
    wanted = record["logits"]
    assert relative_error(logits.reshape(wanted.shape), wanted) <= 1e-4


def module_of(model: torch.nn.Module, name: str) -> AnybitLinear:
    """The module of a checkpoint layer: pieces of the experts have the checkpoint's path too."""
    return model.get_submodule(name)  # type: ignore[return-value]


@pytest.mark.parametrize("name", [n for n in genuine(*READ) if has(n, "layer/")])
def test_a_loaded_layer_gives_the_recorded_output(name: str) -> None:
    model = anybit.load(CHECKPOINTS / name, dtype="float32", device="cpu")
    record = load_file(EXPECTED / f"{name}.safetensors")
    for key, x in record.items():
        if key.startswith("layer/") and key.endswith("/x"):
            name_ = key.removeprefix("layer/").removesuffix("/x")
            module = module_of(model, name_)
            with torch.no_grad():
                y = module(x.float())
            wanted = record[f"layer/{name_}/y"]
            if module.product.scheme.output is not None:
                step = float(module.product.activation["output_scale"])
                assert ((y - wanted).abs() <= 1.001 * step).all(), name_
                assert ((y - wanted).abs() > 1e-3 * step).float().mean() < 0.01, name_
            else:
                assert relative_error(y, wanted) <= 1e-5, name_


@pytest.mark.parametrize("name", [n for n in genuine("modelopt-*", "ct-*", "gptq-*", "awq-*", "autoround-*", "fp8-*", "fbgemm-*", "gptoss-*", "bnb-*", "torchao-*", "hqq-w3-*", "hqq-w4-*", "hqq-w8-*", "quark-*") if has(n, "logits")])
def test_plain_from_pretrained_gives_the_same_model(name: str) -> None:
    from transformers import AutoModelForCausalLM

    anybit.enable()
    anybit.enable()
    record = load_file(EXPECTED / f"{name}.safetensors")
    ours = anybit.load(CHECKPOINTS / name, dtype="float32", device="cpu")
    taken = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    with torch.no_grad():
        a, b = (m(record["input_ids"]).logits for m in (ours, taken))
    assert relative_error(b, a) <= 1e-6


def test_casting_the_model_leaves_the_scales_alone() -> None:
    name = genuine("gptq-*")[0]
    model = anybit.load(CHECKPOINTS / name, dtype="float32", device="cpu")
    layer = next(m for m in model.modules() if isinstance(m, AnybitLinear))
    before = layer.product.stored.dequantize()
    model.to(torch.bfloat16)
    assert torch.equal(layer.product.stored.dequantize(), before)


def test_a_checkpoint_without_a_layer_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """One layer's tensors taken out of a genuine file: refused by name, nothing random."""
    source = CHECKPOINTS / genuine("gptq-v2-*")[0]
    for file in source.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = next(source.glob("*.safetensors"))
    raw = weights.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    from safetensors.torch import save_file

    kept = {k: v for k, v in load_file(weights).items() if ".o_proj." not in k}
    assert len(kept) < len(header)
    save_file(kept, tmp_path / weights.name)
    with pytest.raises(anybit.AnybitError) as refused:
        anybit.load(tmp_path, device="cpu")
    assert "o_proj" in str(refused.value)


def test_gradients_reach_the_input() -> None:
    name = genuine("gptq-*")[0]
    model = anybit.load(CHECKPOINTS / name, dtype="float32", device="cpu")
    layer = next(m for m in model.modules() if isinstance(m, AnybitLinear))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    wanted = layer.product.stored.dequantize().sum(0).expand_as(x)
    assert torch.allclose(x.grad, wanted, rtol=1e-5, atol=1e-5)
