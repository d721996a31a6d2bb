"""Every architecture: a GGUF file of a random model computes what the model in transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

import anybit
from anybit.checkpoints.dialects.gguf import SCHEMES
from anybit.checkpoints.gguf_architectures import ARCHITECTURES, NOT_LOADED
from anybit.checkpoints.gguf_header import GGML_TYPES
from anybit.checkpoints.gguf_orders import row_index
from anybit.errors import Inconsistent, Unsupported
from checkpoints import gguf_models
from checkpoints.gguf_models import MODELS, Model, gguf_tensors, random_model, round_trip, write
from checkpoints.gguf_writing import llama
from checkpoints.test_gguf import random_blocks

Q8_0 = gguf.GGMLQuantizationType.Q8_0
F32 = gguf.GGMLQuantizationType.F32


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(3))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **more).logits
    return found


def test_every_architecture_has_a_model_here() -> None:
    assert {model.architecture for model in MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", MODELS)
def test_float32_files_give_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    loaded = anybit.load(write(name, model, tmp_path / "model.gguf"), dtype="float32", device="cpu")
    assert loaded.anybit.unused == ()
    wanted = logits(model)
    assert torch.allclose(logits(loaded), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_quantized_files_give_the_logits_of_the_decoded_weights(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    round_trip(model, Q8_0)
    loaded = anybit.load(write(name, model, tmp_path / "model.gguf", Q8_0), dtype="float32", device="cpu")
    assert any(layer.scheme.is_quantized for layer in loaded.anybit.checkpoint.layers.values())
    wanted = logits(model)
    # sums of at most 256 products in another order, through a few layers, some of which amplify (delta rule, relu2)
    assert torch.allclose(logits(loaded), wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))


def write_changed(
    monkeypatch: pytest.MonkeyPatch, name: str, path: Path, *, keys: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None, kind: gguf.GGMLQuantizationType = F32,
) -> tuple[Any, Path]:
    """A case with other keys, or with other GGUF tensors altogether: the model and its file."""
    case, model = MODELS[name], random_model(name)
    changed = Model(case.architecture, case.make, {**case.keys, **(keys or {})}, case.change, case.tensors)
    monkeypatch.setattr(gguf_models, "MODELS", {name: changed})
    if tensors is not None:
        monkeypatch.setattr(gguf_models, "gguf_tensors", lambda *_: iter(tensors.items()))
    return model, write(name, model, path, kind)


@pytest.mark.parametrize("name", ["llama", "qwen2", "stablelm", "gemma3"])
def test_joined_q_k_and_v_are_taken_apart(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # --fuse-qkv of the converter
    joined: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for key, value in sorted(gguf_tensors(name, random_model(name)), key=lambda item: "qkv".find(item[0][11:12])):
        if ".attn_" in key and key.split(".")[2] in ("attn_q", "attn_k", "attn_v"):
            block, _, end = key.partition(".attn_")
            parts.setdefault(f"{block}.attn_qkv.{end.partition('.')[2]}", []).append(value)
        else:
            joined[key] = value
    joined |= {key: torch.cat(values) for key, values in parts.items()}
    assert any(key.endswith("attn_qkv.weight") for key in joined)
    model, path = write_changed(monkeypatch, name, tmp_path / "model.gguf", tensors=joined)
    loaded = anybit.load(path, dtype="float32", device="cpu")
    assert torch.allclose(logits(loaded), logits(model), rtol=0, atol=1e-5)


def with_value_heads(monkeypatch: pytest.MonkeyPatch, size: int) -> Any:
    """The tiny Qwen3.5 with other value heads: 4, two for each key head, whose columns the converter tiles."""
    case = MODELS["qwen35"]
    sizes = {**gguf_models._LINEAR_HEADS, "linear_value_head_dim": size}
    make = gguf_models.causal("Qwen3_5", "Qwen3_5TextConfig", **gguf_models.sizes(**sizes))
    changed = Model("qwen35", make, {**case.keys, "ssm.inner_size": 4 * size}, case.change)
    monkeypatch.setattr(gguf_models, "MODELS", {"qwen35": changed})
    return random_model("qwen35")


def grouped(stored: Tensor, size: int) -> Tensor:
    """Stored heads k0v0 k1v0 k0v1 k1v1 as k0v0 k0v1 k1v0 k1v1."""
    wanted = torch.empty_like(stored)
    for place, head in enumerate((0, 2, 1, 3)):
        wanted[:, size * head : size * head + size] = stored[:, size * place : size * place + size]
    return wanted


@pytest.mark.parametrize("kind", [k for k in SCHEMES if k not in ("Q1_0", "Q2_0")] + ["IQ2_XS"])
def test_columns_that_move_in_parts_of_a_block_keep_their_values_bit_for_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value heads of 128, as in every published model; blocks of K types are 256 long."""
    model, raw, type_ = with_value_heads(monkeypatch, 128), random_blocks(kind), GGMLQuantizationType[kind]
    size = GGML_TYPES[kind]
    rows = raw.flatten().repeat(64)[: 64 * 512 // size.block * size.nbytes].view(64, -1)
    path = write("qwen35", model, tmp_path / "model.gguf", raw={"blk.0.ssm_out.weight": (rows, type_)})
    checkpoint = anybit.open(path)
    layer = checkpoint.layers["model.layers.0.linear_attn.out_proj"]
    assert layer.scheme.is_quantized == (kind in SCHEMES)
    found = checkpoint.read(layer.name)
    assert found.scheme == layer.scheme
    assert torch.equal(found.dequantize(), grouped(torch.from_numpy(gguf.dequantize(rows.numpy(), type_)), 128))


def test_columns_that_move_in_units_unlike_any_block_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_value_heads(monkeypatch, 24)
    checkpoint = anybit.open(write("qwen35", model, tmp_path / "model.gguf", Q8_0))
    layer = checkpoint.layers["model.layers.0.linear_attn.out_proj"]
    assert not layer.scheme.is_quantized
    assert "parts of a block" in layer.notes[0]
    stored = next(v for k, v in gguf_tensors("qwen35", model) if k == "blk.0.ssm_out.weight")
    decoded = torch.from_numpy(gguf.dequantize(gguf.quantize(stored.contiguous().numpy(), Q8_0), Q8_0))
    assert torch.equal(checkpoint.read(layer.name).dequantize(), grouped(decoded, 24))


def test_blocks_of_multi_token_prediction_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = dict(gguf_tensors("qwen35", random_model("qwen35")))
    tensors |= {"blk.4.nextn.eh_proj.weight": torch.ones(64, 128), "blk.4.attn_norm.weight": torch.ones(64)}
    model, path = write_changed(monkeypatch, "qwen35", tmp_path / "model.gguf", tensors=tensors,
                                keys={"block_count": 5, "nextn_predict_layers": 1})
    loaded = anybit.load(path, dtype="float32", device="cpu")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("llama", "attention.scale", 0.5), ("qwen2", "final_logit_softcapping", 30.0), ("qwen3", "logit_scale", 0.25),
     ("gemma", "attention.sliding_window", 512), ("llama", "residual_scale", 0.22), ("qwen2", "attention.causal", False),
     ("qwen3moe", "expert_gating_func", 2), ("llama", "rope.scaling.yarn_log_multiplier", 0.1)],
)  # fmt: skip
def test_a_key_that_would_change_the_result_is_refused_where_it_has_no_place(
    name: str, key: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = write_changed(monkeypatch, name, tmp_path / "model.gguf", keys={key: value})
    checkpoint = anybit.open(path)  # to look at it is fine
    with pytest.raises(Unsupported, match=f"{MODELS[name].architecture}.{key}"):
        anybit.load(checkpoint, device="cpu")


@pytest.mark.parametrize(("key", "value"), [("logit_scale", 1.0), ("attention.scale", 0.0), ("expert_count", 0)])
def test_a_key_with_the_value_that_changes_nothing_is_no_reason(
    key: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = write_changed(monkeypatch, "llama", tmp_path / "model.gguf", keys={key: value})
    checkpoint = anybit.open(path)
    checkpoint.demand_loadable()
    assert checkpoint.notes == ()


def test_a_key_that_nobody_knows_is_named_in_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = write_changed(monkeypatch, "llama", tmp_path / "model.gguf", keys={"flux_capacitor": 1})
    assert anybit.open(path).notes == (
        "model.gguf: keys of the architecture that are not known here, ignored: flux_capacitor",
    )


def test_an_architecture_that_is_not_known_is_refused_with_the_list(tmp_path: Path) -> None:
    path = llama(architecture="plamo3").write(tmp_path / "model.gguf")
    with pytest.raises(Unsupported, match="plamo3") as caught:
        anybit.load(path)
    assert caught.value.wanted == ", ".join(ARCHITECTURES)


@pytest.mark.parametrize("name", NOT_LOADED)
def test_an_architecture_without_a_class_says_why(name: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=NOT_LOADED[name]):
        anybit.load(llama(architecture=name).write(tmp_path / "model.gguf"))


def test_keys_and_values_of_unlike_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="heads of different sizes"):
        anybit.open(write_changed(monkeypatch, "qwen3", tmp_path / "m.gguf", keys={"attention.value_length": 16})[1])


def test_rows_that_hold_no_whole_heads_are_refused() -> None:
    assert row_index(8, [("half_split", 2)], "q").tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert row_index(6, [("grouped", 2, 1)], "qkv").tolist() == [0, 2, 4, 1, 3, 5]
    assert row_index(6, [("tiled", 2, 2, 2, 1)], "v").tolist() == [0, 1, 2, 4, 3, 5]
    assert row_index(6, [("part", 2, 4), ("alternating", 2)], "v").tolist() == [2, 4, 3, 5]
    with pytest.raises(Inconsistent, match="whole heads"):
        row_index(7, [("half_split", 2)], "q")


def test_a_bias_that_the_config_does_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = dict(gguf_tensors("qwen3moe", random_model("qwen3moe")))
    tensors["blk.0.ffn_gate_inp.bias"] = torch.ones(4)
    _, path = write_changed(monkeypatch, "qwen3moe", tmp_path / "model.gguf", tensors=tensors)
    with pytest.raises(Inconsistent, match="the model's config none"):
        anybit.load(path, device="cpu")


def test_the_documented_table_is_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    documented = {name.strip().strip("`"): kind.strip() for name, kind in rows}
    assert documented == {name: row.class_name for name, row in ARCHITECTURES.items()}
    assert all(f"`{name}`" in text for name in NOT_LOADED)
