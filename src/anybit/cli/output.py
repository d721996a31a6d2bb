"""The one sink of the command line: results on stdout, remarks and progress on stderr, in three modes.

human   tables, colours and progress on a terminal; plain aligned lines on a pipe
json    one versioned document on stdout, ASCII, no NaN; remarks are left out
quiet   results only

Text that comes from a file, a user or a model is foreign: it reaches a terminal through `shown` (names, values,
messages) or `terminal_safe` (generated text). rich gets `Text` objects only: no markup, no highlighting, no emoji
codes, because rich itself lets escape sequences pass.
"""

from __future__ import annotations

import json
import math
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from anybit.errors import AnybitError
from anybit.limits import SHOWN_CHARS

Mode = Literal["human", "json", "quiet"]
Advance = Callable[[int], None]

VERSION: Final = 1  # of every --json document; keys are added, never renamed
EXIT_OK: Final = 0
EXIT_CHECK_FAILED: Final = 1
EXIT_REFUSED: Final = 2
EXIT_BUG: Final = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT

ERROR_CHARS: Final = 2000  # a field of an error holds our own words around foreign ones
_JOINERS: Final = "\u200c\u200d"  # parts of emoji and of several scripts
_SECRETS: Final = re.compile(r"\b(hf_|sk-|ghp_)\w{4,}")
_COLUMN_GAP: Final = "  "


def shown(text: object, limit: int = SHOWN_CHARS) -> str:
    r"""Foreign text made harmless: what is not printable becomes an escape, what is too long is cut.

    >>> shown("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    whole = str(text)
    cut = whole[:limit]
    safe = "".join(c if c.isprintable() else _escaped(c) for c in cut)
    return safe if len(whole) <= limit else f"{safe}… ({len(whole):,} characters)"


def terminal_safe(text: str) -> str:
    """Generated text for a terminal: line breaks and tabs stay, control and direction characters become escapes."""
    return "".join(c if c in "\n\t" or c in _JOINERS or not _is_control(c) else _escaped(c) for c in text)


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def size(count: float) -> str:
    """Bytes in the units of disks and data sheets: 98.4 MB.

    >>> size(98_362_432)
    '98.4 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """A time in the unit that suits it: 12.3 µs, 4.56 ms, 1.2 s."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


@dataclass
class Output:
    """Where a command's text goes; see the module."""

    mode: Mode
    stdout: Console
    stderr: Console
    verbose: bool = False

    @property
    def is_human(self) -> bool:
        """True unless --json or --quiet."""
        return self.mode == "human"

    @property
    def is_interactive(self) -> bool:
        """True if progress and hints reach a person: a real terminal on stderr."""
        return self.is_human and self.stderr.is_terminal and not self.stderr.is_dumb_terminal

    def document(self, kind: str, data: Mapping[str, Any]) -> None:
        """The --json document of a command: version, kind, then `data`."""
        self._write(to_json({"version": VERSION, "kind": kind, **data}, indent=1) + "\n")

    def record(self, kind: str, data: Mapping[str, Any]) -> None:
        """One of several documents, each on a line of its own."""
        self._write(to_json({"version": VERSION, "kind": kind, **data}) + "\n")

    def text(self, text: str) -> None:
        """Generated text: filtered on a terminal, untouched on a pipe, never wrapped."""
        self._write(terminal_safe(text) if self.stdout.is_terminal else text)

    def _write(self, text: str) -> None:
        stream = self.stdout.file
        stream.write(text)
        stream.flush()

    def line(self, text: str = "", style: str = "") -> None:
        """One line of a result on stdout."""
        self.stdout.print(Text(text, style=style), soft_wrap=True)

    def rows(self, rows: Sequence[Sequence[str]], *, indent: int = 2, right: Sequence[int] = ()) -> None:
        """Aligned columns of a result; `right` names the columns that are set to the right."""
        self._rows(self.stdout, rows, indent, right)

    def remark(self, text: str = "", style: str = "dim") -> None:
        """A line beside the result, on stderr; nothing under --json and --quiet."""
        if self.is_human:
            self.stderr.print(Text(text, style=style), soft_wrap=True)

    def remark_rows(self, rows: Sequence[Sequence[str]]) -> None:
        """Aligned columns on stderr."""
        if self.is_human:
            self._rows(self.stderr, rows, 0, ())

    def warning(self, text: str) -> None:
        """A remark that should not be overlooked."""
        self.remark(f"warning: {text}", style="yellow")

    def hint(self, text: str) -> None:
        """What to type next; only for a person at a terminal."""
        if self.is_interactive and self.stdout.is_terminal:
            self.remark(text)

    @staticmethod
    def _rows(console: Console, rows: Sequence[Sequence[str]], indent: int, right: Sequence[int]) -> None:
        columns = max((len(row) for row in rows), default=0)
        widths = [max(cell_len(row[c]) for row in rows if c < len(row)) for c in range(columns)]
        for row in rows:
            cells = [_padded(cell, widths[c], c in right) for c, cell in enumerate(row)]
            line = " " * indent + _COLUMN_GAP.join(cells)
            console.print(Text(line.rstrip()), soft_wrap=not console.is_terminal, no_wrap=not console.is_terminal)

    @contextmanager
    def progress(
        self, title: str, total: int, unit: Literal["bytes", "windows", "layers"] = "bytes"
    ) -> Iterator[Advance]:
        """A bar over `total` units on a terminal, nothing elsewhere; call the result with what was done since."""
        if not self.is_interactive:
            yield lambda done: None
            return
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

        done_column = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        text = TextColumn("{task.description}", markup=False)
        bar = Progress(text, BarColumn(), done_column, console=self.stderr, transient=True)
        with bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, advance=done)

    def error(self, error: AnybitError) -> None:
        """A refusal: where, found, wanted, do; as data under --json."""
        if self.mode == "json":
            self.document("error", {"error": error.to_dict()})
            return
        lines = str(error).split("\n  ")
        self.stderr.print(Text.assemble(("error: ", "bold red"), shown(lines[0], ERROR_CHARS)), soft_wrap=True)
        for line in lines[1:]:
            self.stderr.print(Text("  " + shown(line, ERROR_CHARS)), soft_wrap=True)

    def bug(self, error: BaseException) -> None:
        """Something that anybit did not foresee: a traceback without values, and where to send it."""
        message = shown(without_secrets(f"{type(error).__name__}: {error}"), ERROR_CHARS)
        if self.mode == "json":
            self.document("bug", {"error": {"kind": "bug", "problem": "a bug in anybit", "found": message}})
            return
        for frame in traceback.extract_tb(error.__traceback__):
            self.stderr.print(Text(f"  {shown(frame.filename)}:{frame.lineno} in {frame.name}"), soft_wrap=True)
        self.stderr.print(Text("error: a bug in anybit", style="bold red"), soft_wrap=True)
        self.stderr.print(Text(f"  found   {message}"), soft_wrap=True)
        self.stderr.print(Text("  do      report it with the lines above and `anybit doctor --json`"), soft_wrap=True)


def make_output(mode: Mode = "human", *, verbose: bool = False) -> Output:
    """The sink over the process's own streams."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a name that the terminal's encoding lacks is escaped, not fatal
            reconfigure(errors="backslashreplace")
    return Output(mode, _console(sys.stdout), _console(sys.stderr), verbose)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process with 1; a closed pipe is no failure, and `main` knows what to do."""
        raise  # rich calls this while it handles the BrokenPipeError


def _console(stream: TextIO) -> Console:
    return _Console(file=stream, markup=False, highlight=False, emoji=False)


def to_json(data: object, indent: int | None = None) -> str:
    """JSON as ASCII; numbers that JSON lacks become null."""
    return json.dumps(_finite(data), allow_nan=False, indent=indent)


def _finite(data: object) -> object:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data


def without_secrets(text: str) -> str:
    """`text` with access tokens blotted out."""
    return _SECRETS.sub(lambda found: found.group(1) + "…", text)


def _padded(cell: str, width: int, to_right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if to_right else cell + space
