"""Products of few tokens in a decoder block on a GPU: layers that read the same input as one, inputs quantized once.

`join` puts the stored weights of several layers below each other and gives each layer back its rows as a window on
them, so that nothing is held twice; a host that calls a layer alone multiplies with its window. `input_of` says what a
stored weight's kernel reads, so that whoever makes the rows quantizes them, and `multiply` takes such rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final, cast

import torch
from torch import Tensor

from anybit.kernels.catalogue import Stored
from anybit.kernels.linear.dense_torch import StoredDense
from anybit.kernels.linear.tiled_torch import as_bits
from anybit.kernels.triton.block import Input, Rows, input_for
from anybit.kernels.triton.planes import StoredPlanes
from anybit.kernels.triton.planes_form import ROWS, counters
from anybit.kernels.triton.quantizers import Quantized
from anybit.kernels.triton.skinny import StoredSkinny
from anybit.kernels.triton.w8a8 import StoredRows8

__all__ = ["Joined", "input_of", "join", "multiply"]

Windows = list[dict[str, Tensor]]  # of each part: its tensors by name, floats as bit patterns
Joined = tuple[Stored, Windows]


def join(parts: Sequence[Stored]) -> Joined | None:
    """The weights [N_i, K] below each other, [sum N_i, K], and each part's window; None where they do not fit.

    Windows hold only what became part of the whole; other tensors of a part stay as they are. The whole serves
    products of few tokens: what decodes a weight asks its part.
    """
    rule = _JOINS.get(type(parts[0]))
    alike = len(parts) > 1 and all(type(p) is type(parts[0]) and len(p.shape) == 2 for p in parts)
    if rule is None or not alike or len({p.shape[1] for p in parts}) > 1:
        return None
    return rule(parts)


def _starts(parts: Sequence[StoredPlanes | StoredRows8 | StoredDense]) -> list[int]:
    """The first row of each part, and the number of all."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.shape[0])
    return starts


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
    wanted = (first._form, first._spec, first._is_pinned, set(packs[0].tensors) - _levels(packs[0].tensors))
    for part in parts:
        pack = part._packed
        alike = (part._form, part._spec, part._is_pinned, set(pack.tensors) - _levels(pack.tensors)) == wanted
        if not alike or "permutation" in pack.tensors:
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
    beside = {"counters": torch.zeros(counters(starts[-1]), dtype=torch.int32, device=tensors["row"].device)}
    if "table" in packs[0].tensors:
        beside["table"] = packs[0].tensors["table"]
    factor = packs[0].factor if len({pack.factor for pack in packs}) == 1 else None
    whole = copy.copy(first)
    whole.shape = (starts[-1], first.shape[1])
    whole._packed = replace(packs[0], shape=whole.shape, tensors=tensors | beside, factor=factor,
                            is_half=all(pack.is_half for pack in packs))
    whole._dtypes = {name: t.dtype for name, t in whole._held().items()}
    whole._take()
    return whole, windows


def _levels(tensors: Mapping[str, Tensor]) -> set[str]:
    """Row scales as stored: only decoding a part reads them."""
    return {name for name in tensors if name.startswith("level_")}


def _join_rows8(given: Sequence[Stored]) -> Joined | None:
    parts = cast("Sequence[StoredRows8]", given)
    first = parts[0]
    wanted = (first._problem, first._pinned, first._is_flavoured, first._codes.device, first._sums is None,
              first._zeros is None, tuple(first._kernels.items()))
    for part in parts:
        if (part._problem, part._pinned, part._is_flavoured, part._codes.device, part._sums is None,
                part._zeros is None, tuple(part._kernels.items())) != wanted:
            return None
    down = first._product.w_rows if first._product.w_group else 1
    if any(p.shape[0] % max(down, 16) for p in parts) or not _equal(first._static, [p._static for p in parts]):
        return None
    starts = _starts(parts)
    whole = copy.copy(first)
    whole.shape = (starts[-1], first.shape[1])
    windows: Windows = [{} for _ in parts]
    for name, of_a_row in (("codes", 1), ("factor", down), ("sums", 1), ("zeros", 1)):
        tensors = [getattr(part, f"_{name}") for part in parts]
        if tensors[0] is None:
            continue
        together = torch.cat(tensors)
        setattr(whole, f"_{name}", together)
        for window, (start, stop) in zip(windows, pairwise(starts), strict=True):
            window[name] = as_bits(together[start // of_a_row : stop // of_a_row])
    whole._counters = torch.zeros_like(first._counters)
    return cast("Stored", whole), windows


def _join_dense(given: Sequence[Stored]) -> Joined | None:
    parts = cast("Sequence[StoredDense]", given)
    first = parts[0]
    if len({(p._tensor.dtype, p._tensor.device, p._pinned) for p in parts}) > 1:
        return None
    starts = _starts(parts)
    whole = copy.copy(first)
    whole.shape = (starts[-1], first.shape[1])
    whole._tensor = torch.cat([p._tensor for p in parts])
    if isinstance(whole, StoredSkinny):
        whole._counters = torch.zeros_like(whole._counters)
    return whole, [{"weight": whole._tensor[a:b]} for a, b in pairwise(starts)]


_JOINS: Final[Mapping[type, Callable[[Sequence[Stored]], Joined | None]]] = {
    StoredPlanes: _join_planes, StoredRows8: _join_rows8, StoredDense: _join_dense, StoredSkinny: _join_dense,
}


# --- inputs -----------------------------------------------------------------------------------------------------------


def input_of(stored: Stored) -> Input | None:
    """What the kernel of a stored weight reads: rows as they are, or quantized so; None where only it can make them."""
    if not stored.quantizes_input:
        return Input()
    if isinstance(stored, StoredPlanes):
        assert stored._spec is not None
        return None if stored._permutation is not None else input_for(
            stored._spec, stored._activation, as_values=torch.bfloat16, own=True)
    if isinstance(stored, StoredRows8):
        kind = stored.operand_kind()
        if kind is None or stored._product.w_shifted:
            return None
        values = torch.float16 if kind == "float16" else None
        return input_for(stored._product.activation, stored._static, columns=stored._codes.shape[1], as_values=values,
                         fnuz=kind == "fp8_e4m3fnuz")
    return None


def multiply(stored: Stored, rows: Rows, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """rows, made as `input_of` says, times W^T plus bias: [M, N] in `out_dtype`."""
    if not stored.quantizes_input:
        return stored.linear(rows.values, "decode", bias, out_dtype)
    if isinstance(stored, StoredPlanes):
        return stored._multiply(rows.values, rows.scale, bias, out_dtype)
    assert isinstance(stored, StoredRows8) and rows.scale is not None
    return stored.linear_of_codes(Quantized(rows.values, rows.scale), bias, out_dtype)


