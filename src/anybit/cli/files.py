"""Writing a command's result into a file that the user named: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from anybit.errors import OutputProblem


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text beside `path` and move it into place. Raises OutputProblem."""
    try:
        handle, made = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _problem(path, error) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(made).chmod(0o666 & ~umask)  # mkstemp's files are their owner's alone
        Path(made).replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            Path(made).unlink()
        raise _problem(path, error) from error


def _problem(path: Path, error: OSError) -> OutputProblem:
    return OutputProblem("the file cannot be written", where=str(path), found=error.strerror or str(error),
                         wanted="a folder that exists and can be written", remedy="another file name")
