"""The 8 bit products of sm_90 in which warps have different work: which they take, with which tiles, what must compile.

Torch-free. Device code: kernels/triton/w8a8_hopper_jit.py, in Gluon, whose names changed between Triton's versions:
those of `VERSIONS` compile it. What is not taken here is the portable kernel's, and so is all in other versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from anybit.kernels.compiling import CompileCase, overlap
from anybit.kernels.linear.triton_w8a8_tiles import (
    BANDWIDTH,
    FP8_NAME,
    INT8_NAME,
    UNITS,
    Operands,
    Product8,
    cases_of_sm_90,
    expected_instruction,
)

__all__ = [
    "BLOCK", "LAYOUT", "VERSIONS", "HopperConfig", "configure_hopper", "constants_of_hopper", "hopper_cases",
    "takes",
]

VERSIONS: Final = ((3, 6), (3, 7), (3, 9))
LAYOUT: Final = (128, 8, 2)  # of tiles in shared memory: swizzled by 128 bytes, 8 bits an element, two dimensions
BLOCK: Final = 128  # columns that are multiplied at once
_UNITS: Final = UNITS["sm_90"]
_TILE_BYTES: Final = 208 * 1024  # of shared memory; the results pass through the rest
_MOST_STAGES: Final = 20
_TYPES: Final[Mapping[str, str]] = {"int8": "i8", "fp8_e4m3fn": "fp8e4nv", "fp8_e5m2": "fp8e5"}
# As measured on an H200 (a product alone, weights cold): a call takes _START and its steps of 128 columns, each as long
# as its tile needs or as W's bytes take to come; more where programs share tiles. They do so only to be as many as the
# chip holds, and where all read other rows of W: those that read the same ones would be apart, and no longer find them
# in the cache (up to twice as slow). The tile that this model picks is 0.6 % slower than the best one on average, 11 %
# at most, over 246 cells of ten weights, M 17 to 4096; fp8 scaled in blocks, timed anew in 15 cells of five weights,
# M 64 to 1024: 1 % at most.
_START: Final = 4.5e-6
_NEXT: Final = 0.5e-6  # from one tile of a program to the next
_PARTIAL: Final = 1.1  # steps of tiles that reach beyond the rows of x
_TILES: Final[tuple[tuple[int, int, tuple[float, float, float], float], ...]] = (
    # rows of x, rows of W, seconds of a step: int8, fp8 scaled by row, fp8 scaled in blocks; seconds more where shared
    (64, 64, (140e-9, 146e-9, 165e-9), 6e-6),
    (64, 128, (190e-9, 212e-9, 230e-9), 6.5e-6),
    (128, 128, (325e-9, 362e-9, 400e-9), 13e-6),
)
# up to here the portable kernel is at least as fast: it has tiles of fewer rows of x
_FEW_ROWS: Final = (32, 32, 16)
# Up to so many rows the product is launched while x is quantized, and copies W meanwhile. With more rows its programs
# would begin one by one, as those that quantize make room; apart, they read each other's tiles from the cache up to 1.4
# times slower to the end. So then small products alone wait, and are launched when the last rows are being quantized.
_WAITING_ROWS: Final = 64
_WAITING_ROWS_OF_SMALL: Final = 512
_SMALL: Final = 2**25  # weights


@dataclass(frozen=True)
class HopperConfig:
    """Tiles and work of one call.

    bm, bn     rows of the tiles of x and of W
    teams      of four warps, which share the tile of x
    stages     blocks of 128 columns that lie in shared memory
    share      blocks that a program multiplies, of all tiles in a row; 0: programs take whole tiles in turn
    programs   as many as work at the same time
    waits      launched before x is quantized, and waits for that itself
    band       rows of tiles that are walked together, for the cache
    """

    bm: int
    bn: int
    teams: int
    stages: int
    share: int
    programs: int
    waits: bool = False
    band: int = 8

    def tiles(self, m: int, n: int) -> int:
        """Tiles of a product [M, N]."""
        return -(-m // self.bm) * -(-n // self.bn)

    def grid(self, m: int, n: int) -> int:
        """Programs of a product [M, N], which may have other M than the tiles were chosen for."""
        return self.programs if self.share else min(self.tiles(m, n), _UNITS)

    @property
    def parts(self) -> int:
        """32 bit sums that programs leave for others: of two tiles each."""
        return 2 * self.programs * self.bm * self.bn if self.share else 0


def takes(product: Product8, given: Operands) -> bool:
    """True for codes that the matrix unit takes, scaled by row, or fp8 with scales of 128 columns on both sides."""
    if given.kind not in _TYPES:
        return False
    if product.x_group or product.w_group:
        return (not product.is_integer and product.x_group == product.w_group == BLOCK
                and product.w_rows % BLOCK == 0)
    return True


@lru_cache(maxsize=4096)
def configure_hopper(n: int, k: int, m: int | None, product: Product8, given: Operands) -> HopperConfig | None:
    """Tiles for M rows by [N, K], or None for the portable kernel; pure. M None: the same for any M, none shared."""
    if not takes(product, given):
        return None
    if m is None:
        return _config(64, 128, n, k, 64, is_shared=False)
    which = 0 if product.is_integer else 2 if product.w_group else 1
    if m <= _FEW_ROWS[which]:
        return None
    made = []
    for bm, bn, steps, shared in _TILES:
        step = steps[which] * (_PARTIAL if m % bm else 1.0)
        alone = _config(bm, bn, n, k, m, is_shared=False)
        if bn > 64 or m <= bm or alone.tiles(m, n) <= _UNITS:  # small tiles one after another pass through the cache
            made.append((_seconds(alone, n, k, m, step), alone))
        if m <= bm and alone.programs < _UNITS:
            among = _config(bm, bn, n, k, m, is_shared=True)
            made.append((shared + _seconds(among, n, k, m, step), among))
    return min(made, key=lambda pair: pair[0])[1]


def _config(bm: int, bn: int, n: int, k: int, m: int, *, is_shared: bool) -> HopperConfig:
    stages = min(_MOST_STAGES, _TILE_BYTES // ((bm + bn) * BLOCK))
    waits = m <= (_WAITING_ROWS_OF_SMALL if n * k <= _SMALL else _WAITING_ROWS)
    made = HopperConfig(bm, bn, bm // 64, stages, 0, 0, waits=waits)
    tiles = made.tiles(m, n)
    steps = tiles * -(-k // BLOCK)
    share = max(-(-steps // _UNITS), 4) if is_shared else 0
    return replace(made, share=share, programs=-(-steps // share) if share else min(tiles, _UNITS))


def _seconds(config: HopperConfig, n: int, k: int, m: int, step: float) -> float:
    """Modelled time of a product alone."""
    tiles, blocks = config.tiles(m, n), -(-k // BLOCK)
    read = n * k / BANDWIDTH
    if config.share:
        return _START + max(config.share * step, read)
    whole, rest = divmod(tiles, _UNITS)
    a_tile = read / tiles  # tiles of other rows of x find W in the cache
    waves = [_UNITS] * whole + [rest] * (rest > 0)
    return _START + _NEXT * (len(waves) - 1) + sum(max(blocks * step, active * a_tile) for active in waves)


def constants_of_hopper(
    product: Product8, config: HopperConfig, *, shifted: bool, has_bias: bool
) -> dict[str, object]:
    """Compile-time arguments of `w8a8_hopper`."""
    return {
        "IS_INTEGER": product.is_integer, "IS_SHIFTED": shifted, "W_SHIFTED": product.w_shifted,
        "IN_BLOCKS": bool(product.w_group), "W_ROWS": product.w_rows, "HAS_BIAS": has_bias, "BM": config.bm,
        "BN": config.bn, "BK": BLOCK, "TEAMS": config.teams, "STAGES": config.stages, "STREAM": config.share > 0,
        "BAND": config.band, "WAITS": config.waits,
    }


# --- what must compile ------------------------------------------------------------------------------------------------

# M, N, K that together bring every kind of tile; a test looks for others that have no case
_SIZES: Final = (
    (33, 4096, 14336), (65, 4096, 14336), (129, 4096, 14336), (1024, 4096, 14336), (64, 28672, 4096),
    (17, 256, 512), (33, 256, 8192), (65, 256, 512), (65, 256, 14336), (17, 256, 4096), (400, 4096, 4096),
    (65, 2048, 28672), (1000, 256, 512),
)  # fmt: skip


def hopper_cases(arch: str) -> list[CompileCase]:
    """Products in several sizes, as `configure_hopper` launches them."""
    return cases_of_sm_90(arch, _cases)


def _cases(label: str, product: Product8, given: Operands) -> Iterator[CompileCase]:
    for m, n, k in _SIZES:
        config = configure_hopper(n, k, m, product, given)
        if config is not None:
            yield _case(label, product, given, config)


def _case(label: str, product: Product8, given: Operands, config: HopperConfig) -> CompileCase:
    element = _TYPES[given.kind]
    layout = f"NVMMASharedLayout{LAYOUT}"
    kept = "*i32" if product.is_integer else "*fp32"
    types = {
        "x": f"tensordesc<{element}[{config.bm // config.teams}, {BLOCK}],{layout}>",
        "w": f"tensordesc<{element}[{config.bn}, {BLOCK}],{layout}>", "sx_ptr": "*fp32", "sw_ptr": "*fp32",
        "zx_ptr": "*i32", "cs_ptr": "*i32", "xs_ptr": "*i32", "zw_ptr": "*i32", "bias_ptr": "*bf16", "out_ptr": "*bf16",
        "part_ptr": kept, "count_ptr": "*i32", "M": "i32", "N": "i32", "K": "i32", "GROUPS": "i32", "SHARE": "i32",
    }
    what = f"{config.bm} x {config.bn}{' shares' if config.share else ''}"
    return CompileCase(
        INT8_NAME if product.is_integer else FP8_NAME, "anybit.kernels.triton.w8a8_hopper_jit:w8a8_hopper", "sm_90",
        f"{label} {what}{' waits' if config.waits else ''}", types,
        constants_of_hopper(product, config, shifted=product.is_integer and not product.activation.symmetric,
                            has_bias=False),
        divisible=("N", "K"), num_warps=4, options=overlap(config.waits),
        expects=(expected_instruction("sm_90", given.kind, 64),), spills=_spills(product, config),
    )  # fmt: skip


def _spills(product: Product8, config: HopperConfig) -> int:
    """Registers that Triton 3.9 spills where a tile begins, and 3.6 does not: the rows' scales are read early."""
    return 8 if config.bm == 128 and not (config.share or product.is_integer or product.w_group) else 0
