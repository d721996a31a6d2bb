"""Marlin's tile order, as AutoGPTQ 0.7.1 and AutoAWQ write it: 4 bits, symmetric, one group over K or groups of 128.

Stored: words int32 [K/16, 2N], scales [G, N], both permuted for tensor cores. Source: docs/formats/gptq.md §8.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble order within a word
_CHANNEL_RUN = (0, 1, 8, 9, 16, 17, 24, 25)  # scale order within a run of 32 where one group spans K


def weight_order() -> Tensor:
    """[1024] int64: slot j of a run of four 16x16 tiles came from position order[j] of them."""
    order: list[int] = []
    for thread in range(32):
        column = thread // 4
        rows = [2 * (thread % 4) + step for step in (0, 1, 8, 9)]
        tile = [16 * row + column + 8 * half for half in (0, 1) for row in rows]
        order += [position + 256 * j for j in range(4) for position in tile]
    return torch.tensor(order).view(-1, 8)[:, list(_INTERLEAVE)].flatten()


def unpack_codes(words: Tensor) -> Tensor:
    """Words [K/16, 2N] int32 -> codes 0 … 15 [N, K] uint8; 8 stands for zero."""
    data = words.contiguous().view(torch.uint8)
    nibbles = torch.stack((data & 15, data >> 4), dim=-1).view(-1, 1024)  # slot 8c + i holds nibble i of word c
    tiles = torch.empty_like(nibbles)
    tiles[:, weight_order()] = nibbles
    rows, columns = words.shape[0], words.shape[1] // 32  # of tiles
    # [rows of tiles, tiles, 16 k, 16 n] -> [n, k]
    return tiles.view(rows, columns, 16, 16).permute(1, 3, 0, 2).reshape(16 * columns, 16 * rows)


def unpermute_scales(stored: Tensor) -> Tensor:
    """Stored scales [G, N] -> [N, G], in the order of the outputs."""
    groups, outputs = stored.shape
    if groups > 1:  # runs of 64: stored[i] = original[i // 8 + 8 (i % 8)]
        origin = torch.tensor([i // 8 + 8 * (i % 8) for i in range(64)])
    else:  # runs of 32: stored[8 i + j] = original[2 i + _CHANNEL_RUN[j]]
        origin = torch.tensor([2 * i + position for i in range(4) for position in _CHANNEL_RUN])
    runs = stored.reshape(groups, outputs // len(origin), len(origin))
    original = torch.empty_like(runs)
    original[..., origin] = runs
    return original.view(groups, outputs).t().contiguous()
