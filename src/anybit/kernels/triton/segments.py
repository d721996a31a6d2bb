"""Rows of x by the expert that multiplies them: what the experts of a layer are launched for.

Made on the device from what the router says, without reading anything back to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = ["Segments"]

_SINGLE_ROWS: Final = 32  # rows up to here, and no more than experts, are a segment each: faster than sorting them
_LONGEST: Final = 64  # rows of a segment


@dataclass(frozen=True)
class Segments:
    """Rows of x by expert.

    order    [P] int64: which (token, place) pair stands in row i, None where rows are in order
    expert, first, length   int32 [S]: a segment's expert (negative: none), first row, rows
    row_experts   int64 [P]: the expert of each row, 0 for one elsewhere
    longest  most rows of a segment
    counts, begins   int64 [experts]: rows of an expert, and where they begin; None where rows are in order
    """

    order: Tensor | None
    expert: Tensor
    first: Tensor
    length: Tensor
    row_experts: Tensor
    longest: int
    counts: Tensor | None = None
    begins: Tensor | None = None

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Segments:
        """Segments for the experts `index` [P] of pairs; numbers from `experts` on stand for experts elsewhere."""
        pairs = index.numel()
        flat = index.reshape(-1)
        here = torch.where(flat < experts, flat, -1).int()
        if pairs <= min(_SINGLE_ROWS, experts):
            first = torch.arange(pairs, dtype=torch.int32, device=flat.device)
            return cls(None, here, first, torch.ones_like(first), here.clamp(min=0).long(), 1)
        longest = min(_LONGEST, max(8, 1 << (pairs // experts - 1).bit_length()))
        known = torch.where(here < 0, experts, here).long()
        order = torch.argsort(known, stable=True)
        counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
        counts.scatter_add_(0, known, torch.ones_like(known))
        counts = counts[:experts]
        begins = counts.cumsum(0) - counts
        ends = ((counts + longest - 1) // longest).cumsum(0)
        number = torch.arange(min(pairs, experts + pairs // longest), device=flat.device)
        expert = torch.searchsorted(ends, number, right=True)
        inside = expert < experts
        at = torch.where(inside, expert, 0)
        before = torch.where(at > 0, ends[at - 1], 0)
        skipped = (number - before) * longest
        length = torch.where(inside, (counts[at] - skipped).clamp(0, longest), 0)
        first = torch.where(inside, begins[at] + skipped, 0)
        rows = here.clamp(min=0).long()[order]
        return cls(order, torch.where(inside, at, -1).int(), first.int(), length.int(), rows, longest,
                   counts, begins)

    def back(self, y: Tensor) -> Tensor:
        """Rows [P, ..] in the order of the pairs again."""
        if self.order is None:
            return y
        placed = torch.empty_like(y)
        placed[self.order] = y
        return placed

    def together(self, values: Tensor) -> Tensor:
        """Values [G, P] of rows as one run of numbers [G * P] in which a segment's, [G, its rows], lie together."""
        if self.counts is None or self.begins is None:
            return values.t().contiguous().view(-1)
        groups, pairs = values.shape
        row = torch.arange(pairs, device=values.device)
        begin = self.begins[self.row_experts]
        inside = row - begin
        start = begin + inside // self.longest * self.longest
        length = (begin + self.counts[self.row_experts] - start).clamp(max=self.longest)
        elsewhere = row >= self.counts.sum()  # nobody reads these, but they must not lie on another's place
        start, length = torch.where(elsewhere, row, start), torch.where(elsewhere, 1, length)
        group = torch.arange(groups, device=values.device)[:, None]
        place = start * groups + group * length + (row - start)
        return torch.empty_like(values).view(-1).scatter_(0, place.view(-1), values.reshape(-1))
