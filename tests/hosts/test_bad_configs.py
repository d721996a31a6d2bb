"""Configs and tensors that only loading can contradict: bad_inputs.md, model config, through `anybit.load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit.errors import AnybitError
from checkpoints.altering import altered
from checkpoints.broken import BROKEN
from checkpoints.writing import line
from conftest import CHECKPOINTS

CT = "ct-llama-w4a16-g128"
ACT_ORDER = "gptq-w4-g64-asym-descact-qwen2"
EXPERTS = "modelopt-fp8-qwen3moe"


def refused(folder: Path) -> AnybitError:
    with pytest.raises(AnybitError) as caught:
        anybit.load(folder, device="cpu")
    assert caught.value.where
    return caught.value


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_never_loaded(name: str, tmp_path: Path) -> None:
    case = BROKEN[name]
    error = refused(case.make(tmp_path / "m"))
    assert error.kind == case.kind
    assert case.words in str(error)


@pytest.mark.parametrize("name", [name for name, case in BROKEN.items() if case.is_seen_by_open])
def test_what_headers_show_is_refused_by_opening(name: str, tmp_path: Path) -> None:
    case = BROKEN[name]
    with pytest.raises(AnybitError) as caught:
        anybit.open(case.make(tmp_path / "m"))
    assert (caught.value.kind, case.words in str(caught.value)) == (case.kind, True)


CONFIGS: list[tuple[str, dict[str, Any], str, str]] = [
    *[("CF01", {"model_type": name}, "unsupported", "transformers") for name in ("odd", ["llama"], None)],
    ("CF02", {"model_type": "odd", "auto_map": {"AutoConfig": "x.Y"}}, "unsafe", "never run"),
    ("CF03", {"_attn_implementation_internal": "org/kernel"}, "unsafe", "org/kernel"),
    *[("CF04", {"torch_dtype": name}, "unsupported", "bfloat16") for name in ("os", "load", "float13")],
    ("CF05", {"hidden_size": 10**18}, "limit", "hidden_size"),
    ("CF05", {"hidden_size": "64"}, "damaged", "hidden_size"),
    *[("CF05", changes, "unsupported", "transformers") for changes in (
        {"hidden_act": "nothing"}, {"layer_types": 7}, {"rms_norm_eps": None}, {"rope_parameters": {"rope_type": "odd"}},
        {"rope_scaling": {"rope_type": "odd"}}, {"pad_token_id": 10**9}, {"mlp_bias": "yes", "rms_norm_eps": "x"},
    )],
    ("CF06", {"hidden_size": 128}, "inconsistent", "by config.json"),
    ("CF06", {"intermediate_size": 1024}, "inconsistent", "by config.json"),
    ("CF06", {"vocab_size": 300}, "inconsistent", "by config.json"),
    ("CF06", {"num_hidden_layers": 40}, "inconsistent", "no tensor for this part"),
]  # fmt: skip


@pytest.mark.parametrize(("id", "config", "kind", "words"), CONFIGS, ids=[f"{c[0]}-{n}" for n, c in enumerate(CONFIGS)])
def test_a_config_that_fits_no_model_is_refused(
    id: str, config: dict[str, Any], kind: str, words: str, tmp_path: Path
) -> None:
    error = refused(altered(CT, tmp_path / "m", config=config))
    assert error.kind == kind
    assert words in str(error)


@line("CF06")
def test_one_layer_more_than_declared_is_left_out_and_told(tmp_path: Path) -> None:
    folder = altered(EXPERTS, tmp_path / "m", {"model.layers.7.self_attn.q_norm.weight": torch.ones(32)})
    model = anybit.load(folder, device="cpu")
    assert model.anybit.unused == ("model.layers.7.self_attn.q_norm.weight",)


@line("CF07")
def test_an_untied_head_without_tensors_is_refused(tmp_path: Path) -> None:
    folder = altered(ACT_ORDER, tmp_path / "m", {"lm_head.weight": None}, {"tie_word_embeddings": False})
    error = refused(folder)
    assert (error.kind, error.where) == ("inconsistent", "lm_head.weight")


@line("QT16")
@pytest.mark.parametrize("count", [2, 65])
def test_experts_that_are_missing_or_too_many_are_refused(count: int, tmp_path: Path) -> None:
    error = refused(altered(EXPERTS, tmp_path / "m", config={"num_local_experts": count}))
    assert error.kind == "inconsistent"


@line("QT16")
def test_one_missing_expert_is_named(tmp_path: Path) -> None:
    leaves = ("weight", "weight_scale", "input_scale")
    tensors = {f"model.layers.0.mlp.experts.1.up_proj.{leaf}": None for leaf in leaves}
    error = refused(altered(EXPERTS, tmp_path / "m", tensors))
    assert (error.kind, error.found) == ("inconsistent", "up_proj: 1")


@line("CF07")
def test_a_tied_head_is_the_embedding_table_whatever_is_stored(tmp_path: Path) -> None:
    """As transformers does; the stored head is told among what was not used."""
    model = anybit.load(altered(ACT_ORDER, tmp_path / "m", config={"tie_word_embeddings": True}), device="cpu")
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    table = model.anybit.checkpoint.read("model.embed_tokens").dequantize()
    # two float32 sums of 256 products in different orders
    assert (model.lm_head(x) - x @ table.T).abs().max() <= 256 * 2.0**-24 * (x.abs() @ table.T.abs()).max()
    assert model.anybit.unused == ("lm_head",)


@line("CF08")
def test_without_a_tokenizer_the_model_still_loads(tmp_path: Path) -> None:
    folder = altered(ACT_ORDER, tmp_path / "m")
    assert not list(folder.glob("tokenizer*"))
    assert anybit.load(folder, device="cpu").config.model_type == "qwen2"


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.input_layernorm.weight",
                                     "model.embed_tokens.weight"])
def test_a_missing_plain_tensor_is_refused_through_both_doors(missing: str, tmp_path: Path) -> None:
    """transformers would fill it at random and only log it."""
    from transformers import AutoModelForCausalLM

    folder = altered("modelopt-nvfp4-llama", tmp_path / "m", tensors={missing: None})
    with pytest.raises(AnybitError) as refused:
        anybit.load(folder, device="cpu")
    assert missing in str(refused.value)
    anybit.enable()
    with pytest.raises(AnybitError) as refused:
        AutoModelForCausalLM.from_pretrained(folder)
    assert missing in str(refused.value)


def test_a_head_that_the_user_adds_is_his_to_train() -> None:
    from transformers import AutoModelForSequenceClassification

    anybit.enable()
    model = AutoModelForSequenceClassification.from_pretrained(CHECKPOINTS / "modelopt-nvfp4-llama", num_labels=3)
    assert model.score.weight.shape[0] == 3
