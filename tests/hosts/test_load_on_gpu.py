"""The transformers door on a GPU: same logits, same layers, memory counted, as on a CPU."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_load_genuine import READ, has, module_of, relative_error, unquantized

import anybit
from anybit.hosts.modules import AnybitLinear
from anybit.kernels.request import regime_of, roundings
from conftest import CHECKPOINTS, EXPECTED, genuine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU answers to torch"),
]


@pytest.mark.parametrize("name", [n for n in genuine(*READ) if has(n, "logits")])
def test_float32_logits_equal_the_record(name: str) -> None:
    model = anybit.load(CHECKPOINTS / name, dtype="float32", device="cuda")
    unquantized(model)
    record = load_file(EXPECTED / f"{name}.safetensors")
    with torch.no_grad():
        logits = model(record["input_ids"].cuda()).logits.cpu()
    assert relative_error(logits.reshape(record["logits"].shape), record["logits"]) <= 1e-4


@pytest.mark.parametrize("name", [n for n in genuine(*READ) if has(n, "layer/")])
def test_a_loaded_layer_gives_the_recorded_output(name: str) -> None:
    """One code that a rounding tie flips is allowed: log2 and division differ in the last bit between devices."""
    model = anybit.load(CHECKPOINTS / name, dtype="float32", device="cuda")
    record = load_file(EXPECTED / f"{name}.safetensors")
    for key, x in record.items():
        if key.startswith("layer/") and key.endswith("/x"):
            layer = key.removeprefix("layer/").removesuffix("/x")
            module = module_of(model, layer)
            with torch.no_grad():
                y = module(x.float().cuda()).cpu()
            if module.product.scheme.output is None:
                assert relative_error(y, record[f"layer/{layer}/y"]) <= 1e-5, layer


@pytest.mark.parametrize("name", genuine("gptq-*", "awq-*", "modelopt-nvfp4-*"))
def test_bfloat16_layers_stay_within_the_bound(name: str) -> None:
    """2 K 2^-24 |x| |W| of accumulation, 2^-8 of that for what the planned kernel says that it rounds, and the output's."""
    model = anybit.load(CHECKPOINTS / name, dtype="bfloat16", device="cuda")
    path, layer = next((path, m) for path, m in model.named_modules() if isinstance(m, AnybitLinear))
    rounds = next(unit.rounds for unit in model.anybit.plan.units if path in unit.layers)
    if layer.product.scheme.activation is not None or layer.product.pre_scale is not None:
        pytest.skip("activation quantization: compared in float32 above")
    for tokens in (1, 3, 17, 130):
        x = torch.randn(tokens, layer.in_features, device="cuda", dtype=torch.bfloat16)
        weight = layer.product.stored.dequantize().double()
        wanted = x.double() @ weight.T
        magnitude = x.double().abs() @ weight.abs().T
        if layer.product.bias is not None:
            wanted = wanted + layer.product.bias.double()
        with torch.no_grad():
            error = (layer(x).double() - wanted).abs()
        unit = 2 * layer.in_features * 2.0**-24 + roundings(rounds[regime_of(tokens)]) * 2.0**-8
        bound = unit * magnitude + (wanted.abs() + unit * magnitude) * 2.0**-8 + 1e-30
        assert (error <= bound).all()


def test_the_model_generates_and_its_memory_is_counted() -> None:
    name = genuine("gptq-v2-*")[0]
    model = anybit.load(CHECKPOINTS / name, device="cuda")
    assert model.anybit.held_bytes > 0
    predicted = model.anybit.plan.memory.weights + model.anybit.plan.memory.plain
    # beside the model: zeros that split products count in, 2 MiB once a process
    assert model.anybit.held_bytes == pytest.approx(predicted, rel=0.1, abs=3 * 2**20)
    out = model.generate(torch.tensor([[1, 2, 3]], device="cuda"), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 11)
