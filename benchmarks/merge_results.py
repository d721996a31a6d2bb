"""Parts of one measurement as one file: what `anybit bench kernels` wrote for some schemes or shapes each.

    anybit bench kernels --schemes int4_g128,nvfp4 --write a.json         (one GPU)
    anybit bench kernels --schemes fp8_per_channel,int8_asym --write b.json      (another, at the same time)
    python benchmarks/merge_results.py benchmarks/results/h200.json a.json b.json

The parts must be of one kind of machine and of equal versions. A row of several parts is taken from the last
one. Numbers are kept to five digits, one row a line; what follows from the others is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

_SAME: Final = ("device", "arch", "driver", "torch", "triton", "humming-kernels", "aiter", "python")
_DERIVED: Final = frozenset({"flop_per_second", "bytes_per_second"})


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One document. Raises SystemExit where the parts were measured on different machines."""
    first = parts[0]
    for part in parts[1:]:
        differing = [name for name in _SAME if part["machine"].get(name) != first["machine"].get(name)]
        if differing or part["dtype"] != first["dtype"]:
            raise SystemExit(f"the parts differ in {', '.join(differing) or 'dtype'}")
    rows = {(row["name"], *row["shape"], row["tokens"], row["kernel"]): row for part in parts for row in part["rows"]}
    machine = {name: value for name, value in first["machine"].items() if name in {*_SAME, "anybit"}}
    return {
        "what": "kernels", "machine": machine, "dtype": first["dtype"],
        "date": max(str(part.get("date", "")) for part in parts), "command": _command(parts),
        "copy_bytes_per_second": _short(sum(part["copy_bytes_per_second"] for part in parts) / len(parts)),
        "rows": [{key: _short(value) for key, value in row.items() if key not in _DERIVED} for row in rows.values()],
    }


def _command(parts: list[dict[str, Any]]) -> str:
    """The one command that measures what all parts did."""
    names = dict.fromkeys(row["name"] for part in parts for row in part["rows"])
    shapes = dict.fromkeys(f"{row['shape'][1]}x{row['shape'][0]}" for part in parts for row in part["rows"])
    tokens = sorted({row["tokens"] for part in parts for row in part["rows"]})
    return (f"anybit bench kernels --schemes {','.join(names)} --shapes {','.join(shapes)} "
            f"--tokens {','.join(map(str, tokens))}")


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def text_of(document: dict[str, Any]) -> str:
    """JSON with a row a line."""
    head = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1, ensure_ascii=False)
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in document["rows"])
    return f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n ]\n}}\n'


def main() -> int:
    """Write the file; 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("parts", type=Path, nargs="+")
    options = parser.parse_args()
    made = merged([json.loads(path.read_text()) for path in options.parts])
    options.target.write_text(text_of(made))
    sys.stdout.write(f"{options.target}: {len(made['rows'])} rows\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
