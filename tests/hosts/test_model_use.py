"""A loaded model used as any other: compiled, cast, from two threads; what it cannot do it refuses."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch

import anybit
from anybit.hosts.modules import AnybitEmbedding
from conftest import CHECKPOINTS, genuine

IDS = torch.tensor([[1, 2, 3, 4, 5]])
NAMES = [name for name in (*genuine("gptq-v2-*"), *genuine("ct-qwen3moe-nvfp4")) if name]


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_holds_the_whole_model(name: str) -> None:
    model = anybit.load(CHECKPOINTS / name, device="cpu")
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(IDS).logits
        found = torch.compile(model, fullgraph=True, backend="eager")(IDS).logits
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_cast_model_computes_in_its_new_dtype(name: str) -> None:
    model = anybit.load(CHECKPOINTS / name, device="cpu").to(torch.bfloat16)
    table = model.get_input_embeddings()
    with torch.no_grad():
        assert table(IDS).dtype == torch.bfloat16
        assert model(IDS).logits.dtype == torch.bfloat16
    assert not isinstance(table, AnybitEmbedding) or table.dtype == torch.bfloat16


def test_copies_and_files_of_a_packed_model_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = anybit.load(CHECKPOINTS / NAMES[0], device="cpu")
    for use in (copy.deepcopy, pickle.dumps, lambda m: m.save_pretrained(tmp_path / "out")):
        with pytest.raises(anybit.AnybitError):
            use(model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_of_one_unit_see_an_input_that_was_written_to(mode) -> None:  # type: ignore[no-untyped-def]
    model = anybit.load(CHECKPOINTS / NAMES[0], device="cpu")
    attention = model.model.layers[0].self_attn
    with mode():
        x = torch.randn(1, attention.q_proj.in_features)
        attention.q_proj(x)
        x.zero_()
        assert not attention.k_proj(x).any()  # no bias: of zeros only zeros come


def test_threads_that_run_the_model_together_leave_torchs_number_of_threads_alone() -> None:
    model = anybit.load(CHECKPOINTS / NAMES[0], device="cpu")
    with torch.no_grad():
        wanted = model(IDS).logits
    wrong: list[object] = []

    def work() -> None:
        torch.set_num_threads(2)
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(IDS).logits, wanted):
                    wrong.append("logits")
        if torch.get_num_threads() != 2:
            wrong.append(torch.get_num_threads())

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("tokens", [1, 20, 100])
def test_float64_inputs_give_float64_outputs(tokens: int) -> None:
    model = anybit.load(CHECKPOINTS / NAMES[0], device="cpu")
    layer = model.model.layers[0].self_attn.o_proj
    x = torch.randn(tokens, layer.in_features)
    with torch.no_grad():
        found = layer(x.double())
        assert found.dtype == torch.float64
        assert torch.equal(found, layer(x).double())


def test_biases_of_unquantized_stacked_experts_are_filled(tmp_path: Path) -> None:
    """An unquantized gpt-oss folder: bare expert parameters with `_bias` beside them, as transformers itself saves."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=1, num_local_experts=4, vocab_size=64, hidden_size=64, intermediate_size=32, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=64,
        layer_types=["full_attention"], rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0, eos_token_id=1,
    )
    plain = GptOssForCausalLM(config).eval()
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    plain.save_pretrained(tmp_path)
    model = anybit.load(tmp_path, dtype="float32", device="cpu")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
