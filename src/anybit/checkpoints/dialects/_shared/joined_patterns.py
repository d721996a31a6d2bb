"""Many patterns as few: 90,000 experts then cost one match each, not one for each of 60 layers' entries; torch-free.

`anybit.checkpoints.patterns` matches them in bounded time; a long list of a genuine file must not spend that time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from anybit.checkpoints.patterns import Patterns
from anybit.limits import MAX_PATTERN_CHARS

_BOUND_TO_ITS_PATTERN: Final = re.compile(r"\\[1-9gk]|\(\?")  # back-references, flags: they mean another thing joined


def matching(patterns: Iterable[str], *, where: str) -> Patterns:
    """Regular expressions anchored at the start, as few as their meaning allows; `first` tells only whether one hits.

    Raises Damaged for a pattern that does not compile, naming it alone.
    """
    given = list(patterns)
    Patterns.match(given, where=where)
    alone = [p for p in given if _BOUND_TO_ITS_PATTERN.search(p)]
    return Patterns.match([*_joined(p for p in given if not _BOUND_TO_ITS_PATTERN.search(p)), *alone], where=where)


def wildcards(patterns: Iterable[str], *, where: str) -> tuple[Patterns, Patterns]:
    """Shell patterns over whole names: (stars and question marks joined, all others as they are)."""
    given = list(patterns)
    simple = [p for p in given if "[" not in p and ("*" in p or "?" in p)]
    others = [p for p in given if "[" in p or ("*" not in p and "?" not in p)]
    regexes = (re.escape(p).replace(r"\*", ".*").replace(r"\?", ".") for p in simple)
    return Patterns.fullmatch(_joined(regexes), where=where), Patterns.fnmatch(others, where=where)


def _joined(patterns: Iterable[str]) -> list[str]:
    """Alternations of at most MAX_PATTERN_CHARS."""
    joined: list[list[str]] = []
    length = MAX_PATTERN_CHARS
    for pattern in patterns:
        part = f"(?:{pattern})"
        length += len(part) + 1
        if length > MAX_PATTERN_CHARS:
            joined.append([])
            length = len(part)
        joined[-1].append(part)
    return ["|".join(parts) for parts in joined]
