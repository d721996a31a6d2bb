"""Strict JSON from strangers: sized, decoded, bounded in depth, no key twice, no NaN; errors with line and column."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, Final

from anybit import limits
from anybit.errors import Damaged, LimitExceeded

__all__ = ["integer", "open_regular", "parse_json", "read_json", "read_small", "refuse_lfs_pointer"]

LFS_START: Final = b"version https://git-lfs.github.com/spec/"
_LIMIT_NAMES: Final = {limits.MAX_CONFIG_JSON: "MAX_CONFIG_JSON", limits.MAX_INDEX_JSON: "MAX_INDEX_JSON"}
# a string, closed or running to the end of the text; possessive, so that no input makes it go back
_STRING: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_BRACKET: Final = re.compile(r"[{}\[\]]")
_DIGITS_AS_0: Final = bytes(ord("0") if chr(byte).isdecimal() and byte < 128 else byte for byte in range(256))
_LONG_INTEGER: Final = b"0" * (limits.MAX_INT_DIGITS + 1)


def read_json(path: Path, *, limit: int = limits.MAX_CONFIG_JSON) -> dict[str, Any]:
    """The object in a JSON file. Raises Damaged (with line and column), LimitExceeded."""
    raw = read_small(path, limit)
    return parse_json(raw, path.name)


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            constant = f" ({_LIMIT_NAMES[limit]})" if limit in _LIMIT_NAMES else ""
            raise LimitExceeded(
                "file is too large", where=path.name, found=f"{size:,} bytes", wanted=f"at most {limit:,}{constant}"
            )
        try:
            return file.read(limit)
        except OSError as error:
            raise Damaged("cannot be read", where=path.name, found=error.strerror or str(error)) from error


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, opened without ever blocking. Raises Damaged with the reason in words."""
    try:
        if stat.S_ISREG(path.stat().st_mode):  # asked before opening: opening a device may do something
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise Damaged("cannot be opened", where=path.name, found=reason, wanted="a readable file") from error
    raise Damaged("not a regular file", where=path.name, wanted="a file")


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
        raise Damaged("empty", where=name, found=f"{len(raw)} bytes of nothing", wanted="a JSON object",
                      remedy="download the file again")
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise Damaged("begins with a byte-order mark: line 1 column 1", where=name, found=f"bytes {raw[:3].hex(' ')}",
                      wanted="plain UTF-8", remedy="save the file as UTF-8 without a mark")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damaged("not UTF-8", where=name, found=f"byte {raw[error.start]:#04x} at {error.start}",
                      wanted="JSON in UTF-8", remedy="download the file again") from error
    _refuse_depth(text, name)
    try:
        # a header has four integers a tensor: they are measured one by one only where one is too long
        limited = _integer(name) if _LONG_INTEGER in raw.translate(_DIGITS_AS_0) else None
        found = json.loads(text, object_pairs_hook=_unique(name), parse_int=limited, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise Damaged(
            "not valid JSON", where=name, found=f"{error.msg}: line {error.lineno} column {error.colno}",
            wanted="a JSON object", remedy="download the file again",
        ) from error
    except RecursionError:
        raise Damaged(f"nested deeper than {limits.MAX_JSON_DEPTH}", where=name) from None
    if not isinstance(found, dict):
        raise Damaged("not an object", where=name, found=_JSON_TYPES[type(found)], wanted="an object: { ... }")
    return found


_JSON_TYPES: Final = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false",
                      type(None): "null"}


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
    if text.count("{") + text.count("[") <= limits.MAX_JSON_DEPTH:
        return
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "{[" else -1
        if depth > limits.MAX_JSON_DEPTH:
            raise Damaged(f"nested deeper than {limits.MAX_JSON_DEPTH}", where=name, wanted="MAX_JSON_DEPTH at most")


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

