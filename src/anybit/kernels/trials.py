"""Trying a kernel on one layer: sample weights, probing inputs, the float64 product with its bound, and times.

The bound follows from what a kernel may do (docs/formats/numerics.md §9). Operands are exact: the float32 reference
weight and the float32 value of the quantized activations. So, with |x||W| the product of the magnitudes,

    accumulation   2 (K + 2) 2^-24 |x||W|   float32 sums in any order; the factor 2 since matrix units may truncate, and
                                            one rounding each where a scale meets a weight or an activation
    operands       r |x||W|                 for each thing that a kernel says that it rounds to a dtype of unit r;
                                            r = 33 2^-13 for sums in a matrix unit's own adder, which takes 32 products
                                            and the sum so far to 13 bits of the largest of them
    output         u |y|                    half a unit in the last place of the output's dtype

The bound holds for each output. It grows with K although errors of random sign do not; so the error as a whole is held
to what such errors come to, within a margin: float32 sums sqrt(K) 2^-24 | |x||W| |, a rounding 0.42 u of the norm. A
kernel that rounds weights to bfloat16 in silence stays within the first for large K, and not within the second.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from anybit.kernels.request import NARROW_ADDER, roundings
from anybit.numerics.activations import RECIPES, quantize_dequantize
from anybit.numerics.formats import number_format
from anybit.schemes import Block, Placement, Scheme
from anybit.weights import Dense, QuantizedWeight, Weight

__all__ = ["ROUNDING", "Clock", "Difference", "Oracle", "compare", "probes", "sample_weight", "seconds_of"]

# half a unit in the last place, relative
ROUNDING: Final = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# a float16 result below its normal range is rounded to a multiple of 2^-24
_SMALLEST: Final = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2.0**-24}
_ADDER: Final = 33 * 2.0**-13  # of |x||W|: what a narrow adder drops of 32 products and of the sum before them
PROBE_TOKENS: Final = (1, 3, 17, 40, 65, 130, 300)  # each in another range of M that some kernel has tiles for
SAMPLED_ROWS: Final = 1024  # rows of a large weight that are compared
SAMPLED_TOKENS: Final = 512  # rows of x whose outputs are
_LARGE: Final = 64 * 2**20  # weights above which only a sample of rows is compared
# root mean square of a rounding error in units of its bound, over the numbers between two powers of two
_RMS: Final = 0.42
_COLD_BYTES: Final = 190e6  # copies of a weight whose sum no cache holds


def sample_weight(scheme: Scheme, shape: tuple[int, int], seed: int = 0, device: torch.device | str = "cpu",
                  ) -> QuantizedWeight | Dense:
    """A random weight [N, K] of a scheme: codes over the whole range, scales over a few octaves, static scales of 0.05.

    Stands in for a checkpoint's layer where only speed or the kernel itself is judged.
    """
    made = torch.Generator(device).manual_seed(seed)
    if not scheme.is_quantized:
        values = torch.randn(shape, generator=made, device=device) * 0.02
        return Dense(scheme, values.to(getattr(torch, scheme.element)))
    form = number_format(scheme.element)
    codes = torch.randint(0, 2**form.bits, shape, generator=made, dtype=torch.int16, device=device)
    for bad in (*form.nan_codes, *form.inf_codes):
        codes[codes == bad] = 1
    stored = (codes - (2 ** (form.bits - 1))).to(torch.int8) if form.kind == "int" else codes.to(torch.uint8)

    def scales(format: str, block: Block, placement: Placement, level: int) -> Tensor:
        target = 0.01 if level == 0 else 1.0
        return _sample_scales(format, _count(block, placement, shape, scheme), target, made)

    offset = None
    offset_scales: tuple[Tensor, ...] = ()
    if scheme.offset is not None:
        count = _count(scheme.offset.block, scheme.offset.placement, shape, scheme)
        offset = _sample_offset(scheme, count, made)
        offset_scales = tuple(scales(lv.format, lv.block, lv.placement, 1) for lv in scheme.offset.levels)
    weight = QuantizedWeight(
        scheme, shape, stored,
        scales=tuple(scales(lv.format, lv.block, lv.placement, i) for i, lv in enumerate(scheme.scales)),
        offset=offset, offset_scales=offset_scales,
        group_map=_sample_map(scheme, shape, made) if scheme.act_order else None,
        pre_scale=torch.rand(shape[1], generator=made, device=device) + 0.5 if scheme.pre_scale else None,
        activation=_static_tensors(scheme),
    )
    return weight.to(device)


def _count(block: Block, placement: Placement, shape: tuple[int, int], scheme: Scheme) -> tuple[int, ...]:
    rows, columns = shape
    if placement in ("flat", "strided"):
        return (-(-rows * columns // (block[1] or columns)),)
    return -(-rows // (block[0] or rows)), -(-columns // (block[1] or columns))


def _sample_scales(format: str, count: tuple[int, ...], target: float, made: torch.Generator) -> Tensor:
    values = target * torch.exp2(torch.rand(count, generator=made, device=made.device) * 3 - 1.5)
    form = number_format(format)
    if form.is_integer:
        low = 1 if form.kind == "uint" else -(2 ** (form.bits - 1)) + 1
        codes = torch.randint(low, 2 ** (form.bits - (form.kind == "int")), count, generator=made, device=made.device)
        return codes.to(torch.int8 if form.kind == "int" else torch.uint8)
    if form.bits <= 8:
        from anybit.numerics.codec import encode

        return encode(format, values if format == "e8m0" else values.clamp(min=2.0**-6))
    return values.to(getattr(torch, format))


def _sample_offset(scheme: Scheme, count: tuple[int, ...], made: torch.Generator) -> Tensor:
    assert scheme.offset is not None
    form = number_format(scheme.offset.format)
    if form.is_integer:
        middle = 2 ** (number_format(scheme.element).bits - 1) if form.kind == "uint" else 0
        spread = max(middle // 2, 1)
        codes = middle + torch.randint(-spread, spread + 1, count, generator=made, device=made.device)
        return codes.clamp(form.minimum, form.maximum).to(torch.int8 if form.kind == "int" else torch.uint8)
    center = 2.0 ** (number_format(scheme.element).bits - 1) if scheme.offset.kind == "zero_point" else -0.05
    noise = torch.randn(count, generator=made, device=made.device)
    return (center * (1 + 0.1 * noise)).to(getattr(torch, scheme.offset.format))


def _sample_map(scheme: Scheme, shape: tuple[int, int], made: torch.Generator) -> Tensor:
    size = next(lv.block[1] for lv in scheme.scales if lv.placement == "gathered") or shape[1]
    return torch.randperm(shape[1], generator=made, device=made.device) // size


def _static_tensors(scheme: Scheme) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for spec in (scheme.activation, scheme.output):
        if spec is None:
            continue
        for name in RECIPES[spec.recipe].tensors:
            found[name] = torch.tensor(0 if name == "zero_point" else 256.0 if "global" in name else 0.05)
    if "zero_point" in found:
        found["zero_point"] = found["zero_point"].to(torch.int32)
    return found


def probes(columns: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Inputs [M, K] that find what random ones miss: outliers, rows of zeros, constant rows, every ragged M."""
    made = torch.Generator().manual_seed(seed)
    for tokens in PROBE_TOKENS:
        x = torch.randn(tokens, columns, generator=made)
        yield f"normal, M = {tokens}", x.to(dtype).to(device)
    x = torch.randn(17, columns, generator=made)
    x[:, :: max(columns // 7, 1)] *= 300.0
    yield "outlier columns, M = 17", x.to(dtype).to(device)
    x = torch.randn(9, columns, generator=made)
    x[::2] = 0.0
    x[1] = 0.75
    yield "zero and constant rows, M = 9", x.to(dtype).to(device)


@dataclass(frozen=True)
class Difference:
    """How far a result is from the float64 product.

    worst     largest error over its bound: at most 1 is within it
    relative  Frobenius norm of the error over that of the product
    expected  what `relative` comes to for a right kernel, margin included
    place     (row, column) of the worst
    """

    worst: float
    relative: float
    expected: float = math.inf
    place: tuple[int, int] = (0, 0)

    @property
    def ok(self) -> bool:
        """Within the bound everywhere and as a whole; NaN is not."""
        return self.worst <= 1.0 and self.relative <= self.expected

    @property
    def fault(self) -> str:
        """What is wrong, in words; "" for a right result."""
        if not self.worst <= 1.0:
            return f"{self.worst:.3g} times the bound at row {self.place[0]}, output {self.place[1]}"
        said = f"relative error {self.relative:.2e}, at most {self.expected:.2e} comes of its roundings"
        return "" if self.ok else said


def compare(weight: Weight, product: Callable[[Tensor], Tensor], x: Tensor, rounds: str | None = None) -> Difference:
    """The layer's y for x [M, K] against the float64 product of the quantized operands, with the bound above.

    rounds  what the kernel rounds beyond the declared arithmetic, as its spec says (None: nothing)
    """
    return Oracle(weight, x).difference(product(x), rounds)


class Oracle:
    """The float64 product of one weight and one input, to which any number of kernels are held."""

    def __init__(self, weight: Weight, x: Tensor) -> None:
        """x [M, K]; of a large weight a sample of rows counts, of many tokens a sample of those."""
        self._outputs = _sampled(weight)
        self._tokens = _spread(x.shape[0], SAMPLED_TOKENS)
        self._dtype, self._columns = x.dtype, weight.shape[-1]
        part = weight if self._outputs is None else _take(weight, self._outputs.to(x.device))
        rows = x.float()
        pre_scale = getattr(part, "pre_scale", None)
        if pre_scale is not None:
            rows = rows * pre_scale.float()
        if part.scheme.activation is not None:  # before tokens are picked: a scale may be taken over all of them
            rows = quantize_dequantize(rows, part.scheme.activation, getattr(part, "activation", {}))
        if self._tokens is not None:
            rows = rows[self._tokens.to(x.device)]
        w = part.dequantize().double()
        self._y = rows.double() @ w.T
        self._magnitude = rows.double().abs() @ w.abs().T
        self._squares = (rows.double() ** 2 @ (w.T**2)).sqrt().norm()
        if part.bias is not None:
            self._y = self._y + part.bias.double()
            self._magnitude = self._magnitude + part.bias.double().abs()
        # a zero point or minimum may be applied to sums of x instead of to weights: the parts are larger than the whole
        self._parts = self._magnitude + _parts(part, rows)

    def difference(self, y: Tensor, rounds: str | None = None) -> Difference:
        """How far a kernel's y [M, N] is from the product; `rounds` as its spec says."""
        if self._tokens is not None:
            y = y[self._tokens.to(y.device)]
        found = y.double() if self._outputs is None else y.double()[:, self._outputs.to(y.device)]
        bound, expected = self._bound(rounds)
        error = (found - self._y).abs()
        share = torch.where(error.isnan() & ~self._y.isnan(), torch.inf, error / bound)
        if not share.numel():
            return Difference(0.0, 0.0)
        worst = int(share.argmax())
        row, column = divmod(worst, share.shape[1])
        norm = self._y.norm().clamp(min=1e-300)
        margin = 1.2 + 4 / math.sqrt(share.numel())  # few outputs stray further from the mean
        place = (row if self._tokens is None else int(self._tokens[row]),
                 column if self._outputs is None else int(self._outputs[column]))
        return Difference(float(share.max()), float(error.norm() / norm), margin * float(expected / norm), place)

    def _bound(self, rounds: str | None) -> tuple[Tensor, Tensor]:
        """The bound of each output, and the norm that the error has as a whole."""
        y, unit = self._y, ROUNDING[self._dtype]
        allowed = 2 * (self._columns + 2) * 2.0**-24 * self._parts
        typical = (2 * math.sqrt(self._columns + 2) * 2.0**-24 * self._parts.norm()) ** 2
        typical = typical + (_RMS * unit * y.norm()) ** 2 + y.numel() * _SMALLEST[self._dtype] ** 2
        count = roundings(rounds)
        if count:
            each = max(unit, _ADDER) if rounds is not None and NARROW_ADDER in rounds else unit
            allowed = allowed + count * each * self._magnitude
            typical = typical + 2 * count * (_RMS * unit * self._squares) ** 2
        return allowed + (y.abs() + allowed) * unit + _SMALLEST[self._dtype], typical.sqrt()


def _sampled(weight: Weight) -> Tensor | None:
    """Outputs to compare: None for all of them; for a large weight a sample."""
    n, k = weight.shape[-2:]
    if n * k <= _LARGE or any(level.placement in ("flat", "strided") for level in weight.scheme.scales):
        return None
    return _spread(n, SAMPLED_ROWS)


def _spread(count: int, at_most: int) -> Tensor | None:
    """Some of `count` places, ascending, the first and the last among them; None where all are few enough."""
    if count <= at_most:
        return None
    picked = torch.randperm(count - 2, generator=torch.Generator().manual_seed(count))[: at_most - 2] + 1
    return torch.cat([torch.tensor([0, count - 1]), picked]).sort().values


def _take(weight: Weight, rows: Tensor) -> Weight:
    if isinstance(weight, Dense):
        return Dense(weight.scheme, weight.tensor[rows], None if weight.bias is None else weight.bias[rows])
    return weight.take_rows(rows)


def _parts(weight: Weight, rows: Tensor) -> Tensor:
    """|x| times the magnitude that code and offset have before they cancel: [M, N]."""
    if isinstance(weight, Dense) or weight.scheme.offset is None:
        return rows.new_zeros((), dtype=torch.float64)
    form = number_format(weight.scheme.element)
    largest = max(abs(form.maximum), abs(form.minimum))
    values = weight.dequantize().abs().amax(-1).double()
    step = values / max(largest, 1.0)
    return 2 * largest * step * rows.double().abs().sum(-1, keepdim=True)


def seconds_of(calls: Sequence[Callable[[], object]], device: torch.device | str, budget: float = 0.025) -> float:
    """Median seconds of one call; `calls` work on copies of a weight, in turn, so that none lies in a cache."""
    return Clock(calls, device).seconds(budget)


def copies_for(nbytes: int) -> int:
    """How many copies of a weight no cache holds, two at least."""
    return max(2, math.ceil(_COLD_BYTES / max(nbytes, 1)))


class Clock:
    """Calls that can be timed again and again, so that two kernels are timed in turn.

    On a GPU the calls are captured into a graph, once; it is replayed and timed with events. On a CPU they run eagerly.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], device: torch.device | str) -> None:
        """`calls` work on copies of a weight, in turn, so that none lies in a cache."""
        self._calls = calls
        self._graph: torch.cuda.CUDAGraph | None = None
        self._length = 1  # calls in the graph
        for call in calls[:2]:
            call()
        if torch.device(device).type == "cuda":
            self._capture()

    def seconds(self, budget: float = 0.025) -> float:
        """Median seconds of one call; `budget` is about how long to measure."""
        if self._graph is None:
            return self._eager_seconds(budget)
        first = _event_seconds(self._graph.replay)
        replays = int(min(30, max(3, budget / max(first, 1e-6))))
        return statistics.median(_event_seconds(self._graph.replay) for _ in range(replays)) / self._length

    def _eager_seconds(self, budget: float) -> float:
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - started < budget:
            call = self._calls[len(times) % len(self._calls)]
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    def _capture(self) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in self._calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        once = _event_seconds(self._calls[0])
        rounds = math.ceil(_GRAPH_SECONDS / max(once, 5e-6) / len(self._calls))
        self._length = rounds * len(self._calls)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in self._calls:
                    call()
        _event_seconds(graph.replay)
        self._graph = graph


_GRAPH_SECONDS: Final = 600e-6  # long against the clock's step


def _event_seconds(work: Callable[[], object]) -> float:
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
