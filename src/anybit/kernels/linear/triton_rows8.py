"""The 8 bit products of one token on sm_90: which they take, how they are launched, what must compile.

Torch-free. Device code: kernels/triton/rows8_one_jit.py, in Gluon, whose names changed between Triton's versions:
`triton_w8a8_hopper.VERSIONS` compile it. What is not taken here is another kernel's, and so is all in other versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from anybit.kernels.compiling import CompileCase, overlap
from anybit.kernels.linear.triton_w8a8_hopper import takes
from anybit.kernels.linear.triton_w8a8_tiles import (
    FP8_NAME,
    INT8_NAME,
    UNITS,
    Operands,
    Product8,
    cases_of_sm_90,
)

__all__ = ["OneConfig", "configure_one", "constants_of_one", "one_cases"]

# From so many rows on the portable kernel has tiles enough for the chip; it is then as fast for columns below the
# second number, where a program of one token is short against its start: fp8 by row, fp8 in blocks. int8: nowhere.
_WIDE_BY_ROW, _SHORT_BY_ROW = 64 * UNITS["sm_90"], 8192
_WIDE_IN_BLOCKS, _SHORT_IN_BLOCKS = 128 * UNITS["sm_90"], 4096


@dataclass(frozen=True)
class OneConfig:
    """One launch.

    rows   of W that a program has
    ahead  steps of 512 columns a warp that are on their way
    warps  side by side along K
    """

    rows: int
    ahead: int
    warps: int = 2

    def grid(self, n: int) -> int:
        """Programs of a weight of n rows."""
        return -(-n // self.rows)


@lru_cache(maxsize=4096)
def configure_one(n: int, k: int, m: int | None, product: Product8, given: Operands) -> OneConfig | None:
    """The launch for one token by [N, K], or None for another kernel; pure. M None, any number of tokens: None.

    As measured on an H200 for twelve weights from 1536 x 2512 to 8192 x 57344. fp8 codes of x are decoded again by
    every program, so that it pays to have more rows, or long ones.
    """
    if m != 1 or not takes(product, given):
        return None
    if product.is_integer:
        return OneConfig(4, 2)
    if product.w_group:
        return None if n >= _WIDE_IN_BLOCKS and k < _SHORT_IN_BLOCKS else OneConfig(4, 1)
    if k >= _SHORT_BY_ROW:
        return OneConfig(4, 3)
    if n >= _WIDE_BY_ROW:
        return None
    return OneConfig(8 if n > 32 * UNITS["sm_90"] else 4, 1)


def constants_of_one(
    product: Product8, given: Operands, config: OneConfig, k: int, *, shifted: bool, has_bias: bool
) -> dict[str, object]:
    """Compile-time arguments of `rows8_one`."""
    return {
        "KIND": given.kind, "IS_SHIFTED": shifted, "W_SHIFTED": product.w_shifted, "IN_BLOCKS": bool(product.w_group),
        "W_ROWS": product.w_rows, "HAS_BIAS": has_bias, "ROWS": config.rows, "AHEAD": config.ahead,
        "WARPS": config.warps, "EVEN": k % (512 * config.warps) == 0, "WAITS": True,
    }


# --- what must compile ------------------------------------------------------------------------------------------------

# N, K that together bring every launch; the last two end within a step
_SIZES: Final = ((4096, 14336), (4096, 4096), (6144, 4096), (4096, 1008), (4096, 14352))


_SPILLS: Final = 8  # addresses of rows: the assembler's own choice of 72 registers, for 14 programs a multiprocessor


def one_cases(arch: str) -> list[CompileCase]:
    """Products in several sizes, as `configure_one` launches them."""
    return cases_of_sm_90(arch, _cases)


def _cases(label: str, product: Product8, given: Operands) -> Iterator[CompileCase]:
    for n, k in _SIZES:
        config = configure_one(n, k, 1, product, given)
        if config is not None:
            yield _case(label, product, given, config, k)


def _case(label: str, product: Product8, given: Operands, config: OneConfig, k: int) -> CompileCase:
    types = {
        "x_ptr": "*i32", "w_ptr": "*i32", "sx_ptr": "*fp32", "sw_ptr": "*fp32", "zx_ptr": "*i32", "cs_ptr": "*i32",
        "xs_ptr": "*i32", "zw_ptr": "*i32", "bias_ptr": "*bf16", "out_ptr": "*bf16", "N": "i32", "K": "i32",
        "GROUPS": "i32",
    }
    constants = constants_of_one(product, given, config, k, has_bias=False,
                                 shifted=product.is_integer and not product.activation.symmetric)
    return CompileCase(
        INT8_NAME if product.is_integer else FP8_NAME, "anybit.kernels.triton.rows8_one_jit:rows8_one", "sm_90",
        f"{label} one token, {config.rows} rows, {config.ahead} ahead{'' if constants['EVEN'] else ', ragged'}", types,
        constants, divisible=("N", "K"), num_warps=config.warps, options=overlap(True),
        spills=0 if product.is_integer or config.ahead > 1 else _SPILLS,  # no matrix instruction is expected
    )  # fmt: skip
