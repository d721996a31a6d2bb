"""Priors of a device from measurements on it: planning/priors/DEVICE.json out of results of `anybit bench kernels`.

    python tools/priors.py benchmarks/results/h200.json --device h200
    python tools/priors.py A.json B.json --device h200        (parts of one measurement, by schemes or shapes)

Every right and timed row becomes a cell, and so does torch's unquantized product beside it. Files must be of one
machine and of the same versions. Of a cell that stands in several files the last one counts. `anybit explain MODEL
--on h200` and plans on such a device then read them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
PRIORS: Final = ROOT / "src" / "anybit" / "planning" / "priors"
sys.path.insert(0, str(ROOT / "src"))

from anybit.cli.bench_kernels import scheme_named  # noqa: E402
from anybit.planning.measured import Cell, cells_to_rows  # noqa: E402
from anybit.planning.records import scheme_to_dict  # noqa: E402
from anybit.schemes import Scheme, dense  # noqa: E402

_LISTS: Final = ("schemes", "cells")
_VERSIONS: Final = ("driver", "torch", "triton", "humming-kernels", "aiter", "python")


def cells_of(documents: list[dict[str, Any]]) -> dict[Cell, float]:
    """The times of all right rows, to four digits: the clock is not better; torch's product from beside them."""
    found: dict[Cell, float] = {}
    beside: dict[Cell, list[float]] = defaultdict(list)
    for document in documents:
        for row in document["rows"]:
            n, k = row["shape"]
            if not row["fault"] and row["seconds"] > 0:
                cell = (row["kernel"], row["scheme"], n, k, row["dtype"], row["tokens"])
                found[cell] = _rounded(row["seconds"])
            if row["unquantized_seconds"]:
                plain = ("torch-dense", str(dense(row["dtype"])), n, k, row["dtype"], row["tokens"])
                beside[plain].append(row["unquantized_seconds"])
    return {cell: _rounded(median(times)) for cell, times in beside.items()} | found


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def prior(documents: list[dict[str, Any]], device: str, command: str) -> dict[str, Any]:
    """The document of a device. Raises SystemExit where the files are not of one machine."""
    machines = [document["machine"] for document in documents]
    for other in machines[1:]:
        differing = [name for name in ("device", "arch", *_VERSIONS) if other.get(name) != machines[0].get(name)]
        if differing:
            raise SystemExit(f"the files differ in {', '.join(differing)}: measure them on one machine")
    first = machines[0]
    return {
        "arch": first["arch"], "device": device, "title": first["device"], "command": command,
        "versions": {name: first[name] for name in _VERSIONS if name in first},
        "date": max(str(document.get("date", "")) for document in documents),
        "schemes": [scheme_to_dict(scheme) for scheme in _schemes(documents)],
        "cells": cells_to_rows(cells_of(documents)),
    }


def _schemes(documents: list[dict[str, Any]]) -> list[Scheme]:
    """The distinct schemes of all rows, so that schemes like them are priced by their times."""
    named = {(row["name"], *row["shape"]): row["scheme"] for document in documents for row in document["rows"]}
    found = {}
    for (name, n, k), printed in named.items():
        scheme = scheme_named(name, (n, k))
        if scheme is not None and str(scheme) == printed:
            found[printed] = scheme
    plain = {str(dense(document["dtype"])): dense(document["dtype"]) for document in documents}
    return [*(plain | found).values()]


def text_of(document: dict[str, Any]) -> str:
    """JSON with one scheme or cell a line, so that a new measurement reads well as a difference."""
    head = json.dumps({key: value for key, value in document.items() if key not in _LISTS},
                      indent=1, ensure_ascii=False)

    def lines(rows: list[dict[str, Any]]) -> str:
        return ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)

    lists = [f' "{name}": [\n{lines(document[name])}\n ]' for name in _LISTS]
    return f'{head.removesuffix("}").rstrip()},\n' + ",\n".join(lists) + "\n}\n"


def main() -> int:
    """Write the file; 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--device", required=True, help="what the device's name contains: h200")
    options = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in options.results]
    command = next((str(d["command"]) for d in documents if d.get("command")), "anybit bench kernels --write FILE")
    target = PRIORS / f"{options.device}.json"
    made = prior(documents, options.device, command)
    target.write_text(text_of(made))
    sys.stdout.write(f"{target}: {len(made['cells'])} layers and kernels\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
