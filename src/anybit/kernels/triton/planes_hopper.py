# mypy: ignore-errors
"""Products of "triton-planes" on sm_90 in Gluon, where waits are placed by hand: decoding beside running wgmma.

Triton waits for each wgmma whose left operand comes from registers before it decodes the next field. Here a field is
decoded while the products of those before it run. Same stored layout, same decoding and same arithmetic as
`planes_kernels`; only codes of 4 bits: integers with float scales of groups (SCALING 1) or rows (0), fp4 with folded
scales (2). What arrives at once is 256 inputs, 32 words a row: one block, or two of 128 inputs.

`few_kernel` does one after the other; several programs on a multiprocessor fill its gaps. `many_kernel` has a tile so
large that one program fills it, and lets the next inputs arrive, and their first field be decoded, while the last one
multiplies.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from anybit.kernels.triton.planes_kernels import (
    _ADD_BF16,
    _ADD_FP16,
    _MUL_BF16,
    _MUL_FP16,
    _NEGATIVE_BF16,
    _NEGATIVE_FP16,
    _bytes,
    _floats,
    _integers,
)

# renamed after Triton 3.6
_load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

# the PTX of `planes_kernels`, by field and by byte
_INTEGERS_BF16 = gl.constexpr(tuple(_integers(i, "0x43004300", _ADD_BF16) for i in range(8)))
_INTEGERS_FP16 = gl.constexpr(tuple(_integers(i, "0x64006400", _ADD_FP16) for i in range(8)))
_FLOATS_BF16 = gl.constexpr(tuple(_floats(i, 6, _MUL_BF16) for i in range(8)))
_FLOATS_FP16 = gl.constexpr(tuple(_floats(i, 9, _MUL_FP16) for i in range(8)))
_SHIFTED = gl.constexpr(tuple(_bytes(i, "shl.b32 $0, t, 7;") for i in range(4)))
_BIASED = gl.constexpr(tuple(_bytes(i, "mad.lo.u32 $0, t, 16, 0x6F806F80;") for i in range(4)))


@gluon.jit
def _decoded(words, pair, i: gl.constexpr, FOLD: gl.constexpr, D: gl.constexpr):
    """Nibble i of words [BN, P] as D, with the pair (minus a zero point on its base, or a folded scale) [BN] applied.

    Not pure, though it is: so it stays between the products that it stands between.
    """
    if gl.bfloat16 == D:
        return gl.inline_asm_elementwise(_FLOATS_BF16[i] if FOLD else _INTEGERS_BF16[i], "=r,r,r,r,r",
                                         [words, pair[:, None]], dtype=gl.bfloat16, is_pure=False, pack=2)
    else:
        return gl.inline_asm_elementwise(_FLOATS_FP16[i] if FOLD else _INTEGERS_FP16[i], "=r,r,r,r,r",
                                         [words, pair[:, None]], dtype=gl.float16, is_pure=False, pack=2)


@gluon.jit
def _factor(word, j: gl.constexpr, SKIND: gl.constexpr, D: gl.constexpr):
    """Byte j of words of folded scales as the factor of fp4 operands, twice in 32 bits: [BN] int32."""
    if SKIND == 2 and gl.bfloat16 == D:
        return gl.inline_asm_elementwise(_BIASED[j], "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)
    else:
        return gl.inline_asm_elementwise(_SHIFTED[j], "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _scale_words(ss, P: gl.constexpr, FOLD: gl.constexpr, BN: gl.constexpr, DOT: gl.constexpr):
    """The words of folded scales of 256 inputs, each [BN]: two, or four where groups are of 16."""
    if FOLD:
        first = ss.slice(0, BN).load(gl.SliceLayout(1, DOT))
        second = ss.slice(BN, BN).load(gl.SliceLayout(1, DOT))
        if P == 16:
            third = ss.slice(2 * BN, BN).load(gl.SliceLayout(1, DOT))
            fourth = ss.slice(3 * BN, BN).load(gl.SliceLayout(1, DOT))
            return first, second, third, fourth
        else:
            return first, second, first, second
    else:
        return 0, 0, 0, 0


@gluon.jit
def _pair(s0, s1, s2, s3, zs, f: gl.constexpr, R: gl.constexpr, FOLD: gl.constexpr, SKIND: gl.constexpr,
          ZERO: gl.constexpr, ZEROS: gl.constexpr, BN: gl.constexpr, DOT: gl.constexpr, D: gl.constexpr):
    """What field f meets on its way to D: folded scales, or minus zero points on the base of integers."""
    if FOLD:
        return _factor(s0 if f < 4 else s1 if f < 8 else s2 if f < 12 else s3, f % 4, SKIND, D)
    else:
        if ZEROS:
            zero = zs.slice(f // R * BN, BN).load(gl.SliceLayout(1, DOT)).to(gl.int32)
        else:
            zero = gl.full([BN], ZERO, gl.float32, gl.SliceLayout(1, DOT)).to(gl.int32)
        return (zero | (zero << 16)) + (_NEGATIVE_FP16 if gl.float16 == D else _NEGATIVE_BF16)


@gluon.jit
def _copy(
    x_from, x_beside, w_from, w_beside, s_from, z_from, x_to, w_to, s_to, z_to, b, h: gl.constexpr, comes, counted,
    x_columns, w_columns, wide, z_wide, K, NP, KP, z_stride, P: gl.constexpr, G: gl.constexpr, R: gl.constexpr,
    XS: gl.constexpr, SCALING: gl.constexpr, ZEROS: gl.constexpr, BN: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Step h of 256 inputs b on its way to shared memory: x, and with the first step the words and scales.

    Masks instead of a branch: products may be running. What lies beyond K, or does not come, becomes zeros. What stands
    `beside` an address is added last.
    """
    _copy_x(x_from, x_beside, x_to, b, h, comes, counted, x_columns, K, XS, EVEN)
    _copy_w(w_from, w_beside, s_from, z_from, w_to, s_to, z_to, b, h, comes, w_columns, wide, z_wide, NP, KP, z_stride,
            P, G, R, XS, SCALING, ZEROS, BN, EVEN)


@gluon.jit
def _copy_x(x_from, x_beside, x_to, b, h: gl.constexpr, comes, counted, x_columns, K, XS: gl.constexpr,
            EVEN: gl.constexpr):
    """The half of `_copy` that other kernels make."""
    k = b * 256 + h * (256 // XS)
    if EVEN:
        _load_async(x_to, x_from + k + x_beside, mask=counted & comes)
    else:
        _load_async(x_to, x_from + k + x_beside, mask=counted & ((k + x_columns < K) & comes)[None, :])


@gluon.jit
def _copy_w(
    w_from, w_beside, s_from, z_from, w_to, s_to, z_to, b, h: gl.constexpr, comes, w_columns, wide, z_wide, NP, KP,
    z_stride, P: gl.constexpr, G: gl.constexpr, R: gl.constexpr, XS: gl.constexpr, SCALING: gl.constexpr,
    ZEROS: gl.constexpr, BN: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """The half of `_copy` that is there since the weight was loaded."""
    k = b * 256 + h * (256 // XS)
    if h == 0:
        if EVEN:
            _load_async(w_to, w_from + b * 32 + w_beside, mask=((w_columns >= 0) & comes)[None, :])
        else:
            _load_async(w_to, w_from + b * 32 + w_beside, mask=((b * 32 + w_columns < KP // 8) & comes)[None, :])
        if SCALING == 2:
            at = b * (64 // P) + wide // BN
            _load_async(s_to, s_from + at * NP, mask=((at < KP // (4 * P)) if not EVEN else (wide >= 0)) & comes)
        elif SCALING == 1:
            g = k + wide // BN * (R * P)
            _load_async(s_to, s_from + g // G * NP, mask=((g < KP) if not EVEN else (wide >= 0)) & comes)
        if ZEROS:
            g = k + z_wide // BN * (R * P)
            zero_group = g // G if G > 0 else g * 0
            _load_async(z_to, z_from + zero_group * z_stride, mask=((g < KP) if not EVEN else (z_wide >= 0)) & comes)


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
def _finish(
    acc, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr, mult, tile, pm, pn, M, N, BM: gl.constexpr,
    BN: gl.constexpr, MMA: gl.constexpr, SPLIT: gl.constexpr, TOKENS: gl.constexpr, BIAS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Factors of rows, bias and rounding; with split-K by the last program to arrive, which adds the parts in order."""
    rn = gl.arange(0, BN, gl.SliceLayout(1, MMA))
    rm = gl.arange(0, BM, gl.SliceLayout(0, MMA))
    acc = (acc * mult) * gl.load(row_ptr + pn * BN + rn)[:, None]
    if TOKENS:
        acc = acc * gl.load(token_ptr + pm * BM + rm, mask=pm * BM + rm < M, other=0.0)[None, :]
    if SPLIT:  # a tile's sums lie together
        inside = rn[:, None] * BM + rm[None, :]
        size = gl.num_programs(0).to(gl.int64) * (BM * BN)
        own = part_ptr + tile.to(gl.int64) * (BM * BN)
        gl.store(own + gl.program_id(1) * size + inside, acc, cache_modifier=".cg")
        _barrier()
        arrived = gl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
        if arrived == gl.num_programs(1) - 1:
            gl.store(count_ptr + tile, 0)  # ready for the next call
            total = gl.zeros([BN, BM], gl.float32, MMA)
            for p in range(gl.num_programs(1)):
                total += gl.load(own + p * size + inside, cache_modifier=".cg")
            _store(total, o_ptr, bias_ptr, pm, pn, rn, M, N, BM, BN, BIAS, WARPS)
    else:
        _store(acc, o_ptr, bias_ptr, pm, pn, rn, M, N, BM, BN, BIAS, WARPS)


@gluon.jit(do_not_specialize=["M"])
def few_kernel(
    x_ptr, c0_ptr, s_ptr, z_ptr, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr,
    M, N, NP, K, KP, x_stride, z_stride, mult,
    P: gl.constexpr, G: gl.constexpr, R: gl.constexpr, SCALING: gl.constexpr, SKIND: gl.constexpr, ZERO: gl.constexpr,
    ZEROS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, FLIGHT: gl.constexpr,
    SPLIT: gl.constexpr, TOKENS: gl.constexpr, BIAS: gl.constexpr, EVEN: gl.constexpr, WARPS: gl.constexpr,
    WAITS: gl.constexpr,
):  # fmt: skip
    """o [M, N] = x [M, K] W^T: a tile of BN rows by BM tokens, programs of dimension 1 share K.

    STAGES  times 256 inputs in shared memory, one of them in use
    FLIGHT  products of fields that may run while the next is decoded, each holding its operand's registers
    WAITS   launched while the kernel before it ends, which it waits for once its first words are on the way; and the
            next kernel may be launched when its sums are done (programmatic dependent launch)
    """
    D: gl.constexpr = x_ptr.dtype.element_ty
    FOLD: gl.constexpr = SCALING == 2
    F: gl.constexpr = 256 // P
    SCALES: gl.constexpr = F // 4 if FOLD else F // R  # words of folded scales, or scales, of a row
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    S_COPY: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    Z_COPY: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    X_SHARED: gl.constexpr = gl.NVMMASharedLayout(2 * P, 16, 2)
    W_SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    S_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile = gl.program_id(0)
    tiles_m = gl.cdiv(M, BM)
    pm = tile % tiles_m
    pn = tile // tiles_m
    per = gl.cdiv(gl.cdiv(KP, 256), gl.num_programs(1))
    first = gl.program_id(1) * per
    last = gl.minimum(first + per, gl.cdiv(KP, 256))
    x_rows = gl.arange(0, BM, gl.SliceLayout(1, X_COPY))
    x_columns = gl.arange(0, 256, gl.SliceLayout(0, X_COPY))
    x_from = x_ptr + (pm * BM + x_rows).to(gl.int64)[:, None] * x_stride + x_columns[None, :]
    counted = (x_rows < M - pm * BM)[:, None] & (x_columns < 256)[None, :]
    w_columns = gl.arange(0, 32, gl.SliceLayout(0, W_COPY))
    w_rows = pn * BN + gl.arange(0, BN, gl.SliceLayout(1, W_COPY))
    w_from = c0_ptr + w_rows.to(gl.int64)[:, None] * (KP // 8) + w_columns[None, :]
    wide = gl.arange(0, SCALES * BN, S_COPY)  # scales, one run of rows after the other
    z_wide = gl.arange(0, SCALES * BN, Z_COPY)
    s_from = s_ptr + pn * BN + wide % BN
    z_from = z_ptr + pn * BN + z_wide % BN
    x_smem = gl.allocate_shared_memory(D, [STAGES, BM, 256], X_SHARED)
    w_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BN, 32], W_SHARED)
    s_smem = gl.allocate_shared_memory(s_ptr.dtype.element_ty, [STAGES, SCALES * BN], S_SHARED)
    z_smem = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [STAGES, SCALES * BN if ZEROS else 32], S_SHARED)

    for i in gl.static_range(STAGES - 1):
        if first + i < last:
            _copy_w(w_from, 0, s_from, z_from, w_smem.index(i), s_smem.index(i), z_smem.index(i), first + i, 0, True,
                    w_columns, wide, z_wide, NP, KP, z_stride, P, G, R, 1, SCALING, ZEROS, BN, EVEN)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    for i in gl.static_range(STAGES - 1):
        if first + i < last:
            _copy_x(x_from, 0, x_smem.index(i), first + i, 0, True, counted, x_columns, K, 1, EVEN)
        async_copy.commit_group()
    acc = gl.zeros([BN, BM], gl.float32, MMA)
    part = acc
    slot = 0
    for b in range(first, last):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        if b + STAGES - 1 < last:
            into = (slot + STAGES - 1) % STAGES
            _copy(x_from, 0, w_from, 0, s_from, z_from, x_smem.index(into), w_smem.index(into), s_smem.index(into),
                  z_smem.index(into), b + STAGES - 1, 0, True, counted, x_columns, w_columns, wide, z_wide, K, NP, KP,
                  z_stride, P, G, R, 1, SCALING, ZEROS, BN, EVEN)
        async_copy.commit_group()
        xs = x_smem.index(slot)
        ws = w_smem.index(slot)
        ss = s_smem.index(slot)
        zs = z_smem.index(slot)
        s0, s1, s2, s3 = _scale_words(ss, P, FOLD, BN, DOT)
        for f in gl.static_range(F):
            if f % 8 == 0:
                words = ws.slice(f // 8 * P, P, dim=1).load(DOT)
            pair = _pair(s0, s1, s2, s3, zs, f, R, FOLD, SKIND, ZERO, ZEROS, BN, DOT, D)
            a = _decoded(words, pair, f % 8, FOLD, D)
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
    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
    _finish(acc, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr, mult, tile, pm, pn, M, N, BM, BN, MMA, SPLIT,
            TOKENS, BIAS, WARPS)


@gluon.jit(do_not_specialize=["M"])
def many_kernel(
    x_ptr, c0_ptr, s_ptr, z_ptr, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr,
    M, N, NP, K, KP, x_stride, z_stride, mult,
    P: gl.constexpr, G: gl.constexpr, R: gl.constexpr, SCALING: gl.constexpr, SKIND: gl.constexpr, ZERO: gl.constexpr,
    ZEROS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, XS: gl.constexpr, STAGES: gl.constexpr,
    FLIGHT: gl.constexpr, SPLIT: gl.constexpr, TOKENS: gl.constexpr, BIAS: gl.constexpr, EVEN: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """o [M, N] = x [M, K] W^T: a tile of BN rows by BM tokens, programs of dimension 1 share K.

    XS      steps in which x of 256 inputs arrives
    STAGES  steps in shared memory: one is multiplied, one was, the others are under way
    FLIGHT  as in `few_kernel`
    """
    D: gl.constexpr = x_ptr.dtype.element_ty
    FOLD: gl.constexpr = SCALING == 2
    F: gl.constexpr = 256 // P
    FS: gl.constexpr = F // XS  # fields of a step
    WS: gl.constexpr = (STAGES + XS - 2) // XS + 1  # of 256 inputs each, the words in shared memory
    SCALES: gl.constexpr = F // 4 if FOLD else F // R
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [XS, 32 // XS], [WARPS, 1], [1, 0])
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    S_COPY: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    Z_COPY: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    X_SHARED: gl.constexpr = gl.NVMMASharedLayout(2 * P, 16, 2)
    W_SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    S_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile = gl.program_id(0)
    tiles_m = gl.cdiv(M, BM)
    pm = tile % tiles_m
    pn = tile // tiles_m
    per = gl.cdiv(gl.cdiv(KP, 256), gl.num_programs(1))
    first = gl.program_id(1) * per
    last = gl.minimum(first + per, gl.cdiv(KP, 256))
    # one address each, and offsets of 32 bits beside it: pointers of 64 bits would take the registers of the sums
    x_rows = gl.arange(0, BM, gl.SliceLayout(1, X_COPY))
    x_columns = gl.arange(0, 256 // XS, gl.SliceLayout(0, X_COPY))
    x_from = x_ptr + (pm * BM).to(gl.int64) * x_stride
    x_offsets = x_rows[:, None] * x_stride + x_columns[None, :]
    counted = (x_rows < M - pm * BM)[:, None] & (x_columns < 256)[None, :]
    w_columns = gl.arange(0, 32, gl.SliceLayout(0, W_COPY))
    w_from = c0_ptr + (pn * BN).to(gl.int64) * (KP // 8)
    w_offsets = gl.arange(0, BN, gl.SliceLayout(1, W_COPY))[:, None] * (KP // 8) + w_columns[None, :]
    wide = gl.arange(0, SCALES * BN, S_COPY)
    z_wide = gl.arange(0, SCALES * BN, Z_COPY)
    s_from = s_ptr + pn * BN + wide % BN
    z_from = z_ptr + pn * BN + z_wide % BN
    x_smem = gl.allocate_shared_memory(D, [STAGES, BM, 256 // XS], X_SHARED)
    w_smem = gl.allocate_shared_memory(gl.int32, [WS, BN, 32], W_SHARED)
    s_smem = gl.allocate_shared_memory(s_ptr.dtype.element_ty, [WS, SCALES * BN], S_SHARED)
    z_smem = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [WS, SCALES * BN if ZEROS else 32], S_SHARED)

    for i in gl.static_range(STAGES - 1):
        _copy(x_from, x_offsets, w_from, w_offsets, s_from, z_from, x_smem.index(i), w_smem.index(i // XS),
              s_smem.index(i // XS), z_smem.index(i // XS), first + i // XS, i % XS, first + i // XS < last, counted,
              x_columns, w_columns, wide, z_wide, K, NP, KP, z_stride, P, G, R, XS, SCALING, ZEROS, BN, EVEN)
        async_copy.commit_group()
    acc = gl.zeros([BN, BM], gl.float32, MMA)
    part = acc
    slot = 0
    word_slot = 0
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    xs = x_smem.index(0)
    ws = w_smem.index(0)
    ss = s_smem.index(0)
    zs = z_smem.index(0)
    words = ws.slice(0, P, dim=1).load(DOT)
    s0, s1, s2, s3 = _scale_words(ss, P, FOLD, BN, DOT)
    pair = _pair(s0, s1, s2, s3, zs, 0, R, FOLD, SKIND, ZERO, ZEROS, BN, DOT, D)
    a = _decoded(words, pair, 0, FOLD, D)
    for b in range(first, last):
        for f in gl.static_range(F):
            # field f multiplies
            xf = xs.slice(f % FS * P, P, dim=1).permute((1, 0))
            if SCALING == 1:
                run = warpgroup_mma(a, xf, part, use_acc=f % R > 0, is_async=True)
                if f % R == 0:
                    s = ss.slice(f // R * BN, BN).load(gl.SliceLayout(1, MMA)).to(gl.float32)
            else:
                run = warpgroup_mma(a, xf, acc, is_async=True)
            # meanwhile the next step arrives, and the next field is decoded
            if f % FS == FS - 1:
                async_copy.wait_group(STAGES - 3)
                fence_async_shared()
                into = (word_slot + (f // FS + STAGES - 1) // XS) % WS
                c = b + (f // FS + STAGES - 1) // XS
                _copy(x_from, x_offsets, w_from, w_offsets, s_from, z_from,
                      x_smem.index((slot + STAGES - 1) % STAGES), w_smem.index(into), s_smem.index(into),
                      z_smem.index(into), c, (f // FS + STAGES - 1) % XS, c < last, counted, x_columns, w_columns, wide,
                      z_wide, K, NP, KP, z_stride, P, G, R, XS, SCALING, ZEROS, BN, EVEN)
                async_copy.commit_group()
                slot = (slot + 1) % STAGES
                xs = x_smem.index(slot)
                if f == F - 1:
                    word_slot = (word_slot + 1) % WS
                    ws = w_smem.index(word_slot)
                    ss = s_smem.index(word_slot)
                    zs = z_smem.index(word_slot)
                    s0, s1, s2, s3 = _scale_words(ss, P, FOLD, BN, DOT)
            if f % 8 == 7:
                words = ws.slice((f + 1) % F // 8 * P, P, dim=1).load(DOT)
            pair = _pair(s0, s1, s2, s3, zs, (f + 1) % F, R, FOLD, SKIND, ZERO, ZEROS, BN, DOT, D)
            a = _decoded(words, pair, (f + 1) % 8, FOLD, D)
            # nothing runs beyond a step: the compiler would wait for every product
            if SCALING == 1:
                part = warpgroup_mma_wait(0 if f % FS == FS - 1 or f % R == R - 1 else FLIGHT, deps=[run])
                if f % R == R - 1:
                    acc += part * s[:, None]
            else:
                acc = warpgroup_mma_wait(0 if f % FS == FS - 1 else FLIGHT, deps=[run])
    # steps beyond the last one arrive as zeros: not in memory that the results pass through
    async_copy.wait_group(0)
    _barrier()
    _finish(acc, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr, mult, tile, pm, pn, M, N, BM, BN, MMA, SPLIT,
            TOKENS, BIAS, WARPS)
