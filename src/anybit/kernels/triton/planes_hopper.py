# mypy: ignore-errors
"""Products of "triton-planes" on sm_90 in Gluon, where waits are placed by hand: decoding beside running wgmma.

Triton waits for each wgmma whose left operand comes from registers before it decodes the next field. Here a field is
decoded while the products of those before it run. Same stored layout and same arithmetic as `planes_kernels`; only
codes of 4 bits: integers with float scales of groups (SCALING 1) or rows (0), fp4 with folded scales (2). What arrives
at once is 256 inputs, 32 words a row: one block, or two of 128 inputs.

`few_kernel` does one after the other; several programs on a multiprocessor fill its gaps. All tiles' steps of 256
inputs stand in a line, of which each program has a share, so that programs end together whatever the shape; a tile that
several have is added up by the last of them, in their order. More tokens, for which one program fills a multiprocessor:
`planes_hopper_roles`.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from anybit.kernels.triton.planes_kernels import _MUL_BF16, _MUL_FP16, _bytes, _floats, _nibbles
from anybit.kernels.triton.planes_registers import _MINUS_BF16, _MINUS_FP16, _lacks

# renamed after Triton 3.6
_load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def _of_pair(field: int, magnitude: int, multiply: str, half: str) -> str:
    """`_floats`, times one half of the pair of factors in $3."""
    text = _floats(field, magnitude, multiply.replace("$3", "p"))
    taken = f".reg .b32 p; .reg .b16 l, h; mov.b32 {{l, h}}, $3; mov.b32 p, {{{half}, {half}}}; "
    return "{" + taken + text.removeprefix("{")


def _zeros(type_: str, one: str, minus: str) -> str:
    """-z over what nibbles lack (`_nibbles`), for zero points z < 128: the mantissa of 2 + z * 2^-6 or 2^-9 is z."""
    body = f"or.b32 t, $1, {one}; mov.b32 u, {minus}; mov.b32 v, {one}; fma.rn.{type_}x2 $0, t, u, v;"
    return "{.reg .b32 t, u, v; " + body + "}"


# the PTX of `planes_kernels`, by field, and by half of the pair of factors; factors by byte, and two bytes at a time
_INTEGERS_BF16 = gl.constexpr(tuple(_nibbles(i, "bf16") for i in range(8)))
_INTEGERS_FP16 = gl.constexpr(tuple(_nibbles(i, "f16") for i in range(8)))
_FLOATS_BF16 = gl.constexpr(tuple(_of_pair(i, 6, _MUL_BF16, half) for i in range(8) for half in "lh"))
_FLOATS_FP16 = gl.constexpr(tuple(_of_pair(i, 9, _MUL_FP16, half) for i in range(8) for half in "lh"))
_ZEROS_BF16 = gl.constexpr(_zeros("bf16", "0x40004000", "0xBF80BF80"))
_ZEROS_FP16 = gl.constexpr(_zeros("f16", "0x40004000", "0xBC00BC00"))
_SHIFTED = gl.constexpr(tuple(_bytes(i, "shl.b32 $0, t, 7;") for i in range(4)))
_BIASED = gl.constexpr(tuple(_bytes(i, "mad.lo.u32 $0, t, 16, 0x6F806F80;") for i in range(4)))
_EVEN = "{.reg .b32 t; and.b32 t, $1, 0x00FF00FF; "
_ODD = "{.reg .b32 t; prmt.b32 t, $1, 0, 0x4341; "
_SHIFTED_PAIRS = gl.constexpr(tuple(f"{these}shl.b32 $0, t, 7;}}" for these in (_EVEN, _ODD)))
_BIASED_PAIRS = gl.constexpr(tuple(f"{these}mad.lo.u32 $0, t, 16, 0x6F806F80;}}" for these in (_EVEN, _ODD)))


@gluon.jit
def _decoded(words, pair, f: gl.constexpr, FOLD: gl.constexpr, D: gl.constexpr):
    """Field f of words [BN, P] as D; the pair [BN] is minus a zero point, or has the field's folded scale in a half.

    Not pure, though it is: so it stays between the products that it stands between.
    """
    half: gl.constexpr = f % 8 * 2 + f % 4 // 2
    if gl.bfloat16 == D:
        return gl.inline_asm_elementwise(_FLOATS_BF16[half] if FOLD else _INTEGERS_BF16[f % 8], "=r,r,r,r,r",
                                         [words, pair[:, None]], dtype=gl.bfloat16, is_pure=False, pack=2)
    else:
        return gl.inline_asm_elementwise(_FLOATS_FP16[half] if FOLD else _INTEGERS_FP16[f % 8], "=r,r,r,r,r",
                                         [words, pair[:, None]], dtype=gl.float16, is_pure=False, pack=2)


@gluon.jit
def _factor(word, j: gl.constexpr, SKIND: gl.constexpr, D: gl.constexpr):
    """Byte j of words of folded scales as the factor of fp4 operands, twice in 32 bits: [BN] int32."""
    if SKIND == 2 and gl.bfloat16 == D:
        return gl.inline_asm_elementwise(_BIASED[j], "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)
    else:
        return gl.inline_asm_elementwise(_SHIFTED[j], "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _factors(word, odd: gl.constexpr, SKIND: gl.constexpr, D: gl.constexpr):
    """Bytes 0 and 2 (odd: 1 and 3) of words of folded scales as factors of fp4 operands, two in 32 bits: [BN] int32."""
    if SKIND == 2 and gl.bfloat16 == D:
        return gl.inline_asm_elementwise(_BIASED_PAIRS[odd], "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)
    else:
        return gl.inline_asm_elementwise(_SHIFTED_PAIRS[odd], "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _pair(ss, zs, f: gl.constexpr, P: gl.constexpr, R: gl.constexpr, FOLD: gl.constexpr, SKIND: gl.constexpr,
          ZERO: gl.constexpr, ZEROS: gl.constexpr, BN: gl.constexpr, DOT: gl.constexpr, D: gl.constexpr):
    """What fields f and f + 2 meet on their way to D: folded scales; or field f: minus its zero point."""
    if FOLD:
        return _factors(ss.slice(f // 4 * BN, BN).load(gl.SliceLayout(1, DOT)), f % 2, SKIND, D)
    elif ZEROS:
        zero = zs.slice(f // R * BN, BN).load(gl.SliceLayout(1, DOT)).to(gl.int32)
        return gl.inline_asm_elementwise(_ZEROS_BF16 if gl.bfloat16 == D else _ZEROS_FP16, "=r,r",
                                         [zero | (zero << 16)], dtype=gl.int32, is_pure=True, pack=1)
    else:
        minus: gl.constexpr = _MINUS_BF16[int(ZERO)] if gl.bfloat16 == D else _MINUS_FP16[int(ZERO)]
        return gl.full([BN], minus, gl.int32, gl.SliceLayout(1, DOT))


@gluon.jit
def _copy_x(x_from, x_to, pm, b, x_rows, x_columns, x_stride, M, K, BM: gl.constexpr, EVEN: gl.constexpr):
    """256 inputs b of tile pm of tokens on their way to shared memory; what lies beyond M or K becomes zeros."""
    x_from = x_from + ((pm * BM).to(gl.int64) * x_stride + b * 256)
    counted = (x_rows < M - pm * BM)[:, None]
    if EVEN:
        _load_async(x_to, x_from, mask=counted & (x_columns >= 0)[None, :])
    else:
        _load_async(x_to, x_from, mask=counted & (b * 256 + x_columns < K)[None, :])


@gluon.jit
def _copy_w(
    w_from, s_from, z_from, w_to, s_to, z_to, pn, b, w_columns, wide, z_wide, NP, KP, z_stride, P: gl.constexpr,
    G: gl.constexpr, R: gl.constexpr, SCALING: gl.constexpr, ZEROS: gl.constexpr, BN: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """The words of 256 inputs b of tile pn of rows on their way, and their scales: there since the weight was loaded.

    What lies beyond K becomes zeros.
    """
    w_from = w_from + (pn.to(gl.int64) * (BN * (KP // 8)) + b * 32)
    if EVEN:
        _load_async(w_to, w_from)
    else:
        _load_async(w_to, w_from, mask=(b * 32 + w_columns < KP // 8)[None, :])
    if SCALING == 2:
        at = b * (64 // P) + wide // BN
        _load_async(s_to, s_from + (at * NP + pn * BN), mask=at < KP // (4 * P) if not EVEN else wide >= 0)
    elif SCALING == 1:
        g = b * 256 + wide // BN * (R * P)
        _load_async(s_to, s_from + (g // G * NP + pn * BN), mask=g < KP if not EVEN else wide >= 0)
    if ZEROS:
        g = b * 256 + z_wide // BN * (R * P)
        zero_group = g // G if G > 0 else g * 0
        _load_async(z_to, z_from + (zero_group * z_stride + pn * BN), mask=g < KP if not EVEN else z_wide >= 0)


@gluon.jit
def _store(acc, o_ptr, bias_ptr, pm, pn, rn, M, N, BM: gl.constexpr, BN: gl.constexpr, BIAS: gl.constexpr,
           WARPS: gl.constexpr):
    """Bias and the one rounding; written in runs of rows of W, which lie together in a row of o."""
    RUN: gl.constexpr = 8 if BN < 256 else BN // 32
    OUT: gl.constexpr = gl.BlockedLayout([RUN, 1], [BN // RUN, 32 * RUN // BN], [1, WARPS], [0, 1])
    if BIAS:
        acc += gl.load(bias_ptr + pn * BN + rn, mask=pn * BN + rn < N, other=0.0).to(gl.float32)[:, None]
    out = gl.convert_layout(acc.to(o_ptr.dtype.element_ty), OUT)
    n = gl.arange(0, BN, gl.SliceLayout(1, OUT))
    m = gl.arange(0, BM, gl.SliceLayout(0, OUT))
    mask = (n < N - pn * BN)[:, None] & (m < M - pm * BM)[None, :]
    gl.store(o_ptr + (pm * BM).to(gl.int64) * N + pn * BN + (m[None, :] * N + n[:, None]), out, mask=mask)


@gluon.jit
def _begins(p, SHARE, LONGER):
    """The first step of program p: the first LONGER programs have a step more than SHARE."""
    return p * SHARE + gl.minimum(p, LONGER)


@gluon.jit
def _has(step, SHARE, LONGER):
    """The program that has a step."""
    beyond = step - LONGER * (SHARE + 1)
    return gl.where(beyond < 0, step // (SHARE + 1), LONGER + beyond // SHARE)


@gluon.jit
def _finish(
    acc, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr, factor, tile, pm, pn, BLOCKS, SHARE, LONGER, M, N,
    BM: gl.constexpr, BN: gl.constexpr, MMA: gl.constexpr, SPLIT: gl.constexpr, TOKENS: gl.constexpr,
    BIAS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Factors of rows, bias and rounding; of a tile that several programs have by the last to arrive, in their order.

    A program keeps two parts: of the tile that it begins in, and of another that it ends in.
    """
    rn = gl.arange(0, BN, gl.SliceLayout(1, MMA))
    rm = gl.arange(0, BM, gl.SliceLayout(0, MMA))
    acc = (acc * factor) * gl.load(row_ptr + pn * BN + rn)[:, None]
    if TOKENS:
        acc = acc * gl.load(token_ptr + pm * BM + rm, mask=pm * BM + rm < M, other=0.0)[None, :]
    if SPLIT:
        begin = tile * BLOCKS
        one = _has(begin, SHARE, LONGER)
        another = _has(begin + BLOCKS - 1, SHARE, LONGER)
        if one == another:
            _store(acc, o_ptr, bias_ptr, pm, pn, rn, M, N, BM, BN, BIAS, WARPS)
        else:
            inside = rn[:, None] * BM + rm[None, :]  # a tile's sums lie together
            own = gl.program_id(0) * 2 + (_begins(gl.program_id(0), SHARE, LONGER) < begin).to(gl.int32)
            gl.store(part_ptr + own.to(gl.int64) * (BM * BN) + inside, acc, cache_modifier=".cg")
            _barrier()
            arrived = gl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
            if arrived == another - one:
                gl.store(count_ptr + tile, 0)  # ready for the next call
                total = gl.zeros([BN, BM], gl.float32, MMA)
                for p in range(one, another + 1):
                    other = p * 2 + (_begins(p, SHARE, LONGER) < begin).to(gl.int32)
                    total += gl.load(part_ptr + other.to(gl.int64) * (BM * BN) + inside, cache_modifier=".cg")
                _store(total, o_ptr, bias_ptr, pm, pn, rn, M, N, BM, BN, BIAS, WARPS)
    else:
        _store(acc, o_ptr, bias_ptr, pm, pn, rn, M, N, BM, BN, BIAS, WARPS)


@gluon.jit
def _next(pm, pn, b, blocks, tiles_n):
    """The step after step b of a tile: tiles of rows first."""
    b += 1
    is_over = b == blocks
    b = gl.where(is_over, 0, b)
    pn = gl.where(is_over, pn + 1, pn)
    is_over = pn == tiles_n
    return gl.where(is_over, pm + 1, pm), gl.where(is_over, 0, pn), b


@gluon.jit(do_not_specialize=["M", "BLOCKS", "SHARE", "LONGER"])
def few_kernel(
    x_ptr, c0_ptr, s_ptr, z_ptr, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr,
    M, N, NP, K, KP, x_stride, z_stride, mult, BLOCKS, SHARE, LONGER,
    P: gl.constexpr, G: gl.constexpr, R: gl.constexpr, SCALING: gl.constexpr, SKIND: gl.constexpr, ZERO: gl.constexpr,
    ZEROS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, FLIGHT: gl.constexpr,
    SPLIT: gl.constexpr, TOKENS: gl.constexpr, BIAS: gl.constexpr, EVEN: gl.constexpr, WARPS: gl.constexpr,
    WAITS: gl.constexpr,
):  # fmt: skip
    """o [M, N] = x [M, K] W^T: tiles of BN rows by BM tokens.

    BLOCKS  steps of a tile in the line: those of 256 inputs that it has, and empty ones, where each program has a part
            of one tile alone
    SHARE   steps of a program; the first LONGER programs have one more
    SPLIT   several programs may have parts of a tile
    STAGES  times 256 inputs in shared memory, one of them in use
    FLIGHT  products of fields that may run while the next is decoded, each holding its operand's registers
    WAITS   launched while the kernel before it ends, which it waits for once its first words are on the way; and the
            next kernel may be launched when its sums are done (programmatic dependent launch)
    """
    D: gl.constexpr = x_ptr.dtype.element_ty
    FOLD: gl.constexpr = SCALING == 2
    F: gl.constexpr = 256 // P
    SCALES: gl.constexpr = F // 4 if FOLD else F // R  # words of folded scales, or scales, of a row
    LACKS: gl.constexpr = 1.0 if FOLD else _lacks(0, 4, 0, D)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    # few rows of x: banks are written side by side; more of them: lines are read whole
    X_COPY: gl.constexpr = (gl.BlockedLayout([1, 8], [8, 4], [1, WARPS], [1, 0]) if BM == 8 else
                            gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0]))  # fmt: skip
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    S_COPY: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    Z_COPY: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    X_SHARED: gl.constexpr = gl.NVMMASharedLayout(2 * P, 16, 2)
    W_SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    S_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    blocks = gl.cdiv(KP, 256)
    tiles_n = gl.cdiv(N, BN)
    start = _begins(gl.program_id(0), SHARE, LONGER)
    tile = start // BLOCKS
    b = start - tile * BLOCKS
    pm = tile // tiles_n
    pn = tile - pm * tiles_n
    steps = SHARE + (gl.program_id(0) < LONGER).to(gl.int32)
    if blocks < BLOCKS:
        steps = gl.minimum(steps, blocks - b)
    x_rows = gl.arange(0, BM, gl.SliceLayout(1, X_COPY))
    x_columns = gl.arange(0, 256, gl.SliceLayout(0, X_COPY))
    w_columns = gl.arange(0, 32, gl.SliceLayout(0, W_COPY))
    wide = gl.arange(0, SCALES * BN, S_COPY)  # scales, one run of rows after the other
    z_wide = gl.arange(0, SCALES * BN, Z_COPY)
    x_from = x_ptr + x_rows.to(gl.int64)[:, None] * x_stride + x_columns[None, :]
    w_from = c0_ptr + gl.arange(0, BN, gl.SliceLayout(1, W_COPY))[:, None] * (KP // 8) + w_columns[None, :]
    s_from = s_ptr + wide % BN
    z_from = z_ptr + z_wide % BN
    x_smem = gl.allocate_shared_memory(D, [STAGES, BM, 256], X_SHARED)
    w_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BN, 32], W_SHARED)
    s_smem = gl.allocate_shared_memory(s_ptr.dtype.element_ty, [STAGES, SCALES * BN], S_SHARED)
    z_smem = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [STAGES, SCALES * BN if ZEROS else 32], S_SHARED)

    lm, ln, lb = pm, pn, b  # of the step that is copied next
    for i in gl.static_range(STAGES - 1):
        if i < steps:
            _copy_w(w_from, s_from, z_from, w_smem.index(i), s_smem.index(i), z_smem.index(i), ln, lb, w_columns, wide,
                    z_wide, NP, KP, z_stride, P, G, R, SCALING, ZEROS, BN, EVEN)
        lm, ln, lb = _next(lm, ln, lb, blocks, tiles_n)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    lm, ln, lb = pm, pn, b
    for i in gl.static_range(STAGES - 1):
        if i < steps:
            _copy_x(x_from, x_smem.index(i), lm, lb, x_rows, x_columns, x_stride, M, K, BM, EVEN)
        async_copy.commit_group()
        lm, ln, lb = _next(lm, ln, lb, blocks, tiles_n)
    acc = gl.zeros([BN, BM], gl.float32, MMA)
    part = acc
    slot = 0
    for step in range(steps):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        if step + STAGES - 1 < steps:
            into = (slot + STAGES - 1) % STAGES
            _copy_x(x_from, x_smem.index(into), lm, lb, x_rows, x_columns, x_stride, M, K, BM, EVEN)
            _copy_w(w_from, s_from, z_from, w_smem.index(into), s_smem.index(into), z_smem.index(into), ln, lb,
                    w_columns, wide, z_wide, NP, KP, z_stride, P, G, R, SCALING, ZEROS, BN, EVEN)
        async_copy.commit_group()
        lm, ln, lb = _next(lm, ln, lb, blocks, tiles_n)
        xs = x_smem.index(slot)
        ws = w_smem.index(slot)
        ss = s_smem.index(slot)
        zs = z_smem.index(slot)
        for f in gl.static_range(F):
            if f % 8 == 0:
                words = ws.slice(f // 8 * P, P, dim=1).load(DOT)
            if FOLD and f % 4 == 0:
                even = _pair(ss, zs, f, P, R, FOLD, SKIND, ZERO, ZEROS, BN, DOT, D)
                odd = _pair(ss, zs, f + 1, P, R, FOLD, SKIND, ZERO, ZEROS, BN, DOT, D)
            elif not FOLD and f % R == 0:
                even = _pair(ss, zs, f, P, R, FOLD, SKIND, ZERO, ZEROS, BN, DOT, D)
                odd = even
            a = _decoded(words, even if f % 2 == 0 else odd, f, FOLD, D)
            xf = xs.slice(f * P, P, dim=1).permute((1, 0))
            if SCALING == 1:
                run = warpgroup_mma(a, xf, part, use_acc=f % R > 0, is_async=True)
                part = warpgroup_mma_wait(0 if f % R == R - 1 else FLIGHT, deps=[run])
                if f % R == R - 1:
                    s = ss.slice(f // R * BN, BN).load(gl.SliceLayout(1, MMA)).to(gl.float32)
                    acc += part * s[:, None]
            else:
                run = warpgroup_mma(a, xf, acc, is_async=True)
                acc = warpgroup_mma_wait(0 if f == F - 1 else FLIGHT, deps=[run])
        slot = (slot + 1) % STAGES
        is_last = step + 1 == steps
        if SPLIT:
            if (b + 1 == blocks) | is_last:
                if WAITS:  # noqa: SIM102 (known when this is compiled, unlike the other)
                    if is_last:
                        tl.extra.cuda.gdc_launch_dependents()
                _finish(acc, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr, mult * LACKS, tile, pm, pn,
                        BLOCKS, SHARE, LONGER, M, N, BM, BN, MMA, SPLIT, TOKENS, BIAS, WARPS)
                acc = gl.zeros([BN, BM], gl.float32, MMA)
                tile += 1
            pm, pn, b = _next(pm, pn, b, blocks, tiles_n)
    if not SPLIT:
        if WAITS:
            tl.extra.cuda.gdc_launch_dependents()
        _finish(acc, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr, mult * LACKS, tile, pm, pn, BLOCKS,
                SHARE, LONGER, M, N, BM, BN, MMA, SPLIT, TOKENS, BIAS, WARPS)
