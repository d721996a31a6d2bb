"""torchao's two orders that are not row by row: tiles of 4-bit codes, and swizzled block scales.

Source: docs/formats/torchao.md §3.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# column of nibble p (0 = lowest) of an int32, relative to 128u + 32i + 2 (lane % 4)
NIBBLE_COLUMNS: Final = (0, 8, 16, 24, 1, 9, 17, 25)


def untile(words: Tensor) -> Tensor:
    """Words int32 [N8/8, K1024/128, 32, 4] -> codes 0 … 15, uint8 [N8, K1024], padding included.

    words[t, u, lane, i] holds row 8t + lane // 4, columns 128u + 32i + 2 (lane % 4) + NIBBLE_COLUMNS.
    """
    tiles, runs = words.shape[:2]
    data = words.contiguous().view(torch.uint8)  # little-endian: byte b of a word has nibbles 2b, 2b + 1
    nibbles = torch.stack((data & 15, data >> 4), dim=-1).view(tiles, runs, 8, 4, 4, 8)  # t, u, row, pair, i, p
    columns = torch.empty((tiles, 8, runs, 4, 32), dtype=torch.uint8)  # t, row, u, i, column within 32
    pairs = 2 * torch.arange(4)
    for p, column in enumerate(NIBBLE_COLUMNS):
        columns[..., pairs + column] = nibbles[..., p].permute(0, 2, 1, 4, 3)
    return columns.view(tiles * 8, runs * 128)


def unswizzle(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in tiles of 128 x 4, any shape of R * C * 512 elements of one byte -> [rows, columns].

    Within a tile the scale (row, col) lies at byte (row % 32) * 16 + (row // 32) * 4 + col.
    """
    down, across = -(-rows // 128), -(-columns // 4)
    tiles = stored.contiguous().view(torch.uint8).reshape(down, across, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)[:rows, :columns].contiguous()
