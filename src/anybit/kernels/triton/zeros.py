"""Zeros in which the programs of a split product count their arrivals: the last one adds the parts and writes 0 again.

They outlive a call, so two calls that run at once must not share them. Calls of one stream follow each other: a stream
has one set, whichever weights are multiplied. A captured graph may be replayed beside anything, another graph too, so
each launch that is captured gets zeros that nobody else will count in. They come from a slab that was cleared before
the capture, since clearing would otherwise become a part of every replay. Whoever owns the launch keeps them: a slab
is freed when all weights are gone whose captured launches count in it, and with them their graphs are dead.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import RLock
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["zeros_for"]

_FEWEST: Final = 4096  # of a stream's set
_SLAB: Final = 2**19  # int32: 2 MiB, a few thousand captured launches
_STEP: Final = 32  # captured launches begin on a cache line of their own
_is_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)


def zeros_for(device: torch.device, stream: int, count: int, kept: list[Tensor]) -> Tensor:
    """At least `count` int32 zeros for a launch on `stream`, the current one; what a graph was given goes to `kept`."""
    if _is_capturing():
        return _of(device).captured(count, kept)
    found = _SETS[device].get(stream)
    if found is None or found.numel() < count:
        return _of(device).of_stream(stream, count)
    return found


# device -> stream -> its set; emptied for a device whose slab runs low
_SETS: Final[defaultdict[torch.device, dict[int, Tensor]]] = defaultdict(dict)


class _Zeros:
    """The zeros of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[int, list[Tensor]] = {}  # the last one is the stream's; launches under way have the others
        self._slab: Tensor | None = None
        self._taken = 0
        self._lock = RLock()  # two threads may capture at once

    def of_stream(self, stream: int, count: int) -> Tensor:
        """The set of a stream, made where it is missing or too small; the place to see to the slab."""
        with self._lock:
            return self._of_stream(stream, count)

    def _of_stream(self, stream: int, count: int) -> Tensor:
        if self._slab is None or self._is_low():
            torch.cuda.synchronize(self._device)  # what counted in a slab that has been freed is through
            self._slab, self._taken = self._cleared(_SLAB), 0
            torch.cuda.synchronize(self._device)
        sets = self._streams.setdefault(stream, [])
        if not sets or sets[-1].numel() < count:
            sets.append(self._cleared(max(_FEWEST, 1 << (count - 1).bit_length())))
        _SETS[self._device][stream] = sets[-1]
        return sets[-1]

    def captured(self, count: int, kept: list[Tensor]) -> Tensor:
        """Zeros for one launch of a graph."""
        with self._lock:
            start = self._taken
            if self._slab is None or start + count > self._slab.numel():  # then clearing is captured too
                return torch.zeros(count, dtype=torch.int32, device=self._device)
            self._taken = -(-(start + count) // _STEP) * _STEP
            found = self._slab[start : start + count]
            if self._is_low():
                _SETS[self._device].clear()
        kept.append(found)
        return found

    def _is_low(self) -> bool:
        return self._taken > _SLAB // 2

    def _cleared(self, count: int) -> Tensor:
        """New zeros, ready for the current stream; of another thread and stream, so that no graph's pool owns them.

        torch.compile warms a graph up with all that its thread allocates in the graph's pool, on whichever stream.
        """
        with ThreadPoolExecutor(1) as another:
            made = another.submit(self._made, count).result()
        torch.cuda.current_stream(self._device).wait_stream(_own_stream(self._device))
        return made

    def _made(self, count: int) -> Tensor:
        with torch.cuda.stream(_own_stream(self._device)):
            return torch.zeros(count, dtype=torch.int32, device=self._device)


@cache
def _of(device: torch.device) -> _Zeros:
    return _Zeros(device)


@cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
