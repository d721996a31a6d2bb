"""The 8 bit products of sm_90 in which warps have different work: which they take, with which tiles, what must compile.

Torch-free. Device code: kernels/triton/w8a8_hopper_jit.py, in Gluon, whose names changed between Triton's versions:
those of `VERSIONS` compile it. What is not taken here is the portable kernel's, and so is all in other versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from anybit.kernels.compiling import CompileCase
from anybit.kernels.linear.triton_w8a8_tiles import (
    CASES,
    FP8_NAME,
    INT8_NAME,
    Operands,
    Product8,
    expected_instruction,
    operands,
)

__all__ = ["BLOCK", "LAYOUT", "VERSIONS", "HopperConfig", "configure_hopper", "constants_of_hopper", "hopper_cases"]

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


def constants_of_hopper(
    product: Product8, config: HopperConfig, *, shifted: bool, has_bias: bool
) -> dict[str, object]:
    """Compile-time arguments of `w8a8_hopper`."""
    return {
        "IS_INTEGER": product.is_integer, "IS_SHIFTED": shifted, "W_SHIFTED": product.w_shifted,
        "IN_BLOCKS": bool(product.w_group), "W_ROWS": product.w_rows, "HAS_BIAS": has_bias, "BA": config.left,
        "BB": config.right, "BK": BLOCK, "TEAMS": config.teams, "STAGES": config.stages, "STREAM": config.share > 0,
        "BAND": config.band, "SWAP": config.swap, "WAITS": config.waits,
    }


# --- what must compile ------------------------------------------------------------------------------------------------

_SIZES: Final = ((1, 4096, 14336), (17, 4096, 14336), (33, 4096, 14336), (65, 4096, 14336), (129, 4096, 14336),
                 (1024, 4096, 14336), (4096, 4096, 14336), (1, 28672, 4096), (64, 28672, 4096), (256, 28672, 4096))


def hopper_cases(arch: str) -> list[CompileCase]:
    """Products in several sizes, as `configure_hopper` launches them."""
    if arch != "sm_90":
        return []
    cases: dict[str, CompileCase] = {}
    for label, product in CASES:
        given = operands(product, arch)
        assert given is not None
        for m, n, k in _SIZES:
            config = configure_hopper(n, k, m, product, given)
            if config is not None:
                case = _case(label, product, given, config)
                cases.setdefault(case.label, case)
    return list(cases.values())


def _case(label: str, product: Product8, given: Operands, config: HopperConfig) -> CompileCase:
    element = _TYPES[given.kind]
    layout = f"NVMMASharedLayout{LAYOUT}"
    x_rows, w_rows = config.boxes
    kept = "*i32" if product.is_integer else "*fp32"
    types = {
        "x": f"tensordesc<{element}[{x_rows}, {BLOCK}],{layout}>",
        "w": f"tensordesc<{element}[{w_rows}, {BLOCK}],{layout}>", "sx_ptr": "*fp32", "sw_ptr": "*fp32",
        "zx_ptr": "*i32", "cs_ptr": "*i32", "xs_ptr": "*i32", "zw_ptr": "*i32", "bias_ptr": "*bf16", "out_ptr": "*bf16",
        "part_ptr": kept, "count_ptr": "*i32", "M": "i32", "N": "i32", "K": "i32", "GROUPS": "i32", "SHARE": "i32",
    }
    what = f"{config.left} x {config.right}{' swapped' if config.swap else ''}{' shares' if config.share else ''}"
    return CompileCase(
        INT8_NAME if product.is_integer else FP8_NAME, "anybit.kernels.triton.w8a8_hopper_jit:w8a8_hopper", "sm_90",
        f"{label} {what}{' waits' if config.waits else ''}", types,
        constants_of_hopper(product, config, shifted=product.is_integer and not product.activation.symmetric,
                            has_bias=False),
        divisible=("N", "K"), num_warps=4, options={"launch_pdl": True} if config.waits else {},
        expects=(expected_instruction("sm_90", given.kind, 64),),
    )  # fmt: skip
