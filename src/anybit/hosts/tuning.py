"""Measuring kernels on the device at hand: each capable kernel on one scheme and shape, correct before timed.

Times are medians with cold weights (calls rotate over copies that no cache holds); on a GPU a graph of calls is
replayed, so that what counts is the device's time. Where a ratio to torch's unquantized product is wanted, both are
timed in turn. A kernel whose answer is outside its bound is not timed: it is reported, and `tune` disqualifies it on
this machine.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from anybit.errors import DeviceProblem
from anybit.kernels.catalogue import KERNELS, Stored, implementation, kernel
from anybit.kernels.product import Product, product_of
from anybit.kernels.request import ANY, Kernels, KernelSpec, Request, scale_bytes
from anybit.kernels.trials import Clock, Oracle, copies_for, sample_weight
from anybit.numerics.formats import number_format
from anybit.platforms import Platform
from anybit.schemes import Scheme, dense
from anybit.weights import Weight

EMPTY_LAUNCH_SECONDS: Final = 0.7e-6  # an empty kernel in a graph, measured on an H200
_MAX_COPIES: Final = 64
_TURNS: Final = 3  # times that a kernel and the unquantized product are timed, in turn
_TURN_SECONDS: Final = 0.01
_HOPELESS: Final = 5.0  # times the least modelled time: not worth the wait


@dataclass(frozen=True)
class Timing:
    """One kernel on one scheme, shape and number of tokens.

    seconds      of one call, NaN where the answer was wrong
    worst        error over its bound, relative the Frobenius norm of the error over that of the product
    unquantized  seconds of torch's product of the same shape, timed in turn; NaN where none was
    ratios       how many times as fast, of each turn
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
    unquantized: float = math.nan
    ratios: tuple[float, ...] = ()

    @property
    def times_unquantized(self) -> float:
        """How many times as fast as torch's unquantized product: the median turn; NaN where it was not timed."""
        return statistics.median(self.ratios) if self.ratios else math.nan

    @property
    def spread(self) -> float:
        """Largest less smallest ratio of the turns, over their median."""
        return (max(self.ratios) - min(self.ratios)) / self.times_unquantized if self.ratios else math.nan

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.tokens * self.shape[0] * self.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """The timing as data."""
        return {"kernel": self.kernel, "layout": self.layout, "scheme": self.scheme, "shape": list(self.shape),
                "dtype": self.dtype, "tokens": self.tokens, "seconds": self.seconds, "error_over_bound": self.worst,
                "relative_error": self.relative, "fault": self.fault, "unquantized_seconds": self.unquantized,
                "times_unquantized": self.times_unquantized, "spread": self.spread}


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
    kernels: Sequence[str] | None = None, beside: Mapping[int, Clock] | None = None, always: Collection[str] = (),
) -> Iterator[Timing]:
    """Every capable kernel on a weight [N, K] at each number of tokens, correct before timed.

    kernels  only these; without, kernels of many times the least modelled time are left out
    beside   torch's unquantized product by number of tokens, timed in turn with each kernel
    always   kernels that are timed whatever the model says of them
    """
    weight = weight.to(device)
    asked = Request("linear", weight.scheme, weight.shape, dtype)
    able = capable(asked, platform, tokens, kernels, always)
    oracles: dict[int, Oracle] = {}
    with torch.inference_mode():
        for spec, counts in able.items():
            products = _Copies(spec, weight, dtype, device)
            for m in counts:
                x = example(m, weight.shape[1], dtype, device)
                if m not in oracles:
                    oracles[m] = Oracle(weight, x)
                yield _timing(spec, asked.of(m), platform, products, x, oracles[m], (beside or {}).get(m))
            del products


def capable(
    asked: Request, platform: Platform, tokens: Sequence[int], kernels: Sequence[str] | None = None,
    always: Collection[str] = (),
) -> dict[KernelSpec, list[int]]:
    """The kernels that can run a layer, and at which numbers of tokens they are worth timing."""
    found: dict[KernelSpec, list[int]] = {}
    for m in tokens:
        able = [spec for spec in KERNELS if spec.can_implement(asked.of(m), platform).ok]
        modelled = {spec: spec.seconds(asked.of(m), platform) for spec in able}
        for spec in able:
            is_hopeless = modelled[spec] > _HOPELESS * max(min(modelled.values()), 1e-6)
            is_wanted = not is_hopeless if kernels is None else spec.name in kernels
            if is_wanted or spec.name in always:
                found.setdefault(spec, []).append(m)
    return {spec: found[spec] for spec in KERNELS if spec in found}


def example(tokens: int, columns: int, dtype: str, device: torch.device | str) -> Tensor:
    """x [M, K] of normal numbers, the same in every process."""
    made = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, columns, generator=made).to(getattr(torch, dtype)).to(device)


class _Copies:
    """Products over copies of a weight in one kernel's layout, more than any cache holds."""

    def __init__(self, spec: KernelSpec, weight: Weight, dtype: str, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._made: list[Product] = []
        self.fault = ""
        try:
            self._made.append(self._one(spec, weight))
            nbytes = sum(t.nbytes for t in self.first.stored.tensors().values())
            count = min(copies_for(nbytes), _MAX_COPIES) if self.device.type == "cuda" else 2
            self._made += [self._one(spec, weight) for _ in range(count - 1)]
        except Exception as error:
            self.fault = _said(error)

    def _one(self, spec: KernelSpec, weight: Weight) -> Product:
        own = deepcopy(weight)  # a layout may keep the tensors it is given: copies would be one
        stored: Stored = implementation(spec).prepare(own, self._dtype, Kernels([(ANY, spec.name)]))
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


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _timing(
    spec: KernelSpec, asked: Request, platform: Platform, products: _Copies, x: Tensor, oracle: Oracle,
    beside: Clock | None,
) -> Timing:
    n, k = asked.shape
    base = Timing(spec.name, spec.layout, str(asked.scheme), (n, k), asked.dtype, asked.tokens, math.nan, math.inf,
                  math.inf, products.fault)
    if base.fault:
        return base
    try:
        difference = oracle.difference(products.first(x), spec.rounds(asked, platform))
        base = replace(base, worst=difference.worst, relative=difference.relative)
        if not difference.ok:
            return replace(base, fault=difference.fault)
        clock = Clock(products.calls(x), products.device)
        return _in_turn(base, clock, beside)
    except Exception as error:
        return replace(base, fault=_said(error))


def _in_turn(base: Timing, clock: Clock, beside: Clock | None) -> Timing:
    """The timing of a right kernel, in turn with the unquantized product where there is one."""
    if beside is None:
        return replace(base, seconds=clock.seconds())
    turns = [(beside.seconds(_TURN_SECONDS), clock.seconds(_TURN_SECONDS)) for _ in range(_TURNS)]
    return replace(
        base, seconds=statistics.median(own for _, own in turns),
        unquantized=statistics.median(other for other, _ in turns), ratios=tuple(other / own for other, own in turns),
    )


def unquantized_clocks(shape: tuple[int, int], device: torch.device | str, dtype: str,
                       tokens: Sequence[int]) -> dict[int, Clock]:
    """torch's own product of an unquantized weight [N, K] by number of tokens: what ratios compare with."""
    weight = sample_weight(dense(dtype), shape, device=device)
    with torch.inference_mode():
        copies = _Copies(kernel("torch-dense"), weight, dtype, device)
        if copies.fault:
            raise DeviceProblem("torch's own product fails", found=copies.fault, wanted="a device that multiplies")
        return {m: Clock(copies.calls(example(m, shape[1], dtype, device)), device) for m in tokens}
