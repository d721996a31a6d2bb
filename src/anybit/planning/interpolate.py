"""Times of products that were not measured, from those of the same kernel and scheme that were. Torch-free.

A kernel's model knows bytes and operations; what it misses (how well the chip is filled, what its launches cost, how
its tiles fit) changes slowly with the shape. So the ratio of a measured time to the modelled one is carried over:
along M within a measured shape, linearly in the logarithms and level beyond the ends; among shapes weighted by the
inverse square of their distance in octaves of N and K, odd sizes telling nothing of even ones. A scheme that was not
measured takes the ratios of the nearest one that was, if one is near: a checkpoint's `uint4·g128·fp16·zp` those of
`int4·g128·bf16`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from anybit.numerics.formats import number_format
from anybit.schemes import Scheme

Shape = tuple[int, int]
Points = dict[Shape, dict[int, float]]
"""(N, K) -> M -> seconds."""

_NEAR: Final = 0.05  # square octaves: added to every distance, so that a shape next to a measured one takes its ratio


def ratio_at(
    points: Mapping[Shape, Mapping[int, float]], model: Callable[[Shape, int], float], shape: Shape, tokens: int
) -> float:
    """Measured over modelled seconds at `shape` and `tokens`, of the measured points; `points` not empty.

    model  (N, K) and M -> modelled seconds of what was measured
    """
    weights, total = 0.0, 0.0
    alike = {found: by_tokens for found, by_tokens in points.items() if _aligned(found) == _aligned(shape)}
    for found, by_tokens in (alike or points).items():
        weight = 1.0 / (_NEAR + _square_octaves(found, shape))
        weights += weight
        total += weight * _log_ratio(found, by_tokens, model, tokens)
    return math.exp(total / weights)


def _aligned(shape: Shape) -> tuple[bool, bool]:
    """Whether rows of x, W and y are multiples of 16 bytes: where not, libraries and kernels take other ways."""
    return shape[0] % 8 == 0, shape[1] % 8 == 0


def _square_octaves(one: Shape, other: Shape) -> float:
    return sum(math.log2(a / b) ** 2 for a, b in zip(one, other, strict=True))


def _log_ratio(
    shape: Shape, by_tokens: Mapping[int, float], model: Callable[[Shape, int], float], tokens: int
) -> float:
    """ln(measured / modelled) of a measured shape at any M."""
    def ratio(m: int) -> float:
        return math.log(by_tokens[m] / model(shape, m))

    below = max((m for m in by_tokens if m <= tokens), default=None)
    above = min((m for m in by_tokens if m >= tokens), default=None)
    if below is None or above is None or below == above:
        return ratio(above if below is None else below)  # type: ignore[arg-type]
    share = math.log(tokens / below) / math.log(above / below)
    return (1 - share) * ratio(below) + share * ratio(above)


class Near(NamedTuple):
    """What was measured of one kernel on one scheme, with activations of one dtype."""

    scheme: Scheme
    dtype: str
    points: Points


_FAR: Final = 1.5
_HALVES: Final = frozenset({"bfloat16", "float16"})


def nearest(found: Iterable[Near], scheme: Scheme, dtype: str) -> Near | None:
    """The measured scheme whose products are most like those of `scheme`; None where all are too unlike."""
    distances = ((_distance(near, scheme, dtype), near) for near in found)
    near = [(distance, place, n) for place, (distance, n) in enumerate(distances) if distance <= _FAR]
    return min(near)[2] if near else None


def _distance(near: Near, scheme: Scheme, dtype: str) -> float:
    """How unlike two products are: bits of a code first, then how often a scale changes, then what comes beside."""
    other = near.scheme
    if near.dtype != dtype and not {near.dtype, dtype} <= _HALVES:
        return math.inf
    if _quantizes(other) != _quantizes(scheme) or other.is_quantized != scheme.is_quantized:
        return math.inf
    return (2.0 * abs(math.log2(other.weight_bits / scheme.weight_bits)) + 0.25 * abs(_finest(other) - _finest(scheme))
            + 0.5 * ((other.offset is None) != (scheme.offset is None)) + 0.25 * (_kind(other) != _kind(scheme))
            + 0.1 * (near.dtype != dtype) + 0.5 * (other.act_order != scheme.act_order))


def _quantizes(scheme: Scheme) -> tuple[object, ...] | None:
    """How x is quantized, as far as the product sees it."""
    spec = scheme.activation
    return None if spec is None else (spec.element, spec.dynamic, spec.granularity, spec.group_size, spec.symmetric)


def _finest(scheme: Scheme) -> float:
    """log2 of the inputs that share the finest scale; a whole row counts as 4096."""
    size = scheme.scales[0].block[1] if scheme.scales else 0
    return math.log2(min(size or 4096, 4096))


def _kind(scheme: Scheme) -> str:
    return number_format(scheme.element).kind
