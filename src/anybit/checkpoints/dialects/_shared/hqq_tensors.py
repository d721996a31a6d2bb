"""HQQ's packed matrices: slabs of rows under each other in the bits of a word. Source: docs/formats/hqq.md §2–4."""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.checkpoints.dialects._shared.hqq_meta import AGAIN, Meta
from anybit.errors import Damaged
from anybit.numerics.formats import number_format


def unpack(packed: Tensor, meta: Meta, where: str) -> Tensor:
    """Words of any dtype -> codes uint8 [rows, columns] of the group matrix, which read row by row are the flat weight.

    Row r of the matrix lies in word row r % (R/s), slab r // (R/s); slab 0 has the highest bits. Rows that only fill
    up a last slab go. Raises Damaged for codes above their width.
    """
    layout = meta.packing
    words = packed.contiguous().flatten().view(torch.uint8 if layout.word == 1 else torch.int32)
    words = words.view(-1, meta.columns)
    mask = 2**layout.bits - 1
    if layout.slabs == 1:
        codes = words
    else:
        shifts = range((layout.slabs - 1) * layout.bits, -1, -layout.bits)
        codes = torch.cat([(words >> shift & mask).to(torch.uint8) for shift in shifts])[: meta.rows]
    most = int(number_format(meta.element).maximum)
    if most < mask or layout.word == 4:
        bad = (codes > most) | (codes < 0)
        if bool(bad.any()):
            first = [int(i) for i in bad.nonzero()[0]]
            raise Damaged(f"codes outside {meta.element}", where=where, found=f"{int(codes[tuple(first)])} at {first}",
                          wanted=f"0 … {most}", remedy=AGAIN)
    return codes.to(torch.uint8).contiguous()


def decode(codes: Tensor, meta: Meta, scale: Tensor, zero: Tensor) -> Tensor:
    """Quantized scales or zeros [rows, columns] -> float32, flat, in the order of the groups that they serve.

    (code - zero) * scale with one of each a row of the matrix (axis 1), a column (axis 0), or one for all.
    """
    shape = (-1, 1) if meta.axis == 1 else (1, -1)
    values = (codes.float() - zero.float().reshape(shape)) * scale.float().reshape(shape)
    return values.flatten()
