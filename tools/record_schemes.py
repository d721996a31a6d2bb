"""Record the schemes of all genuine checkpoints, so that documents can be made without them.

    python tools/record_schemes.py FOLDER [--check]

FOLDER holds the checkpoints, one folder each. Writes docs/schemes.json: dialect -> scheme -> {recipe, fields, kinds,
folders}. With --check it compares instead; the suite does so where the full set is present.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

RECORD = Path(__file__).resolve().parent.parent / "docs" / "schemes.json"


def record(folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    """dialect -> printed scheme -> what a table shows of it."""
    import anybit
    from anybit.errors import Unsupported
    from anybit.planning.records import scheme_to_dict

    made: dict[str, dict[str, dict[str, object]]] = {}
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        try:
            checkpoint = anybit.open(place)
        except Unsupported:
            continue  # a dialect that this version does not read
        for layer in checkpoint.layers.values():
            scheme = layer.scheme
            if not scheme.is_quantized:
                continue
            entry = made.setdefault(checkpoint.dialect, {}).setdefault(str(scheme), {
                "name": scheme.wxay,
                "weights": scheme.weight_name(),
                "scales": ", ".join(f"{lv.format}{' divides' if lv.divide else ''}" for lv in scheme.scales),
                "activations": str(scheme.activation) if scheme.activation else "none",
                "recipe": scheme.activation.recipe if scheme.activation else "",
                "fields": scheme_to_dict(scheme),
                "kinds": [],
                "folders": [],
            })
            for key, value in (("kinds", layer.kind), ("folders", place.name)):
                listed = entry[key]
                assert isinstance(listed, list)
                if value not in listed:
                    listed.append(value)
    return {dialect: dict(sorted(schemes.items())) for dialect, schemes in sorted(made.items())}


def text_of(made: dict[str, dict[str, dict[str, object]]]) -> str:
    """The record as it stands in the repository."""
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write or compare."""
    text = text_of(record(Path(sys.argv[1])))
    if "--check" in sys.argv:
        return 0 if RECORD.read_text() == text else 1
    RECORD.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
