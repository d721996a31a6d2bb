"""The architectures of GGUF files that transformers can build: one row each, and what their tensors are called.

A row says which facts of the file the config takes under which key, which rules of `gguf_rules.py` find the rest, and
what a block's tensors are called in transformers. The set is what transformers 5.23 maps itself, and Gemma and
Command-R. Sources: llama.cpp 0c1e57098 (conversion/, gguf-py tensor_mapping.py), docs/formats/gguf.md §4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from anybit.checkpoints import gguf_rules as rules
from anybit.checkpoints.contents import JSON, TensorInfo
from anybit.checkpoints.gguf_keys import HEAD, Facts

__all__ = ["ARCHITECTURES", "FACTS", "NOT_LOADED", "Architecture", "Parameter", "Stack", "choose"]

Rule = Callable[[Facts, JSON], JSON]
Order = tuple[str, *tuple[int, ...]]  # name of a row order in gguf_orders.py, and its numbers


@dataclass(frozen=True)
class Parameter:
    """A tensor that is no matrix of a linear layer: its name in transformers, and what undoes the converter.

    name  with a * the rows of the stored matrix are vectors of their own, numbered from 0
    undo  a key of `gguf_orders.UNDO`, "" for nothing
    """

    name: str
    undo: str = ""


@dataclass(frozen=True)
class Stack:
    """The blocks of a model: where they stand, and for one block GGUF module or tensor -> name below it."""

    prefix: str
    modules: Mapping[str, str]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """A value of `general.architecture` and the transformers model that computes the same.

    facts      config key -> name of a fact (FACTS)
    rules      find what is no plain number, in this order
    constants  what llama.cpp does and no key states
    biases     config key -> block tensors whose presence it states
    stacks     GGUF stack ("blk") -> its blocks
    top        GGUF module outside blocks -> module in transformers
    orders     config -> GGUF block module -> how the converter changed the order of its rows
    columns    config -> GGUF block module -> how the converter changed the order of its columns
    one_less   norms are stored as weight + 1, all but these
    kept       modules that stay transformers' own, decoded: the model looks at their weight instead of calling them
    """

    model_type: str
    class_name: str
    facts: Mapping[str, str]
    rules: tuple[Rule, ...]
    stacks: Mapping[str, Stack]
    top: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    orders: Callable[[JSON], Mapping[str, Order]] = lambda config: {}
    columns: Callable[[JSON], Mapping[str, Order]] = lambda config: {}
    one_less: tuple[str, ...] | None = None
    kept: tuple[str, ...] = ()


# fact -> how it is found
FACTS: Final[Mapping[str, Callable[[Facts], Any]]] = {
    "hidden": lambda f: f.hidden,
    "layers": lambda f: f.layers,
    "heads": lambda f: f.heads,
    "kv_heads": lambda f: f.kv_heads,
    "head_dim": lambda f: f.head_dim,
    "vocabulary": lambda f: f.vocabulary,
    "context": lambda f: f.context,
    "rms_eps": lambda f: f.keys.number("attention.layer_norm_rms_epsilon", 1e-5),
    "eps": lambda f: f.keys.number("attention.layer_norm_epsilon", 1e-5),
    "feed_forward": lambda f: f.keys.optional("feed_forward_length") or f.rows("ffn_up.weight"),
    "is_tied": lambda f: HEAD not in f.tensors,
}

_SIZES: Final = {
    "hidden_size": "hidden", "num_hidden_layers": "layers", "num_attention_heads": "heads", "vocab_size": "vocabulary",
    "max_position_embeddings": "context", "tie_word_embeddings": "is_tied",
}  # fmt: skip
_DENSE: Final = {**_SIZES, "num_key_value_heads": "kv_heads", "intermediate_size": "feed_forward"}
_LLAMA_FACTS: Final = {**_DENSE, "head_dim": "head_dim", "rms_norm_eps": "rms_eps"}
_QKV_BIAS: Final = ("attn_q.bias", "attn_qkv.bias")
_SILU: Final = {"hidden_act": "silu"}
_GEMMA: Final = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}

# names ----------------------------------------------------------------------------------------------------------------

_TOP: Final = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_ATTENTION: Final = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
_NORMS: Final = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_MLP: Final = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS: Final = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.gate_proj", "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj", "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
}  # fmt: skip
_SHARED: Final = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}  # fmt: skip
_LLAMA: Final = {**_ATTENTION, **_NORMS, **_MLP}
_GEMMA2: Final = {
    **_ATTENTION, **_MLP, "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_BLOOM: Final = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip
_TRANSFORMER_TOP: Final = {
    "token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f", "output": "lm_head",
}  # fmt: skip
_QWEN35: Final = {
    **_ATTENTION, **_MLP, "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv", "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a", "ssm_beta": "linear_attn.in_proj_b", "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}  # fmt: skip
_QWEN35_STATE: Final = {
    "ssm_a": Parameter("linear_attn.A_log", "log_negative"), "ssm_dt.bias": Parameter("linear_attn.dt_bias"),
    "ssm_conv1d.weight": Parameter("linear_attn.conv1d.weight", "insert_axis"),
}  # fmt: skip
_MAMBA_STATE: Final = {
    "ssm_a": Parameter("mixer.A_log", "log_negative"), "ssm_d": Parameter("mixer.D"),
    "ssm_conv1d.weight": Parameter("mixer.conv1d.weight", "insert_axis"),
    "ssm_conv1d.bias": Parameter("mixer.conv1d.bias"),
}  # fmt: skip


def _t5_stacks(up: str) -> dict[str, Stack]:
    """Encoder and decoder; the decoder has attention to the encoder before its feed-forward network, whose `up` is."""
    stacks = {}
    for stack, prefix, mlp in (("enc.blk", "encoder.block", 1), ("dec.blk", "decoder.block", 2)):
        own, cross, wide = "layer.0.SelfAttention", "layer.1.EncDecAttention", f"layer.{mlp}.DenseReluDense"
        modules = {f"attn_{p}": f"{own}.{p}" for p in "qkvo"} | {f"cross_attn_{p}": f"{cross}.{p}" for p in "qkvo"}
        modules |= {"attn_norm": "layer.0.layer_norm", "cross_attn_norm": "layer.1.layer_norm",
                    "ffn_norm": f"layer.{mlp}.layer_norm", "ffn_gate": f"{wide}.wi_0", "ffn_up": f"{wide}.{up}",
                    "ffn_down": f"{wide}.wo"}
        bias = Parameter(f"{own}.relative_attention_bias.weight")
        stacks[stack] = Stack(prefix, modules, {"attn_rel_b.weight": bias})
    return stacks


def _blocks(modules: Mapping[str, str], parameters: Mapping[str, Parameter] | None = None,
            prefix: str = "model.layers") -> Mapping[str, Stack]:
    return {"blk": Stack(prefix, modules, parameters or {})}


# orders of rows and columns -------------------------------------------------------------------------------------------


def _interleaved(config: JSON) -> dict[str, Order]:
    """Rows of q and k from half-split to interleaved rotary order, head by head."""
    return {"attn_q": ("half_split", config["num_attention_heads"]),
            "attn_k": ("half_split", config["num_key_value_heads"])}


def _bloom_order(config: JSON) -> dict[str, Order]:
    """q, k and v of each head together became all q, all k, all v."""
    return {"attn_qkv": ("grouped", config["n_head"], 1)}


def _falcon_order(config: JSON) -> dict[str, Order]:
    """The same with the queries that share a key-value head."""
    return {"attn_qkv": ("grouped", config["num_kv_heads"], config["num_attention_heads"] // config["num_kv_heads"])}


def _value_heads(config: JSON) -> tuple[int, int, int]:
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    return keys, values // keys, config["linear_value_head_dim"]


def _qwen35_order(config: JSON) -> dict[str, Order]:
    """Value heads grouped by key head became tiled."""
    keys, per_key, size = _value_heads(config)
    before = 2 * keys * config["linear_key_head_dim"]
    return {
        "attn_qkv": ("tiled", before, keys, per_key, size), "attn_gate": ("tiled", 0, keys, per_key, size),
        "ssm_conv1d": ("tiled", before, keys, per_key, size),
        **dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"), ("tiled", 0, keys, per_key, 1)),
    }


def _qwen35_columns(config: JSON) -> dict[str, Order]:
    return {"ssm_out": ("tiled", 0, *_value_heads(config))}


def _gpt_oss_order(config: JSON) -> dict[str, Order]:
    """transformers has gate 0, up 0, gate 1, ... where a file of joined experts has all gates first."""
    return {"ffn_gate_up_exps": ("alternating", 2)}


# rows -----------------------------------------------------------------------------------------------------------------

_QWEN2: Final = Architecture(
    "qwen2", "Qwen2ForCausalLM", _LLAMA_FACTS, (rules.rope,), _blocks(_LLAMA), _TOP, _SILU
)
_T5_FACTS: Final = {
    "d_model": "hidden", "num_layers": "layers", "num_heads": "heads", "d_kv": "head_dim", "d_ff": "feed_forward",
    "vocab_size": "vocabulary", "layer_norm_epsilon": "rms_eps", "tie_word_embeddings": "is_tied",
    "n_positions": "context",
}  # fmt: skip
_T5: Final = Architecture(
    "t5", "T5ForConditionalGeneration", _T5_FACTS, (rules.t5,),
    _t5_stacks("wi_1"),
    {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm", "output": "lm_head",
     "dec.output_norm": "decoder.final_layer_norm"}, kept=("ffn_down",),
)  # fmt: skip

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _LLAMA_FACTS, (rules.llama_head_dim, rules.rope), _blocks(_LLAMA), _TOP, _SILU,
        biases={"attention_bias": _QKV_BIAS, "mlp_bias": ("ffn_up.bias",)}, orders=_interleaved,
    ),
    "qwen2": _QWEN2,
    "qwen3": Architecture(
        "qwen3", "Qwen3ForCausalLM", _LLAMA_FACTS, (rules.rope,), _blocks(_LLAMA), _TOP, _SILU,
        biases={"attention_bias": _QKV_BIAS},
    ),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", _LLAMA_FACTS, (rules.rope, rules.experts),
        _blocks({**_LLAMA, **_EXPERTS, **_SHARED}), _TOP, {**_SILU, "norm_topk_prob": False},
        biases={"qkv_bias": _QKV_BIAS},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", _LLAMA_FACTS, (rules.rope, rules.experts),
        _blocks({**_LLAMA, **_EXPERTS}), _TOP, {**_SILU, "norm_topk_prob": True},
        biases={"attention_bias": _QKV_BIAS},
    ),
    "qwen35": Architecture(
        "qwen3_5_text", "Qwen3_5ForCausalLM", _LLAMA_FACTS, (rules.linear_attention,),
        _blocks(_QWEN35, _QWEN35_STATE), _TOP, _SILU, orders=_qwen35_order, columns=_qwen35_columns,
        one_less=("ssm_norm",),
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", _LLAMA_FACTS, (rules.linear_attention, rules.experts),
        _blocks({**_QWEN35, **_EXPERTS, **_SHARED}, _QWEN35_STATE), _TOP, _SILU, orders=_qwen35_order,
        columns=_qwen35_columns, one_less=("ssm_norm",),
    ),
    "gemma": Architecture(
        "gemma", "GemmaForCausalLM", _LLAMA_FACTS, (rules.rope,), _blocks(_LLAMA), _TOP, _GEMMA, one_less=(),
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _LLAMA_FACTS,
        (rules.rope, rules.gemma2_window, rules.softcaps, rules.attention_scale), _blocks(_GEMMA2), _TOP, _GEMMA,
        one_less=(),
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _LLAMA_FACTS,
        (rules.gemma3_window, rules.softcaps, rules.attention_scale), _blocks(_GEMMA2), _TOP, _GEMMA, one_less=(),
    ),
    "gemma4": Architecture(
        "gemma4_text", "Gemma4ForCausalLM", {**_SIZES, "rms_norm_eps": "rms_eps"}, (rules.gemma4,),
        _blocks(
            {**_GEMMA2, "inp_gate": "per_layer_input_gate", "proj": "per_layer_projection",
             "post_norm": "post_per_layer_input_norm", "ffn_gate_inp": "router.proj",
             "ffn_gate_up_exps": "experts.gate_up_proj", "ffn_gate_exps": "experts.gate_proj",
             "ffn_up_exps": "experts.up_proj", "ffn_down_exps": "experts.down_proj",
             "post_ffw_norm_1": "post_feedforward_layernorm_1", "post_ffw_norm_2": "post_feedforward_layernorm_2",
             "pre_ffw_norm_2": "pre_feedforward_layernorm_2"},
            {"layer_output_scale.weight": Parameter("layer_scalar"), "ffn_gate_inp.scale": Parameter("router.scale"),
             "ffn_down_exps.scale": Parameter("router.per_expert_scale")},
        ),
        {**_TOP, "per_layer_token_embd": "model.embed_tokens_per_layer",
         "per_layer_model_proj": "model.per_layer_model_projection",
         "per_layer_proj_norm": "model.per_layer_projection_norm"}, _GEMMA,
    ),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM", {**_DENSE, "rms_norm_eps": "rms_eps"}, (rules.partial_rope, rules.window),
        _blocks({**_ATTENTION, **_NORMS, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj",
                 "ffn_down": "mlp.down_proj"}), _TOP, _SILU,
    ),
    "starcoder2": Architecture(
        "starcoder2", "Starcoder2ForCausalLM", {**_DENSE, "norm_epsilon": "eps"}, (rules.rope, rules.window),
        _blocks({**_ATTENTION, **_NORMS, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}), _TOP,
        {"hidden_act": "gelu_pytorch_tanh"}, biases={"use_bias": _QKV_BIAS},
    ),
    "falcon": Architecture(
        "falcon", "FalconForCausalLM", {**_SIZES, "layer_norm_epsilon": "eps"}, (rules.falcon, rules.rope),
        _blocks({**_BLOOM, "attn_norm": "input_layernorm"}, prefix="transformer.h"), _TRANSFORMER_TOP,
        orders=_falcon_order,
    ),
    "bloom": Architecture(
        "bloom", "BloomForCausalLM",
        {"hidden_size": "hidden", "n_layer": "layers", "n_head": "heads", "vocab_size": "vocabulary",
         "layer_norm_epsilon": "eps", "seq_length": "context", "tie_word_embeddings": "is_tied"},
        (), _blocks(_BLOOM, prefix="transformer.h"), _TRANSFORMER_TOP, orders=_bloom_order,
    ),
    "gpt2": Architecture(
        "gpt2", "GPT2LMHeadModel",
        {"n_embd": "hidden", "n_layer": "layers", "n_head": "heads", "n_positions": "context",
         "n_inner": "feed_forward", "vocab_size": "vocabulary", "layer_norm_epsilon": "eps",
         "tie_word_embeddings": "is_tied"},
        (), _blocks({"attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
                     "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, prefix="transformer.h"),
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
         "output": "lm_head"},
    ),
    "stablelm": Architecture(
        "stablelm", "StableLmForCausalLM", {**_DENSE, "layer_norm_eps": "eps"}, (rules.partial_rope, rules.stablelm),
        _blocks({k: v for k, v in _LLAMA.items() if not k.endswith(("q_norm", "k_norm"))},
                {"attn_q_norm.weight": Parameter("self_attn.q_layernorm.norms.*.weight"),
                 "attn_k_norm.weight": Parameter("self_attn.k_layernorm.norms.*.weight")}), _TOP, _SILU,
    ),
    "nemotron": Architecture(
        "nemotron", "NemotronForCausalLM", {**_DENSE, "head_dim": "head_dim", "norm_eps": "eps"},
        (rules.partial_rope,), _blocks(_LLAMA), _TOP, {"hidden_act": "relu2"},
        biases={"attention_bias": _QKV_BIAS, "mlp_bias": ("ffn_up.bias",)}, one_less=(),
    ),
    "mamba": Architecture(
        "mamba", "MambaForCausalLM",
        {"hidden_size": "hidden", "num_hidden_layers": "layers", "vocab_size": "vocabulary",
         "layer_norm_epsilon": "rms_eps", "tie_word_embeddings": "is_tied"},
        (rules.mamba,),
        _blocks({"attn_norm": "norm", "ssm_in": "mixer.in_proj", "ssm_x": "mixer.x_proj", "ssm_dt": "mixer.dt_proj",
                 "ssm_out": "mixer.out_proj"},
                _MAMBA_STATE, "backbone.layers"),
        {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}, _SILU,
        kept=("token_embd", "output", "ssm_dt"),
    ),
    "lfm2": Architecture(
        "lfm2", "Lfm2ForCausalLM", {**_SIZES, "intermediate_size": "feed_forward", "norm_eps": "rms_eps"},
        (rules.lfm2, rules.rope),
        _blocks({"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
                 "attn_output": "self_attn.out_proj", "attn_q_norm": "self_attn.q_layernorm",
                 "attn_k_norm": "self_attn.k_layernorm", "attn_norm": "operator_norm", "ffn_norm": "ffn_norm",
                 "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2",
                 "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj"},
                {"shortconv.conv.weight": Parameter("conv.conv.weight", "insert_axis"),
                 "shortconv.conv.bias": Parameter("conv.conv.bias")}),
        {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"},
    ),
    "gpt-oss": Architecture(
        "gpt_oss", "GptOssForCausalLM", _LLAMA_FACTS, (rules.local_experts, rules.gpt_oss_window),
        _blocks({**_ATTENTION, **_EXPERTS, "attn_norm": "input_layernorm", "ffn_gate_inp": "mlp.router",
                 "post_attention_norm": "post_attention_layernorm"},
                {"attn_sinks.weight": Parameter("self_attn.sinks")}), _TOP, _SILU, orders=_gpt_oss_order,
    ),
    "minimax-m2": Architecture(
        "minimax_m2", "MiniMaxM2ForCausalLM", _LLAMA_FACTS,
        (rules.partial_rope, rules.local_experts, rules.gating, rules.minimax),
        _blocks({**_LLAMA, **_EXPERTS}, {"exp_probs_b.bias": Parameter("mlp.e_score_correction_bias")}), _TOP, _SILU,
    ),
    "command-r": Architecture(
        "cohere", "CohereForCausalLM", {**_DENSE, "layer_norm_eps": "eps"}, (rules.rope, rules.cohere),
        _blocks(_LLAMA), _TOP, _SILU, biases={"attention_bias": _QKV_BIAS},
    ),
    "t5": _T5,
}  # fmt: skip

_MIXTRAL: Final = Architecture(
    "mixtral", "MixtralForCausalLM", _LLAMA_FACTS, (rules.llama_head_dim, rules.rope, rules.local_experts),
    _blocks({**_LLAMA, **_EXPERTS}), _TOP, _SILU, orders=_interleaved,
)
_MISTRAL: Final = Architecture(
    "mistral", "MistralForCausalLM", _LLAMA_FACTS, (rules.llama_head_dim, rules.rope, rules.window), _blocks(_LLAMA),
    _TOP, _SILU, orders=_interleaved,
)
# Llama with biases on q, k and v but not on o: LlamaConfig.attention_bias means all four. Qwen2 is that model exactly.
_LLAMA_QKV_BIAS: Final = Architecture(
    "qwen2", "Qwen2ForCausalLM", _LLAMA_FACTS, (rules.llama_head_dim, rules.rope), _blocks(_LLAMA), _TOP, _SILU,
    orders=_interleaved,
)
_T5_FIRST: Final = replace(_T5, stacks=_t5_stacks("wi"))  # version 1.0 has no gate
_UMT5: Final = replace(_T5, model_type="umt5", class_name="UMT5ForConditionalGeneration")
# the new decoder (40B, 180B): attention and MLP have norms of their own
_FALCON_NEW: Final = replace(
    ARCHITECTURES["falcon"],
    stacks=_blocks({**_BLOOM, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}, prefix="transformer.h"),
)

# architectures that transformers names in its own table and cannot build, with the reason
NOT_LOADED: Final[Mapping[str, str]] = {
    "deci": "its layers differ in width and heads, and transformers has no class for them without the model's own code",
    "t5encoder": "an encoder alone writes no text",
}


def choose(name: str, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Architecture | None:
    """The row for a value of `general.architecture`; some values stand for several models."""
    if name == "llama" and metadata.get("llama.expert_count"):
        return _MIXTRAL
    has_bias = any(f"blk.0.{bias}" in tensors for bias in _QKV_BIAS)
    if name == "llama" and has_bias and "blk.0.attn_output.bias" not in tensors:
        return _LLAMA_QKV_BIAS
    if name == "llama" and metadata.get("llama.attention.sliding_window"):
        return _MISTRAL
    if name == "falcon" and "blk.0.attn_norm_2.weight" in tensors:
        return _FALCON_NEW
    if name == "t5" and "enc.blk.1.attn_rel_b.weight" in tensors:
        return _UMT5
    if name == "t5" and "enc.blk.0.ffn_gate.weight" not in tensors:
        return _T5_FIRST
    return ARCHITECTURES.get(name)
