"""Repeated layers as one line: names without their numbers, counts, bits per weight. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from anybit.schemes import Layer

_EXPERT_PARENTS: Final = ("experts", "shared_expert", "shared_experts")
_MAX_WORDS: Final = 12
# the order in which a block computes; whatever else follows as it comes
_ORDER: Final = {name: i for i, name in enumerate(("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"))}


def part_name(layer: str) -> str:
    """The short name of a layer's place in its block.

    >>> part_name("model.layers.3.self_attn.q_proj"), part_name("model.layers.3.mlp.experts.7.up_proj")
    ('q', 'experts.up')
    """
    parts = layer.split(".")
    last = next((p for p in reversed(parts) if not p.isdigit()), layer)
    last = last.removesuffix("_proj") or last
    parent = next((p for p in parts[:-1] if p in _EXPERT_PARENTS), "")
    return f"{parent}.{last}" if parent and parent != last else last


def part_names(layers: Iterable[str]) -> str:
    """Short names, each once, in the order of the computation: `q k v o gate up down`."""
    names = sorted(dict.fromkeys(part_name(name) for name in layers), key=lambda n: _ORDER.get(n.split(".")[-1], 99))
    more = len(names) - _MAX_WORDS
    return " ".join(names[:_MAX_WORDS]) + (f" and {more} more" if more > 0 else "")


def bits(stored_bytes: int, elements: int) -> float:
    """Bits for each weight; 0 where there is none."""
    return 8 * stored_bytes / elements if elements else 0.0


@dataclass(frozen=True)
class Fold:
    """Layers of one kind and scheme."""

    kind: str
    scheme: str
    layers: tuple[Layer, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes in the files, scales included."""
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def elements(self) -> int:
        """Number of weights."""
        return sum(layer.elements for layer in self.layers)

    @property
    def names(self) -> str:
        """Short names of the places that they take."""
        return part_names(layer.name for layer in self.layers)


def fold(layers: Iterable[Layer]) -> Iterator[Fold]:
    """Layers by (kind, scheme), those with the most weights first."""
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.kind, str(layer.scheme)), []).append(layer)
    folds = [Fold(kind, scheme, tuple(members)) for (kind, scheme), members in groups.items()]
    return iter(sorted(folds, key=lambda f: -f.elements))
