"""GGUF metadata as a Hugging Face config: what transformers builds the same model from.

`gguf_architectures.py` has a row for each architecture; here the row is walked. The file's float32 epsilon is kept as
it is (9.999999747378752e-06): the genuine engine computes with it. Keys that nobody asked for are named in a remark,
and refused where they would change the result. Sources: llama.cpp 0c1e57098, docs/formats/gguf.md §4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from anybit.checkpoints.contents import JSON, Contents, TensorInfo
from anybit.checkpoints.gguf_architectures import ARCHITECTURES, FACTS, NOT_LOADED, Architecture, choose
from anybit.checkpoints.gguf_keys import Facts, Keys, ReadFloats
from anybit.errors import Unsupported

__all__ = ["architecture_of", "config_from_metadata", "remarks", "require_loadable"]

# general.type values, or architectures, of files that are no language model by themselves
_NO_MODEL: Final = {
    "imatrix": "an importance matrix",
    "adapter": "a LoRA adapter",
    "mmproj": "a vision tower",
    "clip": "a vision tower",
}
_TOKEN_IDS: Final = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}

# keys that change the result -> the values that do not; an architecture that knows a key asks for it
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "attention.output_scale",
                     "attention.value_scale", "expert_weights_scale", "rope.scaling.attn_factor",
                     "rope.scaling.alpha", "expert_group_count", "expert_group_used_count",
                     "interleave_moe_layer_step", "moe_every_n_layers"), (0, 1)),
    **dict.fromkeys(("attention.scale", "attn_logit_softcapping", "final_logit_softcapping",
                     "router_logit_softcapping", "attention.clamp_kqv", "attention.max_alibi_bias",
                     "attention.sliding_window", "attention.temperature_scale", "attention.temperature_length",
                     "attention.q_lora_rank", "attention.kv_lora_rank", "attention.shared_kv_layers",
                     "rope.scaling.yarn_log_multiplier", "leading_dense_block_count", "rescale_every_n_layers",
                     "pooling_type", "swiglu_clamp_exp", "swiglu_clamp_shexp", "activation_sparsity_scale",
                     "embedding_length_per_layer_input", "num_loops", "token_shift_count", "expert_shared_count",
                     "expert_count", "expert_used_count"), (0,)),
    "rope.scaling.yarn_ext_factor": (-1, 0, 1),
    "expert_gating_func": (0, 1),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
}  # fmt: skip
# keys that an architecture may leave alone: labels, and sizes that its tensors or other keys say again
_HARMLESS: Final = frozenset((
    "context_length", "vocab_size", "feed_forward_length", "attention.value_length", "attention.key_length",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.finetuned",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "tensor_data_layout",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "decoder_start_token_id",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_attn_factor",
    "attention.group_norm_epsilon", "attention.group_norm_groups", "rope.scale_linear",
))  # fmt: skip


def architecture_of(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Architecture | None:
    """The architecture of a file, None where the file names none or one that is not in the table."""
    name, kind = metadata.get("general.architecture"), metadata.get("general.type")
    if not isinstance(name, str) or (isinstance(kind, str) and kind in _NO_MODEL):
        return None
    return choose(name, metadata, tensors)


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
        reason = NOT_LOADED.get(name, "") if isinstance(name, str) else ""
        raise Unsupported("the model's architecture is not supported" + (f": {reason}" if reason else ""), where=where,
                          found="no general.architecture" if name is None else f"general.architecture {name!r:.80}",
                          wanted=", ".join(ARCHITECTURES), remedy="use a safetensors checkpoint of the same model")
    version = metadata.get("general.quantization_version", 2)
    if version != 2:  # ggml's GGML_QNT_VERSION: blocks of other versions had other layouts
        raise Unsupported("the blocks have another quantization version", where=where, found=f"{version!r:.80}",
                          wanted="2", remedy="quantize the original model again with a current llama.cpp")
    _require_neutral(contents)


def _require_neutral(contents: Contents) -> None:
    """Refuse a key that changes the result and that the config does not carry."""
    metadata, name = contents.gguf or {}, (contents.gguf or {})["general.architecture"]
    for key in _unasked(contents.metadata):
        found, neutral = metadata.get(f"{name}.{key}"), _NEUTRAL.get(key)
        values = getattr(found, "values", [found])
        if neutral is not None and any(value not in neutral for value in values):
            raise Unsupported(f"{name}.{key} is not known for this architecture", where=contents.path.name,
                              found=f"{found!r:.80}", wanted=" or ".join(map(str, neutral)),
                              remedy="use a safetensors checkpoint of the same model")


def remarks(contents: Contents) -> tuple[str, ...]:
    """One sentence naming the keys that have no place in the config and might matter."""
    strange = [key for key in _unasked(contents.metadata) if key not in _HARMLESS and key not in _NEUTRAL]
    if not strange:
        return ()
    shown = ", ".join(strange[:6]) + (f" and {len(strange) - 6} more" if len(strange) > 6 else "")
    return (f"{contents.path.name}: keys of the architecture that are not known here, ignored: {shown}",)


def _unasked(metadata: Mapping[str, str]) -> list[str]:
    return metadata.get("unasked_keys", "").splitlines()


def config_from_metadata(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str, read_floats: ReadFloats
) -> tuple[JSON, tuple[str, ...]]:
    """A Hugging Face config with `model_type`, and the keys of the architecture that it did not need.

    ({}, ()) for a file that is not one of our architectures. `read_floats` reads the values of a small F32 tensor (rope
    factors). Raises Inconsistent where metadata and tensors disagree, Unsupported for a value that transformers' model
    cannot have, LimitExceeded for sizes beyond `limits.py`.
    """
    architecture = architecture_of(metadata, tensors)
    if architecture is None:
        return {}, ()
    name = metadata["general.architecture"]
    keys = Keys(metadata, name, where)
    facts = Facts(keys, tensors, read_floats)
    config: JSON = {"model_type": architecture.model_type, "architectures": [architecture.class_name]}
    config |= {key: FACTS[fact](facts) for key, fact in architecture.facts.items()}
    config |= architecture.constants
    config |= {key: facts.has(*suffixes) for key, suffixes in architecture.biases.items()}
    for rule in architecture.rules:
        config |= rule(facts, config)
    for key, token in _TOKEN_IDS.items():
        value = metadata.get(f"tokenizer.ggml.{token}_token_id")
        config[key] = value if isinstance(value, int) else None  # a class's default belongs to another vocabulary
    unasked = [k.removeprefix(f"{name}.") for k in metadata if k.startswith(f"{name}.")]
    return config, tuple(k for k in unasked if k not in keys.asked)
