"""Compiling GPU kernels beforehand, in several processes: what a measurement on a lent machine would else wait for.

Each process calls the products once, on weights of the very shapes, and leaves what was compiled in Triton's cache on
disk; the process that measures then only reads it. What fails here fails again, and is reported, where it is measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Final

from anybit.platforms import Platform
from anybit.schemes import Scheme

_LEAST: Final = 2  # tasks below which another process is not worth its start
_MOST: Final = 16
_COMPILED_ALREADY: Final = ("torch-dense", "torch-tiled")


@dataclass(frozen=True)
class Task:
    """A scheme and shape (N, K) to call one kernel on, at each number of tokens."""

    scheme: Scheme
    shape: tuple[int, int]
    kernel: str
    dtype: str
    tokens: tuple[int, ...]


def workers_for(tasks: int, asked: int | None = None) -> int:
    """How many processes: as asked, else as many as there are cores and work; 0 is none."""
    if asked is not None:
        return asked
    return 0 if tasks < _LEAST else min(_MOST, os.cpu_count() or 1)


def tasks_of(
    layers: Iterable[tuple[Scheme, tuple[int, int]]], platform: Platform, dtype: str, tokens: Sequence[int],
    kernels: Sequence[str] | None = None,
) -> list[Task]:
    """A task for every layer (scheme, shape) and kernel that compiles, large ones first: the last should be short."""
    from anybit.hosts.tuning import capable
    from anybit.kernels.request import Request

    found = []
    for scheme, shape in layers:
        able = capable(Request("linear", scheme, shape, dtype), platform, tokens, kernels)
        found += [Task(scheme, shape, spec.name, dtype, tuple(counts)) for spec, counts in able.items()
                  if spec.name not in _COMPILED_ALREADY]
    return sorted(found, key=lambda task: -task.shape[0] * task.shape[1])


def split(tasks: Sequence[Task], workers: int) -> list[Task]:
    """The tasks by fewer numbers of tokens each, where there are fewer tasks than workers."""
    size = max(1, math.ceil(max((len(task.tokens) for task in tasks), default=1) * len(tasks) / max(workers, 1)))
    return [replace(task, tokens=tuple(part)) for task in tasks for part in batched(task.tokens, size)]


def batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`items`, so many at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def warm(tasks: Sequence[Task], device: str, workers: int) -> None:
    """Compile the kernels of all tasks; returns when they are in the cache, or when the processes died."""
    if not tasks or not workers:
        return
    tasks = split(tasks, workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            list(pool.map(_call_once, tasks, [device] * len(tasks)))
        except BrokenProcessPool:
            return  # a compiler aborted; the measurement compiles what is left


def _call_once(task: Task, device: str) -> None:
    import torch

    from anybit.hosts.tuning import example
    from anybit.kernels.catalogue import implementation, kernel
    from anybit.kernels.product import product_of
    from anybit.kernels.request import ANY, Kernels
    from anybit.kernels.trials import sample_weight

    try:
        with torch.inference_mode():
            weight = sample_weight(task.scheme, task.shape, device=device)
            kernels = Kernels([(ANY, task.kernel)])
            stored = implementation(kernel(task.kernel)).prepare(weight, getattr(torch, task.dtype), kernels)
            product = product_of(weight, stored)
            for tokens in task.tokens:
                product(example(tokens, task.shape[1], task.dtype, device))
    except Exception:  # the measurement meets it again and reports it
        return
    finally:
        torch.cuda.empty_cache()
