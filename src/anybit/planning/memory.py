"""Predicted memory of a planned model: weights as stored, what loading needs beside them, the key-value cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
TILE_BYTES: Final = 16 * 2**20  # decoded rows that a prefill product holds at once


@dataclass(frozen=True)
class Memory:
    """Bytes, all predicted from headers and config."""

    weights: int
    plain: int
    loading: int
    workspace: int
    cache_per_token: int

    def at(self, tokens: int) -> int:
        """Everything held while running with a context of `tokens`."""
        return self.weights + self.plain + self.workspace + self.cache_per_token * tokens

    def to_dict(self) -> dict[str, Any]:
        """The prediction as data."""
        return {
            "weights_bytes": self.weights,
            "plain_bytes": self.plain,
            "loading_bytes": self.loading,
            "workspace_bytes": self.workspace,
            "cache_bytes_per_token": self.cache_per_token,
        }


def cache_per_token(config: Mapping[str, Any], dtype: str) -> int:
    """Bytes that one token adds to the key-value cache; 0 where the config does not say."""
    text = config.get("text_config")
    facts = text if isinstance(text, Mapping) else config

    def number(*keys: str) -> int:
        return next((v for k in keys if isinstance(v := facts.get(k), int)), 0)

    layers = number("num_hidden_layers", "n_layer")
    heads = number("num_attention_heads", "n_head")
    kv_heads = number("num_key_value_heads") or heads
    head_dim = number("head_dim") or (number("hidden_size", "n_embd") // heads if heads else 0)
    return 2 * layers * kv_heads * head_dim * DTYPE_BYTES.get(dtype, 4)


def predict(
    layer_bytes: Iterable[int], stored_and_elements: Iterable[tuple[int, int]], plain_bytes: int,
    config: Mapping[str, Any], dtype: str, largest_unpacked: int,
) -> Memory:
    """The prediction for a plan.

    layer_bytes          bytes of each layer in its layout
    stored_and_elements  (bytes in the file, number of weights) of each layer
    plain_bytes          norms and the like, in `dtype`
    largest_unpacked     elements of the largest matrix that is decoded or repacked at once
    """
    loading = max((stored + elements for stored, elements in stored_and_elements), default=0)
    workspace = min(TILE_BYTES, 4 * largest_unpacked)
    return Memory(sum(layer_bytes), plain_bytes, loading, workspace, cache_per_token(config, dtype))
