"""Metadata to config: the recorded entries of genuine files, and that transformers builds a model every part of which
the file fills.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from anybit.checkpoints.contents import Contents
from anybit.checkpoints.dialects import gguf as dialect
from anybit.checkpoints.gguf import read_contents
from anybit.checkpoints.gguf_rope import rope_from_factors
from anybit.errors import AnybitError
from checkpoints.gguf_writing import F32, STRING, U32, File, Tensor, array, llama, pair
from conftest import CHECKPOINTS, expected, genuine


def float32(value: float) -> float:
    """The float32 nearest to a literal, as a file holds it."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def config_of(tmp_path: Path, file: File) -> dict[str, Any]:
    return read_contents(file.write(tmp_path / "model.gguf")).config


@pytest.mark.parametrize("name", genuine("gguf-*"))
def test_recorded_entries(name: str) -> None:
    config = read_contents(CHECKPOINTS / name).config
    for key, wanted in expected(name)["config"].items():
        assert config[key] == (float32(wanted) if key == "rms_norm_eps" else wanted), key


def parameters(contents: Contents) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what transformers builds from the config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(contents.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.for_model(config.pop("model_type"), **config)
        )
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def check_filled(contents: Contents) -> None:
    """Every parameter has its layer or plain tensor, and no layer is left over."""
    layers = dialect.declare(contents)
    shapes = {f"{name}.weight": layer.shape for name, layer in layers.items()}
    shapes |= {f"{name}.bias": layer.shape[:1] for name, layer in layers.items() if layer.has_bias}
    shapes |= {name: contents.tensors[t].shape for name, t in dialect.plain(contents).items()}
    for name, shape in parameters(contents).items():
        parent, _, last = name.rpartition(".")
        if not parent.endswith("experts"):
            assert shapes.pop(name) == shape, name
            continue
        for part in ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",):
            rows = shape[1] // 2 if last == "gate_up_proj" else shape[1]
            if f"{parent}.{part}.weight" in shapes:
                assert shapes.pop(f"{parent}.{part}.weight") == (shape[0], rows, shape[2])
            else:
                for expert in range(shape[0]):
                    assert shapes.pop(f"{parent}.{expert}.{part}.weight") == (rows, shape[2])
    assert not shapes


@pytest.mark.parametrize("name", genuine("gguf-*"))
def test_transformers_builds_the_model_of_a_genuine_file(name: str) -> None:
    check_filled(read_contents(CHECKPOINTS / name))


def moe(architecture: str, *, shared: bool = False, biases: bool = False) -> File:
    """The small llama as a mixture of 4 experts of size 32."""
    sizes = [("expert_count", 4), ("expert_used_count", 2), ("expert_feed_forward_length", 32)]
    sizes += [("expert_shared_feed_forward_length", 96)] if shared else []
    size = 32 if architecture == "llama" else 96  # Mixtral's experts have the size of the layer
    file = llama(
        architecture=architecture,
        changed={"llama.block_count": 1, "llama.feed_forward_length": size},
        more=[pair(f"{architecture}.{key}", U32, value) for key, value in sizes],
    )
    kept = [t for t in file.tensors if not str(t.name).startswith("blk.1.") and ".ffn_" not in str(t.name)]
    kept += [Tensor("blk.0.ffn_norm.weight", (64,)), Tensor("blk.0.ffn_gate_inp.weight", (64, 4))]
    kept += [Tensor(f"blk.0.ffn_{part}_exps.weight", (64, 32, 4), 2) for part in ("gate", "up")]
    kept.append(Tensor("blk.0.ffn_down_exps.weight", (32, 64, 4), 2))
    if shared:
        kept += [Tensor(f"blk.0.ffn_{part}_shexp.weight", (64, 96), 2) for part in ("gate", "up")]
        kept += [Tensor("blk.0.ffn_down_shexp.weight", (96, 64), 2), Tensor("blk.0.ffn_gate_inp_shexp.weight", (64,))]
    if biases:
        kept += [Tensor(f"blk.0.attn_{p}.bias", (rows,)) for p, rows in (("q", 64), ("k", 32), ("v", 32))]
    if architecture == "qwen3moe":
        kept += [Tensor(f"blk.0.attn_{p}_norm.weight", (32,)) for p in ("q", "k")]
    file.tensors = kept
    return file


def test_qwen2moe_has_shared_experts_biases_and_unnormalised_weights(tmp_path: Path) -> None:
    contents = read_contents(moe("qwen2moe", shared=True, biases=True).write(tmp_path / "m.gguf"))
    config = contents.config
    assert config["model_type"] == "qwen2_moe"
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (32, 96)
    assert config["norm_topk_prob"] is False
    check_filled(contents)
    dialect.require_loadable(contents)
    assert dialect.declare(contents)["model.layers.0.mlp.shared_expert_gate"].shape == (1, 64)


def test_qwen3moe_normalises_its_routing_weights(tmp_path: Path) -> None:
    contents = read_contents(moe("qwen3moe").write(tmp_path / "m.gguf"))
    assert contents.config["norm_topk_prob"] is True
    check_filled(contents)


def test_trap_10_the_epsilon_is_the_float32_of_the_file(tmp_path: Path) -> None:
    assert config_of(tmp_path, llama())["rms_norm_eps"] == 9.999999747378752e-06


def test_trap_10_head_dim_is_the_key_length(tmp_path: Path) -> None:
    assert config_of(tmp_path, llama())["head_dim"] == 32
    assert config_of(tmp_path, llama(more=[pair("llama.rope.dimension_count", U32, 16)]))["head_dim"] == 16
    both = [pair("llama.attention.key_length", U32, 64), pair("llama.rope.dimension_count", U32, 64)]
    assert config_of(tmp_path, llama(more=both))["head_dim"] == 64
    unlike = [pair("llama.attention.key_length", U32, 64), pair("llama.rope.dimension_count", U32, 16)]
    with pytest.raises(AnybitError, match="only a part of each head is turned"):  # llama.cpp: invalid n_rot
        config_of(tmp_path, llama(more=unlike))


def llama3_factors(head_dim: int, theta: float, factor: float, original: int) -> list[float]:
    """Meta's rule, frequency by frequency in float64, as float32."""
    found = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        smooth = min(max((original / wavelength - 1) / (4 - 1), 0.0), 1.0)
        found.append(float32(1 / ((1 - smooth) / factor + smooth)))
    return found


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "original"),
    [(128, 500000.0, 8.0, 8192), (64, 500000.0, 32.0, 8192), (64, 10000.0, 4.0, 100)],
)
def test_trap_10_rope_factors_give_back_llama3_parameters(
    head_dim: int, theta: float, factor: float, original: int
) -> None:
    rope = rope_from_factors(llama3_factors(head_dim, theta, factor, original), theta, None, 131072)
    assert rope["rope_type"] == "llama3"
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (factor, original)


def frequencies(config: dict[str, Any]) -> torch.Tensor:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    embedding = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    assert embedding.attention_scaling == 1.0
    found: torch.Tensor = embedding.inv_freq
    return found


def test_trap_10_any_other_factors_divide_the_frequencies_one_by_one(tmp_path: Path) -> None:
    factors = [1.0, 1.5, 1.25, 3.0, *[7.0] * 12]
    file = llama()
    file.tensors.append(Tensor("rope_freqs.weight", (16,), data=struct.pack("<16f", *factors)))
    config = config_of(tmp_path, file)
    wanted = torch.tensor([10000.0 ** (-i / 16) / f for i, f in enumerate(factors)])
    assert torch.allclose(frequencies(config), wanted, rtol=5e-7, atol=0)


def test_factors_of_one_are_no_scaling(tmp_path: Path) -> None:
    file = llama()
    file.tensors.append(Tensor("rope_freqs.weight", (16,), data=struct.pack("<16f", *[1.0] * 16)))
    assert config_of(tmp_path, file)["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


def test_linear_and_yarn_scaling(tmp_path: Path) -> None:
    linear = [pair("llama.rope.scaling.type", STRING, "linear"), pair("llama.rope.scaling.factor", F32, 4.0)]
    assert config_of(tmp_path, llama(more=linear))["rope_parameters"] == {
        "rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0
    }  # fmt: skip
    yarn = [pair("llama.rope.scaling.type", STRING, "yarn"), pair("llama.rope.scaling.factor", F32, 4.0)]
    yarn.append(pair("llama.rope.scaling.original_context_length", U32, 32))
    config = config_of(tmp_path, llama(more=yarn))
    assert config["rope_parameters"] == {
        "rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32
    }  # fmt: skip
    from transformers import AutoConfig

    AutoConfig.for_model(config.pop("model_type"), **config)


def test_trap_11_llama_with_experts_is_mixtral(tmp_path: Path) -> None:
    contents = read_contents(moe("llama").write(tmp_path / "m.gguf"))
    assert contents.config["model_type"] == "mixtral"
    assert contents.config["num_local_experts"] == 4
    assert dialect.declare(contents)["model.layers.0.self_attn.q_proj"].storage["rows"] == (("half_split", 2),)
    check_filled(contents)


def test_llama_with_q_k_v_biases_alone_is_the_model_of_qwen2(tmp_path: Path) -> None:
    file = llama()
    for n in range(2):
        file.tensors += [Tensor(f"blk.{n}.attn_{p}.bias", (rows,)) for p, rows in (("q", 64), ("k", 32), ("v", 32))]
    contents = read_contents(file.write(tmp_path / "m.gguf"))
    assert contents.config["model_type"] == "qwen2"
    assert dialect.declare(contents)["model.layers.0.self_attn.k_proj"].storage["rows"] == (("half_split", 1),)  # still permuted
    check_filled(contents)


def test_biases_on_all_four_projections_are_attention_bias(tmp_path: Path) -> None:
    file = llama()
    for n in range(2):
        rows = (("q", 64), ("k", 32), ("v", 32), ("output", 64))
        file.tensors += [Tensor(f"blk.{n}.attn_{p}.bias", (count,)) for p, count in rows]
    contents = read_contents(file.write(tmp_path / "m.gguf"))
    assert contents.config["attention_bias"] is True
    check_filled(contents)


def test_arrays_with_one_number_a_layer_count_where_all_are_equal(tmp_path: Path) -> None:
    without = {"llama.attention.head_count_kv": None}
    same = llama(changed=without, more=[array("llama.attention.head_count_kv", U32, [1, 1])])
    assert config_of(tmp_path, same)["num_key_value_heads"] == 1
    unlike = llama(changed=without, more=[array("llama.attention.head_count_kv", U32, [1, 2])])
    with pytest.raises(AnybitError, match="differs from layer to layer"):
        config_of(tmp_path, unlike)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([pair("general.type", STRING, "adapter")], "a LoRA adapter"),
        ([pair("general.type", STRING, "imatrix")], "an importance matrix"),
        ([pair("general.quantization_version", U32, 1)], "quantization version"),
    ],
)
def test_files_that_are_no_models_are_not_loaded(tmp_path: Path, more: list[bytes], words: str) -> None:
    contents = read_contents(llama(more=more).write(tmp_path / "m.gguf"))
    with pytest.raises(AnybitError, match=words):
        dialect.require_loadable(contents)
