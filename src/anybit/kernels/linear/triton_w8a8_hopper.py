"""The 8 bit products of sm_90 in which warps have different work: which they take, with which tiles, what must compile.

Torch-free. Device code: kernels/triton/w8a8_hopper_jit.py, in Gluon, whose names changed between Triton's versions: those
of `VERSIONS` compile it. What is not taken here, and every other version, is the portable kernel's (triton_w8a8_tiles.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from anybit.kernels.compiling import CompileCase
from anybit.kernels.linear.triton_w8a8_tiles import Operands, Product8

__all__ = ["LAYOUT", "VERSIONS", "HopperConfig", "configure_hopper", "constants_of_hopper", "hopper_case"]

VERSIONS: Final = ((3, 6), (3, 7), (3, 9))
LAYOUT: Final = (128, 8, 2)  # of tiles in shared memory: swizzled by 128 bytes, 8 bits an element, two dimensions
BLOCK: Final = 128  # columns that are multiplied at once
_UNITS: Final = 132
_TILE_BYTES: Final = 208 * 1024  # of shared memory; the results pass through the rest
_MOST_STAGES: Final = 20
_TYPES: Final[Mapping[str, str]] = {"int8": "i8", "fp8_e4m3fn": "fp8e4nv", "fp8_e5m2": "fp8e5"}


@dataclass(frozen=True)
class HopperConfig:
    """Tiles and work of one call.

    left, right   rows of the tiles of the operands: x and W, with `swap` W and x
    teams         of four warps, which share the left tile
    stages        blocks of 128 columns that lie in shared memory
    share         blocks that a program multiplies, of all tiles in a row; 0: programs take whole tiles in turn
    programs      as many as work at the same time
    waits         launched while x is quantized, and waits for that itself
    """

    left: int
    right: int
    teams: int
    stages: int
    share: int
    programs: int
    swap: bool = False
    waits: bool = False
    band: int = 8

    def tiles(self, m: int, n: int) -> int:
        """Tiles of a product [M, N]."""
        left, right = (n, m) if self.swap else (m, n)
        return -(-left // self.left) * -(-right // self.right)

    @property
    def boxes(self) -> tuple[int, int]:
        """Rows of x and of W that one copy brings."""
        rows = self.left // self.teams
        return (self.right, rows) if self.swap else (rows, self.right)

    @property
    def parts(self) -> int:
        """32 bit sums that programs leave for others: two tiles each."""
        return 2 * self.programs * self.left * self.right if self.share else 0


def takes(product: Product8, given: Operands) -> bool:
    """True for codes that the matrix unit takes, with scales by row, or fp8 with scales of 128 columns on both sides."""
    if given.kind not in _TYPES:
        return False
    if product.x_group or product.w_group:
        return (not product.is_integer and product.x_group == product.w_group == BLOCK
                and product.w_rows % BLOCK == 0)
    return True
