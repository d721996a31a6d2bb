# mypy: ignore-errors
"""Device code of the experts of a layer: `w8a8_matmul` of w8a8_jit.py for segments of rows, each of one expert.

As experts_planes_jit.py, for 8 bit codes. Launched by `experts_rows8.py`.
"""

import triton
import triton.language as tl

from anybit.kernels.triton.w8a8_jit import w8a8_matmul


@triton.jit
def experts8_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, expert_ptr,
    first_ptr, length_ptr, N, K, GROUPS, unit, sx_step, sw_step,
    FORMAT: tl.constexpr, IS_INTEGER: tl.constexpr, IS_SHIFTED: tl.constexpr, W_SHIFTED: tl.constexpr,
    PROMOTE: tl.constexpr, X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, W_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, FUSED: tl.constexpr,
    SWAP: tl.constexpr, EVEN_K: tl.constexpr, BAND: tl.constexpr,
):
    """out [rows of all segments, N]: program (tile of rows of W, part of K, segment).

    expert_ptr, first_ptr, length_ptr   int32, a segment's expert (negative: none), first row and rows, at most BM
    sx_step   scales of a row of x; those of a segment lie together, [groups, its rows]; sw_step those of an expert
    """
    segment = tl.program_id(2)
    expert = tl.load(expert_ptr + segment)
    length = tl.load(length_ptr + segment)
    if (expert >= 0) & (length > 0):
        e = expert.to(tl.int64)
        first = tl.load(first_ptr + segment).to(tl.int64)
        w8a8_matmul(
            x_ptr + first * K, w_ptr + e * N * K, sx_ptr + first * sx_step, sw_ptr + e * sw_step, zx_ptr + first,
            cs_ptr + e * N, xs_ptr + first, zw_ptr + e * N, bias_ptr + e * N, out_ptr + first * N,
            part_ptr + first * N * tl.num_programs(1), count_ptr + segment * tl.num_programs(0), length, N, K, GROUPS,
            unit, FORMAT=FORMAT, IS_INTEGER=IS_INTEGER, IS_SHIFTED=IS_SHIFTED, W_SHIFTED=W_SHIFTED, PROMOTE=PROMOTE,
            X_GROUP=X_GROUP, W_GROUP=W_GROUP, W_ROWS=W_ROWS, HAS_BIAS=HAS_BIAS, BM=BM, BN=BN, BK=BK, SPLIT=SPLIT,
            FUSED=FUSED, SWAP=SWAP, TMA=False, EVEN_K=EVEN_K, BAND=BAND, WAITS=False,
        )
