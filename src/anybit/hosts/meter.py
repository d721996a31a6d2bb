"""One memory meter: bytes held and peak over a region, on the CPU and on any device of torch.

On a CPU it is this process's anonymous memory (mapped files do not count); on a GPU, NVIDIA's and AMD's alike, the
bytes that torch's allocator has given out. Meters may be nested: none resets a counter that another reads.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_INTERVAL_SECONDS = 0.002


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process; 0 where the system does not tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def release_freed() -> None:
    """Give memory that was freed back to the system: glibc keeps large freed blocks, as if the model were larger."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class Meter:
    """`with Meter(device) as m: ...` then `m.held_bytes` and `m.peak_bytes`, both over what was held before."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Nothing is reset: other meters and the user's own counters go on undisturbed."""
        self.device = torch.device(device)
        self.held_bytes = 0
        self.peak_bytes = 0
        self._base = 0
        self._peak_before = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _now(self) -> int:
        return anonymous_bytes() if self.device.type == "cpu" else torch.cuda.memory_allocated(self.device)

    def _peak(self) -> int:
        """The allocator's own peak since someone last reset it; 0 on a CPU, which keeps none."""
        return 0 if self.device.type == "cpu" else torch.cuda.max_memory_allocated(self.device)

    def __enter__(self) -> Meter:
        """Begin: a thread samples the peak every two milliseconds."""
        release_freed()  # what was freed before must not count against what is allocated now
        self._base = self._now()
        self._peak_before = self._peak()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self.peak_bytes = max(self.peak_bytes, self._now() - self._base)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End: what is held now, and the peak so far."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.held_bytes = self._now() - self._base
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        peak = self._peak()
        if peak > self._peak_before:  # a new maximum falls into this region: exact, where samples may miss it
            self.peak_bytes = max(self.peak_bytes, peak - self._base)
