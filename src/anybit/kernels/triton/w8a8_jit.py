# mypy: ignore-errors
"""Device code of the products of 8 bit codes: int8 x int8 and fp8 x fp8, with the scales that checkpoints have.

One kernel, by what changes with a scheme at compile time: whether a scale is one number a row (applied once, in the
epilogue) or changes along K (applied to each block's float32 partial sums), whether codes carry a zero point, and
whether the matrix unit takes the codes themselves or their values in float16. Launched by `w8a8.py`.
"""

import triton
import triton.language as tl


@triton.jit
def decode_fp8(codes, FORMAT: tl.constexpr):
    """float16 values of 8 bit float codes, exact; no NaN codes (kept out when a weight is stored)."""
    bits = codes.to(tl.int16)
    if FORMAT == "fp8_e5m2":  # the upper half of a float16
        value = (bits << 8).to(tl.float16, bitcast=True)
    else:  # exponent bias 15 instead of 7 or 8
        value = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value *= 256.0 if FORMAT == "fp8_e4m3fn" else 128.0
    return value


@triton.jit
def scaled(acc, sx, sw, zx, cs, xs, zw, IS_SHIFTED: tl.constexpr, W_SHIFTED: tl.constexpr):
    """Sums of codes as float32 values: less the zero points' shares, times the row scales sx and sw.

    W's zero points zw meet the sums of x's codes xs in int32, where what wraps around on the way comes back (cs are
    the sums of W's codes less their zero points then). x's zero points within int8 are taken out in int32, exactly.
    What goes beyond (a row far from 0 under its own dynamic range) leaves sums that only float32 holds: the rounding
    is within the accumulation's bound, since |code - zero point| is large there.
    """
    if W_SHIFTED:
        acc = acc - zw * xs
    if IS_SHIFTED:
        if acc.dtype == tl.int32:
            near = tl.minimum(tl.maximum(zx, -128), 128)
            r = (acc - near * cs).to(tl.float32) - (zx - near).to(tl.float32) * cs.to(tl.float32)
        else:
            r = acc - zx.to(tl.float32) * cs
    else:
        r = acc.to(tl.float32)
    return r * sx * sw


@triton.jit
def finish(
    acc, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, bias_ptr, out_ptr, rows, outs, M, N,
    IS_SHIFTED: tl.constexpr, W_SHIFTED: tl.constexpr, X_BY_ROW: tl.constexpr, W_BY_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr, SWAP: tl.constexpr,
):
    """Store a tile of sums, [BN, BM] with SWAP, in true scales and with bias."""
    row_in = rows % M
    out_in = outs % N
    sx = tl.load(sx_ptr + row_in) if X_BY_ROW else tl.full(rows.shape, 1.0, tl.float32)
    sw = tl.load(sw_ptr + out_in) if W_BY_ROW else tl.full(outs.shape, 1.0, tl.float32)
    zx = tl.load(zx_ptr + row_in) if IS_SHIFTED else row_in
    cs = tl.load(cs_ptr + out_in) if IS_SHIFTED else out_in
    xs = tl.load(xs_ptr + row_in) if W_SHIFTED else row_in
    zw = tl.load(zw_ptr + out_in) if W_SHIFTED else out_in
    bias = tl.load(bias_ptr + out_in).to(tl.float32) if HAS_BIAS else tl.zeros(outs.shape, tl.float32)
    if SWAP:
        r = scaled(acc, sx[None, :], sw[:, None], zx[None, :], cs[:, None], xs[None, :], zw[:, None], IS_SHIFTED,
                   W_SHIFTED) + bias[:, None]
        tl.store(out_ptr + rows.to(tl.int64)[None, :] * N + outs[:, None], r.to(out_ptr.dtype.element_ty),
                 mask=(rows < M)[None, :] & (outs < N)[:, None])
    else:
        r = scaled(acc, sx[:, None], sw[None, :], zx[:, None], cs[None, :], xs[:, None], zw[None, :], IS_SHIFTED,
                   W_SHIFTED) + bias[None, :]
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * N + outs[None, :], r.to(out_ptr.dtype.element_ty),
                 mask=(rows < M)[:, None] & (outs < N)[None, :])


@triton.jit
def block_factor(
    sx_ptr, sw_ptr, tile_out, outs, row_in, k, M, GROUPS, unit, X_GROUP: tl.constexpr, W_GROUP: tl.constexpr,
    W_ROWS: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr,
):
    """What the sums of one block of K are multiplied with: scales that change along K, or `unit`."""
    factor = unit
    if W_GROUP > 0 and W_ROWS % BN == 0:  # one number for the tile
        factor = tl.load(sw_ptr + tile_out // W_ROWS * GROUPS + k // W_GROUP)
    elif W_GROUP > 0:
        sw = tl.load(sw_ptr + (outs // W_ROWS) * GROUPS + k // W_GROUP)
        factor = sw[:, None] if SWAP else sw[None, :]
    if X_GROUP > 0:
        sx = tl.load(sx_ptr + (k // X_GROUP) * M + row_in)
        factor *= sx[None, :] if SWAP else sx[:, None]
    return factor


@triton.jit(do_not_specialize=["M"])
def w8a8_matmul(
    x_ptr, w_ptr, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, M, N, K,
    GROUPS, unit,
    FORMAT: tl.constexpr, IS_INTEGER: tl.constexpr, IS_SHIFTED: tl.constexpr, W_SHIFTED: tl.constexpr,
    PROMOTE: tl.constexpr, X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, W_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, FUSED: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, BAND: tl.constexpr, WAITS: tl.constexpr,
):
    """out [M, N] = x [M, K] times W^T [K, N], both as codes, in true scales, plus bias.

    FORMAT    "" where the matrix unit takes the codes; else the 8 bit float that W holds, decoded to float16 as x is
    sx_ptr    [M], with X_GROUP [K / X_GROUP, M]; sw_ptr [N], with W_GROUP [N / W_ROWS, GROUPS]
    zx_ptr    [M] int32 zero points of x; cs_ptr [N]: sums of W's rows, int32, or float32 and scaled with W_GROUP
    zw_ptr    [N] int32 zero points of W; xs_ptr [M] int32: sums of x's codes
    PROMOTE   partial sums of one BK are added to float32 sums, because the matrix unit's own adder is narrower
    unit      1.0, unknown to the compiler, which would otherwise fold that addition back into the matrix unit
    SPLIT     programs along K; their sums meet in part [programs, M, N], FUSED: added in order by the last to arrive
    SWAP      W is the left operand; BAND rows of tiles are walked together, for the cache
    WAITS     launched while the kernel before it runs, which it waits for here; the next one may be launched when its
              sums are done (programmatic dependent launch)
    """
    if WAITS:
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    width = BAND * tl.cdiv(N, BN)
    first = tile // width * BAND
    height = tl.minimum(tiles_m - first, BAND)
    tile_m = first + (tile % width) % height
    tile_n = (tile % width) // height

    rows = tile_m * BM + tl.arange(0, BM)
    row_in = rows % M
    counted = (rows < M)[:, None]  # rows beyond the matrix are not read: one address asked for by all is slow
    outs = tile_n * BN + tl.arange(0, BN)
    inside = tl.arange(0, BK)
    blocks = tl.cdiv(K, BK)
    share = tl.cdiv(blocks, tl.num_programs(1))
    start = part * share
    stop = tl.minimum(start + share, blocks)

    if not TMA:
        x_rows = x_ptr + row_in.to(tl.int64)[:, None] * K + inside[None, :]
        w_rows = w_ptr + (outs % N).to(tl.int64)[:, None] * K + inside[None, :]
    IN_BLOCKS: tl.constexpr = X_GROUP > 0 or W_GROUP > 0
    KEPT: tl.constexpr = tl.int32 if IS_INTEGER and not IN_BLOCKS else tl.float32
    SUMMED: tl.constexpr = tl.int32 if IS_INTEGER else tl.float32
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), KEPT)
    for block in range(start, stop):
        k = block * BK
        if TMA:
            x = x_ptr.load([tile_m * BM, k])
            w = w_ptr.load([tile_n * BN, k])
        elif EVEN_K:
            x = tl.load(x_rows + k, mask=counted, other=0.0)
            w = tl.load(w_rows + k)
        else:
            x = tl.load(x_rows + k, mask=counted & (k + inside < K)[None, :], other=0.0)
            w = tl.load(w_rows + k, mask=(k + inside < K)[None, :], other=0.0)
        if FORMAT != "":
            w = decode_fp8(w, FORMAT)
        if IN_BLOCKS or PROMOTE:
            if SWAP:
                sums = tl.dot(w, x.T, out_dtype=SUMMED).to(tl.float32)
            else:
                sums = tl.dot(x, w.T, out_dtype=SUMMED).to(tl.float32)
            acc += sums * block_factor(sx_ptr, sw_ptr, tile_n * BN, outs % N, row_in, k, M, GROUPS, unit, X_GROUP,
                                       W_GROUP, W_ROWS, BN, SWAP)
        elif SWAP:
            acc = tl.dot(w, x.T, acc, out_dtype=KEPT)
        else:
            acc = tl.dot(x, w.T, acc, out_dtype=KEPT)

    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
    if not SPLIT:
        finish(acc, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, bias_ptr, out_ptr, rows, outs, M, N, IS_SHIFTED,
               W_SHIFTED, X_GROUP == 0, W_GROUP == 0, HAS_BIAS, SWAP)
    else:
        if SWAP:
            counts = (rows < M)[None, :] & (outs < N)[:, None]
            place = rows.to(tl.int64)[None, :] * N + outs[:, None]
        else:
            counts = (rows < M)[:, None] & (outs < N)[None, :]
            place = rows.to(tl.int64)[:, None] * N + outs[None, :]
        whole = M.to(tl.int64) * N
        tl.store(part_ptr + part * whole + place, acc, mask=counts, cache_modifier=".cg")
        if FUSED:
            tl.debug_barrier()
            arrived = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
            if arrived == tl.num_programs(1) - 1:
                tl.store(count_ptr + tile, 0)
                total = tl.zeros((BN, BM) if SWAP else (BM, BN), KEPT)
                for other in range(0, tl.num_programs(1)):  # in order, whichever came last: the same bits every time
                    total += tl.load(part_ptr + other * whole + place, mask=counts, other=0.0, cache_modifier=".cg")
                finish(total, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, bias_ptr, out_ptr, rows, outs, M, N,
                       IS_SHIFTED, W_SHIFTED, X_GROUP == 0, W_GROUP == 0, HAS_BIAS, SWAP)


@triton.jit(do_not_specialize=["M"])
def w8a8_epilogue(
    part_ptr, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, bias_ptr, out_ptr, M, N,
    PARTS: tl.constexpr, IS_SHIFTED: tl.constexpr, W_SHIFTED: tl.constexpr, X_IN_BLOCKS: tl.constexpr,
    W_IN_BLOCKS: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr,
):
    """out [M, N] from sums of codes [PARTS, M, N] (int32 or float32): added in order, then scales and bias."""
    m = tl.program_id(0)
    outs = tl.program_id(1) * BN + tl.arange(0, BN)
    counts = outs < N
    place = m.to(tl.int64) * N + outs
    acc = tl.load(part_ptr + place, mask=counts, other=0)
    for other in range(1, PARTS):
        acc += tl.load(part_ptr + other * (M.to(tl.int64) * N) + place, mask=counts, other=0)
    one = 1.0
    sx = one if X_IN_BLOCKS else tl.load(sx_ptr + m)
    sw = one if W_IN_BLOCKS else tl.load(sw_ptr + outs, mask=counts, other=0.0)
    zx = tl.load(zx_ptr + m) if IS_SHIFTED else 0
    cs = tl.load(cs_ptr + outs, mask=counts, other=0) if IS_SHIFTED else 0
    xs = tl.load(xs_ptr + m) if W_SHIFTED else 0
    zw = tl.load(zw_ptr + outs, mask=counts, other=0) if W_SHIFTED else 0
    r = scaled(acc, sx, sw, zx, cs, xs, zw, IS_SHIFTED, W_SHIFTED)
    if HAS_BIAS:
        r += tl.load(bias_ptr + outs, mask=counts, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, r.to(out_ptr.dtype.element_ty), mask=counts)
