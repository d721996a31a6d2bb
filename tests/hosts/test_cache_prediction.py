"""The predicted key-value cache is the one that transformers fills, layer kinds and latents included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from anybit.planning.memory import Memory, cache_bytes

BASE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 128}
SLIDES = ["sliding_attention", "full_attention"] * 2
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "mistral": {**BASE, "sliding_window": 9},
    "qwen2": {**BASE, "sliding_window": 9, "use_sliding_window": False},
    "gpt_oss": {**BASE, "sliding_window": 9, "layer_types": SLIDES, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gemma3_text": {**BASE, "sliding_window": 9, "layer_types": SLIDES},
    "deepseek_v3": {**BASE, "head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 24,
                    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
                    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 4},
}
TOKENS, SEQUENCES = 23, 2


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_cache_holds_the_bytes_that_the_config_predicts(model_type: str) -> None:
    config = {"model_type": model_type, **CONFIGS[model_type]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    with torch.no_grad():
        cache = model(torch.randint(0, 128, (SEQUENCES, TOKENS)), use_cache=True).past_key_values
    held = sum(t.nelement() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    per_token, windows = cache_bytes(config, "float32")
    # a full window keeps one token less than it is long: the next one is attended to from its own call
    short = SEQUENCES * sum(size for window, size in windows if window < TOKENS)
    assert Memory(0, 0, 0, 0, per_token, windows).cache(TOKENS, SEQUENCES) - short == held


def test_a_window_bounds_the_cache_and_the_next_token_adds_only_what_the_full_layers_keep() -> None:
    memory = Memory(0, 0, 0, 0, cache_per_token=100, windows=((1000, 60),))
    assert memory.cache(1000) == 100_000
    assert memory.cache(1001) - memory.cache(1000) == 40
    assert memory.cache(3000, sequences=2) == 2 * (3000 * 40 + 1000 * 60)


def test_recurrent_layers_add_nothing_a_token() -> None:
    config = {**BASE, "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}
    assert cache_bytes(config, "bfloat16") == (2 * 2 * 16 * 2, ())
