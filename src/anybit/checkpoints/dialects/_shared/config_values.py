"""Values out of a parsed config, each with the type and range that its key demands; torch-free.

A config comes from strangers: a key may be absent, null, of another type, or a bool where an int belongs. Every
function takes the object, the key and the place of the object ("config.json: quantization_config"), and raises Damaged
with what was found and wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from anybit.checkpoints.contents import JSON
from anybit.errors import Damaged

_REMEDY = "compare the file with the one where you got the model"


def integer(holder: JSON, key: str, where: str, *, least: int, most: int = 2**31 - 1) -> int | None:
    """The integer `key`, None where it is absent or null."""
    value = holder.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Damaged(f"{key} has no sound value", where=where, found=_shown(value),
                      wanted=f"an integer, {least} … {most}", remedy=_REMEDY)
    return value


def flag(holder: JSON, key: str, where: str, *, default: bool) -> bool:
    """The bool `key`, `default` where it is absent or null."""
    value = holder.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise Damaged(f"{key} has no sound value", where=where, found=_shown(value), wanted="true or false",
                      remedy=_REMEDY)
    return value


def text(holder: JSON, key: str, where: str, *, allowed: Collection[str] = ()) -> str | None:
    """The string `key`, one of `allowed` where that is given; None where it is absent or null."""
    value = holder.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or (allowed and value not in allowed):
        wanted = " · ".join(sorted(allowed)) if allowed else "a string"
        raise Damaged(f"{key} has no sound value", where=where, found=_shown(value), wanted=wanted, remedy=_REMEDY)
    return value


def strings(holder: JSON, key: str, where: str) -> tuple[str, ...]:
    """The list of strings `key`, () where it is absent or null."""
    value = holder.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise Damaged(f"{key} has no sound value", where=where, found=_shown(value), wanted="a list of strings",
                      remedy=_REMEDY)
    return tuple(value)


def table(holder: Mapping[str, Any], key: str, where: str) -> JSON:
    """The object `key`, {} where it is absent or null."""
    value = holder.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Damaged(f"{key} has no sound value", where=where, found=_shown(value), wanted="an object", remedy=_REMEDY)
    return value


def tables(holder: JSON, key: str, where: str) -> tuple[JSON, ...]:
    """The list of objects `key`, () where it is absent or null."""
    value = holder.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise Damaged(f"{key} has no sound value", where=where, found=_shown(value), wanted="a list of objects",
                      remedy=_REMEDY)
    return tuple(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
