"""Tiny random transformers models written as GGUF the way llama.cpp's converter writes them.

An independent twin of what the reader undoes: names come from gguf-py's tensor map, bytes from its writer and its
quantizer, and the changes to tensors are spelled out here as conversion/*.py of llama.cpp 0c1e57098 makes them (checked
against that converter: same tensors, same keys). One entry of `MODELS` a case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor, nn

Named = Iterator[tuple[str, Tensor]]


def sizes(**more: Any) -> dict[str, Any]:
    """The sizes of the tiny models, as most configs call them."""
    base = {
        "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return base | more


def moe(**more: Any) -> dict[str, Any]:
    return sizes(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, **more)


def rope(kind: str = "default", theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


# what the converter does to tensors -----------------------------------------------------------------------------------


def same(name: str, value: Tensor, config: Any) -> Named:
    yield name, value


def interleaved(name: str, value: Tensor, config: Any) -> Named:
    """q and k of llama."""
    if "q_proj" in name or "k_proj" in name:
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        value = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2)
        value = value.reshape(heads * value.shape[1] * 2, *value.shape[3:])
    yield from experts(name, value, config)


def experts(name: str, value: Tensor, config: Any) -> Named:
    """Stacked experts: gate and up apart, names with a weight."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = value.chunk(2, dim=1)
        yield name.replace("gate_up_proj", "gate_proj.weight"), gate
        yield name.replace("gate_up_proj", "up_proj.weight"), up
    elif name.endswith("experts.down_proj"):
        yield name + ".weight", value
    else:
        yield name, value


def raised_norms(name: str, value: Tensor, config: Any) -> Named:
    yield name, value + 1 if name.endswith("norm.weight") else value


def bloom(name: str, value: Tensor, config: Any) -> Named:
    name = name.removeprefix("transformer.")
    if "query_key_value" in name:
        value = value.reshape(config.n_head, 3, config.hidden_size // config.n_head, -1)
        value = value.transpose(0, 1).reshape(3 * config.hidden_size, -1)
        value = value[:, 0] if name.endswith("bias") else value
    yield name, value


def falcon(name: str, value: Tensor, config: Any) -> Named:
    if "query_key_value" in name:
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
        head = config.hidden_size // config.num_attention_heads
        parts = value.view(groups, config.num_attention_heads // groups + 2, head, -1)
        value = torch.cat([p.reshape(-1, value.shape[1]) for p in (parts[:, :-2], parts[:, [-2]], parts[:, [-1]])])
    yield name, value


def gpt2(name: str, value: Tensor, config: Any) -> Named:
    yield name, value.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value


def stablelm(name: str, value: Tensor, config: Any) -> Named:
    """Norms of the heads become one matrix."""
    if ".norms." not in name:
        yield name, value


def mamba(name: str, value: Tensor, config: Any) -> Named:
    if name.endswith("A_log"):
        value = -torch.exp(value)
    yield name, value.squeeze() if "conv1d.weight" in name else value


def lfm2(name: str, value: Tensor, config: Any) -> Named:
    yield name, value.squeeze(1) if "conv.conv.weight" in name else value


def gpt_oss(name: str, value: Tensor, config: Any) -> Named:
    """Experts turned, gate and up taken apart from every second column."""
    if "gate_up_proj" in name:
        kind = "bias" if name.endswith("bias") else "weight"
        value = value if kind == "bias" else value.transpose(-1, -2)
        stem = name.removesuffix("_bias").removesuffix("gate_up_proj")
        gate, up = (value[..., i::2] if kind == "bias" else value[:, i::2] for i in (0, 1))
        yield f"{stem}gate_proj.{kind}", gate
        yield f"{stem}up_proj.{kind}", up
    elif name.endswith("down_proj_bias"):
        yield name.replace("_bias", ".bias"), value
    elif name.endswith("down_proj"):
        yield name + ".weight", value.transpose(-1, -2)
    else:
        yield (name + ".weight" if name.endswith("sinks") else name), value


def qwen35(name: str, value: Tensor, config: Any) -> Named:
    """Value heads tiled over the key heads, norms raised, the state's decay as it is used."""
    keys, per_key = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    size, before = config.linear_value_head_dim, 2 * keys * config.linear_key_head_dim

    def tile(t: Tensor, head: int) -> Tensor:
        return t.view(keys, per_key, head, *t.shape[1:]).transpose(0, 1).reshape(t.shape)

    if name.endswith("A_log"):
        value = tile(-torch.exp(value), 1)
    elif name.endswith("dt_bias"):
        name, value = name.replace("dt_bias", "dt_proj.bias"), tile(value, 1)
    elif "conv1d" in name:
        value = value.squeeze(1)
        value = torch.cat([value[:before], tile(value[before:], size)])
    elif "in_proj_qkv" in name:
        value = torch.cat([value[:before], tile(value[before:], size)])
    elif "in_proj_z" in name:
        value = tile(value, size)
    elif "in_proj_a" in name or "in_proj_b" in name:
        value = tile(value, 1)
    elif "linear_attn.out_proj" in name:
        value = tile(value.t().contiguous(), size).t()
    elif name.endswith("norm.weight") and "linear_attn.norm" not in name:
        value = value + 1
    yield from experts(name, value, config)


def gemma4(name: str, value: Tensor, config: Any) -> Named:
    """Scales that are no weights there; experts stay joined."""
    for end, stored in (("router.scale", "ffn_gate_inp.scale"), ("router.per_expert_scale", "ffn_down_exps.scale")):
        if name.endswith(end):
            yield f"blk.{name.split('.')[2]}.{stored}", value
            return
    is_bare = name.endswith("layer_scalar") or ".experts." in name
    yield (name + ".weight" if is_bare else name), value


def minimax(name: str, value: Tensor, config: Any) -> Named:
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    yield from experts(name, value, config)


# models ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A case: value of `general.architecture`, class and config in transformers, keys beyond the usual, changes."""

    architecture: str
    make: Callable[[], Any]
    keys: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[str, Tensor, Any], Named] = same
    tensors: Mapping[str, list[float]] = field(default_factory=dict)


def causal(kind: str, config: str = "", **values: Any) -> Callable[[], Any]:
    """A maker of `transformers.<kind>ForCausalLM`."""
    model, settings = getattr(transformers, f"{kind}ForCausalLM"), getattr(transformers, config or f"{kind}Config")
    return lambda: model(settings(**values))


_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
_LINEAR_ATTENTION = {
    "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.time_step_rank": 4,
    "full_attention_interval": 4, "rope.dimension_count": 8,
}  # fmt: skip
_LINEAR_HEADS = {
    "num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_GEMMA2 = sizes(head_dim=32, sliding_window=8, query_pre_attn_scalar=32)
_GEMMA4 = sizes(
    head_dim=32, global_head_dim=64, sliding_window=8, num_hidden_layers=4, num_kv_shared_layers=0,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
_GEMMA4_KEYS = {
    "attention.key_length": 64, "attention.value_length": 64, "attention.key_length_swa": 32,
    "attention.value_length_swa": 32, "rope.dimension_count": 64, "rope.dimension_count_swa": 32,
    "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 8,
    "attention.sliding_window_pattern": [True, False, True, False], "attention.shared_kv_layers": 0,
}  # fmt: skip
_QUARTER = {"rope_freqs.weight": [1.0] * 8 + [1e30] * 24}  # a quarter of each global head turns
_PHI3 = sizes(original_max_position_embeddings=128)
_LONG = {"short": [1.0 + 0.1 * i for i in range(8)], "long": [2.0 + 0.3 * i for i in range(8)]}
_FALCON = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False,
    "bos_token_id": 1, "eos_token_id": 2, "parallel_attn": True, "bias": False,
}  # fmt: skip
_SMALL = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {
    "vocab_size": 96, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_T5_KEYS = {
    "embedding_length": 64, "feed_forward_length": 96, "block_count": 2, "decoder_block_count": 2,
    "attention.head_count": 4, "attention.key_length": 32, "attention.value_length": 32,
    "attention.layer_norm_epsilon": 1e-6, "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.relative_buckets_count": 32, "decoder_start_token_id": 0, "context_length": 512,
}  # fmt: skip


def _untied_t5() -> Any:
    config = transformers.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    config.tie_word_embeddings = False  # the class ties whatever it is told
    model = transformers.T5ForConditionalGeneration(config)
    model.set_input_embeddings(model.shared)
    return model


MODELS: Mapping[str, Model] = {
    "llama": Model("llama", causal("Llama", **sizes()), {"rope.dimension_count": 16}, interleaved),
    "llama-yarn": Model(
        "llama", causal("Llama", **sizes(rope_parameters=rope(
            "yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16.0, attention_factor=0.8))),
        {**_YARN, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_attn_factor": 0.8}, interleaved,
    ),
    "llama-linear": Model(
        "llama", causal("Llama", **sizes(rope_parameters=rope("linear", factor=4.0))),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, interleaved,
    ),
    "mistral-window": Model(
        "llama", causal("Mistral", **sizes(sliding_window=8)), {"attention.sliding_window": 8}, interleaved
    ),
    "mixtral": Model(
        "llama", causal("Mixtral", **sizes(num_local_experts=4, num_experts_per_tok=2)),
        {"expert_count": 4, "expert_used_count": 2}, interleaved,
    ),
    "qwen2": Model("qwen2", causal("Qwen2", **sizes())),
    "qwen2moe": Model(
        "qwen2moe", causal("Qwen2Moe", **moe(shared_expert_intermediate_size=64)),
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32,
         "expert_shared_feed_forward_length": 64}, experts,
    ),
    "qwen3": Model("qwen3", causal("Qwen3", **sizes(head_dim=32))),
    "qwen3moe": Model(
        "qwen3moe", causal("Qwen3Moe", **moe(head_dim=32, norm_topk_prob=True)),
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}, experts,
    ),
    "qwen35": Model(
        "qwen35", causal("Qwen3_5", "Qwen3_5TextConfig", **sizes(**_LINEAR_HEADS, linear_value_head_dim=32)),
        {**_LINEAR_ATTENTION, "ssm.inner_size": 128, "rope.dimension_sections": [11, 11, 10, 0]}, qwen35,
    ),
    "qwen35moe": Model(
        "qwen35moe",
        causal("Qwen3_5Moe", "Qwen3_5MoeTextConfig",
               **moe(shared_expert_intermediate_size=64, **_LINEAR_HEADS, linear_value_head_dim=32)),
        {**_LINEAR_ATTENTION, "ssm.inner_size": 128, "expert_count": 4, "expert_used_count": 2,
         "attention.recurrent_layers": [True, True, True, False], "expert_feed_forward_length": 32,
         "expert_shared_feed_forward_length": 64}, qwen35,
    ),
    "gemma": Model("gemma", causal("Gemma", **sizes(head_dim=32)), change=raised_norms),
    "gemma2": Model(
        "gemma2", causal("Gemma2", **_GEMMA2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        {"attention.sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, raised_norms,
    ),
    "gemma3": Model(
        "gemma3", causal("Gemma3", "Gemma3TextConfig", **_GEMMA2 | {"num_hidden_layers": 7}, rope_parameters={
            "full_attention": rope("linear", 1e6, factor=8.0), "sliding_attention": rope("default", 2e4)}),
        {"attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.freq_base_swa": 2e4,
         "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, raised_norms,
    ),
    "gemma4": Model(
        "gemma4", causal("Gemma4", "Gemma4TextConfig", **_GEMMA4, hidden_size_per_layer_input=32,
                         vocab_size_per_layer_input=96, final_logit_softcapping=4.0),
        {**_GEMMA4_KEYS, "embedding_length_per_layer_input": 32, "final_logit_softcapping": 4.0}, gemma4, _QUARTER,
    ),
    "gemma4-experts": Model(
        "gemma4", causal("Gemma4", "Gemma4TextConfig", **_GEMMA4, hidden_size_per_layer_input=0, enable_moe_block=True,
                         num_experts=4, top_k_experts=2, moe_intermediate_size=32),
        {**_GEMMA4_KEYS, "embedding_length_per_layer_input": 0, "expert_count": 4, "expert_used_count": 2,
         "expert_feed_forward_length": 32}, gemma4, _QUARTER,
    ),
    "gemma4-shared-keys": Model(
        "gemma4", causal("Gemma4", "Gemma4TextConfig", **_GEMMA4 | {"num_kv_shared_layers": 2},
                         hidden_size_per_layer_input=32, vocab_size_per_layer_input=96, use_double_wide_mlp=True),
        {**_GEMMA4_KEYS, "embedding_length_per_layer_input": 32, "attention.shared_kv_layers": 2,
         "feed_forward_length": [96, 96, 192, 192]}, gemma4, _QUARTER,
    ),
    "gemma4-keys-as-values": Model(
        "gemma4", causal("Gemma4", "Gemma4TextConfig", **_GEMMA4, hidden_size_per_layer_input=0, attention_k_eq_v=True,
                         num_global_key_value_heads=1),
        {**_GEMMA4_KEYS, "embedding_length_per_layer_input": 0, "attention.head_count_kv": [2, 1, 2, 1]}, gemma4,
        _QUARTER,
    ),
    "phi3": Model("phi3", causal("Phi3", **_PHI3, rope_parameters=rope(partial_rotary_factor=0.5)),
                  {"rope.dimension_count": 8, "rope.scaling.original_context_length": 128,
                   "attention.sliding_window": 0}),
    "phi3-window": Model("phi3", causal("Phi3", **_PHI3, sliding_window=8), {"attention.sliding_window": 8}),
    "phi3-longrope": Model(
        "phi3", causal("Phi3", **_PHI3 | {"original_max_position_embeddings": 32}, rope_parameters=rope(
            "longrope", original_max_position_embeddings=32, short_factor=_LONG["short"],
            long_factor=_LONG["long"])),
        {"rope.scaling.original_context_length": 32, "rope.dimension_count": 16,
         "rope.scaling.attn_factor": 1.1832159757614136},  # sqrt(1 + ln 4 / ln 32)
        tensors={"rope_factors_long.weight": _LONG["long"], "rope_factors_short.weight": _LONG["short"]},
    ),
    "starcoder2": Model("starcoder2", causal("Starcoder2", **sizes(use_bias=True))),
    "falcon": Model("falcon", causal("Falcon", **_FALCON, multi_query=True, new_decoder_architecture=False),
                    {"attention.head_count_kv": 1, "feed_forward_length": 256}, falcon),
    "falcon-new": Model("falcon", causal("Falcon", **_FALCON, num_kv_heads=2, new_decoder_architecture=True),
                        {"attention.head_count_kv": 2, "feed_forward_length": 256}, falcon),
    "bloom": Model("bloom", causal("Bloom", **_SMALL, hidden_size=64, n_layer=2, n_head=4),
                   {"feed_forward_length": 256}, bloom),
    "gpt2": Model(
        "gpt2", lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**_SMALL, n_embd=64, n_layer=2, n_head=4, n_positions=128)),
        {"feed_forward_length": 256}, gpt2,
    ),
    "stablelm": Model(
        "stablelm", causal("StableLm", **sizes(use_parallel_residual=False, use_qkv_bias=True,
                                               rope_parameters=rope(partial_rotary_factor=0.5))),
        {"rope.dimension_count": 8, "use_parallel_residual": False},
    ),
    "stablelm-parallel": Model(
        "stablelm", causal("StableLm", **sizes(use_parallel_residual=True, qk_layernorm=True,
                                               rope_parameters=rope(partial_rotary_factor=0.25))),
        {"rope.dimension_count": 4, "use_parallel_residual": True}, stablelm,
    ),
    "nemotron": Model(
        "nemotron", causal("Nemotron", **sizes(norm_eps=1e-5, rope_parameters=rope(partial_rotary_factor=0.5))),
        {"rope.dimension_count": 8, "rope.scaling.type": "none", "attention.layer_norm_epsilon": 1e-5}, raised_norms,
    ),
    "mamba": Model(
        "mamba", causal("Mamba", **_SMALL, hidden_size=64, num_hidden_layers=2, state_size=16, conv_kernel=4, expand=2,
                        time_step_rank=8),
        {"attention.head_count": 0, "feed_forward_length": 0, "ssm.conv_kernel": 4, "ssm.inner_size": 128,
         "ssm.state_size": 16, "ssm.time_step_rank": 8, "ssm.dt_b_c_rms": False,
         "attention.layer_norm_rms_epsilon": 1e-5}, mamba,
    ),
    "lfm2": Model(
        "lfm2", causal("Lfm2", **sizes(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"],
                                       block_auto_adjust_ff_dim=False)),
        {"attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3, "attention.layer_norm_rms_epsilon": 1e-5}, lfm2,
    ),
    "gpt-oss": Model(
        "gpt-oss", causal("GptOss", **sizes(
            num_local_experts=4, num_experts_per_tok=2, head_dim=32, sliding_window=8, rope_parameters=rope(
                "yarn", 150000.0, factor=4.0, original_max_position_embeddings=32, truncate=False))),
        {**_YARN, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96,
         "attention.sliding_window": 8, "rope.freq_base": 150000.0}, gpt_oss,
    ),
    "minimax-m2": Model(
        "minimax-m2", causal("MiniMaxM2", **sizes(num_local_experts=4, num_experts_per_tok=2, head_dim=32,
                                                  rope_parameters=rope(partial_rotary_factor=0.5))),
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96, "expert_gating_func": 2,
         "rope.dimension_count": 16}, minimax,
    ),
    "command-r": Model(
        "command-r", causal("Cohere", **sizes(logit_scale=0.25)), {"logit_scale": 0.25, "rope.scaling.type": "none"}
    ),
    "t5": Model("t5", lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
        **_T5, feed_forward_proj="relu")), _T5_KEYS),
    "t5-gated": Model("t5", _untied_t5, _T5_KEYS),
    "umt5": Model("t5", lambda: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(
        **_T5, feed_forward_proj="gated-gelu")), _T5_KEYS),
}  # fmt: skip

_ALIKE = {  # key -> attributes of a config that hold it, the first that exists
    "context_length": ("max_position_embeddings", "n_positions", "seq_length"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
}


def random_model(name: str) -> Any:
    """The model of a case with random weights that matter: norms near 1, everything else large enough to show."""
    torch.manual_seed(1)
    model = MODELS[name].make().float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in key or "ln_" in key:
                value.add_(0.1 * noise)
            elif not key.endswith("A_log"):
                value.copy_(noise * (0.15 if value.dim() > 1 else 0.1))
    return model


def round_trip(model: Any, kind: gguf.GGMLQuantizationType) -> None:
    """Every matrix of a layer as it is after ggml's quantizer, in place; blocks go along the inputs."""
    turned = [f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]
    with torch.no_grad():
        for key, value in model.named_parameters():
            if not is_matrix(key, value):
                continue
            is_turned = key in turned or (type(model).__name__.startswith("GptOss") and ".experts." in key)
            rows = value.transpose(-1, -2) if is_turned else value
            shape = rows.shape
            raw = gguf.quantize(rows.reshape(-1, shape[-1]).contiguous().numpy(), kind)
            back = torch.from_numpy(gguf.dequantize(raw, kind)).reshape(shape)
            value.copy_(back.transpose(-1, -2) if is_turned else back)


def is_matrix(name: str, value: Tensor) -> bool:
    """What a quantizer touches: neither norms, routers, convolutions nor tables of positions."""
    kept = ("norm", "conv1d", "conv.conv", "A_log", "mlp.gate.", "router", "shared_expert_gate", "wpe", "sinks", "bias",
            "dt_proj", "ln_", "position")
    return value.dim() >= 2 and not any(part in name for part in kept) and value.shape[-1] % 32 == 0


def write(
    name: str, model: Any, path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    raw: Mapping[str, tuple[Tensor, gguf.GGMLQuantizationType]] | None = None,
) -> Path:
    """The model as GGUF: matrices of layers as `kind`, everything else F32; tensors in `raw` as these bytes."""
    case, config = MODELS[name], model.config
    writer = gguf.GGUFWriter(path, case.architecture)
    said = config.to_dict()
    keys = {key: next((said[a] for a in names if said.get(a) is not None), None) for key, names in _ALIKE.items()}
    theta = (said.get("rope_parameters") or {}).get("rope_theta")
    keys |= {"rope.freq_base": theta, "vocab_size": config.vocab_size} | dict(case.keys)
    for key, value in keys.items():
        if value is not None:
            _add(writer, f"{case.architecture}.{key}", value)
    for key, token in (("bos", said.get("bos_token_id")), ("eos", said.get("eos_token_id"))):
        if token is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
    for tensor, values in case.tensors.items():
        writer.add_tensor(tensor, torch.tensor(values, dtype=torch.float32).numpy())
    for tensor, value in gguf_tensors(name, model):
        if tensor in (raw or {}):
            blocks, type_ = (raw or {})[tensor]
            writer.add_tensor(tensor, blocks.numpy(), raw_dtype=type_)
            continue
        is_block = kind != gguf.GGMLQuantizationType.F32 and _is_quantized(tensor, value)
        data = value.contiguous().float().numpy()
        writer.add_tensor(tensor, gguf.quantize(data, kind) if is_block else data, raw_dtype=kind if is_block else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _is_quantized(tensor: str, value: Tensor) -> bool:
    kept = ("norm", "ssm_conv1d", "shortconv.conv", "ssm_a", "ffn_gate_inp", "position_embd", "ssm_dt", "_rel_b", ".bias")
    return value.dim() >= 2 and not any(part in tensor for part in kept) and value.shape[-1] % 32 == 0


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def gguf_tensors(name: str, model: nn.Module) -> Named:
    """GGUF name and value of every tensor, as the converter gives them."""
    case = MODELS[name]
    architecture = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == case.architecture)
    names = gguf.get_tensor_name_map(architecture, 8)
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tied |= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    for key, value in state.items():
        if key in tied or key.endswith(("inv_freq", "masked_bias", ".attn.bias", "embed_scale")):
            continue
        for changed, tensor in case.change(key, value, model.config):
            found = changed if changed.endswith(".scale") else names.get_name(changed, try_suffixes=(".weight", ".bias"))
            assert found is not None, f"gguf-py has no name for {changed}"
            yield found, tensor
    if name == "stablelm-parallel":
        for layer in range(2):
            for part, heads in (("q", 4), ("k", 2)):
                norms = [state[f"model.layers.{layer}.self_attn.{part}_layernorm.norms.{h}.weight"]
                         for h in range(heads)]
                yield f"blk.{layer}.attn_{part}_norm.weight", torch.stack(norms)
