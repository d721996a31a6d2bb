"""Predicted memory of a planned model: weights as stored, what loading needs beside them, the key-value cache.

The cache is the host's: `cache_utils.py` of transformers decides which layers keep every token, which the last few and
which none, and the attention of each model what it hands over. Source: transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from anybit.planning.config_facts import number, text_facts

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
TILE_BYTES: Final = 16 * 2**20  # decoded rows that a prefill product holds at once


@dataclass(frozen=True)
class Memory:
    """Bytes, all predicted from headers and config.

    cache_per_token  what a token adds to the cache while no layer's window is full
    windows          (tokens, bytes per token) of layers that keep only the last so many tokens, counted above too
    checkpoint       what the layers take in the file, before they are repacked
    """

    weights: int
    plain: int
    loading: int
    workspace: int
    cache_per_token: int
    windows: tuple[tuple[int, int], ...] = ()
    checkpoint: int = 0

    def cache(self, tokens: int, sequences: int = 1) -> int:
        """Bytes of the key-value cache with `tokens` in each sequence."""
        dropped = sum(per_token * max(0, tokens - window) for window, per_token in self.windows)
        return sequences * (self.cache_per_token * tokens - dropped)

    def at(self, tokens: int, sequences: int = 1) -> int:
        """Everything held while running with `tokens` in each sequence."""
        return self.weights + self.plain + self.workspace + self.cache(tokens, sequences)

    def to_dict(self) -> dict[str, Any]:
        """The prediction as data."""
        return {
            "weights_bytes": self.weights,
            "checkpoint_bytes": self.checkpoint,
            "plain_bytes": self.plain,
            "loading_bytes": self.loading,
            "workspace_bytes": self.workspace,
            "cache_bytes_per_token": self.cache_per_token,
            "cache_windows": [{"tokens": tokens, "bytes_per_token": size} for tokens, size in self.windows],
        }

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Memory:
        """The prediction from `to_dict`."""
        windows = tuple((row["tokens"], row["bytes_per_token"]) for row in fields["cache_windows"])
        return Memory(fields["weights_bytes"], fields["plain_bytes"], fields["loading_bytes"],
                      fields["workspace_bytes"], fields["cache_bytes_per_token"], windows, fields["checkpoint_bytes"])


# layers of these kinds keep the last tokens only; the config's key says how many
_WINDOWED: Final[Mapping[str, str]] = {
    "sliding_attention": "sliding_window", "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
# no keys and values: a recurrent state of fixed size, or no attention at all
_WITHOUT_CACHE: Final = frozenset({"linear_attention", "conv", "mamba", "moe", "mlp"})
# models without `layer_types` whose every layer slides; of the others' patterns the config says too little: all count
# as full, which is never too small
_ALL_SLIDE: Final = frozenset({"mistral", "mixtral", "phi3", "starcoder2"})


def cache_bytes(
    config: Mapping[str, Any], dtype: str, row_bytes: Callable[[int], int] | None = None
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """`cache_per_token` and `windows` of Memory; 0 and none where the config does not say.

    row_bytes  bytes of one head's key or value of so many numbers, where the cache keeps codes
    """
    facts = text_facts(config)
    per_layer = _layer_bytes(facts, row_bytes or (lambda width: width * DTYPE_BYTES.get(dtype, 4)))
    counts = _layers_by_window(facts)
    windows = tuple((window, per_layer * count) for window, count in counts.items() if window is not None)
    return per_layer * sum(counts.values()), windows


def _layer_bytes(facts: Mapping[str, Any], row: Callable[[int], int]) -> int:
    """Bytes that one token adds in one layer."""
    latent, rotary = number(facts, "kv_lora_rank"), number(facts, "qk_rope_head_dim")
    heads = number(facts, "num_attention_heads", "n_head")
    if latent:  # one latent and one rotary key for all heads; attention expands them
        return row(latent) + row(rotary)
    head_dim = number(facts, "head_dim") or (number(facts, "hidden_size", "n_embd") // heads if heads else 0)
    return 2 * (number(facts, "num_key_value_heads") or heads) * row(head_dim)


def _layers_by_window(facts: Mapping[str, Any]) -> dict[int | None, int]:
    """How many layers keep so many tokens; None is all of them."""
    kinds = facts.get("layer_types")
    if not isinstance(kinds, (list, tuple)):
        slides = str(facts.get("model_type")) in _ALL_SLIDE and number(facts, "sliding_window") > 0
        kind = "sliding_attention" if slides else "full_attention"
        kinds = [kind] * number(facts, "num_hidden_layers", "n_layer")
    found: dict[int | None, int] = {}
    for kind in map(str, kinds):
        if kind not in _WITHOUT_CACHE:
            window = number(facts, _WINDOWED[kind]) or None if kind in _WINDOWED else None
            found[window] = found.get(window, 0) + 1
    return found


def predict(
    layer_bytes: Iterable[int], stored_and_elements: Iterable[tuple[int, int]], plain_bytes: int,
    config: Mapping[str, Any], dtype: str, largest_unpacked: int,
    kernel_workspace: int = 0,
) -> Memory:
    """The prediction for a plan.

    layer_bytes          bytes of each layer in its layout
    stored_and_elements  (bytes in the file, number of weights) of each layer
    plain_bytes          norms and the like, in `dtype`
    largest_unpacked     elements of the largest matrix that is decoded or repacked at once
    kernel_workspace     bytes of scratch that the hungriest kernel says one call needs
    """
    layers = list(stored_and_elements)
    loading = max((stored + elements for stored, elements in layers), default=0)
    workspace = max(min(TILE_BYTES, 4 * largest_unpacked), kernel_workspace)
    return Memory(sum(layer_bytes), plain_bytes, loading, workspace, *cache_bytes(config, dtype),
                  sum(stored for stored, _ in layers))
