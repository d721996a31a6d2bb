"""Units: layers that read the same input (q/k/v, gate/up) and whether they run as one product. Torch-free.

The compiled CPU library stores the layers of a unit below each other and wakes its threads once for all of them. Each
row keeps its own scales, so unequal scales of the parts (NVFP4's global scales among them) are no obstacle; unequal
schemes and quantized inputs are: each part then runs alone. The host does what stands here (`hosts/filling.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from anybit.kernels.request import Regime
from anybit.schemes import Layer, Scheme

# children of one module that read the same input, by the hubs' names
SAME_INPUT: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# weights of a unit: larger layers keep memory and threads busy alone, and would be held twice while they are joined
MAX_UNIT_ELEMENTS: Final = 2**24
_JOINING_LAYOUT: Final = "planes"


@dataclass(frozen=True)
class Unit:
    """Layers that read the same input.

    name     of the module they belong to, then the parts: "model.layers.0.self_attn: q_proj + k_proj + v_proj"
    reasons  why each part runs alone; empty if they run as one product
    """

    layers: tuple[str, ...]
    reasons: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The parent module and the parts."""
        parent = self.layers[0].rpartition(".")[0]
        return f"{parent}: {' + '.join(self.parts)}"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the layers within their module."""
        return tuple(layer.rpartition(".")[2] for layer in self.layers)

    @property
    def is_joined(self) -> bool:
        """True if the parts run as one product."""
        return not self.reasons


@dataclass(frozen=True)
class Part:
    """What decides about one layer of a unit."""

    layer: Layer
    scheme: Scheme
    layout: str
    kernels: Mapping[Regime, str]


def units_of(layers: Mapping[str, Layer], part_of: Callable[[str], Part | None], *, pinned: bool) -> Iterator[Unit]:
    """The units among `layers`; `part_of` gives None for a layer that no kernel runs, `pinned` is batch invariance."""
    for names in SAME_INPUT:
        parents = (name.rpartition(".")[0] for name in layers if name.rpartition(".")[2] == names[0])
        for parent in parents:
            members = tuple(f"{parent}.{name}" if parent else name for name in names)
            if ".experts." in f".{parent}.":  # experts are one module with a product for each
                continue
            parts = [part for name in members if name in layers and (part := part_of(name)) is not None]
            if len(parts) == len(names) and any(part.scheme.is_quantized for part in parts):
                yield Unit(members, tuple(_reasons_apart(parts, pinned)))


def _reasons_apart(parts: list[Part], pinned: bool) -> Iterator[str]:
    first = parts[0]
    schemes = dict.fromkeys(str(part.scheme) for part in parts)
    layouts = dict.fromkeys(part.layout for part in parts)
    if set(layouts) != {_JOINING_LAYOUT}:
        yield f"layout {', '.join(layouts)} stores each layer alone"
    if len({part.scheme for part in parts}) > 1:
        yield f"schemes differ: {', '.join(schemes)}"
    if len({part.layer.shape[-1] for part in parts}) > 1:
        yield "input sizes differ"
    if any(part.scheme.activation is not None for part in parts):
        yield "inputs are quantized, each part's by its own scale"
    if any(part.scheme.output is not None for part in parts):
        yield "outputs are quantized, each part's by its own scale"
    if any(part.scheme.act_order or part.scheme.pre_scale for part in parts):
        yield "inputs are transformed, each part's in its own way"
    if any(block > 1 for block in _row_blocks(first.scheme)):
        yield "blocks of several rows"
    if any(placement != "grid" for placement in _placements(first.scheme)):
        yield "scales that are not placed by rows"
    if len({part.layer.has_bias for part in parts}) > 1:
        yield "some have a bias, some have none"
    if sum(part.layer.elements for part in parts) > MAX_UNIT_ELEMENTS:
        yield f"more than {MAX_UNIT_ELEMENTS:,} weights: each part is large enough alone"
    if set(layouts) == {_JOINING_LAYOUT} and any(part.kernels["decode"] != "native-matvec" for part in parts):
        yield "another kernel was asked for"
    if pinned:
        yield "batch invariance: one kernel for all M"


def _levels(scheme: Scheme) -> list[Any]:
    offset = scheme.offset
    return [*scheme.scales, *([offset, *offset.levels] if offset is not None else [])]


def _row_blocks(scheme: Scheme) -> list[int]:
    return [level.block[0] for level in _levels(scheme)]


def _placements(scheme: Scheme) -> list[str]:
    return [level.placement for level in _levels(scheme)]


def units_to_dict(units: Iterable[Unit]) -> list[dict[str, Any]]:
    """Units as data, those of equal parts and reasons folded."""
    folded: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for unit in units:
        folded.setdefault((unit.parts, unit.reasons), []).append(unit.layers[0].rpartition(".")[0])
    return [
        {"parts": list(parts), "modules": modules, "count": len(modules), "is_joined": not reasons,
         "reasons": list(reasons)}
        for (parts, reasons), modules in folded.items()
    ]


def units_from_dict(rows: Iterable[Mapping[str, Any]]) -> tuple[Unit, ...]:
    """Units from `units_to_dict`."""
    return tuple(
        Unit(tuple(f"{module}.{part}" if module else part for part in row["parts"]), tuple(row["reasons"]))
        for row in rows for module in row["modules"]
    )
