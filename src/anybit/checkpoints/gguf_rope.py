"""Rotary frequencies of a GGUF file as transformers' `rope_parameters`.

llama.cpp stores theta and the scaling of linear and yarn as keys, the factors of llama3 and longrope as tensors.
Sources: llama.cpp 0c1e57098 (conversion/base.py, llama-context.cpp), docs/formats/gguf.md §4.
"""

from __future__ import annotations

import math
from typing import Final

from anybit.checkpoints.contents import JSON
from anybit.checkpoints.gguf_keys import Facts
from anybit.errors import Unsupported

__all__ = ["ROPE_FACTORS", "rope_from_factors", "rope_parameters"]

ROPE_FACTORS: Final = "rope_freqs.weight"
_LONG: Final = "rope_factors_long.weight"
_SHORT: Final = "rope_factors_short.weight"


def rope_parameters(facts: Facts, head_dim: int, *, is_partial: bool = False) -> JSON:
    """Theta, and the scaling that gives the file's frequencies; with `is_partial` also which part of a head turns.

    Raises Unsupported for a rotary width that the architecture's model in transformers does not have.
    """
    keys = facts.keys
    theta = keys.number("rope.freq_base", 10000.0)
    width = keys.optional("rope.dimension_count") or head_dim
    found = _scaled(facts, theta, width)
    if width != head_dim:
        if not is_partial:
            raise Unsupported("only a part of each head is turned, which this architecture does not do elsewhere",
                              where=keys.where, found=f"rope.dimension_count {width} of {head_dim}",
                              wanted=f"{head_dim}", remedy="use a safetensors checkpoint of the same model")
        found["partial_rotary_factor"] = width / head_dim
    return found


def _scaled(facts: Facts, theta: float, width: int) -> JSON:
    keys = facts.keys
    original = keys.optional("rope.scaling.original_context_length")
    factors = facts.floats(ROPE_FACTORS)
    if factors is not None and len(factors) == width // 2 and any(f != 1.0 for f in factors):
        return rope_from_factors(factors, theta, original, facts.context)
    long, short = facts.floats(_LONG), facts.floats(_SHORT)
    if long is not None and short is not None:
        return {"rope_theta": theta, "rope_type": "longrope", "short_factor": short, "long_factor": long,
                "factor": facts.context / (original or facts.context),
                "attention_factor": keys.number("rope.scaling.attn_factor", 1.0),
                "original_max_position_embeddings": original or facts.context}
    kind = keys.word("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind == "yarn":
        return _yarn(facts, theta, factor, original)
    if factor not in (0.0, 1.0) and kind in ("linear", None):
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    return {"rope_theta": theta, "rope_type": "default"}


def _yarn(facts: Facts, theta: float, factor: float, original: int | None) -> JSON:
    """`yarn_attn_factor` is the config's attention_factor; `attn_factor` multiplies what would be used without."""
    keys = facts.keys
    keys.raw("rope.scaling.yarn_ext_factor")  # 1 in every yarn file
    scaling: JSON = {"rope_theta": theta, "rope_type": "yarn", "factor": factor,
                     "original_max_position_embeddings": original or facts.context}
    own = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    stated = keys.value("rope.scaling.yarn_attn_factor") is not None
    attention = keys.number("rope.scaling.yarn_attn_factor", own) * keys.number("rope.scaling.attn_factor", 1.0)
    if stated or attention != own:
        scaling["attention_factor"] = attention
    for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if keys.value(f"rope.scaling.{name}") is not None:
            scaling[key] = keys.number(f"rope.scaling.{name}", 0.0)
    return scaling


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
