# mypy: ignore-errors
"""Device code of the product of one token with 8 bit codes on sm_90: W goes from memory to registers, no further.

A program has a few rows of W and all of K: so many small programs end evenly, and none adds to another's sums. A warp
reads half a kilobyte of a row at once (eight rows of 64 bytes each, as a matrix instruction would have them, took up
to twice as long); AHEAD steps of W are on their way at any time, the first of them before the kernel that makes x is
done. int8 codes are multiplied four at a time into int32 sums (dp4a); fp8 codes become float32 by way of float16,
where each is exact, and so do those of x, which take the scales that change along K. The arithmetic is that of
`w8a8_jit.w8a8_matmul`, the portable twin, on the same stored weight; launched by `w8a8.py` where `triton_rows8.py`
says so. Written in Gluon, Triton's language of explicit layouts.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anybit.kernels.triton.w8a8_hopper_jit import scaled

_DP4A = gl.constexpr("dp4a.s32.s32 $0, $1, $2, $3;")
# the four values of a word
_VALUES = gl.constexpr("""{
    .reg .b16 a, b, c, d; .reg .b32 low, high;
    mov.b32 {a, b}, $4;
    cvt.rn.f16x2.TYPEx2 low, a;
    cvt.rn.f16x2.TYPEx2 high, b;
    mov.b32 {a, b}, low;
    mov.b32 {c, d}, high;
    cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }""")
# $0 = $6 + the four values of the word $1 times $2 ... $5
_ADDED = gl.constexpr("""{
    .reg .b16 a, b, c, d; .reg .b32 low, high; .reg .f32 e, f, g, h;
    mov.b32 {a, b}, $1;
    cvt.rn.f16x2.TYPEx2 low, a;
    cvt.rn.f16x2.TYPEx2 high, b;
    mov.b32 {a, b}, low;
    mov.b32 {c, d}, high;
    cvt.f32.f16 e, a; cvt.f32.f16 f, b; cvt.f32.f16 g, c; cvt.f32.f16 h, d;
    fma.rn.f32 e, e, $2, $6; fma.rn.f32 f, f, $3, e; fma.rn.f32 g, g, $4, f; fma.rn.f32 $0, h, $5, g; }""")
_VALUES_E4M3 = gl.constexpr(_VALUES.value.replace("TYPE", "e4m3"))
_VALUES_E5M2 = gl.constexpr(_VALUES.value.replace("TYPE", "e5m2"))
_ADDED_E4M3 = gl.constexpr(_ADDED.value.replace("TYPE", "e4m3"))
_ADDED_E5M2 = gl.constexpr(_ADDED.value.replace("TYPE", "e5m2"))


@gluon.jit
def read(at, word, words, EVEN: gl.constexpr):
    """Words of a step, 0 beyond K."""
    if EVEN:
        return gl.load(at)
    else:
        return gl.load(at, mask=word < words, other=0)


@gluon.jit
def add_step(
    acc, w, x_at, sx_ptr, sw_at, step, word, words, GROUPS, is_step, KIND: gl.constexpr, IN_BLOCKS: gl.constexpr,
    C: gl.constexpr, EVEN: gl.constexpr, MASKED: gl.constexpr,
):
    """acc [R, C] plus the products of a step's words; MASKED: nothing unless `is_step`."""
    x = read(x_at + step * C, word + step * C, words, EVEN)
    if MASKED:
        x = gl.where(is_step, x, 0)
    if KIND == "int8":
        x, _ = gl.broadcast(x, w)
        acc = gl.inline_asm_elementwise(_DP4A, "=r,r,r,r", [w, x, acc], dtype=gl.int32, is_pure=True, pack=1)
    else:
        VALUES: gl.constexpr = _VALUES_E4M3 if KIND == "fp8_e4m3fn" else _VALUES_E5M2
        ADDED: gl.constexpr = _ADDED_E4M3 if KIND == "fp8_e4m3fn" else _ADDED_E5M2
        x0, x1, x2, x3 = gl.inline_asm_elementwise(
            VALUES, "=f,=f,=f,=f,r", [x], dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1)
        if IN_BLOCKS:
            block = gl.minimum((word + step * C) // 32, GROUPS - 1)
            factor = gl.load(sx_ptr + block) * gl.load(sw_at + block)
            x0, x1, x2, x3 = x0 * factor, x1 * factor, x2 * factor, x3 * factor
        x0, _ = gl.broadcast(x0, w)
        x1, _ = gl.broadcast(x1, w)
        x2, _ = gl.broadcast(x2, w)
        x3, _ = gl.broadcast(x3, w)
        acc = gl.inline_asm_elementwise(ADDED, "=f,r,f,f,f,f,f", [w, x0, x1, x2, x3, acc], dtype=gl.float32,
                                        is_pure=True, pack=1)
    return acc


@gluon.jit(do_not_specialize=["GROUPS"])
def rows8_one(
    x_ptr, w_ptr, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, bias_ptr, out_ptr, N, K, GROUPS,
    KIND: gl.constexpr, IS_SHIFTED: gl.constexpr, W_SHIFTED: gl.constexpr, IN_BLOCKS: gl.constexpr,
    W_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, ROWS: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr,
    EVEN: gl.constexpr, WAITS: gl.constexpr,
):
    """out [1, N] = x [1, K] times W^T [K, N], both as codes, in true scales, plus bias.

    x_ptr, w_ptr    codes as words of four, rows of K / 4 words
    sx_ptr ... bias_ptr, GROUPS, W_ROWS    as in w8a8_matmul; IN_BLOCKS: both scales change every 128 columns
    KIND      "int8", "fp8_e4m3fn" or "fp8_e5m2", of both
    ROWS      of W that a program has, at most W_ROWS where scales are IN_BLOCKS
    EVEN      K is a multiple of the columns of a step, 512 a warp
    WAITS     as in w8a8_matmul
    """
    KEPT: gl.constexpr = gl.int32 if KIND == "int8" else gl.float32
    C: gl.constexpr = 128 * WARPS
    TILE: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, WARPS], [1, 0])
    OF_ROW: gl.constexpr = gl.SliceLayout(1, TILE)
    words = K // 4
    steps = (words + C - 1) // C
    first = gl.program_id(0) * ROWS
    row = gl.arange(0, ROWS, OF_ROW)[:, None]
    word = gl.arange(0, C, gl.SliceLayout(0, TILE))[None, :]
    w_at = w_ptr + gl.minimum(first + row, N - 1).to(gl.int64) * words + word
    x_at = x_ptr + word
    sw_at = sw_ptr + first // W_ROWS * GROUPS
    w = ()
    for i in gl.static_range(AHEAD):  # the last step again where there are fewer
        k = gl.minimum(i, steps - 1) * C
        w = w + (read(w_at + k, word + k, words, EVEN),)  # noqa: RUF005 (Triton has no starred tuples)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    acc = gl.zeros([ROWS, C], KEPT, TILE)
    whole = steps // AHEAD * AHEAD
    for start in range(0, whole, AHEAD):
        for i in gl.static_range(AHEAD):
            acc = add_step(acc, w[0], x_at, sx_ptr, sw_at, start + i, word, words, GROUPS, True, KIND, IN_BLOCKS, C,
                           EVEN, False)
            k = gl.minimum(start + i + AHEAD, steps - 1) * C
            w = w[1:] + (read(w_at + k, word + k, words, EVEN),)  # noqa: RUF005
    for i in gl.static_range(AHEAD - 1):
        acc = add_step(acc, w[i], x_at, sx_ptr, sw_at, gl.minimum(whole + i, steps - 1), word, words, GROUPS,
                       whole + i < steps, KIND, IN_BLOCKS, C, EVEN, True)
    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
    n = first + gl.arange(0, ROWS, OF_ROW)
    sx, sw, zx, cs, xs, zw = 1.0, 1.0, 0, 0, 0, 0
    if not IN_BLOCKS:
        sx = gl.load(sx_ptr)
        sw = gl.load(sw_ptr + n, mask=n < N, other=0.0)
    if IS_SHIFTED:
        zx = gl.load(zx_ptr)
        cs = gl.load(cs_ptr + n, mask=n < N, other=0)
    if W_SHIFTED:
        xs = gl.load(xs_ptr)
        zw = gl.load(zw_ptr + n, mask=n < N, other=0)
    r = scaled(gl.sum(acc, 1), sx, sw, zx, cs, xs, zw, IS_SHIFTED, W_SHIFTED)
    if HAS_BIAS:
        r += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
    gl.store(out_ptr + n, r.to(out_ptr.dtype.element_ty), mask=n < N)
