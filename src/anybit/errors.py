"""Every exception that anybit raises on purpose.

    AnybitError
    ├── Damaged        bytes of a file are broken, or say something that no writer means
    ├── Inconsistent   two parts of a checkpoint, or a part and its description, disagree
    ├── Unsupported    sound, but nothing here reads or runs it
    ├── Unsafe         following it would leave the folder, run code, or never end
    ├── LimitExceeded  larger than a stated limit (`limits.py`)
    ├── DeviceProblem  the device at hand cannot do it: memory, driver, missing library
    └── OutputProblem  the result cannot be written where it was asked for

An error is data first: where it is, what was found, what was wanted, what to do. Its text is made from that once
(`AnybitError.__str__`), `--json` prints the data (`to_dict`). The command line ends with exit code 2 on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "AnybitError",
    "Damaged",
    "DeviceProblem",
    "Inconsistent",
    "LimitExceeded",
    "OutputProblem",
    "Unsafe",
    "Unsupported",
]


class AnybitError(Exception):
    """Something that the user, not anybit, can put right.

    `problem` is one lower-case sentence without a full stop; `where` names the file, tensor or layer; `found` and
    `wanted` carry both numbers when two disagree; `remedy` is something that can be done or typed; `more` lists
    further places with the same problem.
    """

    kind: ClassVar[str] = "error"

    def __init__(
        self,
        problem: str,
        *,
        where: str = "",
        found: str = "",
        wanted: str = "",
        remedy: str = "",
        more: Sequence[str] = (),
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.found = found
        self.wanted = wanted
        self.remedy = remedy
        self.more = tuple(more)

    def headline(self) -> str:
        """The first line: place, problem, and how many further places share it."""
        head = f"{self.where}: {self.problem}" if self.where else self.problem
        return f"{head} (and {len(self.more)} more)" if self.more else head

    def __str__(self) -> str:
        lines = [self.headline()]
        lines += [f"  {label:<7} {text}" for label, text in self._fields() if text]
        return "\n".join(lines)

    def _fields(self) -> tuple[tuple[str, str], ...]:
        also = ", ".join(self.more[:20])
        return (("found", self.found), ("wanted", self.wanted), ("do", self.remedy), ("also", also))

    def to_dict(self) -> dict[str, object]:
        """The error as data for `--json`: the keys are stable."""
        return {
            "kind": self.kind,
            "where": self.where,
            "problem": self.problem,
            "found": self.found,
            "wanted": self.wanted,
            "remedy": self.remedy,
            "more": list(self.more),
        }


class Damaged(AnybitError):
    """Bytes of a file are broken, or say something that no writer means."""

    kind = "damaged"


class Inconsistent(AnybitError):
    """Two parts of a checkpoint, or a part and its description, disagree."""

    kind = "inconsistent"


class Unsupported(AnybitError):
    """Sound, but nothing here reads or runs it."""

    kind = "unsupported"


class Unsafe(AnybitError):
    """Following it would leave the folder, run code, or never end."""

    kind = "unsafe"


class LimitExceeded(AnybitError):
    """Larger than a limit of `limits.py`, whose name the message carries."""

    kind = "limit"


class DeviceProblem(AnybitError):
    """The device at hand cannot do it: memory, driver, missing library."""

    kind = "device"


class OutputProblem(AnybitError):
    """The result cannot be written where it was asked for."""

    kind = "output"
