# mypy: ignore-errors
"""Products of "triton-planes" on sm_90 in which warps have different work, for more than a few tokens.

One warp copies x and one copies words, scales and zero points into shared memory, by tensor memory access and as many
stages ahead as fit. Two teams of four warps decode and multiply: each has its own rows of W and all of the tile's
tokens, and decodes the next inputs while those before them multiply. Teams wait for each other nowhere, so that the
matrix unit works for one while the other adds sums of groups or stores results. Work is divided by whole tiles, or
(STREAM) by equal shares of all blocks of K of all tiles. Stored layout, decoding and arithmetic are those of
`planes_hopper`; K is taken 256 inputs at a time.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from anybit.kernels.triton.planes_hopper import _NEGATIVE_BF16, _NEGATIVE_FP16, _decoded, _factor
from anybit.kernels.triton.w8a8_hopper_jit import add_scaled, load_tile, step_at, steps_of


@gluon.jit
def _copy_x(x, x_tiles, ready, free, M, NP, KP, SHARE, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
            STREAM: gl.constexpr, WAITS: gl.constexpr):
    """The warp that copies x, 64 inputs at a time; what lies beyond it becomes zeros."""
    if WAITS:
        tl.extra.cuda.gdc_wait()
    tiles_m = gl.cdiv(M, BM)
    blocks = gl.cdiv(KP, 256)
    steps = steps_of(tiles_m * gl.cdiv(NP, BN), blocks, SHARE, STREAM)
    for i in range(steps):
        tile, block = step_at(i, blocks, SHARE, STREAM)
        for q in gl.static_range(4):
            at = 4 * i + q
            stage = at % STAGES
            mbarrier.wait(free.index(stage), ((at // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), BM * 128)
            load_tile(x, [tile % tiles_m * BM, block * 256 + q * 64], ready.index(stage), x_tiles.index(stage))


@gluon.jit
def _copy_w(
    w, s, z, w_tiles, s_tiles, z_tiles, ready, free, M, NP, pitch, KP, z_stride, SHARE, P: gl.constexpr,
    G: gl.constexpr, R: gl.constexpr, SCALING: gl.constexpr, ZEROS: gl.constexpr, SCALES: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, STREAM: gl.constexpr,
):  # fmt: skip
    """The warp that copies what is stored of W, 256 inputs at a time."""
    S_BYTES: gl.constexpr = s_tiles.dtype.primitive_bitwidth // 8 if SCALING > 0 else 0
    BYTES: gl.constexpr = BN * 128 + SCALES * BN * (S_BYTES + (1 if ZEROS else 0))
    tiles_m = gl.cdiv(M, BM)
    blocks = gl.cdiv(KP, 256)
    steps = steps_of(tiles_m * gl.cdiv(NP, BN), blocks, SHARE, STREAM)
    for i in range(steps):
        tile, block = step_at(i, blocks, SHARE, STREAM)
        first = tile // tiles_m * BN
        stage = i % STAGES
        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(stage), BYTES)
        load_tile(w, [first, block * 32], ready.index(stage), w_tiles.index(stage))
        for j in gl.static_range(SCALES):
            k = block * 256 + j * (256 // SCALES)
            if SCALING == 2:
                load_tile(s, [k // (4 * P) * pitch + first], ready.index(stage), s_tiles.index(stage * SCALES + j))
            elif SCALING == 1:
                load_tile(s, [k // G * pitch + first], ready.index(stage), s_tiles.index(stage * SCALES + j))
            if ZEROS:
                group = k // G if G > 0 else 0
                load_tile(z, [group * z_stride + first], ready.index(stage), z_tiles.index(stage * SCALES + j))


@gluon.jit
def _beside(a, b, DOT: gl.constexpr):
    """Operands of inputs that follow each other as one: [R, C] twice, [R, 2 C]; registers stay where they are."""
    both = gl.join(a, b).permute((0, 2, 1)).reshape([a.shape[0], 2 * a.shape[1]])
    return gl.convert_layout(both, DOT, assert_trivial=True)


@gluon.jit
def _zeros_of(z_tiles, at, first, ROWS: gl.constexpr, DOT: gl.constexpr):
    """Zero points of a team's rows [ROWS], twice in 32 bits."""
    zero = z_tiles.index(at).slice(first, ROWS).load(gl.SliceLayout(1, DOT)).to(gl.int32)
    return zero | (zero << 16)


@gluon.jit
def _field(words, s0, s1, s2, s3, z_tiles, stage, first, f: gl.constexpr, R: gl.constexpr, FOLD: gl.constexpr,
           SKIND: gl.constexpr, ZERO: gl.constexpr, ZEROS: gl.constexpr, SCALES: gl.constexpr, ROWS: gl.constexpr,
           DOT: gl.constexpr, D: gl.constexpr):
    """Field f of 256 inputs as D, its folded scales or zero points applied: [ROWS, P]."""
    if FOLD:
        pair = _factor(s0 if f < 4 else s1 if f < 8 else s2 if f < 12 else s3, f % 4, SKIND, D)
    else:
        if ZEROS:
            zero = _zeros_of(z_tiles, stage * SCALES + f // R, first, ROWS, DOT)
        else:
            zero = gl.full([ROWS], ZERO, gl.float32, gl.SliceLayout(1, DOT)).to(gl.int32)
            zero = zero | (zero << 16)
        pair = zero + (_NEGATIVE_FP16 if gl.float16 == D else _NEGATIVE_BF16)
    return _decoded(words, pair, f % 8, FOLD, D)


@gluon.jit
def _operand(words, s0, s1, s2, s3, z_tiles, stage, first, u: gl.constexpr, U: gl.constexpr, P: gl.constexpr,
             R: gl.constexpr, FOLD: gl.constexpr, SKIND: gl.constexpr, ZERO: gl.constexpr, ZEROS: gl.constexpr,
             SCALES: gl.constexpr, ROWS: gl.constexpr, DOT: gl.constexpr, D: gl.constexpr):
    """Inputs u * U ... of 256 as D: [ROWS, U], of one field or several."""
    f: gl.constexpr = u * U // P
    a = _field(words, s0, s1, s2, s3, z_tiles, stage, first, f, R, FOLD, SKIND, ZERO, ZEROS, SCALES, ROWS, DOT, D)
    if U >= 2 * P:
        b = _field(words, s0, s1, s2, s3, z_tiles, stage, first, f + 1, R, FOLD, SKIND, ZERO, ZEROS, SCALES, ROWS,
                   DOT, D)
        a = _beside(a, b, DOT)
    if U >= 4 * P:
        c = _field(words, s0, s1, s2, s3, z_tiles, stage, first, f + 2, R, FOLD, SKIND, ZERO, ZEROS, SCALES, ROWS,
                   DOT, D)
        d = _field(words, s0, s1, s2, s3, z_tiles, stage, first, f + 3, R, FOLD, SKIND, ZERO, ZEROS, SCALES, ROWS,
                   DOT, D)
        a = _beside(a, _beside(c, d, DOT), DOT)
    return a


@gluon.jit
def _folded(s_tiles, stage, first, SCALES: gl.constexpr, FOLD: gl.constexpr, ROWS: gl.constexpr, DOT: gl.constexpr):
    """The words of folded scales of 256 inputs, each [ROWS]: two, or four where groups are of 16."""
    if FOLD:
        s0 = s_tiles.index(stage * SCALES).slice(first, ROWS).load(gl.SliceLayout(1, DOT))
        s1 = s_tiles.index(stage * SCALES + 1).slice(first, ROWS).load(gl.SliceLayout(1, DOT))
        if SCALES == 4:
            s2 = s_tiles.index(stage * SCALES + 2).slice(first, ROWS).load(gl.SliceLayout(1, DOT))
            s3 = s_tiles.index(stage * SCALES + 3).slice(first, ROWS).load(gl.SliceLayout(1, DOT))
            return s0, s1, s2, s3
        else:
            return s0, s1, s0, s1
    else:
        return 0, 0, 0, 0


@gluon.jit
def _store(acc, o_ptr, bias_ptr, pm, first, M, N, BM: gl.constexpr, ROWS: gl.constexpr, MMA: gl.constexpr,
           BIAS: gl.constexpr):
    """Bias and the one rounding; written in runs of eight rows of W, which lie together in a row of o."""
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [4, 1], [0, 1])  # of a warp's own rows
    if BIAS:
        rn = first + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
        acc += gl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(gl.float32)[:, None]
    out = gl.convert_layout(acc.to(o_ptr.dtype.element_ty), OUT)
    n = first + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    m = gl.arange(0, BM, gl.SliceLayout(0, OUT))
    mask = (n < N)[:, None] & (m < M - pm * BM)[None, :]
    gl.store(o_ptr + (pm * BM).to(gl.int64) * N + (m[None, :] * N + n[:, None]), out, mask=mask)


@gluon.jit
def _multiply(
    TEAM: gl.constexpr, x_tiles, w_tiles, s_tiles, z_tiles, x_ready, x_free, w_ready, w_free, row_ptr, token_ptr,
    bias_ptr, o_ptr, part_ptr, count_ptr, M, N, NP, KP, mult, SHARE,
    P: gl.constexpr, R: gl.constexpr, SCALING: gl.constexpr, SKIND: gl.constexpr, ZERO: gl.constexpr,
    ZEROS: gl.constexpr, SCALES: gl.constexpr, U: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, FLIGHT: gl.constexpr, STREAM: gl.constexpr, TOKENS: gl.constexpr,
    BIAS: gl.constexpr, WAITS: gl.constexpr,
):  # fmt: skip
    """A team's work: half of the tiles' rows of W, all their tokens."""
    D: gl.constexpr = x_tiles.dtype
    FOLD: gl.constexpr = SCALING == 2
    ROWS: gl.constexpr = BN // 2
    FIRST: gl.constexpr = TEAM * ROWS
    UNITS: gl.constexpr = 256 // U
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    OF_W: gl.constexpr = gl.SliceLayout(1, MMA)
    OF_X: gl.constexpr = gl.SliceLayout(0, MMA)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    tiles_m = gl.cdiv(M, BM)
    blocks = gl.cdiv(KP, 256)
    steps = steps_of(tiles_m * gl.cdiv(NP, BN), blocks, SHARE, STREAM)
    mbarrier.wait(w_ready.index(0), 0)
    words = w_tiles.index(0).slice(FIRST, ROWS).slice(0, P, dim=1).load(DOT)
    s0, s1, s2, s3 = _folded(s_tiles, 0, FIRST, SCALES, FOLD, ROWS, DOT)
    a = _operand(words, s0, s1, s2, s3, z_tiles, 0, FIRST, 0, U, P, R, FOLD, SKIND, ZERO, ZEROS, SCALES, ROWS, DOT, D)
    i = 0
    while i < steps:
        tile, start = step_at(i, blocks, SHARE, STREAM)
        pm = tile % tiles_m
        pn = tile // tiles_m
        count = gl.minimum(blocks - start, steps - i)
        acc = gl.zeros([ROWS, BM], gl.float32, MMA)
        part = acc
        for _ in range(count):
            stage = i % W_STAGES
            for u in gl.static_range(UNITS):
                at = 4 * i + u * U // 64
                x_stage = at % X_STAGES
                if u * U % 64 == 0:
                    mbarrier.wait(x_ready.index(x_stage), (at // X_STAGES) & 1)
                b = x_tiles.index(x_stage).slice(u * U % 64, U, dim=1).permute((1, 0))
                if SCALING == 1:
                    run = warpgroup_mma(a, b, part, use_acc=u * U % (R * P) > 0, is_async=True)
                    if u * U % (R * P) == 0:
                        group = s_tiles.index(stage * SCALES + u * U // (R * P)).slice(FIRST, ROWS)
                        scale = group.load(OF_W).to(gl.float32)
                else:
                    run = warpgroup_mma(a, b, acc, is_async=True)
                # meanwhile the next operand is decoded; behind the last step the last one again
                after = stage
                if u == UNITS - 1:
                    following = gl.minimum(i + 1, steps - 1)
                    after = following % W_STAGES
                    mbarrier.wait(w_ready.index(after), (following // W_STAGES) & 1)
                    s0, s1, s2, s3 = _folded(s_tiles, after, FIRST, SCALES, FOLD, ROWS, DOT)
                if (u + 1) * U // P % 8 == 0:
                    held = w_tiles.index(after).slice(FIRST, ROWS)
                    words = held.slice((u + 1) % UNITS * U // P // 8 * P, P, dim=1).load(DOT)
                a = _operand(words, s0, s1, s2, s3, z_tiles, after, FIRST, (u + 1) % UNITS, U, P, R, FOLD, SKIND, ZERO,
                             ZEROS, SCALES, ROWS, DOT, D)
                # nothing runs beyond a step: the compiler would wait for every product
                if SCALING == 1:
                    part = warpgroup_mma_wait(FLIGHT if u < UNITS - 1 and (u + 1) * U % (R * P) > 0 else 0, deps=[run])
                    if (u + 1) * U % (R * P) == 0:
                        acc = add_scaled(acc, part, scale[:, None], True)
                else:
                    acc = warpgroup_mma_wait(0 if u == UNITS - 1 else FLIGHT, deps=[run])
                if FLIGHT == 1 and u * U % 64 == 0 and u > 0:  # what came before this product is through
                    mbarrier.arrive(x_free.index((at + X_STAGES - 1) % X_STAGES), count=1)
                if u == UNITS - 1 or (FLIGHT == 0 and (u + 1) * U % 64 == 0):
                    mbarrier.arrive(x_free.index(x_stage), count=1)
            mbarrier.arrive(w_free.index(stage), count=1)
            i += 1

        rm = gl.arange(0, BM, OF_X)
        rn = gl.arange(0, ROWS, OF_W)
        first = pn * BN + FIRST
        acc = (acc * mult) * gl.load(row_ptr + first + rn, mask=first + rn < NP, other=0.0)[:, None]
        if TOKENS:
            acc = acc * gl.load(token_ptr + pm * BM + rm, mask=pm * BM + rm < M, other=0.0)[None, :]
        is_done = True
        if STREAM:
            is_done = count == blocks
            if count < blocks:  # sums of a part of K, in an order of their own: only the same team reads them again
                inside = rn[:, None] * BM + rm[None, :]
                own = part_ptr + FIRST * BM
                # a program has two parts at most: of its first tile, and of its last one
                slot = 2 * gl.program_id(0) + (i > count).to(gl.int32)
                gl.store(own + slot.to(gl.int64) * (BN * BM) + inside, acc, cache_modifier=".cg")
                tl.debug_barrier()
                earliest = tile * blocks // SHARE
                latest = (tile * blocks + blocks - 1) // SHARE
                counter = count_ptr + tile * 2 + TEAM
                is_done = gl.atomic_add(counter, 1, sem="acq_rel") == latest - earliest
                if is_done:
                    gl.store(counter, 0)  # ready for the next call
                    acc = gl.zeros([ROWS, BM], gl.float32, MMA)
                    slot = 2 * earliest + (earliest * SHARE < tile * blocks).to(gl.int32)
                    for program in range(earliest, latest + 1):  # in order, whichever came last: the same bits
                        acc += gl.load(own + slot.to(gl.int64) * (BN * BM) + inside, cache_modifier=".cg")
                        slot = 2 * program + 2
        if is_done:
            _store(acc, o_ptr, bias_ptr, pm, first, M, N, BM, ROWS, MMA, BIAS)


@gluon.jit(do_not_specialize=["M", "SHARE"])
def roles_kernel(
    x, w, s, z, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr, M, N, NP, pitch, KP, z_stride, mult,
    SHARE, P: gl.constexpr, G: gl.constexpr, R: gl.constexpr, SCALING: gl.constexpr, SKIND: gl.constexpr,
    ZERO: gl.constexpr, ZEROS: gl.constexpr, U: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, FLIGHT: gl.constexpr, STREAM: gl.constexpr, TOKENS: gl.constexpr, BIAS: gl.constexpr,
    WAITS: gl.constexpr,
):  # fmt: skip
    """o [M, N] = x [M, K] W^T in tiles of BN rows by BM tokens.

    x, w, s, z  tensor descriptors: [M, K], words [NP, KP / 8], scales [.., NP] and zero points [.., NP] of groups
    part_ptr    sums of parts of K, of two tiles a program at most: [2 * programs, BN, BM]; count_ptr [tiles * 2]
    SHARE       with STREAM the steps of 256 inputs that a program multiplies
    U           inputs that are multiplied at once: 64, or as many as a group has
    X_STAGES, W_STAGES  times 64, and 256, inputs in shared memory
    FLIGHT      products that may run while an operand is decoded beside the one that follows them
    WAITS       launched while the kernel that makes x runs, which is waited for here (programmatic dependent launch)
    """
    D: gl.constexpr = x.dtype
    SCALES: gl.constexpr = 0 if SCALING == 0 and not ZEROS else 64 // P if SCALING == 2 else 256 // (R * P)
    x_tiles = gl.allocate_shared_memory(D, [X_STAGES, BM, 64], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int32, [W_STAGES, BN, 32], w.layout)
    if SCALING > 0:
        s_tiles = gl.allocate_shared_memory(s.dtype, [W_STAGES * SCALES, BN], s.layout)
    else:
        s_tiles = w_tiles
    if ZEROS:
        z_tiles = gl.allocate_shared_memory(gl.uint8, [W_STAGES * SCALES, BN], z.layout)
    else:
        z_tiles = w_tiles
    x_ready = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_free = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    w_ready = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    w_free = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(X_STAGES):
        mbarrier.init(x_ready.index(stage), count=1)
        mbarrier.init(x_free.index(stage), count=2)
    for stage in gl.static_range(W_STAGES):
        mbarrier.init(w_ready.index(stage), count=1)
        mbarrier.init(w_free.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (0, x_tiles, w_tiles, s_tiles, z_tiles, x_ready, x_free, w_ready, w_free, row_ptr, token_ptr,
                     bias_ptr, o_ptr, part_ptr, count_ptr, M, N, NP, KP, mult, SHARE, P, R, SCALING, SKIND, ZERO, ZEROS,
                     SCALES, U, BM, BN, X_STAGES, W_STAGES, FLIGHT, STREAM, TOKENS, BIAS, WAITS)),
        (_multiply, (1, x_tiles, w_tiles, s_tiles, z_tiles, x_ready, x_free, w_ready, w_free, row_ptr, token_ptr,
                     bias_ptr, o_ptr, part_ptr, count_ptr, M, N, NP, KP, mult, SHARE, P, R, SCALING, SKIND, ZERO, ZEROS,
                     SCALES, U, BM, BN, X_STAGES, W_STAGES, FLIGHT, STREAM, TOKENS, BIAS, WAITS)),
        (_copy_w, (w, s, z, w_tiles, s_tiles, z_tiles, w_ready, w_free, M, NP, pitch, KP, z_stride, SHARE, P, G, R,
                   SCALING, ZEROS, SCALES, BM, BN, W_STAGES, STREAM)),
        (_copy_x, (x, x_tiles, x_ready, x_free, M, NP, KP, SHARE, BM, BN, X_STAGES, STREAM, WAITS)),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip
