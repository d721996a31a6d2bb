"""Plan documents as tables: layers folded, platforms beside each other. Pure functions, for every rendering.

A document is what `Plan.to_dict` gives, so a saved plan renders like a fresh one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from anybit.cli.folding import bits, part_names
from anybit.cli.output import duration
from anybit.kernels.request import REGIMES, Kernels
from anybit.planning.choose import WEIGHTS
from anybit.planning.difference import seconds_of

Document = Mapping[str, Any]
CONTEXT: Final = 4096  # tokens at which the memory of the key-value cache is shown
REFUSED: Final = "refused"
# how a cell reads, best first
EXECUTIONS: Final = ("native", "unquantized", "exact emulation", "weight-only", REFUSED)


@dataclass(frozen=True)
class Rows:
    """Layers of one kind and declared scheme that run alike on one platform: units that differ in shape only."""

    units: tuple[Mapping[str, Any], ...]

    @property
    def first(self) -> Mapping[str, Any]:
        """The unit that stands for all."""
        return self.units[0]

    @property
    def layers(self) -> list[str]:
        """All their layers."""
        return [name for unit in self.units for name in unit["layers"]]

    @property
    def names(self) -> str:
        """Short names of the layers, as text that may be foreign."""
        return part_names(self.layers)

    @property
    def shapes(self) -> str:
        """`1536 x 576, 576 x 1536`."""
        return ", ".join(" x ".join(map(str, unit["shape"])) for unit in self.units)

    def seconds(self, regime: str) -> float | None:
        """Time of one pass through all these layers; None where the regime does not occur."""
        found = [u["runs_a_pass"][regime] * u["kernels"][regime]["seconds"] for u in self.units
                 if regime in u["kernels"]]
        return sum(found) if found else None


def rows_of(document: Document) -> list[Rows]:
    """The units of a plan, those that differ in shape only put together."""
    groups: dict[object, list[Mapping[str, Any]]] = {}
    for unit in document["units"]:
        kernels = tuple((regime, row["name"]) for regime, row in unit["kernels"].items())
        refused = tuple((row["kernel"], tuple(row["regimes"]), row["reason"]) for row in unit["refused"])
        groups.setdefault((unit["kind"], unit["declared"], unit["scheme"], kernels, refused), []).append(unit)
    return [Rows(tuple(units)) for units in groups.values()]


@dataclass(frozen=True)
class Cell:
    """How the layers of a line run on one platform.

    execution  the worst of them; one of EXECUTIONS
    kernels    regime -> names
    seconds    decode time of one pass through all of them
    """

    execution: str
    kernels: Mapping[str, str]
    seconds: float

    @property
    def short(self) -> str:
        """`triton-planes` or `native-matvec · native-expand`."""
        return " · ".join(dict.fromkeys(self.kernels.values())) or REFUSED


@dataclass(frozen=True)
class Line:
    """One kind and declared scheme over several platforms."""

    kind: str
    declared: str
    layers: tuple[str, ...]
    cells: tuple[Cell, ...]


def comparison(documents: Sequence[Document]) -> list[Line]:
    """Lines by kind and declared scheme, a cell for each document."""
    keys = dict.fromkeys((u["kind"], u["declared"]) for document in documents for u in document["units"])
    lines = []
    for kind, declared in keys:
        by_document = [[u for u in d["units"] if (u["kind"], u["declared"]) == (kind, declared)] for d in documents]
        layers = dict.fromkeys(name for units in by_document for u in units for name in u["layers"])
        lines.append(Line(kind, declared, tuple(layers), tuple(_cell(units) for units in by_document)))
    return lines + list(_refused_lines(documents, {name for line in lines for name in line.layers}))


def _cell(units: Sequence[Mapping[str, Any]]) -> Cell:
    worst = max((u["execution"] for u in units), key=EXECUTIONS.index, default=REFUSED)
    kernels = {
        regime: ", ".join(dict.fromkeys(u["kernels"][regime]["name"] for u in units if regime in u["kernels"]))
        for regime in REGIMES
    }
    seconds = sum(u["runs_a_pass"]["decode"] * u["kernels"]["decode"]["seconds"] for u in units)
    return Cell(worst, {regime: names for regime, names in kernels.items() if names}, seconds)


def _refused_lines(documents: Sequence[Document], known: set[str]) -> Iterator[Line]:
    """Layers that no platform runs have no unit anywhere."""
    nowhere = dict.fromkeys(name for document in documents for name in document["refused"] if name not in known)
    if nowhere:
        yield Line("", "", tuple(nowhere), tuple(Cell(REFUSED, {}, 0.0) for _ in documents))


def bits_per_weight(document: Document) -> float:
    """Bits of one weight as the plan stores it, scales included."""
    elements = sum(u["count"] * math.prod(u["shape"]) for u in document["units"])
    return bits(document["memory"]["weights_bytes"], elements)


def execution_counts(document: Document) -> dict[str, int]:
    """Number of layers by how their decode step runs, the refused included; in the order of EXECUTIONS."""
    counts = dict.fromkeys(EXECUTIONS, 0)
    for unit in document["units"]:
        counts[unit["execution"]] += unit["count"]
    counts[REFUSED] += len(document["refused"])
    return {name: count for name, count in counts.items() if count}


def memory_parts(document: Document, tokens: int = CONTEXT) -> dict[str, int]:
    """What is held while running with a context of `tokens`: part -> bytes."""
    memory = document["memory"]
    return {
        "weights": memory["weights_bytes"],
        "plain tensors": memory["plain_bytes"],
        "workspace": memory["workspace_bytes"],
        f"cache for {tokens:,} tokens": memory["cache_bytes_per_token"] * tokens,
    }


def took(seconds: float, source: str) -> str:
    """`51.2 µs modelled`; a table whose rows are only looked up takes no time worth counting."""
    return f"{duration(seconds)} {source}" if seconds else "looked up"


def steps_line(unit: Mapping[str, Any]) -> str:
    """`triton-matvec to M = 8 · triton-fused to 192 · triton-expand beyond`; "" where the regimes say it all."""
    names = Kernels((row["up_to_tokens"], row["name"]) for row in unit["by_tokens"])
    if names.steps == Kernels.of(dict(names)).steps or not names:
        return ""
    last = len(names.steps) - 1
    bounds = (" beyond" if i == last else f" to {'M = ' if i == 0 else ''}{most:,}"
              for i, (most, _) in enumerate(names.steps))
    return " · ".join(name + bound for (_, name), bound in zip(names.steps, bounds, strict=True))


def decode_seconds(document: Document) -> float:
    """Time of the products of one decode step; attention and the rest of the host are not in it."""
    return seconds_of(document, "decode")


def price_word(document: Document) -> str:
    """`measured`, `modelled`, or both words."""
    found = {row["price"] for unit in document["units"] for row in unit["kernels"].values()}
    return " and ".join(sorted(found)) or "modelled"


def better_lines(unit: Mapping[str, Any]) -> list[str]:
    """What would have to change for a faster kernel, a line each."""
    return [
        f"{row['kernel']} ({', '.join(row['regimes'])}) would be {row['times_faster']:.1f}× as fast, but: "
        + "; ".join(reason["text"] for reason in row["needs"])
        for row in unit["better"]
    ]


def slower_lines(unit: Mapping[str, Any]) -> list[str]:
    """Layouts that could run it and are dearer: their time over the chosen one's, as the chooser weighs regimes."""
    chosen = sum(WEIGHTS[regime] * row["seconds"] for regime, row in unit["kernels"].items())
    return [f"layout {row['layout']}: {row['seconds'] / chosen:.1f}× the time" for row in unit["slower"] if chosen]


def refusal_lines(refused: Sequence[Mapping[str, Any]], regimes: int) -> list[tuple[str, str]]:
    """(kernel and the regimes, where not all) and reasons, a pair each."""
    made = []
    for row in refused:
        where = "" if len(row["regimes"]) == regimes else f" ({', '.join(row['regimes'])})"
        made.append((f"{row['kernel']}{where}", row["reason"]))
    return made


def joined_lines(document: Document) -> list[str]:
    """Layers that read the same input, and whether they run as one product."""
    made = []
    for row in document["joined"]:
        parts = " + ".join(row["parts"])
        how = "one product" if row["is_joined"] else "each alone: " + "; ".join(row["reasons"])
        made.append(f"{parts} ×{row['count']}: {how}")
    return made
