"""humming-kernels, the package: found, loaded, asked for kernels. What it is given and why: `humming.py`.

Loading it starts no process and compiles nothing (humming would build its launcher in the background; wheels carry it).
Kernels are compiled by nvcc or NVRTC into humming's cache, `~/.humming` or HUMMING_CACHE_DIR, once for a shape.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from anybit.errors import DeviceProblem
from anybit.kernels.linear.humming import Settings

__all__ = ["RUNGS", "Kernels", "Library", "library"]

# largest M of each compiled kernel; humming itself would compile ninety for the M up to 1024
RUNGS: Final = (8, 16, 32, 64, 128, 256, 512, 1024, 2**30)
_PRICED: Final = 4096  # the M for which the last one is made
_PARTS: Final = ("humming.ops", "humming.schema", "humming.transform", "humming.tune", "humming.kernel.humming")
_NO_BACKGROUND: Final = "HUMMING_DISABLE_PARALLEL_BUILD"


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels of a layer's shape and scheme.

    config  humming's description of the layer
    table   int64 [4 * rungs] on the CPU: M above, M up to, kernel, multiprocessors (0: all)
    """

    config: Any
    table: Tensor


class Library:
    """humming's modules, and the four things that are asked of them."""

    def __init__(self) -> None:
        self.ops, schema, self.transform, self.tune, kernel = (import_module(name) for name in _PARTS)
        self._weight_schema, self._input_schema = schema.BaseWeightSchema, schema.BaseInputSchema
        self._kernel = kernel.HummingKernel
        self._run: Any = None

    def config(self, settings: Settings, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Any:
        """Its description of a layer [N, K]."""
        weight = self._weight_schema.from_config({**settings.weight_config(), "quant_method": "humming"})
        given = {"dtype": settings.codes or str(dtype).removeprefix("torch."), "quant_method": "humming"}
        return self.transform.prepare_layer_config(
            n, k, weight, self._input_schema.from_config(given), torch_dtype=dtype, device=device)

    def stored(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors in the order that the kernels read."""
        made: dict[str, Tensor] = self.transform.transform_humming_tensors(config, tensors)
        return {name: tensor.contiguous() for name, tensor in made.items()}

    def compile(self, config: Any, device: torch.device) -> Kernels:
        """A kernel for each rung of M, from humming's cache where it has it; in parallel where there are cores."""
        steps = []
        for low, high in zip((0, *RUNGS), RUNGS, strict=False):
            tuned = self.tune.get_heuristics_config(config, shape_m=min(high, _PRICED), device=device)
            steps.append([low, high, tuned])
        table = self._kernel.prepare_kernels(config.to_str(), None, json.dumps(steps), device)
        return Kernels(config, table)

    def launch(
        self, table: Tensor, x: Tensor, scale_of_x: Tensor | None, parts: Sequence[Tensor | None], out: Tensor, *,
        as_tokens: int = 0,
    ) -> None:  # fmt: skip
        """out [M, N] = x [M, K] times the weight; `parts` = weight, scale, zero point, factor, locks.

        scale_of_x  float32 [M, 1] where x is codes
        as_tokens   the M whose kernel takes it, 0: that of x
        """
        weight, scale, zeros, factor, locks = parts
        if self._run is None:  # defined when humming compiles its first kernel
            self._run = torch.ops.humming.launch_kernel.out
        self._run(table, x, weight, scale, factor, scale_of_x, None, zeros, None, out, None, None, None, None, locks, 1,
                  as_tokens)


@cache
def _loaded() -> Library:
    asked = os.environ.get(_NO_BACKGROUND)
    os.environ[_NO_BACKGROUND] = "1"
    try:
        return Library()
    finally:
        if asked is None:
            del os.environ[_NO_BACKGROUND]


def library() -> Library:
    """The package, loaded; DeviceProblem where it is there and does not load."""
    try:
        return _loaded()
    except Exception as error:  # whatever a foreign package raises on import
        raise DeviceProblem(
            "humming-kernels is installed and does not load", found=f"{type(error).__name__}: {error}",
            wanted="humming-kernels 0.1.19 with its dependencies",
            remedy="pip install 'humming-kernels==0.1.19', or pip uninstall humming-kernels",
        ) from error
