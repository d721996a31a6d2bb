"""What an H200 measured, as a table: the plan's kernel for every scheme, shape and M, and what the choice loses.

`make docs` puts it into docs/gpu.md from benchmarks/results/h200.json; `benchmarks/plot_kernels.py` draws the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(ROOT / "tools"))

from priors import cells_of  # noqa: E402

from anybit.cli.bench import TOKENS  # noqa: E402
from anybit.cli.bench_kernels import scheme_named  # noqa: E402
from anybit.kernels.request import Request  # noqa: E402
from anybit.planning.measured import Measured  # noqa: E402
from anybit.planning.regret import ALLOWED, Regret, regrets  # noqa: E402
from anybit.platforms import Platform, named  # noqa: E402

_PROVIDERS: Final = {"humming-kernels": "humming", "aiter": "aiter"}  # library in a result file -> name in a platform
_LEAST_CELLS: Final = 4  # of a line of the table
# how a kernel is marked in a table of ratios; one of ours that decodes in registers has no mark
MARKS: Final = {"triton-expand": "e", "torch-scaled-mm": "s", "torch-int-mm": "i", "torch-dense": "t"}


@dataclass(frozen=True)
class Planned:
    """One measured cell: the kernel that the plan runs there.

    row  what was measured of it
    """

    name: str
    shape: tuple[int, int]
    tokens: int
    row: dict[str, Any]
    regret: Regret

    @property
    def ratio(self) -> float:
        """How many times as fast as the unquantized product."""
        return float(self.row["times_unquantized"])


def all_rows() -> dict[str, Any]:
    """What is committed of an H200."""
    document: dict[str, Any] = json.loads((RESULTS / "h200.json").read_text())
    return document


def planned(document: dict[str, Any]) -> Iterator[Planned]:
    """The plan's choice in every cell of a result file, by the file's own times."""
    policy = Measured(cells_of([document])).policy(document["dtype"])
    platform = _platform(document)
    layers: dict[tuple[str, int, int], dict[tuple[int, str], dict[str, Any]]] = {}
    for row in document["rows"]:
        if not row["fault"]:
            layers.setdefault((row["name"], *row["shape"]), {})[row["tokens"], row["kernel"]] = row
    for (name, n, k), rows in layers.items():
        scheme = scheme_named(name, (n, k))
        if scheme is None:
            continue
        times: dict[int, dict[str, float]] = {}
        for (tokens, kernel), row in rows.items():
            times.setdefault(tokens, {})[kernel] = row["seconds"]
        asked = Request("linear", scheme, (n, k), document["dtype"])
        for regret in regrets(asked, platform, policy, times):
            row = rows.get((regret.request.tokens, regret.chosen[0]))
            if row is not None:
                yield Planned(name, (n, k), regret.request.tokens, row, regret)


def _platform(document: dict[str, Any]) -> Platform:
    """The device as it is described, with the optional libraries of the measurement."""
    machine = document["machine"]
    found = named(machine["device"].removeprefix("NVIDIA ").lower())
    more = {provider for library, provider in _PROVIDERS.items() if library in machine}
    return replace(found, providers=found.providers | more)


def tables(document: dict[str, Any]) -> str:
    """The ratios by scheme and shape, and what the choice loses, in Markdown."""
    cells = list(planned(document))
    counts = [int(m) for m in TOKENS.split(",")]
    lines = [f"| scheme | K x N | {' | '.join(f'M = {m}' for m in counts)} |", "|" + "---|" * (len(counts) + 2)]
    rows: dict[tuple[str, tuple[int, int]], dict[int, Planned]] = {}
    for cell in cells:
        if cell.tokens in counts and cell.name != "none":
            rows.setdefault((cell.name, cell.shape), {})[cell.tokens] = cell
    order = list(dict.fromkeys(cell.name for cell in cells))
    for (name, (n, k)), found in sorted(rows.items(), key=lambda item: order.index(item[0][0])):
        if len(found) < _LEAST_CELLS:
            continue
        words = " | ".join(_ratio(found[m]) if m in found else "" for m in counts)
        lines.append(f"| {name} | {k} x {n} | {words} |")
    return "\n".join(lines) + "\n\n" + _losses(cells) + "\n"


def _ratio(cell: Planned) -> str:
    kernel = cell.row["kernel"]
    mark = MARKS.get(kernel, "h" if kernel.startswith("humming") else "")
    return f"{cell.ratio:.2f} {mark}".strip()


def _losses(cells: list[Planned]) -> str:
    within = [cell.regret.within for cell in cells if cell.regret.within is not None]
    others = [cell for cell in cells if (cell.regret.against_others or 0.0) > ALLOWED]
    said = (f"Within the stored layout the kernel that the plan takes is in none of {len(cells)} cells slower than the "
            f"fastest by more than {max(within, default=0.0):.1%}. ")
    if not others:
        return f"{said}No kernel of another layout is more than 5 % faster anywhere."
    most = max(others, key=lambda cell: cell.regret.against_others or 0.0)
    n, k = most.shape
    assert most.regret.other is not None
    usual = median(cell.regret.against_others or 0.0 for cell in others)
    return (f"{said}A kernel of another layout is more than 5 % faster in {len(others)}, by {usual:.0%} in the middle, "
            f"{most.regret.against_others:.0%} at most (`{most.regret.other[0]}`, {most.name} {k} x {n} at M = "
            f"{most.tokens}): one layout serves all M.")


def main() -> int:
    """Print the tables of a result file."""
    sys.stdout.write(tables(json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else all_rows()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
