# mypy: ignore-errors
"""Device code of the unquantized product for few rows: W streamed once, K split until the chip is full.

Launched by `skinny.py`. W [N, K] is the left operand, so that few rows of x fill the narrow side of the instruction.
"""

import triton
import triton.language as tl


@triton.jit
def store_tile(acc, bias_ptr, out_ptr, rows, outs, M, N, HAS_BIAS: tl.constexpr):
    """A tile of sums [BN, BM] plus bias, rounded once."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outs, mask=outs < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + rows.to(tl.int64)[None, :] * N + outs[:, None], acc.to(out_ptr.dtype.element_ty),
             mask=(rows < M)[None, :] & (outs < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def skinny_matmul(
    x_ptr, w_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, M, N, K, stride,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    FUSED: tl.constexpr, EVEN_K: tl.constexpr, WAITS: tl.constexpr,
):
    """out [M, N] = x [M, K] W^T + bias, sums in float32; one tile of at most BM rows.

    SPLIT programs along K leave their sums in part [SPLIT, M, N]; FUSED: the last to arrive adds them, in order.
    WAITS: launched while the kernel before it ends, which it waits for here; the next one may be launched when its sums
    are done (programmatic dependent launch).
    """
    if WAITS:
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    part = tl.program_id(1)
    rows = tl.arange(0, BM)
    outs = tile * BN + tl.arange(0, BN)
    inside = tl.arange(0, BK)
    blocks = tl.cdiv(K, BK)
    share = tl.cdiv(blocks, SPLIT)
    start = part * share
    stop = tl.minimum(start + share, blocks)
    w_rows = w_ptr + (outs % N).to(tl.int64)[:, None] * K + inside[None, :]
    x_rows = x_ptr + (rows % M)[None, :] * stride + inside[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for block in range(start, stop):
        k = block * BK
        if EVEN_K:
            w = tl.load(w_rows + k)
            x = tl.load(x_rows + k)
        else:
            w = tl.load(w_rows + k, mask=(k + inside < K)[None, :], other=0.0)
            x = tl.load(x_rows + k, mask=(k + inside < K)[:, None], other=0.0)
        acc = tl.dot(w, x, acc)
    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT == 1:
        store_tile(acc, bias_ptr, out_ptr, rows, outs, M, N, HAS_BIAS)
    else:
        counts = (rows < M)[None, :] & (outs < N)[:, None]
        place = rows.to(tl.int64)[None, :] * N + outs[:, None]
        whole = M.to(tl.int64) * N
        tl.store(part_ptr + part * whole + place, acc, mask=counts, cache_modifier=".cg")
        if FUSED:
            tl.debug_barrier()
            arrived = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
            if arrived == SPLIT - 1:
                tl.store(count_ptr + tile, 0)
                total = tl.zeros((BN, BM), tl.float32)
                for other in range(0, SPLIT):  # in order, whichever came last: the same bits every time
                    total += tl.load(part_ptr + other * whole + place, mask=counts, other=0.0, cache_modifier=".cg")
                store_tile(total, bias_ptr, out_ptr, rows, outs, M, N, HAS_BIAS)


@triton.jit(do_not_specialize=["M"])
def add_parts(part_ptr, bias_ptr, out_ptr, M, N, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr):
    """out [M, N] = sums [PARTS, M, N], added in order, plus bias."""
    m = tl.program_id(0)
    outs = tl.program_id(1) * BN + tl.arange(0, BN)
    counts = outs < N
    place = m.to(tl.int64) * N + outs
    acc = tl.load(part_ptr + place, mask=counts, other=0.0)
    for other in range(1, PARTS):
        acc += tl.load(part_ptr + other * (M.to(tl.int64) * N) + place, mask=counts, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outs, mask=counts, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=counts)
