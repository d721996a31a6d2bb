"""Products of few tokens in a decoder block on a GPU: layers that read the same input as one, inputs quantized once.

`join` puts the stored weights of several layers below each other and gives each layer back its rows as a window on
them, so that nothing is held twice; a host that calls a layer alone multiplies with its window. A `Product` says what
its kernel reads, so that whoever makes the rows quantizes them, and takes such rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final, TypeVar, cast

import torch
from torch import Tensor

from anybit.kernels.catalogue import Stored
from anybit.kernels.linear.dense_torch import StoredDense
from anybit.kernels.linear.tiled_torch import as_bits
from anybit.kernels.triton.block import AS_THEY_ARE, Rows, Wanted, makes_in_passing
from anybit.kernels.triton.launching import Call
from anybit.kernels.triton.opaque import Launched, Opaque
from anybit.kernels.triton.planes import StoredPlanes
from anybit.kernels.triton.planes_form import ROWS
from anybit.kernels.triton.quantizers import QuantizerPlan
from anybit.kernels.triton.skinny import StoredSkinny
from anybit.kernels.triton.w8a8 import StoredRows8

__all__ = ["Joined", "Product", "join", "wanted_by"]

_Kind = TypeVar("_Kind", StoredPlanes, StoredRows8, StoredDense)
Windows = list[dict[str, Tensor]]  # of each part: its tensors by name, floats as bit patterns
Joined = tuple[Stored, Windows]


def join(parts: Sequence[Stored]) -> Joined | None:
    """The weights [N_i, K] below each other, [sum N_i, K], and each part's window; None where they do not fit.

    Windows hold only what became part of the whole; other tensors of a part stay as they are. The whole serves
    products of few tokens: what decodes a weight asks its part.
    """
    rules = {_JOINS.get(type(part)) for part in parts}
    if len(parts) < 2 or len(rules) > 1 or any(len(p.shape) != 2 or p.shape[1] != parts[0].shape[1] for p in parts):
        return None
    rule = rules.pop()
    return None if rule is None else rule(parts)


def _starts(parts: Sequence[StoredPlanes | StoredRows8 | StoredDense]) -> list[int]:
    """The first row of each part, and the number of all."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.shape[0])
    return starts


def _copied(first: _Kind, rows: int) -> _Kind:
    """A stored weight like the first part's, of its own identity for compilers and graphs, still with its tensors."""
    whole = copy.copy(first)
    whole.shape = (rows, first.shape[1])
    if isinstance(whole, Opaque):
        Opaque.__init__(whole)
        whole._captured = []  # type: ignore[attr-defined]
    return whole


def _equal(first: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> bool:
    """True if all hold the same tensors."""
    return all(set(first) == set(o) and all(torch.equal(first[n], o[n]) for n in first) for o in others)


# along which axis a tensor of the layout "triton-planes" has rows of the weight
_ROW_AXIS: Final = {"plane_0": 0, "plane_1": 0, "plane_2": 0, "row": 0, "scale": -1, "scale_super": -1, "zeros": -1,
                    "addend": -1, "addend_super": -1}


def _join_planes(given: Sequence[Stored]) -> Joined | None:
    parts = cast("Sequence[StoredPlanes]", given)
    first = parts[0]
    packs = [p._packed for p in parts]
    if len({(p._packed.form, p._spec, p._is_pinned, _kinds(p._packed.tensors)) for p in parts}) > 1:
        return None
    if "permutation" in packs[0].tensors:
        return None
    if any(p.shape[0] % ROWS for p in parts) or not _equal(first._activation, [p._activation for p in parts]):
        return None
    if any(packs[0].tensors["row"].device != pack.tensors["row"].device for pack in packs):
        return None
    starts = _starts(parts)
    tensors = {name: torch.cat([pack.tensors[name] for pack in packs], dim=axis)
               for name, axis in _ROW_AXIS.items() if name in packs[0].tensors}
    windows: Windows = [
        {name: as_bits(t.narrow(_ROW_AXIS[name], start, stop - start)) for name, t in tensors.items()}
        for start, stop in pairwise(starts)
    ]
    beside = {"table": packs[0].tensors["table"]} if "table" in packs[0].tensors else {}
    factor = packs[0].factor if len({pack.factor for pack in packs}) == 1 else None
    whole = _copied(first, starts[-1])
    whole._packed = replace(packs[0], shape=whole.shape, tensors=tensors | beside, factor=factor,
                            is_half=all(pack.is_half for pack in packs))
    whole._dtypes = {name: t.dtype for name, t in whole._held().items()}
    whole._take()
    return whole, windows


def _kinds(tensors: Mapping[str, Tensor]) -> frozenset[tuple[str, torch.dtype]]:
    """Which tensors there are, but row scales as stored: only decoding a part reads them."""
    return frozenset((name, t.dtype) for name, t in tensors.items() if not name.startswith("level_"))


def _join_rows8(given: Sequence[Stored]) -> Joined | None:
    parts = cast("Sequence[StoredRows8]", given)
    first = parts[0]
    kinds = {(part._product, part._pinned, part._is_flavoured, part._codes.device, part._sums is None,
              part._zeros is None, part._kernels["decode"]) for part in parts}
    if len(kinds) > 1:
        return None
    down = first._product.w_rows if first._product.w_group else 1
    if any(p.shape[0] % max(down, 16) for p in parts) or not _equal(first._static, [p._static for p in parts]):
        return None
    starts = _starts(parts)
    whole = _copied(first, starts[-1])
    windows: Windows = [{} for _ in parts]
    for name, of_a_row in (("codes", 1), ("factor", down), ("sums", 1), ("zeros", 1)):
        tensors = [getattr(part, f"_{name}") for part in parts]
        if tensors[0] is None:
            continue
        together = torch.cat(tensors)
        setattr(whole, f"_{name}", together)
        for window, (start, stop) in zip(windows, pairwise(starts), strict=True):
            window[name] = as_bits(together[start // of_a_row : stop // of_a_row])
    whole._calls, whole._quantizers = {}, {}
    return cast("Stored", whole), windows


def _join_dense(given: Sequence[Stored]) -> Joined | None:
    """The product of the largest part is that of the whole."""
    parts = cast("Sequence[StoredDense]", given)
    first = max(parts, key=lambda part: part.shape[0])
    if len({(p._tensor.dtype, p._tensor.device, p._pinned) for p in parts}) > 1:
        return None
    starts = _starts(parts)
    whole = _copied(first, starts[-1])
    whole._tensor = torch.cat([p._tensor for p in parts])
    if isinstance(whole, StoredSkinny):
        whole._calls = {}
    return whole, [{"weight": whole._tensor[a:b]} for a, b in pairwise(starts)]


_JOINS: Final[Mapping[type, Callable[[Sequence[Stored]], Joined | None]]] = {
    StoredPlanes: _join_planes, StoredRows8: _join_rows8, StoredDense: _join_dense, StoredSkinny: _join_dense,
}


# --- products ---------------------------------------------------------------------------------------------------------


class Product:
    """One stored weight as a block calls it: rows of few tokens, quantized beforehand where its recipe allows."""

    def __init__(self, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> None:
        """`dtype` of the rows before they are quantized, and of the result."""
        self.stored, self._bias, self._dtype = stored, bias, dtype
        self._calls: dict[int, Call | None] = {}

    def _call(self, tokens: int, device: torch.device) -> Call | None:
        """The launches for so many tokens where another kernel can make their input; else None."""
        if tokens not in self._calls:
            call = None
            if isinstance(self.stored, Launched) and self.stored.quantizes_input:
                like = torch.empty((tokens, self.stored.shape[1]), dtype=self._dtype, device=device)
                call = self.stored.launches(like, self._bias, self._dtype)
            plan = None if call is None else call.quantize
            passes = isinstance(plan, QuantizerPlan) and makes_in_passing(plan.quantizer)
            self._calls[tokens] = call if passes else None
        return self._calls[tokens]

    def wanted(self, tokens: int, device: torch.device) -> Wanted:
        """What it reads."""
        call = self._call(tokens, device)
        if call is None:
            return AS_THEY_ARE
        assert isinstance(call.quantize, QuantizerPlan)
        return Wanted(call.quantize.quantizer, call.quantize, call.scratch_bytes)

    def __call__(self, rows: Rows) -> Tensor:
        """rows, made as `wanted` says or as they are, times W^T plus bias: [M, N]."""
        if rows.values is not None:
            return self.stored.linear(rows.values, "decode", self._bias, self._dtype)
        assert rows.scratch is not None
        call = self._calls[rows.tokens]
        assert call is not None
        return call.of_made(rows.scratch, self._bias)


def wanted_by(products: Sequence[Product], tokens: int, device: torch.device) -> Wanted:
    """What serves all of them; rows as they are where they differ."""
    each = [product.wanted(tokens, device) for product in products]
    first = each[0]
    if first.quantizer is None or not all(_is_like(first, other) for other in each):
        return AS_THEY_ARE
    return replace(first, scratch_bytes=max(w.scratch_bytes for w in each))


def _is_like(first: Wanted, other: Wanted) -> bool:
    if first.quantizer is None or other.quantizer is None or first.quantizer.form != other.quantizer.form:
        return False
    given = [w.static for w in (first.quantizer, other.quantizer) if w.static is not None]
    return len(given) != 1 and (not given or torch.equal(*given))
