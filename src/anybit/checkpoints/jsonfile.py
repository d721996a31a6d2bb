"""Strict JSON from strangers: sized, decoded, bounded in depth, no key twice, no NaN; errors with line and column."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from anybit import limits
from anybit.errors import Damaged, LimitExceeded, Unsafe

LFS_START = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path, *, limit: int = limits.MAX_CONFIG_JSON) -> dict[str, Any]:
    """The object in a JSON file. Raises Damaged (with line and column), LimitExceeded, Unsafe."""
    raw = read_small(path, limit)
    return parse_json(raw, path.name)


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes."""
    try:
        if not path.is_file():
            raise Damaged("not a regular file", where=path.name, wanted="a file")
        size = path.stat().st_size
        if size > limit:
            raise LimitExceeded(
                "file is too large", where=path.name, found=f"{size:,} bytes", wanted=f"at most {limit:,} bytes"
            )
        return path.read_bytes()
    except OSError as error:
        raise Damaged("cannot be read", where=path.name, found=error.strerror or str(error)) from error


def refuse_lfs_pointer(raw: bytes, name: str) -> None:
    """Raise Damaged if the bytes are a Git-LFS pointer instead of the file."""
    if raw.startswith(LFS_START):
        fields = dict(line.split(" ", 1) for line in raw[:1024].decode("ascii", "replace").splitlines() if " " in line)
        stands_for = fields.get("size", "")
        size = f"{int(stands_for) / 1e9:.1f} GB" if stands_for.isdigit() else "the real file"
        raise Damaged(
            f"Git-LFS pointer ({len(raw)} bytes for {size})",
            where=name,
            found="the text that Git stores in place of a large file",
            wanted="the file itself",
            remedy="run `git lfs pull` in the folder, or download the file again",
        )


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    """The object in `raw`; `name` is for messages."""
    refuse_lfs_pointer(raw, name)
    if not raw.strip():
        raise Damaged("empty file", where=name, wanted="a JSON object")
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise Damaged("begins with a byte-order mark", where=name, found=raw[:3].hex(), wanted="plain UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damaged("not UTF-8", where=name, found=f"byte {raw[error.start]:#04x} at {error.start}") from error
    _refuse_depth(text, name)
    try:
        found = json.loads(text, object_pairs_hook=_unique(name), parse_int=_integer(name), parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise Damaged(
            "not valid JSON", where=name, found=f"{error.msg}: line {error.lineno} column {error.colno}",
            wanted="a JSON object", remedy="download the file again",
        ) from error
    except RecursionError:
        raise Damaged(f"nested deeper than {limits.MAX_JSON_DEPTH}", where=name) from None
    if not isinstance(found, dict):
        raise Damaged("not an object", where=name, found=type(found).__name__, wanted="an object: { ... }")
    return found


def _unique(name: str) -> Any:
    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise Damaged(f"{twice[:200]!r} is declared twice", where=name, wanted="each key once")
        return made

    return hook


def _integer(name: str) -> Any:
    def parse(text: str) -> int:
        if len(text.lstrip("-")) > limits.MAX_INT_DIGITS:
            raise Damaged(
                f"an integer of {len(text)} digits", where=name, wanted=f"at most {limits.MAX_INT_DIGITS} digits"
            )
        return int(text)

    return parse


def _constant(text: str) -> float:
    return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}[text]


def _refuse_depth(text: str, name: str) -> None:
    """Depth by counting brackets outside strings: before any parser recurses."""
    depth = deepest = 0
    in_string = is_escaped = False
    if text.count("{") + text.count("[") <= limits.MAX_JSON_DEPTH:
        return
    for char in text:
        if in_string:
            if is_escaped:
                is_escaped = False
            elif char == "\\":
                is_escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "{[":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > limits.MAX_JSON_DEPTH:
                raise Damaged(f"nested deeper than {limits.MAX_JSON_DEPTH}", where=name)
        elif char in "}]":
            depth -= 1


def integer(config: dict[str, Any], key: str, where: str, low: int, high: int) -> int | None:
    """config[key] as an int in [low, high], None if absent or null. Raises Damaged with key and value."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise Damaged(f"{key} is not an integer", where=where, found=repr(value)[:80], wanted=f"{low} … {high}")
    if value < low:
        raise Damaged(f"{key} is out of range", where=where, found=str(value), wanted=f"{low} … {high}")
    if value > high:
        raise LimitExceeded(f"{key} is out of range", where=where, found=str(value), wanted=f"{low} … {high}")
    return value


__all__ = ["Unsafe", "integer", "parse_json", "read_json", "read_small", "refuse_lfs_pointer"]
