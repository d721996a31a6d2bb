"""Layers that read the same input (q/k/v, gate/up) as one product of the compiled CPU library.

One call for three layers wakes the threads once and gives them enough rows to share. Each layer keeps its own face: the
first to be asked for an input computes the rows of all, the others take theirs. `planes_native.py` is the single layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anybit.kernels.linear.planes_native import EXPAND, MATVEC, StoredPlanes
from anybit.kernels.request import REGIMES, Kernels, Regime
from anybit.weights import QuantizedWeight, Weight, concatenate

# the last input of a unit, its mark, its rows, and the parts that have taken theirs: one tuple, replaced as a whole,
# so that threads that run the model at the same time never see each other's rows
_Last = tuple[Tensor, int | bytes, Tensor, frozenset[int]]


def _mark(x: Tensor) -> int | bytes:
    """What tells whether x was written to: its version, or its few bytes where inference mode keeps no versions."""
    if not x.is_inference():
        return x._version
    x = x if x.is_contiguous() else x.contiguous()
    return ctypes.string_at(x.data_ptr(), x.nbytes)


class _Unit:
    """The rows of all parts below each other."""

    def __init__(self, stored: StoredPlanes, parts: int) -> None:
        self.stored = stored
        self.parts = parts
        self._last: _Last | None = None

    def rows_for(self, x: Tensor, part: int) -> Tensor:
        """W x of all parts for few tokens; kept until every part has asked for this very tensor once."""
        last = self._last
        if last is not None and last[0] is x and part not in last[3] and _mark(x) == last[1]:
            _, mark, y, taken = last
            taken = taken | {part}
        else:
            mark, y, taken = _mark(x), self.stored.step(x), frozenset({part})
        self._last = (x, mark, y, taken) if len(taken) < self.parts else None
        return y


class StoredPart:
    """One layer's rows of a unit, with the face of a stored weight."""

    quantizes_input = False

    def __init__(self, unit: _Unit, part: int, start: int, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._unit, self._part, self._start, self._stop = unit, part, start, start + shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The unit's buffers, counted with the first part."""
        return self._unit.stored.tensors() if self._part == 0 else {}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Refuse a move, as the unit does."""
        if self._part == 0:
            self._unit.stored.bind(tensors)

    def step(self, x: Tensor) -> Tensor:
        """x [.., K] of few tokens -> [.., N], a view of the unit's rows."""
        return self._unit.rows_for(x, self._part)[..., self._start : self._stop]

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] times W^T plus bias: [M, N] in `out_dtype`."""
        if regime != "decode":  # a part asked alone for many tokens decodes its own rows only
            return self._unit.stored.some_rows(x, regime, bias, out_dtype, self._start, self.shape[0])
        y = self._unit.stored.linear(x, regime, None, out_dtype)  # the unit's own bias is in it
        return y[:, self._start : self._stop].contiguous()

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Decoded rows [.., K] for integer `index` [..]."""
        return self._unit.stored.rows(index + self._start, dtype)

    def dequantize(self) -> Tensor:
        """The float32 weight."""
        return self._unit.stored.decode(self._start, self.shape[0])


def whole_unit(parts: Sequence[StoredPart]) -> StoredPlanes | None:
    """What the parts of one unit, in their order, are rows of; None if they are not all of one unit."""
    unit = parts[0]._unit
    if any(part._unit is not unit or part._part != number for number, part in enumerate(parts)):
        return None
    return unit.stored if len(parts) == unit.parts else None


def as_unit(weights: Sequence[Weight], kernels: Mapping[Regime, str]) -> list[StoredPart] | None:
    """The weights of one unit stored together, one face for each; None where they do not fit below each other.

    kernels  by number of tokens, as for a single layer; a decode step is one product of all
    """
    quantized = [w for w in weights if isinstance(w, QuantizedWeight) and w.scheme.activation is None]
    if len(quantized) < len(weights) or any(w.scheme.act_order or w.scheme.output for w in quantized):
        return None
    together = concatenate(quantized)
    if together is None:
        return None
    from anybit.kernels.native.planes import from_weight

    few = REGIMES["decode"][0]
    steps = Kernels.of(kernels).steps
    # a part that is asked alone reads some of the rows, which the product of a decode step cannot
    later = next((name for _, name in steps if name != MATVEC), EXPAND)
    many = ((most, later if name == MATVEC else name) for most, name in steps if most > few)
    unit = _Unit(StoredPlanes(from_weight(together), Kernels([(few, MATVEC), *many])), len(quantized))
    parts, start = [], 0
    for number, weight in enumerate(quantized):
        parts.append(StoredPart(unit, number, start, weight.shape))
        start += weight.shape[0]
    return parts
