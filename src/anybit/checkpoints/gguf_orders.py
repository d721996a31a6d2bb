"""What llama.cpp's converter did to tensors, undone: orders of rows and columns, and values of a few small tensors.

A row is whole blocks of any ggml type, so rows move as raw bytes. An order is a name of ORDERS and its numbers; it
gives for each row of the transformers tensor the row of the file that holds it. Source: llama.cpp 0c1e57098
(conversion/*.py), docs/formats/gguf.md §4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from anybit.errors import Inconsistent

__all__ = ["ORDERS", "UNDO", "row_index"]


def _half_split(rows: int, heads: int) -> Tensor:
    """Rotary pairs of each head as two halves, from pairs side by side."""
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(rows)


def _grouped(rows: int, groups: int, queries: int) -> Tensor:
    """For each key-value head its queries, its key, its value; from all queries, all keys, all values."""
    head = rows // (groups * (queries + 2))
    index, ends = torch.arange(rows), (groups * queries * head, groups * (queries + 1) * head)
    parts = (index[: ends[0]], index[ends[0] : ends[1]], index[ends[1] :])
    return torch.cat([part.view(groups, -1) for part in parts], dim=1).flatten()


def _tiled(rows: int, before: int, keys: int, per_key: int, size: int) -> Tensor:
    """Value heads grouped by key head, from tiled; the first `before` rows stay."""
    later = torch.arange(before, rows).view(per_key, keys, size).transpose(0, 1).flatten()
    return torch.cat([torch.arange(before), later])


def _alternating(rows: int, parts: int) -> Tensor:
    """Row 0 of each part, then row 1, from the parts one after the other."""
    return torch.arange(rows).view(parts, -1).t().flatten()


def _part(rows: int, start: int, count: int) -> Tensor:
    """Rows of one of several layers that a file holds as one."""
    return torch.arange(start, start + count)


ORDERS: Final[Mapping[str, Callable[..., Tensor]]] = {
    "half_split": _half_split, "grouped": _grouped, "tiled": _tiled, "alternating": _alternating, "part": _part,
}  # fmt: skip


def row_index(rows: int, orders: Sequence[tuple[str, *tuple[int, ...]]], name: str) -> Tensor:
    """For each wanted row the file's: [wanted rows] int64, all `orders` after one another.

    Raises Inconsistent where the rows do not hold the heads that an order counts.
    """
    index = torch.arange(rows)
    for order, *numbers in orders:
        try:
            index = index[ORDERS[order](len(index), *numbers)]
        except (RuntimeError, IndexError) as error:
            raise Inconsistent("the rows do not hold whole heads", where=name, found=f"{len(index)} rows",
                               wanted=f"rows for the order {order} {tuple(numbers)}") from error
    return index


def _log_negative(value: Tensor) -> Tensor:
    """A_log from -exp(A_log)."""
    return torch.log(-value.float())


def _insert_axis(value: Tensor) -> Tensor:
    """The kernel of a depthwise convolution [channels, 1, width] from a matrix."""
    return value.unsqueeze(1)


def _one_less(value: Tensor) -> Tensor:
    """The weight of a norm that multiplies by 1 + weight; exact in float32 for stored values from 0.5 to 2."""
    return value.float() - 1


UNDO: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "": lambda value: value, "log_negative": _log_negative, "insert_axis": _insert_axis, "one_less": _one_less,
}  # fmt: skip
