"""The 16 bit product of sm_90 after an expansion: which it takes, with which tiles, what must compile.

Torch-free. Device code: kernels/triton/gemm16_hopper_jit.py, in Gluon, whose names changed between Triton's versions:
those of `VERSIONS` compile it. What is not taken here is torch's product, and so is all in other versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from anybit.kernels.compiling import CompileCase

__all__ = [
    "ARCH", "BLOCK", "LAYOUT", "VERSIONS", "Gemm16Config", "configure_gemm16", "constants_of_gemm16", "gemm16_cases",
    "gemm16_seconds",
]

ARCH: Final = "sm_90"
VERSIONS: Final = ((3, 6), (3, 7), (3, 9))
LAYOUT: Final = (128, 16, 2)  # of tiles in shared memory: swizzled by 128 bytes, 16 bits an element, two dimensions
BLOCK: Final = 64  # columns of K that are multiplied at once, and outputs that are written at once
ALIGNED: Final = 8  # elements: rows of every operand begin at multiples of 16 bytes
_UNITS: Final = 132
_ROWS: Final = 128  # of x in a tile
# As measured on an H200 (six weights, M 256 to 4096): rows of W in a tile, blocks of K in shared memory, seconds of a
# block, and of a tile beside its blocks; half a turn is a little more than half as long
_TILES: Final = ((256, 4, 0.75e-6, 2e-6), (128, 6, 0.395e-6, 1e-6))
_HALF: Final = 0.56


@dataclass(frozen=True)
class Gemm16Config:
    """Tiles and work of one product.

    bm, bn    rows of the tiles of x and of W
    stages    blocks of K that lie in shared memory
    halves    tiles of the last turn are halved, W's rows between two programs
    programs  as many as work at the same time
    band      rows of tiles that are walked together, for the cache
    """

    bm: int
    bn: int
    stages: int
    halves: bool
    programs: int
    band: int = 8

    @property
    def boxes(self) -> int:
        """In how many parts W's tiles are copied."""
        return 2 if self.halves else 1


@lru_cache(maxsize=4096)
def configure_gemm16(m: int, n: int, k: int) -> Gemm16Config | None:
    """Tiles for M rows by [N, K], or None for torch's product; pure."""
    if k % ALIGNED or not m or not n:
        return None
    return min((_timed(m, n, k, *tile) for tile in _TILES), key=lambda pair: pair[0])[1]


def gemm16_seconds(m: int, n: int, k: int) -> float:
    """Modelled time of the product alone."""
    return min(_timed(m, n, k, *tile)[0] for tile in _TILES)


def _timed(m: int, n: int, k: int, bn: int, stages: int, block: float, beside: float) -> tuple[float, Gemm16Config]:
    turns, rest = divmod(-(-m // _ROWS) * -(-n // bn), _UNITS)
    halves = 0 < 2 * rest <= _UNITS
    programs = _UNITS if turns else 2 * rest if halves else rest
    taken = turns + (_HALF if halves else rest > 0)
    return taken * (-(-k // BLOCK) * block + beside), Gemm16Config(_ROWS, bn, stages, halves, programs)


def constants_of_gemm16(config: Gemm16Config, *, has_factors: bool, has_bias: bool) -> dict[str, object]:
    """Compile-time arguments of `gemm16_hopper`."""
    return {
        "TOKENS": has_factors, "BIAS": has_bias, "BM": config.bm, "BN": config.bn, "BK": BLOCK,
        "STAGES": config.stages, "BAND": config.band, "HALVES": config.halves,
    }


# --- what must compile ------------------------------------------------------------------------------------------------

# M, N, K that together bring every kind of tile; a test looks for others that have no case
_SIZES: Final = ((1024, 6144, 4096), (1024, 4096, 14336), (512, 4096, 14336), (512, 6144, 4096))
_DTYPES: Final[Mapping[str, str]] = {"bfloat16": "bf16", "float16": "fp16"}


def gemm16_cases(kernel: str, arch: str) -> list[CompileCase]:
    """Products in several sizes, as `configure_gemm16` launches them, in both dtypes."""
    if arch != ARCH:
        return []
    cases: dict[str, CompileCase] = {}
    for dtype in _DTYPES:
        for m, n, k in _SIZES:
            config = configure_gemm16(m, n, k)
            assert config is not None
            case = _case(kernel, dtype, config)
            cases.setdefault(case.label, case)
    return list(cases.values())


def _case(kernel: str, dtype: str, config: Gemm16Config) -> CompileCase:
    element, layout = _DTYPES[dtype], f"NVMMASharedLayout{LAYOUT}"
    half = f"tensordesc<{element}[{config.bm // 2}, {BLOCK}],{layout}>"
    types = {
        "x": half, "w": f"tensordesc<{element}[{config.bn // config.boxes}, {BLOCK}],{layout}>", "out": half,
        "token_ptr": "*fp32", "bias_ptr": f"*{element}", "alpha": "fp32", "M": "i32", "N": "i32", "K": "i32",
    }
    return CompileCase(
        kernel, "anybit.kernels.triton.gemm16_hopper_jit:gemm16_hopper", ARCH,
        f"{dtype} {config.bm} x {config.bn}{' halves' if config.halves else ''}", types,
        constants_of_gemm16(config, has_factors=True, has_bias=True), divisible=("K",), num_warps=4,
        expects=("wgmma",),
    )  # fmt: skip
