"""safetensors files and folders written byte by byte: what the genuine library would refuse to write, too."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., None])
LINES: set[str] = set()
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "F8_E4M3": 1, "BOOL": 1}
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8,
}


def line(*ids: str) -> Callable[[Test], Test]:
    """Name the lines of bad_inputs.md that a test stands for: `pytest -k ST07` finds them, as it does parameters."""

    def mark(test: Test) -> Test:
        for id in ids:
            setattr(test, id, True)
        LINES.update(ids)
        return test

    return mark


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    """A tensor's entry of the header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def framed(header: str | bytes, data: bytes = b"") -> bytes:
    """Length, header, data."""
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def file_of(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None) -> bytes:
    """A sound file: name -> (dtype, shape, bytes), one after another."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = entry(dtype, shape, len(data), len(data) + len(raw))
        data += raw
    return framed(json.dumps(header), data)


def floats(count: int, first: float = 0.0) -> bytes:
    """`count` float32 numbers: first, first + 1, ..."""
    return struct.pack(f"<{count}f", *(first + i for i in range(count)))


def matrix(*names: str, first: float = 0.0) -> bytes:
    """A sound file of float32 matrices [2, 3]."""
    return file_of({name: ("F32", [2, 3], floats(6, first)) for name in names})


def folder_of(folder: Path, files: dict[str, bytes | str | dict[str, Any]], config: Any = None) -> Path:
    """A folder with these files, and a small config.json unless `files` has one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": {**CONFIG, **(config or {})}, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def index_of(weight_map: Any, **more: Any) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    return {"metadata": {"total_size": 24, **more}, "weight_map": weight_map}
