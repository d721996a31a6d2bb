"""--quantization end to end: rules reach modules, logits are those of the quantized weights, memory stays in bounds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import anybit
from anybit.checkpoints.online import Online, quantizer
from anybit.checkpoints.online_schemes import ONLINE
from anybit.errors import Damaged, Unsupported

BASE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 96, "head_dim": 16, "max_position_embeddings": 128, "intermediate_size": 96}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**BASE, tie_word_embeddings=False),
    "tied": lambda: transformers.LlamaConfig(**BASE, tie_word_embeddings=True),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **BASE, moe_intermediate_size=96, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "gpt_oss": lambda: transformers.GptOssConfig(  # experts stacked as [E, in, out]
        **BASE, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2),
}  # fmt: skip
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the folder of a model, written once."""
    root = tmp_path_factory.mktemp("models")

    def of(name: str) -> Path:
        place = root / name
        if not place.exists():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).bfloat16()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(place)
        return place

    return of


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def host_with(place: Path, recipe: str) -> Any:
    """transformers' own model in float32, its weights replaced by the recipe's reference weights."""
    checkpoint = anybit.open(place)
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    asked = quantizer(recipe)
    for name, layer in checkpoint.layers.items():
        weight = asked(layer, checkpoint.read(name)).dequantize()
        piece = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj", name)
        with torch.no_grad():
            if piece is None:
                parameter = model.get_parameter(name if layer.kind == "experts" else f"{name}.weight")
                parameter.copy_(weight.mT if layer.storage.get("transposed") else weight)
            elif piece[3] == "down":
                model.get_parameter(f"{piece[1]}.down_proj")[int(piece[2])] = weight
            else:
                half = model.get_parameter(f"{piece[1]}.gate_up_proj")[int(piece[2])].chunk(2)
                half[piece[3] == "up"].copy_(weight)
    return model


@pytest.mark.parametrize("recipe", ["mxfp4_a16", "int4_g32_asym", "fp8_per_block_a16,experts=nvfp4_a16",
                                    "re:.*down_proj.*=int8_per_channel_a16", "experts_int8,*.o_proj=int4_g64"])
@pytest.mark.parametrize("name", ["llama", "tied", "qwen3_moe", "gpt_oss"])
def test_logits_are_those_of_the_reference_weights(name: str, recipe: str, folder: Any) -> None:
    """Weight-only, float32 on both sides: the difference is the order of sums."""
    made, wanted = logits(anybit.load(folder(name), "float32", "cpu", quantization=recipe)), \
        logits(host_with(folder(name), recipe))
    assert float((made - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_head_and_an_embedding_are_quantized_where_a_rule_says_so(name: str, folder: Any) -> None:
    rules = {"Embedding": "int8_per_channel_a16", **({"lm_head": "fp8_per_channel_a16"} if name == "llama" else {})}
    model = anybit.load(folder(name), "float32", "cpu", targets=rules)
    schemes = {layer: unit.scheme.element for unit in model.anybit.plan.units for layer in unit.layers}
    assert schemes["model.embed_tokens"] == "int8"
    assert schemes.get("lm_head") == ("fp8_e4m3fn" if name == "llama" else None)
    wanted = logits(host_with(folder(name), str(Online(None, rules))))
    assert float((logits(model) - wanted).norm() / wanted.norm()) < 1e-4


def test_the_plan_tells_declared_and_executed_and_what_a_rule_missed(folder: Any) -> None:
    plan = anybit.plan(folder("llama"), "cpu", quantization="nvfp4", targets={"re:.*down_proj": "fp8_per_channel"},
                       ignore=["*.o_proj", "nothing"])
    found = {layer: (str(unit.declared), unit.scheme) for unit in plan.units for layer in unit.layers}
    assert found["model.layers.0.mlp.up_proj"] == ("bf16", ONLINE["nvfp4"].scheme)
    assert found["model.layers.1.mlp.down_proj"] == ("bf16", ONLINE["fp8_per_channel"].scheme)
    assert str(found["model.layers.1.self_attn.o_proj"][1]) == "bf16"
    told = plan.to_dict()
    assert told["quantization"] == "nvfp4,re:.*down_proj=fp8_per_channel,*.o_proj=none,nothing=none"
    assert "the rule nothing takes no layer" in told["notes"]


def test_load_and_plan_take_the_same_recipe(folder: Any) -> None:
    recipe = {"name": "fp8_per_tensor", "moe": "mxfp4", "ignore": ["re:.*layers\\.0.*"]}
    plan = anybit.plan(folder("qwen3_moe"), "cpu", dtype="float32", quantization=recipe)
    model = anybit.load(folder("qwen3_moe"), "float32", "cpu", quantization=recipe)
    schemes = {layer: unit.scheme for unit in plan.units for layer in unit.layers}
    assert schemes == {layer: unit.scheme for unit in model.anybit.plan.units for layer in unit.layers}
    assert schemes["model.layers.1.mlp.experts.3.up_proj"] == ONLINE["mxfp4"].scheme
    assert schemes["model.layers.1.self_attn.q_proj"] == ONLINE["fp8_per_tensor"].scheme
    assert not schemes["model.layers.0.self_attn.q_proj"].is_quantized
    assert not schemes["model.layers.1.mlp.gate"].is_quantized


def test_rules_without_a_scheme_are_refused_before_anything_is_read(folder: Any) -> None:
    with pytest.raises(Unsupported, match="rules without a scheme"):
        anybit.load(folder("llama"), targets=["re:.*"])


def test_a_weight_with_nan_is_refused_by_its_layers_name(folder: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder("llama") / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder("llama") / "config.json").read_text())
    with pytest.raises(Damaged) as caught:
        anybit.load(tmp_path, "float32", "cpu", quantization="nvfp4,re:.*up_proj=int8_per_channel")
    assert caught.value.where == "model.layers.1.mlp.up_proj"


# ---- memory ----

MEMORY = """
import json, sys
import torch, transformers, transformers.models.llama.modeling_llama
import anybit
torch.set_num_threads(1)
model = anybit.load(sys.argv[1], "bfloat16", "cpu", quantization=sys.argv[2])
info = model.anybit
print(json.dumps([info.held_bytes, info.peak_bytes, info.plan.memory.to_dict()]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 0.4 GB in bfloat16, so that a second copy of the model would break the bound."""
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("large")
    hidden, wide, layers = 2048, 8192, 3
    config = transformers.LlamaConfig(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
                                      num_attention_heads=16, num_key_value_heads=16, vocab_size=1024)
    (place / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    square, long = (hidden, hidden), (wide, hidden)
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in (
        *((f"self_attn.{p}_proj", square) for p in "qkvo"), ("mlp.gate_proj", long), ("mlp.up_proj", long),
        ("mlp.down_proj", long[::-1]), ("input_layernorm", (hidden,)), ("post_attention_layernorm", (hidden,)))}
    shapes |= {"model.embed_tokens.weight": (1024, hidden), "lm_head.weight": (1024, hidden),
               "model.norm.weight": (hidden,)}
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, place / "model.safetensors")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["nvfp4", "int8_per_channel", "int4_g128,*.down_proj=fp8_per_block"])
def test_loading_holds_the_packed_model_and_one_layer_beside_it(recipe: str, large: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY, str(large), recipe], capture_output=True, text=True, check=True)
    held, peak, memory = json.loads(done.stdout.splitlines()[-1])
    packed = memory["weights_bytes"] + memory["plain_bytes"]
    assert abs(held / packed - 1) < 0.1
    assert peak <= packed + memory["loading_bytes"] + 256 * 2**20
    assert packed < 0.6 * (large / "model.safetensors").stat().st_size


# ---- the take-over door ----

@pytest.mark.parametrize("name", ["llama", "tied", "qwen3_moe", "gpt_oss"])
def test_from_pretrained_quantizes_as_load_does(name: str, folder: Any) -> None:
    from anybit.hosts.quantizer import AnybitConfig

    anybit.enable()
    recipe = Online("mxfp4", {"re:.*o_proj": "int8_per_channel"}, ["re:.*layers\\.0.*down_proj"])
    made = transformers.AutoModelForCausalLM.from_pretrained(
        folder(name), dtype=torch.float32, quantization_config=AnybitConfig(quantization=recipe))
    wanted = logits(anybit.load(folder(name), "float32", "cpu", quantization=recipe))
    assert float((logits(made) - wanted).norm() / wanted.norm()) < 1e-5
    assert type(made.model.layers[1].self_attn.o_proj).__name__ == "AnybitLinear"


def test_from_pretrained_without_it_is_transformers_own(folder: Any) -> None:
    anybit.enable()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder("llama"), dtype=torch.float32)
    assert type(model.model.layers[1].self_attn.o_proj) is torch.nn.Linear
