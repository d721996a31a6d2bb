# mypy: ignore-errors
"""Products of "triton-planes" on sm_90 in which warps have different work, for more than a few tokens.

One warp copies x and one copies words, scales and zero points into shared memory, by tensor memory access and as many
stages ahead as fit. Two or four teams of four warps decode and multiply, each the next inputs while those before them
multiply. Each has its own rows of a tile of W and all of its tokens. While one adds sums of groups or stores results
the matrix unit works for another; teams that would come to that at the same time (TURNS) begin groups in turn, and
wait for each other nowhere else. Work is divided by whole tiles, and (STREAM) what of them is left at the end by equal
shares of its steps of 256 inputs. Stored layout and arithmetic are those of `planes_hopper`; one program fills a
multiprocessor.
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

from anybit.kernels.triton.planes_hopper_roles_decode import folded, operands
from anybit.kernels.triton.planes_registers import _lacks
from anybit.kernels.triton.w8a8_hopper_jit import add_scaled, load_tile


@gluon.jit
def _after(place, phase, PLACES: gl.constexpr):
    """The next place of a ring, and its phase."""
    wraps = (place >= PLACES - 1).to(gl.int32)
    return place + 1 - wraps * PLACES, phase ^ wraps


@gluon.jit
def _steps_of(tiles, blocks, WAVES, SHARE, STREAM: gl.constexpr):
    """Steps of this program, in all its tiles: whole ones in turn, and with STREAM its share of the others."""
    if STREAM:
        left = (tiles - WAVES * gl.num_programs(0)) * blocks - gl.program_id(0) * SHARE
        count = WAVES * blocks + gl.minimum(gl.maximum(left, 0), SHARE)
    else:
        count = (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0) * blocks
    return count


@gluon.jit
def _step_at(i, blocks, WAVES, SHARE, STREAM: gl.constexpr):
    """Tile and block of K of this program's step i."""
    tile = gl.program_id(0) + i // blocks * gl.num_programs(0)
    block = i % blocks
    if STREAM:
        unit = gl.program_id(0) * SHARE + i - WAVES * blocks
        is_shared = i >= WAVES * blocks
        tile = gl.where(is_shared, WAVES * gl.num_programs(0) + unit // blocks, tile)
        block = gl.where(is_shared, unit % blocks, block)
    return tile, block


@gluon.jit
def _copy_x(
    x, x_tiles, ready, free, M, NP, blocks, WAVES, SHARE, BM: gl.constexpr, BN: gl.constexpr, XW: gl.constexpr,
    X_RING: gl.constexpr, STREAM: gl.constexpr, WAITS: gl.constexpr,
):  # fmt: skip
    """The warp that copies x; what lies beyond it becomes zeros."""
    if WAITS:
        tl.extra.cuda.gdc_wait()
    STAGES: gl.constexpr = 256 // XW  # of a step
    BOXES: gl.constexpr = XW // 64
    tiles_m = gl.cdiv(M, BM)
    steps = _steps_of(tiles_m * gl.cdiv(NP, BN), blocks, WAVES, SHARE, STREAM)
    at = 0
    phase = 0
    i = 0
    while i < steps:
        tile, start = _step_at(i, blocks, WAVES, SHARE, STREAM)
        first = tile % tiles_m * BM
        for block in range(start, start + gl.minimum(blocks - start, steps - i)):
            for q in gl.static_range(STAGES):
                stage = at * STAGES + q
                mbarrier.wait(free.index(stage), phase ^ 1)
                mbarrier.expect(ready.index(stage), BM * XW * 2)
                for r in gl.static_range(BOXES):
                    load_tile(x, [first, block * 256 + q * XW + r * 64], ready.index(stage),
                              x_tiles.index(stage * BOXES + r))
            at, phase = _after(at, phase, X_RING)
            i += 1


@gluon.jit
def _copy_w(
    w, s, z, w_tiles, s_tiles, z_tiles, ready, free, M, NP, pitch, blocks, z_stride, WAVES, SHARE,
    P: gl.constexpr, G: gl.constexpr, R: gl.constexpr, SCALING: gl.constexpr, ZEROS: gl.constexpr, SCALES: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, STREAM: gl.constexpr,
):  # fmt: skip
    """The warp that copies what is stored of W, 256 inputs at a time; it waits for no kernel before this one."""
    S_BYTES: gl.constexpr = s_tiles.dtype.primitive_bitwidth // 8 if SCALING > 0 else 0
    BYTES: gl.constexpr = BN * 128 + SCALES * BN * (S_BYTES + (1 if ZEROS else 0))
    tiles_m = gl.cdiv(M, BM)
    steps = _steps_of(tiles_m * gl.cdiv(NP, BN), blocks, WAVES, SHARE, STREAM)
    stage = 0
    phase = 0
    i = 0
    while i < steps:
        tile, start = _step_at(i, blocks, WAVES, SHARE, STREAM)
        first = tile // tiles_m * BN
        for block in range(start, start + gl.minimum(blocks - start, steps - i)):
            mbarrier.wait(free.index(stage), phase ^ 1)
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
            stage, phase = _after(stage, phase, STAGES)
            i += 1


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
    TEAM: gl.constexpr, given, M, N, NP, blocks, mult, WAVES, SHARE,
    P: gl.constexpr, R: gl.constexpr, SCALING: gl.constexpr, SKIND: gl.constexpr, ZERO: gl.constexpr,
    ZEROS: gl.constexpr, SCALES: gl.constexpr, U: gl.constexpr, TEAMS: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, XW: gl.constexpr, X_RING: gl.constexpr, W_STAGES: gl.constexpr, FLIGHT: gl.constexpr,
    SUMS: gl.constexpr, TURNS: gl.constexpr, STREAM: gl.constexpr, TOKENS: gl.constexpr,
    BIAS: gl.constexpr, WAITS: gl.constexpr,
):  # fmt: skip
    """A team's work: its rows of the tiles of W, all their tokens."""
    (x_tiles, w_tiles, s_tiles, z_tiles, x_ready, x_free, w_ready, w_free, turns, row_ptr, token_ptr, bias_ptr,
     o_ptr, part_ptr, count_ptr) = given
    D: gl.constexpr = x_tiles.dtype
    FOLD: gl.constexpr = SCALING == 2
    ROWS: gl.constexpr = BN // TEAMS
    FIRST: gl.constexpr = TEAM * ROWS
    SMALL: gl.constexpr = BM * ROWS <= 64 * 128  # sums that leave registers
    UNITS: gl.constexpr = 256 // U
    X_STAGES: gl.constexpr = 256 // XW  # of a step
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    OF_W: gl.constexpr = gl.SliceLayout(1, MMA)
    OF_X: gl.constexpr = gl.SliceLayout(0, MMA)
    tiles_m = gl.cdiv(M, BM)
    steps = _steps_of(tiles_m * gl.cdiv(NP, BN), blocks, WAVES, SHARE, STREAM)
    mbarrier.wait(w_ready.index(0), 0, pred=steps > 0)
    words = w_tiles.index(0).slice(FIRST, ROWS).slice(0, P, dim=1).load(DOT)
    s0, s1, s2, s3 = folded(s_tiles, 0, FIRST, SCALES, FOLD, ROWS, DOT)
    a, rest = operands(words, s0, s1, s2, s3, z_tiles, 0, FIRST, 0, U, P, R, FOLD, SKIND, ZERO, ZEROS, ROWS, DOT, D)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    x_place = 0
    x_phase = 0
    stage = 0
    w_phase = 0
    turn = 0
    i = 0
    while i < steps:
        tile, start = _step_at(i, blocks, WAVES, SHARE, STREAM)
        pm = tile % tiles_m
        pn = tile // tiles_m
        count = gl.minimum(blocks - start, steps - i)
        rn = gl.arange(0, ROWS, OF_W)
        row_first = pn * BN + FIRST
        if SMALL:  # long before it is needed
            row = gl.load(row_ptr + row_first + rn, mask=row_first + rn < NP, other=0.0)
        acc = gl.zeros([ROWS, BM], gl.float32, MMA)
        part = acc
        other = acc
        scale = gl.zeros([ROWS], gl.float32, OF_W)
        for _ in range(count):
            # the step after this one; behind the last one the last again
            is_last = i == steps - 1
            after, after_phase = _after(stage, w_phase, W_STAGES)
            after = gl.where(is_last, stage, after)
            after_phase = gl.where(is_last, w_phase, after_phase)
            first = x_place * X_STAGES
            for u in gl.static_range(UNITS):
                if u * U % XW == 0:
                    mbarrier.wait(x_ready.index(first + u * U // XW), x_phase)
                box = x_tiles.index(x_place * 4 + u * U // 64)
                b = box.slice(u * U % 64, U, dim=1).permute((1, 0))
                if SCALING == 1:
                    if u * U % (R * P) == 0:  # a new group
                        if TURNS:  # the team before has begun the last products of its own
                            mbarrier.wait(turns.index(TEAM), turn ^ (1 if TEAM == 0 else 0))
                            turn ^= 1
                        if SUMS == 2:
                            part, other = other, part
                        run = warpgroup_mma(a, b, part, use_acc=False, is_async=True)
                    else:
                        run = warpgroup_mma(a, b, part, is_async=True)
                    if TURNS and (u + 1) * U % (R * P) == 0:
                        mbarrier.arrive(turns.index((TEAM + 1) % TEAMS), count=1)
                else:
                    run = warpgroup_mma(a, b, acc, is_async=True)
                # meanwhile the next operand is decoded
                if u == UNITS - 1:
                    mbarrier.wait(w_ready.index(after), after_phase)
                    s0, s1, s2, s3 = folded(s_tiles, after, FIRST, SCALES, FOLD, ROWS, DOT)
                if (u + 1) * U // P % 8 == 0:
                    held = w_tiles.index(after if u == UNITS - 1 else stage).slice(FIRST, ROWS)
                    words = held.slice((u + 1) % UNITS * U // P // 8 * P, P, dim=1).load(DOT)
                if U == P and u % 2 == 0:
                    a = rest
                else:
                    a, rest = operands(words, s0, s1, s2, s3, z_tiles, (after if u == UNITS - 1 else stage) * SCALES,
                                        FIRST, (u + 1) % UNITS, U, P, R, FOLD, SKIND, ZERO, ZEROS, ROWS, DOT, D)
                # nothing runs beyond a step: the compiler would wait for every product
                if SCALING == 1:
                    if SUMS == 2 and u > 0 and u * U % (R * P) == 0:  # the sums of the group before
                        other, run = warpgroup_mma_wait(1, deps=[other, run])
                        acc = add_scaled(acc, other, scale[:, None], True)
                    if u * U % (R * P) == 0:
                        group = s_tiles.index(stage * SCALES + u * U // (R * P)).slice(FIRST, ROWS)
                        scale = group.load(OF_W).to(gl.float32)
                    if (u + 1) * U % (R * P) == 0 and (SUMS == 1 or u == UNITS - 1):
                        part = warpgroup_mma_wait(0, deps=[run])
                        acc = add_scaled(acc, part, scale[:, None], True)
                    else:
                        part = warpgroup_mma_wait(1 if SUMS == 2 else FLIGHT, deps=[run])
                else:
                    acc = warpgroup_mma_wait(FLIGHT if u < UNITS - 1 else 0, deps=[run])
                if u * U % XW == 0 and u > 0:  # what came before this product is through
                    mbarrier.arrive(x_free.index(first + u * U // XW - 1), count=1)
            mbarrier.arrive(x_free.index(first + X_STAGES - 1), count=1)
            mbarrier.arrive(w_free.index(stage), count=1)
            stage, w_phase = after, after_phase
            x_place, x_phase = _after(x_place, x_phase, X_RING)
            i += 1

        if WAITS and i == steps:
            tl.extra.cuda.gdc_launch_dependents()
        rm = gl.arange(0, BM, OF_X)
        LACKS: gl.constexpr = 1.0 if FOLD else _lacks(0, 4, 0, D)
        if not SMALL:
            row = gl.load(row_ptr + row_first + rn, mask=row_first + rn < NP, other=0.0)
        acc = (acc * (mult * LACKS)) * row[:, None]
        if TOKENS:
            acc = acc * gl.load(token_ptr + pm * BM + rm, mask=pm * BM + rm < M, other=0.0)[None, :]
        is_done = True
        if STREAM:
            is_done = count == blocks
            if count < blocks:  # sums of a part of K, in an order of their own: only the same team reads them again
                inside = rn[:, None] * BM + rm[None, :]
                own = part_ptr + FIRST * BM
                shared = tile - WAVES * gl.num_programs(0)
                earliest = shared * blocks // SHARE
                latest = (shared * blocks + blocks - 1) // SHARE
                counter = count_ptr + shared * TEAMS + TEAM
                # a program has two parts at most: of its first shared tile, and of its last one
                slot = 2 * gl.program_id(0) + (i - WAVES * blocks > count).to(gl.int32)
                arrived = -1
                if start == 0:  # the first part is most often the last to come, and need not be written then
                    arrived = gl.atomic_add(counter, 0, sem="acquire")
                if arrived < latest - earliest:
                    gl.store(own + slot.to(gl.int64) * (BN * BM) + inside, acc, cache_modifier=".cg")
                    tl.debug_barrier()
                    arrived = gl.atomic_add(counter, 1, sem="acq_rel")
                is_done = arrived == latest - earliest
                if is_done:
                    gl.store(counter, 0)  # ready for the next call
                    # in order, whichever came last: the same bits; two are on the way where registers hold them
                    if start > 0:
                        slot = 2 * earliest + (earliest * SHARE < shared * blocks).to(gl.int32)
                        acc = gl.load(own + slot.to(gl.int64) * (BN * BM) + inside, cache_modifier=".cg")
                    AT_ONCE: gl.constexpr = 2 if SMALL and TEAMS == 2 else 1
                    for program in range(earliest + 1, latest + 1, AT_ONCE):
                        one = gl.load(own + (2 * program).to(gl.int64) * (BN * BM) + inside, cache_modifier=".cg")
                        if AT_ONCE == 2:
                            two = gl.load(own + (2 * program + 2).to(gl.int64) * (BN * BM) + inside,
                                          mask=program < latest, other=0.0, cache_modifier=".cg")
                            acc = acc + one
                            acc = acc + two
                        else:
                            acc = acc + one
        if is_done:
            _store(acc, o_ptr, bias_ptr, pm, row_first, M, N, BM, ROWS, MMA, BIAS)


@gluon.jit(do_not_specialize=["M", "WAVES", "SHARE", "blocks"])
def roles_kernel(
    x, w, s, z, row_ptr, token_ptr, bias_ptr, o_ptr, part_ptr, count_ptr, M, N, NP, pitch, blocks, z_stride, mult,
    WAVES, SHARE, P: gl.constexpr, G: gl.constexpr, R: gl.constexpr, SCALING: gl.constexpr, SKIND: gl.constexpr,
    ZERO: gl.constexpr, ZEROS: gl.constexpr, U: gl.constexpr, TEAMS: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, XW: gl.constexpr, X_RING: gl.constexpr, W_STAGES: gl.constexpr, FLIGHT: gl.constexpr,
    SUMS: gl.constexpr, TURNS: gl.constexpr, STREAM: gl.constexpr, TOKENS: gl.constexpr,
    BIAS: gl.constexpr, WAITS: gl.constexpr,
):  # fmt: skip
    """o [M, N] = x [M, K] W^T in tiles of BN rows by BM tokens.

    x, w, s, z  tensor descriptors: [M, K], words [NP, KP / 8], scales and zero points of groups, in a row
    part_ptr    sums of parts of K, of two tiles a program at most: [2 * programs, BN, BM]; count_ptr counts those of
                each shared tile and team
    pitch       how far apart values of neighbouring groups lie
    WAVES       with STREAM whole tiles that each program multiplies first
    SHARE       and the steps of 256 inputs that it then multiplies of the tiles that are left
    U           inputs that are multiplied at once: 64, or as many as a group has
    XW, X_RING  inputs of x that arrive at once, and times 256 inputs of x in shared memory
    W_STAGES    times 256 inputs of W in shared memory
    FLIGHT      products that may run while an operand is decoded beside the one that follows them: at most 1
    SUMS        sums of groups in turn: with 2 those of one are added while the next are made
    TURNS       teams begin groups in turn, each when the one before has begun all products of its own
    WAITS       launched while the kernel before it ends, which those warps wait for that read or write what it may;
                the next one may be launched when the last sums are done (programmatic dependent launch)
    """
    D: gl.constexpr = x.dtype
    SCALES: gl.constexpr = 0 if SCALING == 0 and not ZEROS else 64 // P if SCALING == 2 else 256 // (R * P)
    X_STAGES: gl.constexpr = X_RING * 256 // XW
    x_tiles = gl.allocate_shared_memory(D, [4 * X_RING, BM, 64], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int32, [W_STAGES, BN, 32], w.layout)
    s_tiles = w_tiles
    if SCALING > 0:
        s_tiles = gl.allocate_shared_memory(s.dtype, [W_STAGES * SCALES, BN], s.layout)
    z_tiles = w_tiles
    if ZEROS:
        z_tiles = gl.allocate_shared_memory(gl.uint8, [W_STAGES * SCALES, BN], z.layout)
    x_ready = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_free = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    w_ready = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    w_free = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    for team in gl.static_range(TEAMS):
        mbarrier.init(turns.index(team), count=1)
    for stage in gl.static_range(X_STAGES):
        mbarrier.init(x_ready.index(stage), count=1)
        mbarrier.init(x_free.index(stage), count=TEAMS)
    for stage in gl.static_range(W_STAGES):
        mbarrier.init(w_ready.index(stage), count=1)
        mbarrier.init(w_free.index(stage), count=TEAMS)
    fence_async_shared()
    given = (x_tiles, w_tiles, s_tiles, z_tiles, x_ready, x_free, w_ready, w_free, turns, row_ptr, token_ptr, bias_ptr,
             o_ptr, part_ptr, count_ptr)
    if TEAMS == 2:
        gl.warp_specialize([
            (_multiply, (0, given, M, N, NP, blocks, mult, WAVES, SHARE, P, R, SCALING, SKIND, ZERO, ZEROS, SCALES, U,
                         TEAMS, BM, BN, XW, X_RING, W_STAGES, FLIGHT, SUMS, TURNS, STREAM, TOKENS, BIAS, WAITS)),
            (_multiply, (1, given, M, N, NP, blocks, mult, WAVES, SHARE, P, R, SCALING, SKIND, ZERO, ZEROS, SCALES, U,
                         TEAMS, BM, BN, XW, X_RING, W_STAGES, FLIGHT, SUMS, TURNS, STREAM, TOKENS, BIAS, WAITS)),
            (_copy_w, (w, s, z, w_tiles, s_tiles, z_tiles, w_ready, w_free, M, NP, pitch, blocks, z_stride, WAVES,
                       SHARE, P, G, R, SCALING, ZEROS, SCALES, BM, BN, W_STAGES, STREAM)),
            (_copy_x, (x, x_tiles, x_ready, x_free, M, NP, blocks, WAVES, SHARE, BM, BN, XW, X_RING, STREAM, WAITS)),
        ], [4, 1, 1], [240, 24, 24])
    else:
        gl.warp_specialize([
            (_multiply, (0, given, M, N, NP, blocks, mult, WAVES, SHARE, P, R, SCALING, SKIND, ZERO, ZEROS, SCALES, U,
                         TEAMS, BM, BN, XW, X_RING, W_STAGES, FLIGHT, SUMS, TURNS, STREAM, TOKENS, BIAS, WAITS)),
            (_multiply, (1, given, M, N, NP, blocks, mult, WAVES, SHARE, P, R, SCALING, SKIND, ZERO, ZEROS, SCALES, U,
                         TEAMS, BM, BN, XW, X_RING, W_STAGES, FLIGHT, SUMS, TURNS, STREAM, TOKENS, BIAS, WAITS)),
            (_multiply, (2, given, M, N, NP, blocks, mult, WAVES, SHARE, P, R, SCALING, SKIND, ZERO, ZEROS, SCALES, U,
                         TEAMS, BM, BN, XW, X_RING, W_STAGES, FLIGHT, SUMS, TURNS, STREAM, TOKENS, BIAS, WAITS)),
            (_multiply, (3, given, M, N, NP, blocks, mult, WAVES, SHARE, P, R, SCALING, SKIND, ZERO, ZEROS, SCALES, U,
                         TEAMS, BM, BN, XW, X_RING, W_STAGES, FLIGHT, SUMS, TURNS, STREAM, TOKENS, BIAS, WAITS)),
            (_copy_w, (w, s, z, w_tiles, s_tiles, z_tiles, w_ready, w_free, M, NP, pitch, blocks, z_stride, WAVES,
                       SHARE, P, G, R, SCALING, ZEROS, SCALES, BM, BN, W_STAGES, STREAM)),
            (_copy_x, (x, x_tiles, x_ready, x_free, M, NP, blocks, WAVES, SHARE, BM, BN, XW, X_RING, STREAM, WAITS)),
        ], [4, 4, 4, 1, 1], [112, 112, 112, 24, 24])  # fmt: skip
