"""Measuring kernels on the device at hand: each capable kernel on one scheme and shape, correct before timed.

Times are medians with cold weights (calls rotate over copies that no cache holds); on a GPU a graph of calls is
replayed, so that what counts is the device's time. A kernel whose answer is outside its bound is not timed: it is
reported, and `tune` disqualifies it on this machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from anybit.kernels.catalogue import KERNELS, Stored, implementation
from anybit.kernels.product import Product, product_of
from anybit.kernels.request import REGIMES, KernelSpec, Regime, Request, regime_of, scale_bytes
from anybit.kernels.trials import compare, copies_for, sample_weight, seconds_of
from anybit.numerics.formats import number_format
from anybit.platforms import Platform
from anybit.schemes import Scheme
from anybit.weights import Weight

EMPTY_LAUNCH_SECONDS: Final = 0.7e-6  # an empty kernel in a graph, measured on an H200
_MAX_COPIES: Final = 64


@dataclass(frozen=True)
class Timing:
    """One kernel on one scheme, shape and number of tokens.

    seconds   of one call, NaN where the answer was wrong
    worst     error over its bound, relative the Frobenius norm of the error over that of the product
    """

    kernel: str
    layout: str
    scheme: str
    shape: tuple[int, int]
    dtype: str
    tokens: int
    seconds: float
    worst: float
    relative: float
    fault: str = ""

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.tokens * self.shape[0] * self.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """The timing as data."""
        return {"kernel": self.kernel, "layout": self.layout, "scheme": self.scheme, "shape": list(self.shape),
                "dtype": self.dtype, "tokens": self.tokens, "seconds": self.seconds, "error_over_bound": self.worst,
                "relative_error": self.relative, "fault": self.fault}


def floor_seconds(scheme: Scheme, shape: tuple[int, int], tokens: int, dtype: str, bandwidth: float) -> float:
    """The streaming floor: canonical weight, x and y once over the memory's measured rate, and one empty launch."""
    n, k = shape
    weight = n * k * number_format(scheme.element).bits / 8 + scale_bytes(scheme, shape)
    moved = weight + tokens * (n + k) * torch.finfo(getattr(torch, dtype)).bits / 8
    return moved / bandwidth + EMPTY_LAUNCH_SECONDS


def copy_bandwidth(device: torch.device | str) -> float:
    """Bytes a second that the device's memory reads and writes together, copying a gibibyte (CPU: 256 MiB)."""
    kind = torch.device(device).type
    source = torch.ones(2**28 if kind == "cuda" else 2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(9):
        _synchronize(kind)
        begun = time.perf_counter()
        target.copy_(source)
        _synchronize(kind)
        times.append(time.perf_counter() - begun)
    return 2.0 * source.nbytes / sorted(times)[len(times) // 2]


def _synchronize(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def measure(
    weight: Weight, platform: Platform, device: torch.device | str, dtype: str, tokens: Sequence[int],
    kernels: Sequence[str] | None = None, floor: float = 0.0,
) -> Iterator[Timing]:
    """Every capable kernel on a weight [N, K] at each number of tokens, correct before timed.

    kernels  only these
    floor    kernels whose modelled time is more than 50 times this are left out, 0 keeps all
    """
    n, k = weight.shape
    for spec in KERNELS:
        if kernels is not None and spec.name not in kernels:
            continue
        counts = [m for m in tokens if _can(spec, weight.scheme, (n, k), dtype, m, platform)]
        if not counts:
            continue
        products = _Copies(spec, weight, dtype, device)
        for m in counts:
            asked = Request("linear", weight.scheme, (n, k), dtype, regime_of(m))
            if floor and spec.seconds(asked, platform) > 50 * max(floor, 20e-6):
                continue
            yield _timing(spec, asked, platform, products, weight, m)
        del products


def _can(spec: KernelSpec, scheme: Scheme, shape: tuple[int, int], dtype: str, tokens: int, platform: Platform) -> bool:
    return spec.can_implement(Request("linear", scheme, shape, dtype, regime_of(tokens)), platform).ok


class _Copies:
    """Products over copies of a weight in one kernel's layout, more than any cache holds."""

    def __init__(self, spec: KernelSpec, weight: Weight, dtype: str, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._made: list[Product] = []
        self.fault = ""
        kernels: dict[Regime, str] = dict.fromkeys(REGIMES, spec.name)
        try:
            self._made.append(self._one(spec, weight, kernels))
            nbytes = sum(t.nbytes for t in self._made[0].stored.tensors().values())
            count = min(copies_for(nbytes), _MAX_COPIES) if self.device.type == "cuda" else 2
            self._made += [self._one(spec, weight, kernels) for _ in range(count - 1)]
        except Exception as error:
            self.fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def _one(self, spec: KernelSpec, weight: Weight, kernels: dict[Regime, str]) -> Product:
        own = deepcopy(weight.to(self.device))  # a layout may keep the tensors it is given: copies would be one
        stored: Stored = implementation(spec).prepare(own, self.dtype, kernels)
        return product_of(own, stored)

    @property
    def first(self) -> Product:
        """One of them."""
        return self._made[0]

    def calls(self, x: Tensor) -> list[Callable[[], object]]:
        """A call of each copy on x."""
        def call(product: Product) -> Callable[[], object]:
            return lambda: product(x)

        return [call(product) for product in self._made]


def _timing(
    spec: KernelSpec, asked: Request, platform: Platform, products: _Copies, weight: Weight, tokens: int
) -> Timing:
    n, k = weight.shape
    base = Timing(spec.name, spec.layout, str(weight.scheme), (n, k), asked.dtype, tokens, math.nan, math.inf, math.inf)
    if products.fault:
        return replace(base, fault=products.fault)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, k, generator=generator).to(products.dtype).to(products.device)
    try:
        with torch.inference_mode():
            difference = compare(weight.to(products.device), products.first, x[: min(tokens, 512)],
                                 spec.rounds(asked, platform))
            base = replace(base, worst=difference.worst, relative=difference.relative)
            if not difference.ok:
                return replace(base, fault=difference.fault)
            return replace(base, seconds=seconds_of(products.calls(x), products.device))
    except Exception as error:
        return replace(base, fault=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def dense_timings(shape: tuple[int, int], platform: Platform, device: torch.device | str, dtype: str,
                  tokens: Sequence[int]) -> dict[int, float]:
    """Seconds of torch's own product of an unquantized weight, by number of tokens: what ratios compare with."""
    from anybit.schemes import dense

    weight = sample_weight(dense(dtype), shape)
    found = measure(weight, platform, device, dtype, tokens, kernels=("torch-dense",))
    return {timing.tokens: timing.seconds for timing in found}
