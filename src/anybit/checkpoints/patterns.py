"""Patterns that checkpoints carry (`re:`, fnmatch, bare regular expressions), matched in bounded time.

A checkpoint comes from strangers and Python's `re` takes exponential time on some patterns. So RE2 compiles first: it
is linear. Real files use look-ahead, which RE2 lacks: those go to `regex` with a time limit for each match.
"""

from __future__ import annotations

import fnmatch as fnmatch_module
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from anybit import limits
from anybit.errors import Damaged, LimitExceeded, Unsafe

How = Literal["match", "search", "fullmatch"]


def _compile(pattern: str, where: str) -> Any:
    """A compiled pattern of RE2, or of `regex` where RE2 cannot. Raises Damaged, LimitExceeded."""
    if len(pattern) > limits.MAX_PATTERN_CHARS:
        raise LimitExceeded(
            "a pattern is too long", where=where, found=f"{len(pattern):,} characters",
            wanted=f"at most {limits.MAX_PATTERN_CHARS:,} (MAX_PATTERN_CHARS)",
        )
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options=options)
    except re2.error:
        pass
    import regex

    try:
        return _Timed(regex.compile(pattern), pattern, where)
    except regex.error as error:
        raise Damaged(
            "a pattern does not compile", where=where, found=repr(pattern[:200]), wanted="a regular expression",
            remedy=str(error),
        ) from error


@dataclass
class _Timed:
    """A pattern of `regex`; each match has limits.PATTERN_SECONDS."""

    compiled: Any
    pattern: str
    where: str

    def _run(self, how: How, text: str) -> Any:
        try:
            return getattr(self.compiled, how)(text, timeout=limits.PATTERN_SECONDS)
        except TimeoutError:
            raise _too_slow(self.pattern, self.where) from None

    def match(self, text: str) -> Any:
        """As re.match."""
        return self._run("match", text)

    def search(self, text: str) -> Any:
        """As re.search."""
        return self._run("search", text)

    def fullmatch(self, text: str) -> Any:
        """As re.fullmatch."""
        return self._run("fullmatch", text)


def _too_slow(pattern: str, where: str) -> Unsafe:
    return Unsafe(
        "a pattern takes too long", where=where, found=repr(pattern[:200]),
        wanted=f"{limits.PATTERN_SECONDS} s for a name (PATTERN_SECONDS)",
        remedy="the pattern can only be meant to stall a reader: report the file where you got it",
    )


@dataclass
class Patterns:
    """Patterns in their order; `first(name)` is the index of the first that matches, None if none does.

    Names without any pattern character are looked up in a table, so long lists cost nothing.
    Raises Damaged for a pattern that does not compile, LimitExceeded, and Unsafe for one that takes too long.
    """

    where: str
    literal: dict[str, int] = field(default_factory=dict)
    compiled: list[tuple[int, Callable[[str], Any]]] = field(default_factory=list)
    spent_seconds: float = 0.0

    @classmethod
    def match(cls, patterns: Iterable[str], *, where: str) -> Patterns:
        """Regular expressions anchored at the start only, as re.match."""
        return cls._of(patterns, "match", where)

    @classmethod
    def search(cls, patterns: Iterable[str], *, where: str) -> Patterns:
        """Regular expressions found anywhere, as re.search."""
        return cls._of(patterns, "search", where)

    @classmethod
    def fullmatch(cls, patterns: Iterable[str], *, where: str) -> Patterns:
        """Regular expressions that cover the whole name."""
        return cls._of(patterns, "fullmatch", where)

    @classmethod
    def fnmatch(cls, patterns: Iterable[str], *, where: str) -> Patterns:
        """Shell patterns over the whole name, case counts: * ? [seq]."""
        made = cls(where)
        for index, pattern in enumerate(_bounded(patterns, where)):
            if any(c in pattern for c in "*?["):
                made.compiled.append((index, _compile(_regex_of_shell(pattern), where).fullmatch))
            else:
                made.literal.setdefault(pattern, index)
        return made

    @classmethod
    def _of(cls, patterns: Iterable[str], how: How, where: str) -> Patterns:
        made = cls(where)
        for index, pattern in enumerate(_bounded(patterns, where)):
            made.compiled.append((index, getattr(_compile(pattern, where), how)))
        return made

    def first(self, name: str) -> int | None:
        """Index of the first pattern that matches."""
        best = self.literal.get(name)
        start = time.perf_counter()
        for index, matches in self.compiled:
            if best is not None and index > best:
                break
            if matches(name):
                best = index
                break
        self._spend(time.perf_counter() - start)
        return best

    def all(self, name: str) -> list[int]:
        """Indices of all patterns that match, in order."""
        start = time.perf_counter()
        found = [index for index, matches in self.compiled if matches(name)]
        self._spend(time.perf_counter() - start)
        if name in self.literal:
            found.append(self.literal[name])
        return sorted(found)

    def _spend(self, seconds: float) -> None:
        """Count time against the limit of the whole list."""
        self.spent_seconds += seconds
        if self.spent_seconds > limits.PATTERN_SECONDS_IN_ALL:
            raise Unsafe(
                "patterns take too long", where=self.where, found=f"{self.spent_seconds:.1f} s",
                wanted=f"{limits.PATTERN_SECONDS_IN_ALL} s in all (PATTERN_SECONDS_IN_ALL)",
                remedy="no genuine list takes so long: report the file where you got it",
            )


def _regex_of_shell(pattern: str) -> str:
    """A shell pattern as a regular expression for the whole name, in words that RE2 has unless it holds [seq]."""
    if "[" in pattern:
        return fnmatch_module.translate(pattern)
    return "".join({"*": "(?s:.*)", "?": "(?s:.)"}.get(char, re.escape(char)) for char in pattern)


def _of_shell(pattern: str) -> str:
    """The regular expression of a shell pattern: fnmatch.translate writes constructs that RE2 does not know."""
    made = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        end = pattern.find("]", at + 2) if char == "[" else -1
        if end > 0:
            inside = pattern[at + 1 : end]
            sign = "^" if inside.startswith("!") else ""
            made.append(f"[{sign}{re.escape(inside.removeprefix('!')).replace(chr(92) + '-', '-')}]")
            at = end
        else:
            made.append({"*": ".*", "?": "."}.get(char) or re.escape(char))
        at += 1
    return "(?s)" + "".join(made)


def _bounded(patterns: Iterable[str], where: str) -> list[str]:
    listed = list(patterns)
    if len(listed) > limits.MAX_PATTERNS:
        raise LimitExceeded(
            "too many patterns", where=where, found=f"{len(listed):,}",
            wanted=f"at most {limits.MAX_PATTERNS:,} (MAX_PATTERNS)",
        )
    return listed
