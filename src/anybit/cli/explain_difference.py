"""`anybit explain --diff BEFORE AFTER`: what differs between two saved plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anybit.checkpoints.jsonfile import read_json
from anybit.cli.folding import part_names
from anybit.cli.output import Output, counted, duration, shown, size
from anybit.limits import MAX_INDEX_JSON
from anybit.planning.difference import Difference, differences
from anybit.planning.plan import Plan


def print_difference(output: Output, before: Path, after: Path) -> None:
    """Each difference on a line: what, before, after, which layers. Raises AnybitErrors for files that are no plans."""
    found = differences(_document(before), _document(after))
    if output.mode == "json":
        output.document("explain-diff", {"before": str(before), "after": str(after),
                                         "differences": [difference.to_dict() for difference in found]})
        return
    if not found:
        output.line("the plans are the same")
        return
    output.rows([("what", "before", "after", "layers"), *(_row(difference) for difference in found)], indent=0)


def _document(path: Path) -> dict[str, Any]:
    """What the file says, once a plan could be made of it."""
    found: dict[str, Any] = read_json(path, limit=MAX_INDEX_JSON)
    Plan.from_dict(found)
    return found


def _row(difference: Difference) -> tuple[str, str, str, str]:
    layers = difference.layers
    of = f"{counted(len(layers), 'layer')}: {shown(part_names(layers))}" if layers else "all"
    return difference.what, _value(difference.what, difference.before), _value(difference.what, difference.after), of


def _value(what: str, value: Any) -> str:
    if "bytes" in what and isinstance(value, int):
        return size(value)
    if what.startswith("seconds") and isinstance(value, float):
        return duration(value)
    return "none" if value is None else shown(value)
