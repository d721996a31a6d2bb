"""Small stored tensors that describe another one (a shape, a JSON, a flag), read without torch while declaring.

bitsandbytes keeps a weight's shape and dtype, HQQ also its bits and packing in tensors of a few bytes.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from anybit.checkpoints.contents import TensorInfo
from anybit.checkpoints.jsonfile import open_regular
from anybit.errors import Damaged, LimitExceeded

MOST_BYTES: Final = 65_536  # of one such tensor; the longest genuine one, a quant_state, has about 200
_WINDOW: Final = 4096  # bytes read at once: writers sort by dtype and name, so that descriptions lie side by side
# dtype -> letter of `struct`
_LETTERS: Final = {"BOOL": "?", "U8": "B", "I8": "b", "I16": "h", "I32": "i", "I64": "q", "F16": "e", "F32": "f",
                   "F64": "d"}


class SmallTensors:
    """Reads small tensors; keeps the files open that it has read from. A context manager."""

    def __init__(self) -> None:
        """Nothing is open yet."""
        self._open: dict[Path, int] = {}
        self._windows: dict[Path, tuple[int, bytes]] = {}  # what was read last of each file, and where

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def raw(self, info: TensorInfo) -> bytes:
        """The tensor's bytes. Raises LimitExceeded for a tensor that is not small, Damaged if it cannot be read."""
        where = f"{info.file.name}: {info.name}"
        if info.nbytes > MOST_BYTES:
            raise LimitExceeded("too large for a description", where=where, found=f"{info.nbytes:,} bytes",
                                wanted=f"at most {MOST_BYTES:,}", remedy="the file is damaged: download it again")
        start, window = self._windows.get(info.file, (0, b""))
        if not start <= info.offset <= info.offset + info.nbytes <= start + len(window):
            start, window = self._windows[info.file] = (info.offset, self._read(info, where))
        found = window[info.offset - start : info.offset - start + info.nbytes]
        if len(found) != info.nbytes:
            raise Damaged("changed while being read", where=where, found=f"{len(found)} bytes",
                          wanted=f"{info.nbytes} bytes", remedy="open the checkpoint again when nothing writes to it")
        return found

    def _read(self, info: TensorInfo, where: str) -> bytes:
        """The tensor's bytes and some that follow in the file."""
        if info.file not in self._open:
            self._open[info.file] = open_regular(info.file)
        try:
            return os.pread(self._open[info.file], max(info.nbytes, _WINDOW), info.offset)
        except OSError as error:
            raise Damaged("cannot be read", where=where, found=error.strerror or str(error)) from error

    def numbers(self, info: TensorInfo) -> list[int | float]:
        """All elements. Raises Damaged for a dtype that no description has."""
        letter = _LETTERS.get(info.dtype)
        if letter is None:
            raise Damaged("not a description's dtype", where=f"{info.file.name}: {info.name}", found=info.dtype,
                          wanted=" or ".join(_LETTERS), remedy="the file is damaged: download it again")
        raw = self.raw(info)
        return list(struct.unpack(f"<{info.elements}{letter}", raw))

    def text(self, info: TensorInfo) -> str:
        """Bytes that are UTF-8 text. Raises Damaged if they are not."""
        where = f"{info.file.name}: {info.name}"
        if info.dtype not in ("U8", "I8"):
            raise Damaged("not a text's dtype", where=where, found=info.dtype, wanted="U8")
        try:
            return self.raw(info).decode()
        except UnicodeDecodeError as error:
            raise Damaged("not valid text", where=where, found=f"byte {error.start}", wanted="UTF-8",
                          remedy="the file is damaged: download it again") from None
