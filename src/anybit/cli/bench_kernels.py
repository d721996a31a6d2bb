"""`anybit bench kernels`: every kernel over schemes, shapes and numbers of tokens, a line each, kept as they come."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from anybit.checkpoints.online import quantizer
from anybit.cli.output import shown
from anybit.errors import Unsupported
from anybit.platforms import Platform
from anybit.schemes import Layer, Scheme, dense

if TYPE_CHECKING:
    from anybit.hosts.tuning import Timing
    from anybit.kernels.trials import Clock

_SHAPE: Final = re.compile(r"(\d+)x(\d+)")
_MOST_WEIGHTS: Final = 2**32
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    names       online schemes
    shapes      (N, K)
    tokens      M
    kernels     only these, None: all that can run
    workers     processes that compile beforehand, None: as many as pay
    stop_after  seconds after which no further layer is begun
    """

    platform: Platform
    device: str
    dtype: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    kernels: Sequence[str] | None = None
    workers: int | None = None
    stop_after: float | None = None

    @property
    def cells(self) -> Iterator[tuple[tuple[int, int], str, Scheme]]:
        """Shape, name and scheme of every layer; schemes that leave a shape as it is are left out."""
        for shape in self.shapes:
            for name in self.names:
                scheme = scheme_named(name, shape)
                if scheme is not None:
                    yield shape, name, scheme


def shapes_of(text: str) -> list[tuple[int, int]]:
    """(N, K) of every KxN; raises Unsupported for what is no shape."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        matched = _SHAPE.fullmatch(part)
        n, k = (int(matched[2]), int(matched[1])) if matched is not None else (0, 0)
        if not 0 < n * k <= _MOST_WEIGHTS:
            raise Unsupported("no such shape", found=part, wanted="KxN, for example 4096x6144")
        found.append((n, k))
    return found


def random_shapes(count: int, seed: int) -> list[tuple[int, int]]:
    """(N, K) such as nobody tuned for: 1024 to 16384, K in steps of 128, every other N odd."""
    dice = random.Random(seed)  # noqa: S311 - sizes, not secrets

    def size(step: int) -> int:
        return round(2 ** dice.uniform(10, 14) / step) * step

    return [(size(16) + (i % 2), size(128)) for i in range(count)]


def numbers(text: str) -> list[int]:
    """Numbers of tokens, ascending."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise Unsupported("no such number of tokens", found=text, wanted="numbers with commas: 1,16,256")
    return found


def scheme_named(name: str, shape: tuple[int, int]) -> Scheme | None:
    """The scheme that an online name gives a layer of this shape, None where it leaves it; "none" is not quantized."""
    if name == "none":
        return dense("bfloat16")
    return quantizer(name).scheme_of(Layer(name, "linear", shape, dense("bfloat16")))


def kernel_rows(wanted: Wanted, say: Say, keep: Callable[[dict[str, Any]], object], warn: Say) -> dict[str, Any]:
    """All rows, and the memory's rate; `keep` is given what there is after each layer, `warn` what was left out."""
    from anybit.hosts.tuning import copy_bandwidth, measure, unquantized_clocks
    from anybit.kernels.trials import sample_weight

    begun = time.monotonic()
    cells = list(wanted.cells)
    if not cells:
        raise Unsupported("no scheme fits a shape", found=", ".join(wanted.names), wanted="K in whole groups")
    for name in wanted.names:
        for shape in wanted.shapes:
            if (shape, name) not in {(s, n) for s, n, _ in cells}:
                warn(f"{name} leaves a layer of {shape[0]} x {shape[1]} as it is: not measured")
    _compile(wanted, cells, say)
    bandwidth = copy_bandwidth(wanted.device)
    say(f"memory {bandwidth / 1e9:.0f} GB/s (a copy), on {shown(wanted.platform.title)}, activations {wanted.dtype}")
    say("m n k · scheme · kernel · µs · TFLOP/s · GB/s · share of the streaming floor · × unquantized ± · match")
    found: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "rows": []}
    clocks: dict[int, Clock] = {}
    clocked = None
    for shape, name, scheme in cells:
        if wanted.stop_after is not None and time.monotonic() - begun > wanted.stop_after:
            warn(f"stopped after {wanted.stop_after:.0f} s, before {name} at {shape[0]} x {shape[1]}")
            break
        if clocked != shape:
            clocks.clear()  # the graphs of the shape before, with their weights
            clocks, clocked = unquantized_clocks(shape, wanted.device, wanted.dtype, wanted.tokens), shape
        weight = sample_weight(scheme, shape, device=wanted.device)
        for timing in measure(weight, wanted.platform, wanted.device, wanted.dtype, wanted.tokens, wanted.kernels,
                              clocks):
            row = _row(timing, name, scheme, bandwidth)
            found["rows"].append(row)
            say(_line(row))
        del weight
        keep({**found, "seconds": time.monotonic() - begun})
    found["seconds"] = time.monotonic() - begun
    return found


def _compile(wanted: Wanted, cells: list[tuple[tuple[int, int], str, Scheme]], say: Say) -> None:
    from anybit.hosts.warming import tasks_of, warm, workers_for

    if wanted.platform.vendor == "cpu":
        return
    tasks = tasks_of([(scheme, shape) for shape, _, scheme in cells], wanted.platform, wanted.dtype, wanted.tokens,
                     wanted.kernels)
    workers = workers_for(len(tasks), wanted.workers)
    if workers:
        begun = time.monotonic()
        warm(tasks, wanted.device, workers)
        say(f"{len(tasks)} products compiled by {workers} processes in {time.monotonic() - begun:.0f} s")


def _row(timing: Timing, name: str, scheme: Scheme, bandwidth: float) -> dict[str, Any]:
    from anybit.hosts.tuning import floor_seconds

    floor = floor_seconds(scheme, timing.shape, timing.tokens, timing.dtype, bandwidth)
    row = {**timing.to_dict(), "name": name, "floor_seconds": floor, "share_of_floor": floor / timing.seconds,
           "flop_per_second": timing.flops / timing.seconds, "bytes_per_second": floor * bandwidth / timing.seconds}
    return finite(row)


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null for what was not timed: JSON has no NaN."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()}


def _line(row: dict[str, Any]) -> str:
    n, k = row["shape"]
    head = f"{row['tokens']} {n} {k} · {row['name']} · {row['kernel']}"
    if row["fault"]:
        return f"{head} · WRONG: {shown(row['fault'])}"
    return (f"{head} · {row['seconds'] * 1e6:.1f} · {row['flop_per_second'] / 1e12:.2f} · "
            f"{row['bytes_per_second'] / 1e9:.0f} · {row['share_of_floor']:.0%} · × {row['times_unquantized']:.2f} "
            f"± {row['spread'] / 2:.0%} · {row['relative_error']:.1e}")
