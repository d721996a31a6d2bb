"""The demo model end to end: digests, three chats token for token, bits per byte, online quantization."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import anybit
from conftest import SHARED, SMOLLM2, digest, expected, needs_shared, needs_smollm2

pytestmark = needs_smollm2


@functools.cache
def loaded(quantization: str | None = None) -> Any:
    return anybit.load(SMOLLM2, dtype="float32", device="cpu", quantization=quantization)


def test_all_matrices_have_the_recorded_digests() -> None:
    checkpoint = anybit.open(SMOLLM2)
    record = expected("smollm2")["weights"]
    assert len(record) == 211
    assert set(record) == set(checkpoint.layers)
    for name, wanted in record.items():
        weight = checkpoint.read(name).dequantize()
        assert list(weight.shape) == wanted["shape"]
        assert digest(weight) == wanted["sha256"], name


def answer_ids(chat: dict[str, Any]) -> list[int]:
    record = chat["transformers_f32"]
    return list(record["ids"] if isinstance(record, dict) else record)


@pytest.mark.parametrize("number", range(3))
def test_greedy_answers_equal_the_reference_token_for_token(number: int) -> None:
    model = loaded()
    chat = expected("smollm2")["chats"][number]
    ids = torch.tensor([chat["prompt_ids"]])
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=48, do_sample=False, eos_token_id=2, pad_token_id=2)
    assert out[0, ids.shape[1] :].tolist() == answer_ids(chat)


@needs_shared
@pytest.mark.slow
def test_bits_per_byte_equal_the_reference() -> None:
    from anybit.hosts.evaluating import bits_per_byte
    from anybit.hosts.tokenizers import tokenizer_for

    assert SHARED is not None
    text = (SHARED / "corpus" / "eval.txt").read_text()
    found = bits_per_byte(loaded(), tokenizer_for(anybit.open(SMOLLM2)), text)
    assert found.tokens == 11753
    assert found.bits_per_byte == pytest.approx(1.3799194647, abs=1e-5)


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "fp8_per_channel", "int8_per_channel", "int4_g128"])
def test_a_model_quantized_while_loading_still_speaks(scheme: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The demo's own matrices are quantized already; an unquantized copy of two layers is made for this."""
    from safetensors.torch import save_file

    checkpoint = anybit.open(SMOLLM2)
    config = {**checkpoint.config, "num_hidden_layers": 2}
    names = [n for n in checkpoint.layers if ".layers." not in n or ".layers.0." in n or ".layers.1." in n]
    tensors = {f"{n}.weight": checkpoint.read(n).dequantize().to(torch.bfloat16).contiguous() for n in names}
    tensors |= {n: checkpoint.read_plain(n) for n in checkpoint.plain
                if ".layers." not in n or ".layers.0." in n or ".layers.1." in n}
    import json

    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    plain = anybit.load(tmp_path, dtype="float32", device="cpu")
    made = anybit.load(tmp_path, dtype="float32", device="cpu", quantization=scheme)
    ids = torch.arange(1000, 1064)[None]
    with torch.inference_mode():
        a, b = (torch.log_softmax(m(ids).logits.double(), -1) for m in (plain, made))
    divergence = (a.exp() * (a - b)).sum(-1).mean()
    assert 0 < divergence < {"8": 0.05}.get(scheme[3:4], 1.5)
    kinds = {u.kind: u.scheme.is_quantized for u in made.anybit.plan.units if u.kind == "linear"}
    assert kinds["linear"]
