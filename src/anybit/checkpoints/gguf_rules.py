"""What a config needs beyond plain numbers: one function a rule, `rule(facts, config) -> entries`.

Rules look at keys and at which tensors exist; where llama.cpp decides by architecture alone, the rule says so. They run
in the order of the architecture's row and see what earlier ones found. Sources: llama.cpp 0c1e57098 (src/models/*.cpp,
conversion/*.py), docs/formats/gguf.md §4.
"""

from __future__ import annotations

from anybit.checkpoints.contents import JSON
from anybit.checkpoints.gguf_keys import Facts
from anybit.checkpoints.gguf_rope import rope_parameters
from anybit.errors import Unsupported

_GATING = {0: "none", 1: "softmax", 2: "sigmoid"}  # llama_expert_gating_func_type


def _alternating(count: int, period: int) -> list[str]:
    """The last layer of each `period` sees everything, the others a window."""
    return ["full_attention" if (n + 1) % period == 0 else "sliding_attention" for n in range(count)]


def rope(facts: Facts, config: JSON) -> JSON:
    """The rotary embedding of whole heads."""
    return {"rope_parameters": rope_parameters(facts, int(config.get("head_dim") or facts.head_dim))}


def partial_rope(facts: Facts, config: JSON) -> JSON:
    """The rotary embedding of heads that may turn in part."""
    head_dim = int(config.get("head_dim") or facts.head_dim)
    return {"rope_parameters": rope_parameters(facts, head_dim, is_partial=True)}


def llama_head_dim(facts: Facts, config: JSON) -> JSON:
    """Files of architecture llama say the size of a head by the rotary width, too."""
    keys = facts.keys
    known = keys.optional("attention.key_length") or keys.optional("rope.dimension_count")
    return {"head_dim": known or facts.head_dim}


def experts(facts: Facts, config: JSON) -> JSON:
    """Counts and sizes of experts as Qwen's configs name them: numbers of the file first, else of the tensors."""
    keys = facts.keys
    count, used = keys.positive("expert_count"), keys.positive("expert_used_count")
    found: JSON = {"num_experts": count, "num_experts_per_tok": used, "num_local_experts": count}
    size = keys.optional("expert_feed_forward_length") or facts.rows("ffn_up_exps.weight")
    size = size or facts.rows("ffn_up.0.weight")
    if size is not None:
        found["moe_intermediate_size"] = size
    shared = keys.optional("expert_shared_feed_forward_length") or facts.rows("ffn_up_shexp.weight")
    if shared is not None:
        found["shared_expert_intermediate_size"] = shared
    found["decoder_sparse_step"] = 1
    routers = [f"blk.{n}.ffn_gate_inp.weight" in facts.tensors for n in range(facts.layers)]
    found["mlp_only_layers"] = [n for n, has in enumerate(routers) if not has]
    return found


def local_experts(facts: Facts, config: JSON) -> JSON:
    """Counts of experts as Mixtral's configs name them; their size is the layer's."""
    keys = facts.keys
    count = keys.positive("expert_count")
    found: JSON = {"num_local_experts": count, "num_experts": count,
                   "num_experts_per_tok": keys.positive("expert_used_count")}
    size = keys.optional("expert_feed_forward_length") or facts.rows("ffn_up_exps.weight")
    return found | ({"intermediate_size": size} if size is not None else {})


def gating(facts: Facts, config: JSON) -> JSON:
    """How router logits become weights, where the file says it."""
    kind = facts.keys.value("expert_gating_func")
    if kind is None:
        return {}
    if kind not in _GATING:
        raise Unsupported("experts are chosen in a way that is not known here", where=facts.keys.where,
                          found=f"expert_gating_func {kind!r:.80}", wanted=", ".join(map(str, _GATING)))
    return {"scoring_func": _GATING[kind]}


def window(facts: Facts, config: JSON) -> JSON:
    """A sliding window in all layers; 0 or none: full attention."""
    return {"sliding_window": facts.keys.size_or_zero("attention.sliding_window") or None}


def softcaps(facts: Facts, config: JSON) -> JSON:
    """Limits of attention and output logits, none where absent or 0."""
    return {key: facts.keys.number(key, 0.0) or None for key in ("attn_logit_softcapping", "final_logit_softcapping")}


def attention_scale(facts: Facts, config: JSON) -> JSON:
    """Gemma 2 and 3 scale queries by the head's size; only the 27B models (46, 62 layers) by hidden / heads."""
    is_27b = (config["model_type"], facts.layers) in (("gemma2", 46), ("gemma3_text", 62))
    return {"query_pre_attn_scalar": facts.hidden // facts.heads if is_27b else facts.head_dim}


def gemma2_window(facts: Facts, config: JSON) -> JSON:
    """Every second layer sees a window, the first one included."""
    size = facts.keys.size_or_zero("attention.sliding_window") or 4096
    return {"sliding_window": size, "layer_types": _layer_types(facts, 2)}


def gemma3_window(facts: Facts, config: JSON) -> JSON:
    """Five layers of six see a window and turn with a theta of their own, which no scaling touches."""
    keys = facts.keys
    size = keys.size_or_zero("attention.sliding_window")
    full = rope_parameters(facts, int(config["head_dim"]))
    if not size:
        return {"layer_types": ["full_attention"] * facts.layers,
                "rope_parameters": {"full_attention": full, "sliding_attention": full}}
    local = {"rope_theta": keys.number("rope.freq_base_swa", 10000.0), "rope_type": "default"}
    return {"sliding_window": size, "layer_types": _layer_types(facts, 6),
            "rope_parameters": {"full_attention": full, "sliding_attention": local}}


def gpt_oss_window(facts: Facts, config: JSON) -> JSON:
    """Every second layer sees a window, the first one included; frequencies of yarn are not rounded to whole dims."""
    rope = rope_parameters(facts, int(config["head_dim"]))
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False
    return {"sliding_window": facts.keys.positive("attention.sliding_window"), "layer_types": _layer_types(facts, 2),
            "rope_parameters": rope}


def _layer_types(facts: Facts, period: int) -> list[str]:
    """From the pattern that newer files state, else the architecture's own."""
    stated = facts.keys.raw("attention.sliding_window_pattern")
    values = getattr(stated, "values", None)
    if values is None:
        return _alternating(facts.layers, stated if isinstance(stated, int) and stated > 0 else period)
    return ["sliding_attention" if is_local else "full_attention" for is_local in values[: facts.layers]]


def gemma4(facts: Facts, config: JSON) -> JSON:
    """Heads of two sizes, a window in most layers, inputs of their own for each layer, keys shared by the last ones."""
    keys = facts.keys
    kinds = _layer_types(facts, 6)
    first_local = kinds.index("sliding_attention") if "sliding_attention" in kinds else 0
    first_full = kinds.index("full_attention") if "full_attention" in kinds else 0
    kv = keys.numbers("attention.head_count_kv", facts.layers) or [facts.heads] * facts.layers
    widths = keys.numbers("feed_forward_length", facts.layers) or []
    head_dim = keys.positive("attention.key_length")
    local_dim = keys.optional("attention.key_length_swa") or head_dim
    keys.raw("attention.value_length_swa")
    keys.raw("rope.dimension_count")  # a whole head; rope_freqs says which part of it turns
    factors = facts.floats("rope_freqs.weight") or []
    turned = sum(f < 1e20 for f in factors) / len(factors) if factors else 1.0
    local_width = keys.optional("rope.dimension_count_swa") or local_dim
    local = {"rope_theta": keys.number("rope.freq_base_swa", 10000.0), "rope_type": "default"}
    if local_width != local_dim:
        local["partial_rotary_factor"] = local_width / local_dim
    has_values = f"blk.{first_full}.attn_v.weight" in facts.tensors
    per_layer = keys.size_or_zero("embedding_length_per_layer_input")
    found: JSON = {
        "head_dim": local_dim, "global_head_dim": head_dim, "layer_types": kinds,
        "num_key_value_heads": kv[first_local],
        "num_global_key_value_heads": None if has_values else kv[first_full],
        "attention_k_eq_v": not has_values,
        "num_kv_shared_layers": keys.size_or_zero("attention.shared_kv_layers"),
        "hidden_size_per_layer_input": per_layer,
        "vocab_size_per_layer_input": facts.vocabulary,
        "sliding_window": keys.positive("attention.sliding_window"),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "intermediate_size": widths[0] if widths else None,
        "use_double_wide_mlp": len(set(widths)) > 1,
        "rope_parameters": {
            "full_attention": {"rope_theta": keys.number("rope.freq_base", 1e6), "rope_type": "proportional",
                               "partial_rotary_factor": turned},
            "sliding_attention": local,
        },
    }  # fmt: skip
    if keys.value("expert_count"):
        found |= {"enable_moe_block": True, "num_experts": keys.positive("expert_count"),
                  "top_k_experts": keys.positive("expert_used_count"),
                  "moe_intermediate_size": keys.positive("expert_feed_forward_length")}
    return found


def falcon(facts: Facts, config: JSON) -> JSON:
    """Two norms a block: the new decoder (40B); else one norm, and one key-value head for all (7B)."""
    is_new = facts.has("attn_norm_2.weight")
    if not is_new and facts.kv_heads not in (1, facts.heads):
        raise Unsupported("a falcon of the old kind has one key-value head, or one for each query head",
                          where=facts.keys.where, found=f"{facts.kv_heads}", wanted=f"1 or {facts.heads}")
    facts.keys.raw("tensor_data_layout")
    return {"new_decoder_architecture": is_new, "num_kv_heads": facts.kv_heads, "multi_query": facts.kv_heads == 1,
            "parallel_attn": True, "alibi": False, "bias": False, "ffn_hidden_size": facts.rows("ffn_up.weight"),
            "num_ln_in_parallel_attn": 2 if is_new else None}


def stablelm(facts: Facts, config: JSON) -> JSON:
    """Without a second norm attention and MLP work side by side; biases and norms of q and k by their tensors."""
    stated = facts.keys.flag("use_parallel_residual")
    has_norm = facts.has("ffn_norm.weight")
    if stated is not None and stated == has_norm:
        raise Unsupported("use_parallel_residual and the norms disagree", where=facts.keys.where, found=f"{stated}",
                          wanted=f"{not has_norm}, by the blocks' ffn_norm")
    return {"use_parallel_residual": not has_norm, "use_qkv_bias": facts.has("attn_q.bias", "attn_qkv.bias"),
            "qk_layernorm": facts.has("attn_q_norm.weight")}


def mamba(facts: Facts, config: JSON) -> JSON:
    """Sizes of the state-space layer; the norms of dt, B and C are FalconMamba's."""
    keys = facts.keys
    hidden, inner = facts.hidden, keys.positive("ssm.inner_size")
    if keys.flag("ssm.dt_b_c_rms"):
        raise Unsupported("dt, B and C have norms, as in FalconMamba", where=keys.where, found="ssm.dt_b_c_rms true",
                          wanted="false", remedy="use a safetensors checkpoint of the same model")
    for key in ("attention.head_count", "feed_forward_length"):
        keys.raw(key)  # 0: there is no attention
    return {"intermediate_size": inner, "expand": inner // hidden, "state_size": keys.positive("ssm.state_size"),
            "conv_kernel": keys.positive("ssm.conv_kernel"), "time_step_rank": keys.positive("ssm.time_step_rank"),
            "use_conv_bias": facts.has("ssm_conv1d.bias"), "use_bias": facts.has("ssm_in.bias")}


def lfm2(facts: Facts, config: JSON) -> JSON:
    """Layers without key-value heads are convolutions."""
    keys = facts.keys
    heads = keys.numbers("attention.head_count_kv", facts.layers) or [facts.heads] * facts.layers
    return {"num_key_value_heads": max(heads), "block_auto_adjust_ff_dim": False,
            "layer_types": ["full_attention" if h else "conv" for h in heads],
            "conv_L_cache": keys.positive("shortconv.l_cache"), "conv_bias": facts.has("shortconv.in_proj.bias")}


def minimax(facts: Facts, config: JSON) -> JSON:
    """Rotary width in dimensions, a correction added to the scores that choose."""
    return {"rotary_dim": facts.keys.optional("rope.dimension_count") or facts.head_dim,
            "use_routing_bias": facts.has("exp_probs_b.bias")}


def linear_attention(facts: Facts, config: JSON) -> JSON:
    """Qwen3.5: which layers are recurrent, their heads, and the three axes of the rotary embedding."""
    keys = facts.keys
    interval = keys.optional("full_attention_interval") or 4
    stated = getattr(keys.raw("attention.recurrent_layers"), "values", None)
    recurrent = stated or [(n + 1) % interval != 0 for n in range(facts.layers)]
    value_heads = keys.positive("ssm.time_step_rank")
    rope = rope_parameters(facts, int(config["head_dim"]), is_partial=True)
    rope.setdefault("partial_rotary_factor", 1.0)
    sections = getattr(keys.raw("rope.dimension_sections"), "values", None)
    if sections:
        rope |= {"mrope_section": [s for s in sections if s], "mrope_interleaved": True}
    return {
        "layer_types": ["linear_attention" if r else "full_attention" for r in recurrent[: facts.layers]],
        "linear_conv_kernel_dim": keys.positive("ssm.conv_kernel"),
        "linear_key_head_dim": keys.positive("ssm.state_size"),
        "linear_num_key_heads": keys.positive("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": keys.positive("ssm.inner_size") // value_heads,
        "rope_parameters": rope,
    }


def cohere(facts: Facts, config: JSON) -> JSON:
    """The factor on the logits, norms of q and k by their tensors, turning without scaling."""
    return {"logit_scale": facts.keys.number("logit_scale", 1.0), "use_qk_norm": facts.has("attn_q_norm.weight")}


def t5(facts: Facts, config: JSON) -> JSON:
    """A gate makes it version 1.1."""
    keys = facts.keys
    is_gated = facts.has("ffn_gate.weight")
    keys.raw("attention.layer_norm_epsilon")
    return {"num_decoder_layers": keys.optional("decoder_block_count") or facts.layers,
            "relative_attention_num_buckets": keys.positive("attention.relative_buckets_count"),
            "decoder_start_token_id": keys.value("decoder_start_token_id") or 0,
            "feed_forward_proj": "gated-gelu" if is_gated else "relu", "is_encoder_decoder": True}
