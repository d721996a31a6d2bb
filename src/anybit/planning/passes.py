"""How often a layer's matrix is multiplied in one pass of some tokens: of experts those that some token chooses.

Tokens are taken to choose experts evenly. A table of embeddings is multiplied where it is the output head too (tied);
looking rows up costs nothing worth counting. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from anybit.planning.config_facts import number, text_facts
from anybit.schemes import LayerKind

_HEADS: Final = frozenset({"lm_head", "embed_out", "output_layer", "score"})


def is_tied(layers: Iterable[str]) -> bool:
    """True if no layer is an output head: then the table of embeddings is."""
    return not any(name.rpartition(".")[2] in _HEADS for name in layers)


def experts_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """(routed experts of a block, those that a token chooses); (0, 0) for a dense model."""
    facts = text_facts(config)
    return (number(facts, "num_local_experts", "num_experts", "n_routed_experts"),
            number(facts, "num_experts_per_tok", "num_experts_per_token"))


def expected_experts(experts: int, used: int, tokens: int) -> float:
    """Experts that at least one of `tokens` tokens chooses."""
    used = min(used or experts, experts)
    return experts * (1.0 - (1.0 - used / experts) ** tokens) if experts else 0.0


def multiplications(
    kind: LayerKind, layers: Iterable[str], shape: tuple[int, ...], config: Mapping[str, Any], tokens: int, *,
    tied: bool,
) -> float:
    """How often a matrix of `shape` is multiplied in one pass of so many tokens through all of `layers`."""
    layers = tuple(layers)
    if kind == "embedding":
        return float(tied)
    experts, used = experts_of(config)
    if kind == "experts":
        return len(layers) * expected_experts(shape[0], used, tokens)
    routed = sum(".experts." in name for name in layers)
    share = expected_experts(experts, used, tokens) / experts if experts else 1.0
    return len(layers) - routed + routed * share
