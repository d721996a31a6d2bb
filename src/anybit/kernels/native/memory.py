"""Memory of packed weights, in large pages where the system gives them.

A step reads every weight once, a few kilobytes of each row after the other: with pages of 4 KiB the processor looks up
an address for every one of them, which cost a tenth of a step on the machine of docs/performance.md. So weights of all
layers lie together in chunks that the kernel is asked to back by large pages (2 MiB). A chunk is given back when the
last tensor in it is gone.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from contextlib import suppress
from typing import Final

import torch
from torch import Tensor

__all__ = ["settled"]

_CHUNK: Final = 256 << 20  # bytes of addresses; memory is taken as it is filled
_PAGE: Final = 2 << 20
_LINE: Final = 64
_SMALL: Final = 4096  # bytes; less stays where it is
_ADVICE: Final = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


_lock = threading.Lock()
_last: tuple[weakref.ref[mmap.mmap], int] | None = None  # the chunk that has room, and how much of it is taken


def settled(tensor: Tensor) -> Tensor:
    """The same bytes in a chunk; the tensor itself if it is small or there are no large pages."""
    nbytes = tensor.nbytes
    if _ADVICE is None or nbytes < _SMALL or not tensor.is_contiguous():
        return tensor
    try:
        memory, start = _place(nbytes)
    except OSError:  # no addresses left (a limit of the shell's)
        return tensor
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start)  # keeps the chunk alive
    return copy.copy_(tensor.view(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


def _chunk(size: int) -> mmap.mmap:
    assert _ADVICE is not None  # so this is Linux, which has the flags too
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    with suppress(OSError):  # a kernel built without large pages
        memory.madvise(_ADVICE)
    return memory


def _place(nbytes: int) -> tuple[mmap.mmap, int]:
    """A chunk and the first of `nbytes` free bytes in it."""
    global _last
    with _lock:
        memory, used = (_last[0](), _last[1]) if _last is not None else (None, 0)
        if memory is None or used + nbytes > len(memory):
            size = max(_CHUNK, -(-nbytes // _PAGE) * _PAGE)
            memory, used = _chunk(size), 0
        _last = weakref.ref(memory), -(-(used + nbytes) // _LINE) * _LINE
        return memory, used
