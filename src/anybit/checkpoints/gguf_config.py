"""GGUF metadata as a Hugging Face config: what `AutoConfig.for_model` builds the same model from.

One table gives the architectures, one the keys; what a file says only through its tensors (tied head, biases, rope
factors, expert sizes, vocabulary) is taken from them. The file's float32 epsilon is kept as it is
(9.999999747378752e-06): the genuine engine computes with it. Sources: llama.cpp 0c1e57098 (convert_hf_to_gguf.py,
llama-arch.cpp), docs/formats/gguf.md §4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from anybit.checkpoints.contents import JSON, Contents, TensorInfo
from anybit.checkpoints.gguf_header import GgufArray
from anybit.errors import Inconsistent, LimitExceeded, Unsupported
from anybit.limits import MAX_HIDDEN, MAX_LAYERS, MAX_VOCABULARY

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "config_from_metadata", "require_loadable"]

ReadFloats = Callable[[TensorInfo], list[float]]

# Names of GGUF tensors that a config or a dialect asks for.
EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
ROPE_FACTORS: Final = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """A value of `general.architecture` and the transformers model that computes the same.

    permuted  the converter changed the rows of q and k from half-split to interleaved rotary order
    moe       the model has experts; `norm_topk_prob` is what llama.cpp does, files do not state it
    """

    model_type: str
    class_name: str
    permuted: bool = False
    moe: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "qwen2moe": Architecture("qwen2_moe", "Qwen2MoeForCausalLM", moe=True, extra={"norm_topk_prob": False}),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", moe=True, extra={"norm_topk_prob": True}),
}
_MIXTRAL: Final = Architecture("mixtral", "MixtralForCausalLM", permuted=True, moe=True)
# Llama with biases on q, k and v but not on o: LlamaConfig.attention_bias means all four. Qwen2 is that model exactly.
_LLAMA_QKV_BIAS: Final = Architecture("qwen2", "Qwen2ForCausalLM", permuted=True)

# general.type values, or architectures, of files that are no language model by themselves
_NO_MODEL: Final = {
    "imatrix": "an importance matrix",
    "adapter": "a LoRA adapter",
    "mmproj": "a vision tower",
    "clip": "a vision tower",
}

_BLOCK: Final = re.compile(r"blk\.([0-9]{1,10})\.(.+)")
# model_type -> config key -> the tensor whose presence it states; qwen2 always has q, k and v biases, mixtral never
_BIAS_KEYS: Final[Mapping[str, Mapping[str, str]]] = {
    "llama": {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
    "qwen3": {"attention_bias": "blk.0.attn_q.bias"},
    "qwen2_moe": {"qkv_bias": "blk.0.attn_q.bias"},
    "qwen3_moe": {"attention_bias": "blk.0.attn_q.bias"},
}
_TOKEN_IDS: Final = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def architecture_of(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Architecture | None:
    """The architecture of a file, None where the file names none or one that is not in the table."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or metadata.get("general.type") in _NO_MODEL:
        return None
    if name == "llama" and metadata.get("llama.expert_count"):
        return _MIXTRAL
    if name == "llama" and "blk.0.attn_q.bias" in tensors and "blk.0.attn_output.bias" not in tensors:
        return _LLAMA_QKV_BIAS
    return ARCHITECTURES.get(name)


def require_loadable(contents: Contents) -> None:
    """Raise Unsupported, naming the reason, for a file that can be inspected but not run."""
    metadata = contents.gguf or {}
    where = contents.path.name
    name = metadata.get("general.architecture")
    kind = metadata.get("general.type")
    role = _NO_MODEL.get(kind if isinstance(kind, str) else "") or _NO_MODEL.get(name if isinstance(name, str) else "")
    if role:
        raise Unsupported(f"this file is {role}, no model", where=where, wanted="a language model",
                          remedy="give the .gguf file of the model itself")
    if architecture_of(metadata, contents.tensors) is None:
        raise Unsupported("the model's architecture is not supported", where=where,
                          found="no general.architecture" if name is None else f"general.architecture {name!r:.80}",
                          wanted=", ".join(ARCHITECTURES), remedy="use a safetensors checkpoint of the same model")
    version = metadata.get("general.quantization_version", 2)
    if version != 2:  # ggml's GGML_QNT_VERSION: blocks of other versions had other layouts
        raise Unsupported("the blocks have another quantization version", where=where, found=f"{version!r:.80}",
                          wanted="2", remedy="quantize the original model again with a current llama.cpp")


def config_from_metadata(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str, read_floats: ReadFloats
) -> JSON:
    """A Hugging Face config with `model_type`, or {} for a file that is not one of our architectures.

    `read_floats` reads the values of a small F32 tensor (rope factors). Raises Inconsistent where metadata and tensors
    disagree, LimitExceeded for sizes beyond `limits.py`.
    """
    architecture = architecture_of(metadata, tensors)
    if architecture is None:
        return {}
    keys = _Keys(metadata, metadata["general.architecture"], where)
    heads = keys.positive("attention.head_count")
    hidden = keys.positive("embedding_length", MAX_HIDDEN, "MAX_HIDDEN")
    layers = keys.positive("block_count")
    _check_blocks(layers, tensors, where)
    if layers > MAX_LAYERS:
        raise LimitExceeded("too many layers", where=where, found=f"{layers:,}", wanted=f"{MAX_LAYERS:,} (MAX_LAYERS)")
    head_dim = keys.optional("attention.key_length") or keys.optional("rope.dimension_count") or hidden // heads
    if head_dim == 0:
        raise Inconsistent("more heads than hidden inputs", where=where, found=f"{heads:,} heads, {hidden:,} inputs",
                           wanted="at least one input a head")
    config: JSON = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.optional("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "vocab_size": _vocabulary(keys, tensors, where),
        "max_position_embeddings": keys.optional("context_length") or 2048,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-5),
        "hidden_act": "silu",
        "tie_word_embeddings": HEAD not in tensors,
        "rope_parameters": _rope(keys, tensors, head_dim, read_floats),
        **architecture.extra,
    }
    for key, tensor in _BIAS_KEYS.get(architecture.model_type, {}).items():
        config[key] = tensor in tensors
    dense_size = keys.optional("feed_forward_length") or _rows(tensors, "ffn_up.weight")
    if dense_size is not None:
        config["intermediate_size"] = dense_size
    if architecture.moe:
        config.update(_experts(keys, tensors, layers, architecture))
    for key, name in _TOKEN_IDS.items():
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(value, int):
            config[key] = value
    return config


class _Keys:
    """Hyper-parameters `A.key` of architecture A; a value of a wrong type or size is refused by name."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str) -> None:
        self._metadata = metadata
        self._prefix = architecture
        self.where = where

    def value(self, key: str) -> Any:
        """The stored value; an array with one number a layer counts as that number where all are equal."""
        found = self._metadata.get(f"{self._prefix}.{key}")
        if isinstance(found, GgufArray):
            if len(set(found.values)) != 1:
                raise Unsupported(f"{self._prefix}.{key} differs from layer to layer", where=self.where,
                                  found=f"{found.values[:8]}", wanted="the same number in all layers",
                                  remedy="use a safetensors checkpoint of the same model")
            return found.values[0]
        return found

    def optional(self, key: str) -> int | None:
        """A whole number above 0, None where the key is absent."""
        found = self.value(key)
        if found is None:
            return None
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise Inconsistent(f"{self._prefix}.{key} is no size", where=self.where, found=f"{found!r:.80}",
                               wanted="a whole number above 0")
        return found

    def positive(self, key: str, limit: int | None = None, constant: str = "") -> int:
        """A whole number above 0 that must be there."""
        found = self.optional(key)
        if found is None:
            raise Inconsistent(f"{self._prefix}.{key} is missing", where=self.where, wanted="a whole number above 0")
        if limit is not None and found > limit:
            raise LimitExceeded(f"{self._prefix}.{key} is too large", where=self.where, found=f"{found:,}",
                                wanted=f"at most {limit:,} ({constant})")
        return found

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        found = self.value(key)
        if found is None:
            return default
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
            raise Inconsistent(f"{self._prefix}.{key} is no number", where=self.where, found=f"{found!r:.80}",
                               wanted="a finite number")
        return float(found)

    def word(self, key: str) -> str | None:
        """A string, None where the key is absent or something else."""
        found = self.value(key)
        return found if isinstance(found, str) else None


def _check_blocks(layers: int, tensors: Mapping[str, TensorInfo], where: str) -> None:
    numbers = {int(match[1]) for match in map(_BLOCK.fullmatch, tensors) if match}
    if len(numbers) != layers or max(numbers, default=-1) != layers - 1:
        raise Inconsistent("block_count and the tensors disagree", where=where, found=f"block_count {layers:,}",
                           wanted=f"{len(numbers)}, the blocks that have tensors",
                           remedy="a part of a split model may be missing; download it again")


def _vocabulary(keys: _Keys, tensors: Mapping[str, TensorInfo], where: str) -> int:
    """Rows of the embedding; files that lack it say it in a key."""
    embedding = tensors.get(EMBEDDING)
    size = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else keys.positive("vocab_size")
    if size > MAX_VOCABULARY:
        raise LimitExceeded("vocabulary too large", where=where, found=f"{size:,}",
                            wanted=f"at most {MAX_VOCABULARY:,} (MAX_VOCABULARY)")
    return size


def _rows(tensors: Mapping[str, TensorInfo], suffix: str) -> int | None:
    """N of the first block tensor called so."""
    for name, info in tensors.items():
        match = _BLOCK.fullmatch(name)
        if match and match[2] == suffix and len(info.shape) >= 2:
            return info.shape[-2]
    return None


def _experts(keys: _Keys, tensors: Mapping[str, TensorInfo], layers: int, architecture: Architecture) -> JSON:
    """Sizes of the experts: numbers of the file first, else what the tensors have."""
    count = keys.positive("expert_count")
    found: JSON = {
        "num_experts": count,
        "num_local_experts": count,
        "num_experts_per_tok": keys.positive("expert_used_count"),
    }
    if architecture.model_type == "mixtral":  # its experts have the model's intermediate_size
        return found
    size = _rows(tensors, "ffn_up_exps.weight") or _rows(tensors, "ffn_up.0.weight")
    size = keys.optional("expert_feed_forward_length") or size
    if size is not None:
        found["moe_intermediate_size"] = size
    shared = keys.optional("expert_shared_feed_forward_length") or _rows(tensors, "ffn_up_shexp.weight")
    if shared is not None:
        found["shared_expert_intermediate_size"] = shared
    found["decoder_sparse_step"] = 1
    found["mlp_only_layers"] = [n for n in range(layers) if f"blk.{n}.ffn_gate_inp.weight" not in tensors]
    return found


def _rope(keys: _Keys, tensors: Mapping[str, TensorInfo], head_dim: int, read_floats: ReadFloats) -> JSON:
    """`rope_parameters`: theta, and the scaling that gives the file's frequencies."""
    theta = keys.number("rope.freq_base", 10000.0)
    original = keys.optional("rope.scaling.original_context_length")
    factors_info = tensors.get(ROPE_FACTORS)
    if factors_info is not None and factors_info.dtype == "F32" and factors_info.shape == (head_dim // 2,):
        factors = read_floats(factors_info)
        if any(f != 1.0 for f in factors):
            context = keys.optional("context_length") or 2048
            return rope_from_factors(factors, theta, original, context)
    kind = keys.word("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind == "yarn":
        context = original or keys.optional("context_length") or 2048
        scaling: JSON = {"rope_theta": theta, "rope_type": "yarn", "factor": factor,
                         "original_max_position_embeddings": context}
        attention = keys.number("rope.scaling.attn_factor", 1.0) * keys.number("rope.scaling.yarn_attn_factor", 1.0)
        if attention != 1.0:  # llama.cpp multiplies yarn's own factor by it; a config states the product
            scaling["attention_factor"] = attention * (1 + 0.1 * math.log(factor) if factor > 1 else 1)
        for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if keys.value(f"rope.scaling.{name}") is not None:
                scaling[key] = keys.number(f"rope.scaling.{name}", 0.0)
        return scaling
    if factor not in (0.0, 1.0) and kind in ("linear", None):
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    return {"rope_theta": theta, "rope_type": "default"}


def rope_from_factors(factors: list[float], theta: float, original: int | None, context: int) -> JSON:
    """Rope parameters whose frequencies are theta^(-2i/d) / f_i.

    The converter writes llama3 scaling only as its factors. Where parameters of that scaling give them back (to the
    rounding of float32), these are returned; any other factors go out as they are, as a longrope whose short and long
    list are the same, which divides each frequency by its factor and leaves the attention alone.
    """
    largest = max(factors)
    for candidate in _original_contexts(factors, theta, original, largest):
        again = _llama3_factors(len(factors), theta, largest, candidate)
        if all(abs(a - f) <= 2e-6 * f for a, f in zip(again, factors, strict=True)):
            return {"rope_theta": theta, "rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": candidate}
    return {"rope_theta": theta, "rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0,
            "short_factor": factors, "long_factor": factors, "original_max_position_embeddings": context}


def _llama3_factors(count: int, theta: float, factor: float, original: int) -> list[float]:
    """What convert_hf_to_gguf.py writes for low and high frequency factors 1 and 4, the only ones published."""
    written = []
    for i in range(count):
        wavelength = 2 * math.pi * theta ** (i / count)
        if wavelength < original / 4:
            written.append(1.0)
        elif wavelength > original:
            written.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            written.append(1 / ((1 - smooth) / factor + smooth))
    return written


def _original_contexts(factors: list[float], theta: float, stated: int | None, largest: float) -> list[int]:
    """Context lengths worth trying: the stated one, those that factors in between imply, powers of two."""
    implied = []
    for i, f in enumerate(factors):
        if 1.0 < f < largest:
            smooth = (1 / f - 1 / largest) / (1 - 1 / largest)
            implied.append(round((1 + 3 * smooth) * 2 * math.pi * theta ** (i / len(factors))))
    return [*([stated] if stated else []), *implied, *(2**e for e in range(5, 21))]
