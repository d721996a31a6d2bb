"""Numbers of a model's config, which multimodal models keep one level deeper. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["number", "text_facts"]


def text_facts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the text model: `text_config` where there is one, else the whole."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def number(facts: Mapping[str, Any], *keys: str) -> int:
    """The first of these keys that holds an integer; 0 if none does."""
    return next((v for k in keys if isinstance(v := facts.get(k), int)), 0)
