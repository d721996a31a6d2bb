# mypy: ignore-errors
"""Device code of block-scaled products: chips whose matrix unit takes codes with their 8 bit scales (tl.dot_scaled).

Launched by `mx_native.py`. Elsewhere Triton would decompose this into bfloat16 products, slowly: other kernels do that.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def mx_matmul(
    x_ptr, xs_ptr, w_ptr, ws_ptr, outer_ptr, factor_ptr, bias_ptr, out_ptr, M, N, K,
    X_FORMAT: tl.constexpr, W_FORMAT: tl.constexpr, GROUP: tl.constexpr, X_PACK: tl.constexpr, W_PACK: tl.constexpr,
    HAS_OUTER: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BAND: tl.constexpr,
):
    """out [M, N] = x [M, K] W^T under a scale for each GROUP columns of both, plus bias; K is a multiple of BK.

    X_FORMAT, W_FORMAT  "e2m1", "e4m3", "e5m2"; X_PACK, W_PACK codes a byte
    xs_ptr [M, K / GROUP], ws_ptr [N, K / GROUP]: e8m0 bytes, or e4m3 numbers
    outer_ptr [M], factor_ptr [N]: global scales, float32, in the epilogue
    """
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    width = BAND * tl.cdiv(N, BN)
    first = tile // width * BAND
    height = tl.minimum(tiles_m - first, BAND)
    tile_m = first + (tile % width) % height
    tile_n = (tile % width) // height
    rows = tile_m * BM + tl.arange(0, BM)
    outs = tile_n * BN + tl.arange(0, BN)
    row_in = (rows % M).to(tl.int64)
    out_in = (outs % N).to(tl.int64)
    x_inside = tl.arange(0, BK // X_PACK)
    w_inside = tl.arange(0, BK // W_PACK)
    s_inside = tl.arange(0, BK // GROUP)
    x_rows = x_ptr + row_in[:, None] * (K // X_PACK) + x_inside[None, :]
    w_rows = w_ptr + out_in[None, :] * (K // W_PACK) + w_inside[:, None]
    xs_rows = xs_ptr + row_in[:, None] * (K // GROUP) + s_inside[None, :]
    ws_rows = ws_ptr + out_in[:, None] * (K // GROUP) + s_inside[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for block in range(0, K // BK):
        x = tl.load(x_rows + block * (BK // X_PACK))
        w = tl.load(w_rows + block * (BK // W_PACK))
        xs = tl.load(xs_rows + block * (BK // GROUP))
        ws = tl.load(ws_rows + block * (BK // GROUP))
        acc = tl.dot_scaled(x, xs, X_FORMAT, w, ws, W_FORMAT, acc)
    if HAS_OUTER:
        acc *= tl.load(outer_ptr + row_in)[:, None]
    if HAS_FACTOR:
        acc *= tl.load(factor_ptr + out_in)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out_in).to(tl.float32)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * N + outs[None, :], acc.to(out_ptr.dtype.element_ty),
             mask=(rows < M)[:, None] & (outs < N)[None, :])
