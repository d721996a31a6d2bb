"""Cutting a model over devices: which tensor-parallel sizes divide it, what a cut would split, what it changes.

Column-parallel layers (q/k/v, gate/up) are cut along N, row-parallel ones (o, down) along K; the others are whole on
every device. A cut is exact where it falls between the blocks that share a scale, and `QuantizedWeight.narrow` refuses
the rest. A scale that is computed from the whole input of a row-parallel layer is computed from a part of it after a
cut: the result changes, which is said. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from anybit.planning.config_facts import text_facts
from anybit.schemes import Layer, Scheme

Cut = Literal["rows", "columns", "none"]

# last part of a module's name -> the dimension of its weight that a cut divides
_CUTS: Final[Mapping[str, Cut]] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3",
                     "embed_tokens", "lm_head", "q_b_proj", "kv_b_proj", "fc1", "c_fc"), "rows"),
    **dict.fromkeys(("o_proj", "down_proj", "w2", "out_proj", "dense", "fc2", "c_proj"), "columns"),
}
SIZES: Final = (2, 4, 8, 16)


@dataclass(frozen=True)
class Obstacle:
    """Why a layer cannot be cut into so many parts, or not exactly.

    code   divides: the dimension is no multiple; splits: a group or block would be split; position: scales lie over
           the flattened matrix; heads: attention heads are no multiple; changes: it can be cut, the result changes
    """

    code: Literal["divides", "splits", "position", "heads", "changes"]
    layers: tuple[str, ...]
    text: str

    def to_dict(self) -> dict[str, Any]:
        """The obstacle as data."""
        return {"code": self.code, "layers": list(self.layers), "text": self.text}


@dataclass(frozen=True)
class TensorParallel:
    """One size and what stands against it; it divides the model if nothing but `changes` does."""

    size: int
    obstacles: tuple[Obstacle, ...]

    @property
    def divides(self) -> bool:
        """True if every layer can be cut exactly."""
        return all(obstacle.code == "changes" for obstacle in self.obstacles)

    def to_dict(self) -> dict[str, Any]:
        """The size as data."""
        return {"size": self.size, "divides": self.divides, "obstacles": [o.to_dict() for o in self.obstacles]}


def cut_of(layer: Layer) -> Cut:
    """Which dimension of a layer's weight tensor parallelism divides."""
    return _CUTS.get(layer.name.rpartition(".")[2], "none")


def tensor_parallel(layers: Iterable[Layer], config: Mapping[str, Any], sizes: Iterable[int] = SIZES,
                    ) -> Iterator[TensorParallel]:
    """Each size with its obstacles, layers of equal obstacle folded."""
    layers = list(layers)
    for size in sizes:
        found: dict[tuple[Literal["divides", "splits", "position", "heads", "changes"], str], list[str]] = {}
        for layer in layers:
            for code, text in _against(layer, size):
                found.setdefault((code, text), []).append(layer.name)
        obstacles = [Obstacle(code, tuple(names), text) for (code, text), names in found.items()]
        yield TensorParallel(size, (*_heads(config, size), *obstacles))


def _heads(config: Mapping[str, Any], size: int) -> Iterator[Obstacle]:
    heads = text_facts(config).get("num_attention_heads")
    shared = kv_heads(config)
    if isinstance(heads, int) and heads % size:
        yield Obstacle("heads", (), f"{heads} attention heads are no multiple of {size}")
    elif shared is not None and shared % size and size % max(shared, 1):
        yield Obstacle("heads", (), f"{shared} key-value heads neither divide {size} nor are divided by it")


def kv_heads(config: Mapping[str, Any]) -> int | None:
    """Heads of the key-value cache: one where it keeps latents for all (`kv_lora_rank`); None if the config is mute."""
    facts = text_facts(config)
    if isinstance(facts.get("kv_lora_rank"), int):
        return 1
    found = facts.get("num_key_value_heads") or facts.get("num_attention_heads")
    return found if isinstance(found, int) else None


_Found = tuple[Literal["divides", "splits", "position", "heads", "changes"], str]


def _against(layer: Layer, size: int) -> Iterator[_Found]:
    cut = cut_of(layer)
    if cut == "none":
        return
    n, k = layer.shape[-2:]
    if layer.kind == "embedding":
        return  # vocabularies are padded by every host
    whole, letter = (n, "N") if cut == "rows" else (k, "K")
    if whole % size:
        yield "divides", f"{letter} = {whole} is no multiple of {size}"
        return
    for block, placement in _blocks(layer.scheme):
        yield from _split(block, placement, cut, (n, k), letter, size)
    if cut == "columns":
        yield from _changes(layer.scheme, k // size)


def _blocks(scheme: Scheme) -> Iterator[tuple[tuple[int, int], str]]:
    for level in scheme.scales:
        yield level.block, level.placement
    if scheme.offset is not None:
        yield scheme.offset.block, scheme.offset.placement
        for level in scheme.offset.levels:
            yield level.block, level.placement


def _split(
    block: tuple[int, int], placement: str, cut: Cut, shape: tuple[int, int], letter: str, size: int
) -> Iterator[_Found]:
    n, k = shape
    if placement in ("flat", "strided"):
        if cut == "columns" or placement == "strided":
            yield "position", f"scales lie over the flattened matrix: a cut along {letter} would mix them"
        elif n // size * k % block[1]:
            yield "splits", f"N / {size} = {n // size} rows of {k} would split a block of {block[1]}"
        return
    if placement == "gathered" and cut == "columns":
        return  # the map is cut, the table of groups stays whole
    whole, shared = (n, block[0]) if cut == "rows" else (k, block[1])
    if 1 < shared < whole and whole // size % shared:  # a block over all of it is one scale that every part keeps
        what = "group" if block[0] == 1 else "block"
        yield "splits", f"{letter} / {size} = {whole // size} would split a {what} of {shared}"


def _changes(scheme: Scheme, part: int) -> Iterator[_Found]:
    spec = scheme.activation
    if spec is None or not spec.dynamic:
        return
    if spec.granularity == "group":
        if part % spec.group_size:
            yield "changes", f"its input's scale is computed over groups of {spec.group_size}, which a cut would split"
        return
    yield "changes", f"its input's scale is computed over a {spec.granularity}, after a cut over a part of it"
