"""Times of products that were not measured, from those of the same kernel and scheme that were. Torch-free.

A kernel's model knows bytes and operations; what it misses (how well the chip is filled, what its launches cost, how
its tiles fit) changes slowly with the shape. So the ratio of a measured time to the modelled one is carried over: along
M within a measured shape, linearly in the logarithms and level beyond the ends; among shapes weighted by the inverse
square of their distance in octaves of N and K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

Shape = tuple[int, int]
Points = dict[Shape, dict[int, float]]
"""(N, K) -> M -> seconds."""

_NEAR: Final = 0.05  # square octaves: added to every distance, so that a shape next to a measured one takes its ratio


def interpolated(
    points: Mapping[Shape, Mapping[int, float]], model: Callable[[Shape, int], float], shape: Shape, tokens: int
) -> float:
    """Seconds at `shape` and `tokens`: the model there, times the ratios of the measured points; `points` not empty.

    model  (N, K) and M -> modelled seconds
    """
    weights, total = 0.0, 0.0
    for found, by_tokens in points.items():
        weight = 1.0 / (_NEAR + _square_octaves(found, shape))
        weights += weight
        total += weight * _log_ratio(found, by_tokens, model, tokens)
    return model(shape, tokens) * math.exp(total / weights)


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
