# mypy: ignore-errors
"""The product of "triton-planes" on sm_90 for more than a few tokens, in Gluon: decoding beside running wgmma.

Triton waits for each wgmma whose left operand comes from registers before it decodes the next field. Here the waits
are placed by hand: a field is decoded while the products of those before it run, and sums of one group are scaled
while the next group multiplies. Same stored layout, same arithmetic and same order of parts as `planes_kernels`.
Only 4-bit codes: integers with float scales by group or row (FOLD 0), fp4 with folded scales (FOLD 1).
"""

from __future__ import annotations

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
    """Field i of words [BN, P] as D, with the pair (a zero point on its base, or a folded scale) [BN] applied.

    Not pure, though it is: so it stays between the products that it stands between.
    """
    if D == gl.bfloat16:
        return gl.inline_asm_elementwise(_FLOATS_BF16[i] if FOLD else _INTEGERS_BF16[i], "=r,r,r,r,r", [words, pair[:, None]],
                                         dtype=gl.bfloat16, is_pure=False, pack=2)
    else:
        return gl.inline_asm_elementwise(_FLOATS_FP16[i] if FOLD else _INTEGERS_FP16[i], "=r,r,r,r,r", [words, pair[:, None]],
                                         dtype=gl.float16, is_pure=False, pack=2)


@gluon.jit
def _factor(word, j: gl.constexpr, SKIND: gl.constexpr, D: gl.constexpr):
    """Byte j of words of folded scales as the factor of fp4 operands, twice in 32 bits: [BN] int32."""
    if SKIND == 2 and D == gl.bfloat16:
        return gl.inline_asm_elementwise(_BIASED[j], "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)
    else:
        return gl.inline_asm_elementwise(_SHIFTED[j], "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _pair(first, second, zs, f: gl.constexpr, R: gl.constexpr, FOLD: gl.constexpr, SKIND: gl.constexpr,
          ZERO: gl.constexpr, ZEROS: gl.constexpr, BN: gl.constexpr, DOT: gl.constexpr, D: gl.constexpr):
    """What field f of a block meets on its way to D: folded scales, or minus zero points on the base of integers."""
    if FOLD:
        return _factor(first if f < 4 else second, f % 4, SKIND, D)
    else:
        if ZEROS:
            zero = zs.slice(f // R * BN, BN).load(gl.SliceLayout(1, DOT)).to(gl.int32)
        else:
            zero = gl.full([BN], ZERO, gl.float32, gl.SliceLayout(1, DOT)).to(gl.int32)
        return (zero | (zero << 16)) + (_NEGATIVE_FP16 if D == gl.float16 else _NEGATIVE_BF16)


@gluon.jit
def _copy(
    x_from, x_offsets, w_from, w_offsets, s_from, z_from, x_to, w_to, s_to, z_to, b, last, h: gl.constexpr, counted,
    x_columns, wide, z_wide, K, NP, z_stride, P: gl.constexpr, G: gl.constexpr, R: gl.constexpr, XS: gl.constexpr,
    SCALING: gl.constexpr, ZEROS: gl.constexpr, BN: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Step h of block b on its way to shared memory: x, and with the first step the block's words and scales.

    Masks instead of a branch: products are running.
    """
    k = b * (8 * P) + h * (8 * P // XS)
    if EVEN:
        _load_async(x_to, x_from + k + x_offsets, mask=counted & (b < last))
    else:
        _load_async(x_to, x_from + k + x_offsets, mask=counted & ((k + x_columns < K) & (b < last))[None, :])
    if h == 0:
        _load_async(w_to, w_from + b * P + w_offsets, mask=(w_offsets >= 0) & (b < last))
        if SCALING == 2:
            _load_async(s_to, s_from + ((b * 2 + wide // BN) * NP + wide % BN), mask=(wide >= 0) & (b < last))
        elif SCALING == 1:
            _load_async(s_to, s_from + ((k + wide // BN * (R * P)) // G * NP + wide % BN),
                        mask=(wide >= 0) & (b < last))
        if ZEROS:
            g = (k + z_wide // BN * (R * P)) // G if G > 0 else z_wide * 0
            _load_async(z_to, z_from + (g * z_stride + z_wide % BN), mask=(z_wide >= 0) & (b < last))


@gluon.jit
def _store(acc, o_ptr, bias_ptr, pm, pn, rn, M, N, BM: gl.constexpr, BN: gl.constexpr, BIAS: gl.constexpr,
           num_warps: gl.constexpr):
    """Bias and the one rounding; written in runs of rows of W, which lie together in a row of o."""
    RUN: gl.constexpr = 8 if BN < 256 else BN // 32
    OUT: gl.constexpr = gl.BlockedLayout([RUN, 1], [BN // RUN, 32 * RUN // BN], [1, num_warps], [0, 1])
    if BIAS:
        acc += gl.load(bias_ptr + pn * BN + rn, mask=pn * BN + rn < N, other=0.0).to(gl.float32)[:, None]
    out = gl.convert_layout(acc.to(o_ptr.dtype.element_ty), OUT)
    n = gl.arange(0, BN, gl.SliceLayout(1, OUT))
    m = gl.arange(0, BM, gl.SliceLayout(0, OUT))
    mask = (n < N - pn * BN)[:, None] & (m < M - pm * BM)[None, :]
    gl.store(o_ptr + (pm * BM).to(gl.int64) * N + pn * BN + (m[None, :] * N + n[:, None]), out, mask=mask)


@gluon.jit(do_not_specialize=["M"])
def hopper_kernel(
    x_ptr, c0_ptr, s_ptr, z_ptr, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr,
    M, N, NP, K, KP, x_stride, z_stride, mult,
    P: gl.constexpr, G: gl.constexpr, R: gl.constexpr, SCALING: gl.constexpr, SKIND: gl.constexpr, ZERO: gl.constexpr,
    ZEROS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, XS: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, FLIGHT: gl.constexpr, SPLIT: gl.constexpr, TOKENS: gl.constexpr, BIAS: gl.constexpr, EVEN: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """o [M, N] = x [M, K] W^T: a tile of BN rows by BM tokens, SPLIT programs along K.

    XS      steps in which a block's x arrives
    STAGES  steps in shared memory
    AHEAD   two sums of groups in turn
    FLIGHT  products of fields that may still run when the next is decoded, each holding its operand's registers
    """
    D: gl.constexpr = x_ptr.dtype.element_ty
    HALF: gl.constexpr = D == gl.float16
    F: gl.constexpr = 8
    FS: gl.constexpr = F // XS  # fields of a step
    BK: gl.constexpr = F * P
    FOLD: gl.constexpr = SCALING == 2
    WS: gl.constexpr = (STAGES + XS - 2) // XS + 1  # blocks of words in shared memory
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BM, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 * XS // P, P // XS], [num_warps, 1], [1, 0])
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [128 // P, P // 4], [num_warps, 1], [1, 0])
    S_COPY: gl.constexpr = gl.BlockedLayout([2], [32], [num_warps], [0])
    Z_COPY: gl.constexpr = gl.BlockedLayout([4], [32], [num_warps], [0])
    X_SHARED: gl.constexpr = gl.NVMMASharedLayout(2 * P, 16, 2)
    W_SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 32 // P, P // 8, [1, 0])
    S_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SCALES: gl.constexpr = 2 if FOLD else F // R  # words of folded scales, or scales, that a row has in a block

    tile = gl.program_id(0)
    tiles_m = gl.cdiv(M, BM)
    pm = tile % tiles_m
    pn = tile // tiles_m
    blocks = KP // BK
    per = gl.cdiv(blocks, gl.num_programs(1))
    first = gl.program_id(1) * per
    last = gl.minimum(first + per, blocks)

    # one address each, and offsets of 32 bits beside it: pointers of 64 bits would take the registers of the sums
    x_rows = gl.arange(0, BM, gl.SliceLayout(1, X_COPY))
    x_columns = gl.arange(0, BK // XS, gl.SliceLayout(0, X_COPY))
    x_from = x_ptr + (pm * BM).to(gl.int64) * x_stride
    x_offsets = x_rows[:, None] * x_stride + x_columns[None, :]
    counted = (x_rows < M - pm * BM)[:, None] & (x_columns < BK)[None, :]
    w_from = c0_ptr + (pn * BN).to(gl.int64) * (blocks * P)
    w_offsets = gl.arange(0, BN, gl.SliceLayout(1, W_COPY))[:, None] * (blocks * P) + gl.arange(
        0, P, gl.SliceLayout(0, W_COPY))[None, :]
    wide = gl.arange(0, SCALES * BN, S_COPY)  # scales of a block, one run of rows after the other
    z_wide = gl.arange(0, SCALES * BN, Z_COPY)

    x_smem = gl.allocate_shared_memory(D, [STAGES, BM, BK // XS], X_SHARED)
    w_smem = gl.allocate_shared_memory(gl.int32, [WS, BN, P], W_SHARED)
    s_smem = gl.allocate_shared_memory(s_ptr.dtype.element_ty, [WS, SCALES * BN], S_SHARED)
    z_smem = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [WS, SCALES * BN if ZEROS else 32], S_SHARED)

    for i in gl.static_range(STAGES - 1):
        _copy(x_from, x_offsets, w_from, w_offsets, s_ptr + pn * BN, z_ptr + pn * BN, x_smem.index(i), w_smem.index(i // XS), s_smem.index(i // XS),
              z_smem.index(i // XS), first + i // XS, last, i % XS, counted, x_columns, wide, z_wide, K, NP,
              z_stride, P, G, R, XS, SCALING, ZEROS, BN, EVEN)
        async_copy.commit_group()

    acc = gl.zeros([BN, BM], gl.float32, MMA)
    part = acc
    other = acc
    s_before = gl.zeros([BN], gl.float32, gl.SliceLayout(1, MMA))
    slot = 0
    block_slot = 0
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    xs = x_smem.index(0)
    words = w_smem.index(0).load(DOT)
    ss = s_smem.index(0)
    zs = z_smem.index(0)
    low = words
    high = words
    if FOLD:
        low = ss.slice(0, BN).load(gl.SliceLayout(1, DOT))
        high = ss.slice(BN, BN).load(gl.SliceLayout(1, DOT))
    a = _decoded(words, _pair(low, high, zs, 0, R, FOLD, SKIND, ZERO, ZEROS, BN, DOT, D), 0, FOLD, D)
    for b in range(first, last):
        for f in gl.static_range(F):
            # field f multiplies
            xf = xs.slice(f % FS * P, P, dim=1).permute((1, 0))
            if SCALING != 1:
                run = warpgroup_mma(a, xf, acc, is_async=True)
            elif f // R % 2 == 1 and AHEAD:
                run = warpgroup_mma(a, xf, other, use_acc=f % R > 0, is_async=True)
            else:
                run = warpgroup_mma(a, xf, part, use_acc=f % R > 0, is_async=True)
            if SCALING == 1 and f % R == 0:
                if AHEAD:  # the sum of the group before is done
                    if f // R % 2 == 1:
                        run, part = warpgroup_mma_wait(1, deps=[run, part])
                        acc += part * s_before[:, None]
                    else:
                        run, other = warpgroup_mma_wait(1, deps=[run, other])
                        acc += other * s_before[:, None]
                s_before = ss.slice(f // R * BN, BN).load(gl.SliceLayout(1, MMA)).to(gl.float32)
            # meanwhile: the next step arrives, the next field is decoded
            if f % FS == FS - 1:
                async_copy.wait_group(STAGES - 3)
                fence_async_shared()
                c = b + (f // FS + STAGES - 1) // XS
                into = (block_slot + (f // FS + STAGES - 1) // XS) % WS
                _copy(x_from, x_offsets, w_from, w_offsets, s_ptr + pn * BN, z_ptr + pn * BN, x_smem.index((slot + STAGES - 1) % STAGES), w_smem.index(into),
                      s_smem.index(into), z_smem.index(into), c, last, (f // FS + STAGES - 1) % XS, counted,
                      x_columns, wide, z_wide, K, NP, z_stride, P, G, R, XS, SCALING, ZEROS, BN, EVEN)
                async_copy.commit_group()
                slot = (slot + 1) % STAGES
                xs = x_smem.index(slot)
                if f == F - 1:
                    block_slot = (block_slot + 1) % WS
                    words = w_smem.index(block_slot).load(DOT)
                    ss = s_smem.index(block_slot)
                    zs = z_smem.index(block_slot)
                    if FOLD:
                        low = ss.slice(0, BN).load(gl.SliceLayout(1, DOT))
                        high = ss.slice(BN, BN).load(gl.SliceLayout(1, DOT))
            pair = _pair(low, high, zs, (f + 1) % F, R, FOLD, SKIND, ZERO, ZEROS, BN, DOT, D)
            a = _decoded(words, pair, (f + 1) % F, FOLD, D)
            # nothing runs beyond a step: its registers would be waited for everywhere
            if SCALING != 1:
                acc = warpgroup_mma_wait(0 if f % FS == FS - 1 else FLIGHT, deps=[run])
            elif f // R % 2 == 1 and AHEAD:
                other = warpgroup_mma_wait(0 if f % FS == FS - 1 else FLIGHT, deps=[run])
            else:
                part = warpgroup_mma_wait(0 if f % FS == FS - 1 or not AHEAD and f % R == R - 1 else FLIGHT, deps=[run])
            if SCALING == 1 and not AHEAD and f % R == R - 1:
                acc += part * s_before[:, None]
    if AHEAD:
        acc += other * s_before[:, None]

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
            _store(total, o_ptr, bias_ptr, pm, pn, rn, M, N, BM, BN, BIAS, num_warps)
    else:
        _store(acc, o_ptr, bias_ptr, pm, pn, rn, M, N, BM, BN, BIAS, num_warps)
