"""Patterns that checkpoints carry (`re:`, fnmatch, bare regular expressions), matched in bounded time.

A checkpoint comes from strangers and Python's `re` takes exponential time on some patterns. So RE2 compiles first: it
is linear. Real files use look-ahead, which RE2 lacks: those go to `regex` with a time limit for each match.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from anybit import limits
from anybit.errors import Damaged, LimitExceeded, Unsafe

How = Literal["match", "search", "fullmatch"]
_SET_SIZE: Final = 500  # patterns of one RE2 set; with 20,000 RE2 gives up and floods stderr
_SET_BYTES: Final = 64 * 2**20  # most memory of a set: RE2's own 8 MiB hold about 1,000 genuine patterns


def _options() -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = _SET_BYTES
    return options


def _timed(pattern: str, where: str) -> _Timed:
    """A pattern that RE2 cannot compile, as one of `regex` with a time limit. Raises Damaged."""
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


class Patterns:
    """Patterns in their order; `first(name)` is the index of the first that matches, None if none does.

    What RE2 compiles goes into RE2 sets, each matched in one pass; names without any pattern character are looked up
    in a table. So 100 rules over 36,000 modules take a fraction of a second.
    Raises Damaged for a pattern that does not compile, LimitExceeded, and Unsafe for one that takes too long.
    """

    def __init__(self, patterns: Iterable[str], how: How, where: str, *, globs: bool = False) -> None:
        """Compile; with `globs` they are fnmatch's."""
        import re2

        self.where = where
        self._literal: dict[str, int] = {}
        self._timed: list[tuple[int, Callable[[str], Any]]] = []
        self._sets: list[tuple[Any, list[int]]] = []  # RE2 sets, each with its patterns' indices
        self._spent_seconds = 0.0
        linear: list[tuple[int, str]] = []
        for index, pattern in enumerate(_bounded(patterns, where)):
            if globs and not any(c in pattern for c in "*?["):
                self._literal.setdefault(pattern, index)
                continue
            text = _of_shell(pattern) if globs else pattern
            try:
                re2.compile(text, options=_options())
                linear.append((index, text))
            except re2.error:
                self._timed.append((index, getattr(_timed(text, where), how)))
        for start in range(0, len(linear), _SET_SIZE):
            self._add_set(linear[start : start + _SET_SIZE], how)

    def _add_set(self, patterns: list[tuple[int, str]], how: How) -> None:
        """One RE2 set of these patterns; one by one where they are too large together."""
        import re2

        kinds = {"match": re2.Set.MatchSet, "search": re2.Set.SearchSet, "fullmatch": re2.Set.FullMatchSet}
        made = kinds[how](_options())
        try:
            for _, text in patterns:
                made.Add(text)
            made.Compile()
            self._sets.append((made, [index for index, _ in patterns]))
        except re2.error:
            for index, text in patterns:
                self._timed.append((index, getattr(re2.compile(text, options=_options()), how)))

    @classmethod
    def match(cls, patterns: Iterable[str], *, where: str) -> Patterns:
        """Regular expressions anchored at the start only, as re.match."""
        return cls(patterns, "match", where)

    @classmethod
    def search(cls, patterns: Iterable[str], *, where: str) -> Patterns:
        """Regular expressions found anywhere, as re.search."""
        return cls(patterns, "search", where)

    @classmethod
    def fullmatch(cls, patterns: Iterable[str], *, where: str) -> Patterns:
        """Regular expressions that cover the whole name."""
        return cls(patterns, "fullmatch", where)

    @classmethod
    def fnmatch(cls, patterns: Iterable[str], *, where: str) -> Patterns:
        """Shell patterns over the whole name, case counts: * ? [seq]."""
        return cls(patterns, "fullmatch", where, globs=True)

    def first(self, name: str) -> int | None:
        """Index of the first pattern that matches."""
        return min(self.all(name), default=None)

    def all(self, name: str) -> list[int]:
        """Indices of all patterns that match, in order."""
        start = time.perf_counter()
        found = [indices[number] for made, indices in self._sets for number in made.Match(name) or ()]
        found += [index for index, matches in self._timed if matches(name)]
        if name in self._literal:
            found.append(self._literal[name])
        self._spent_seconds += time.perf_counter() - start
        if self._spent_seconds > limits.PATTERN_SECONDS_IN_ALL:
            raise Unsafe(
                "patterns take too long", where=self.where, found=f"{self._spent_seconds:.1f} s",
                wanted=f"{limits.PATTERN_SECONDS_IN_ALL} s in all (PATTERN_SECONDS_IN_ALL)",
                remedy="no genuine list takes so long: report the file where you got it",
            )
        return sorted(found)


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
    for pattern in listed:
        if len(pattern) > limits.MAX_PATTERN_CHARS:
            raise LimitExceeded(
                "a pattern is too long", where=where, found=f"{len(pattern):,} characters",
                wanted=f"at most {limits.MAX_PATTERN_CHARS:,} (MAX_PATTERN_CHARS)",
            )
    return listed
