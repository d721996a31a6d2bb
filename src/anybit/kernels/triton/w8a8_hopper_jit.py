# mypy: ignore-errors
"""Device code of the products of 8 bit codes for sm_90, in which warps have different work.

One warp copies tiles of both operands into shared memory by tensor memory access, as many stages ahead as fit. One or
two teams of four warps multiply them (wgmma) and scale and store the sums. Teams wait for each other nowhere, so that
one adds its partial sums while the matrix unit works for the other; and each has two partial sums in turn. Work is
divided by whole tiles, or (STREAM) by equal shares of all blocks of K of all tiles, whatever their number. The
arithmetic is that of `w8a8_jit.w8a8_matmul`, the portable twin, on the same stored weight; launched by `w8a8.py` where
`triton_w8a8_hopper.py` says so. Written in Gluon, Triton's language of explicit layouts and waits.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name up to Triton 3.6


@gluon.jit
def place(tile, tiles_a, tiles_b, BAND: gl.constexpr):
    """Tile of the left and of the right operand: BAND rows of tiles are walked together, for the cache."""
    width = BAND * tiles_b
    first = tile // width * BAND
    height = gl.minimum(tiles_a - first, BAND)
    return first + (tile % width) % height, (tile % width) // height


@gluon.jit
def steps_of(tiles, blocks, SHARE, STREAM: gl.constexpr):
    """Blocks of K that this program multiplies, in all its tiles."""
    if STREAM:
        count = gl.minimum(tiles * blocks - gl.program_id(0) * SHARE, SHARE)
    else:
        count = (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0) * blocks
    return count


@gluon.jit
def step_at(i, blocks, SHARE, STREAM: gl.constexpr):
    """Tile and block of K of this program's step i."""
    if STREAM:
        unit = gl.program_id(0) * SHARE + i
        tile = unit // blocks
        block = unit % blocks
    else:
        tile = gl.program_id(0) + i // blocks * gl.num_programs(0)
        block = i % blocks
    return tile, block


@gluon.jit
def copy_tiles(
    a, b, a_tiles, b_tiles, ready, free, A, B, K, SHARE, BK: gl.constexpr, BA: gl.constexpr, BB: gl.constexpr,
    TEAMS: gl.constexpr, STAGES: gl.constexpr, STREAM: gl.constexpr, BAND: gl.constexpr,
    SWAP: gl.constexpr, WAITS: gl.constexpr,
):
    """The copying warp. With WAITS its first tiles of W are on the way before the kernel that makes x is done."""
    BYTES: gl.constexpr = (BA + BB) * BK
    ROWS: gl.constexpr = BA // TEAMS
    tiles_a = (A + BA - 1) // BA
    tiles_b = (B + BB - 1) // BB
    blocks = (K + BK - 1) // BK
    steps = steps_of(tiles_a * tiles_b, blocks, SHARE, STREAM)
    ahead = 0
    if WAITS:
        ahead = gl.minimum(steps, STAGES)
        i = 0
        while i < ahead:
            tile, start = step_at(i, blocks, SHARE, STREAM)
            tile_a, tile_b = place(tile, tiles_a, tiles_b, BAND)
            for block in range(start, start + gl.minimum(blocks - start, ahead - i)):
                mbarrier.expect(ready.index(i), BYTES)
                if SWAP:
                    for g in gl.static_range(TEAMS):
                        load_tile(a, [tile_a * BA + g * ROWS, block * BK], ready.index(i),
                                  a_tiles.index(i * TEAMS + g))
                else:
                    load_tile(b, [tile_b * BB, block * BK], ready.index(i), b_tiles.index(i))
                i += 1
        tl.extra.cuda.gdc_wait()
    i = 0
    while i < steps:
        tile, start = step_at(i, blocks, SHARE, STREAM)
        tile_a, tile_b = place(tile, tiles_a, tiles_b, BAND)
        for block in range(start, start + gl.minimum(blocks - start, steps - i)):
            stage = i % STAGES
            is_new = i >= ahead
            mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), BYTES, pred=is_new)
            for g in gl.static_range(TEAMS):
                load_tile(a, [tile_a * BA + g * ROWS, block * BK], ready.index(stage),
                          a_tiles.index(stage * TEAMS + g), pred=is_new if SWAP else True)
            load_tile(b, [tile_b * BB, block * BK], ready.index(stage), b_tiles.index(stage),
                      pred=True if SWAP else is_new)
            i += 1


@gluon.jit
def multiply(a_tiles, b_tiles, ready, i, acc, use_acc, TEAM: gl.constexpr, TEAMS: gl.constexpr,
             STAGES: gl.constexpr):
    """Start the product of the tiles of step i."""
    stage = i % STAGES
    mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
    return warpgroup_mma(a_tiles.index(stage * TEAMS + TEAM), b_tiles.index(stage).permute((1, 0)), acc,
                         use_acc=use_acc, is_async=True)


@gluon.jit
def read_scales(sx, sw, block, last, M, within):
    """Scales of the rows of x, and the number of W's rows, in a block of K."""
    at = gl.minimum(block, last)
    return gl.load(sx + at * M, mask=within, other=0.0), gl.load(sw + at)


@gluon.jit
def product_of(sx, sw, IN_BLOCKS: gl.constexpr, SWAP: gl.constexpr):
    """sx * sw, not to be moved past what follows: the registers of both are then free for the next scales."""
    if IN_BLOCKS:
        both = gl.inline_asm_elementwise("mul.f32 $0, $1, $2;", "=f,f,f", [sx, sw], dtype=gl.float32, is_pure=False,
                                         pack=1)
        return gl.expand_dims(both, 0 if SWAP else 1)
    else:
        return 1.0


@gluon.jit
def add_scaled(sums, acc, factor, IN_BLOCKS: gl.constexpr):
    """sums + acc * factor, here and not later, where the registers of acc hold other sums."""
    if IN_BLOCKS:
        return gl.inline_asm_elementwise("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [acc, factor, sums],
                                         dtype=gl.float32, is_pure=False, pack=1)
    else:
        return gl.inline_asm_elementwise("add.f32 $0, $1, $2;", "=f,f,f", [acc, sums], dtype=gl.float32, is_pure=False,
                                         pack=1)


@gluon.jit
def scaled(acc, sx, sw, zx, cs, xs, zw, IS_SHIFTED: gl.constexpr, W_SHIFTED: gl.constexpr):
    """As in w8a8_jit."""
    if W_SHIFTED:
        acc = acc - zw * xs
    if IS_SHIFTED:
        near = gl.minimum(gl.maximum(zx, -128), 128)
        r = (acc - near * cs).to(gl.float32) - (zx - near).to(gl.float32) * cs.to(gl.float32)
    else:
        r = acc.to(gl.float32)
    return r * sx * sw


@gluon.jit
def multiply_tiles(
    TEAM: gl.constexpr, a_tiles, b_tiles, ready, free, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, bias_ptr,
    out_ptr, part_ptr, count_ptr, M, N, K, GROUPS, SHARE,
    IS_INTEGER: gl.constexpr, IS_SHIFTED: gl.constexpr, W_SHIFTED: gl.constexpr, IN_BLOCKS: gl.constexpr,
    W_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, BK: gl.constexpr, BA: gl.constexpr, BB: gl.constexpr,
    TEAMS: gl.constexpr, STAGES: gl.constexpr, STREAM: gl.constexpr, BAND: gl.constexpr, SWAP: gl.constexpr,
    WAITS: gl.constexpr,
):
    """A team's work: rows TEAM * 64 ... of the left tiles, all of the right ones."""
    ROWS: gl.constexpr = BA // TEAMS
    KEPT: gl.constexpr = gl.int32 if IS_INTEGER else gl.float32
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BB, 32])
    OF_A: gl.constexpr = gl.SliceLayout(1, MMA)
    OF_B: gl.constexpr = gl.SliceLayout(0, MMA)
    ALONG_X: gl.constexpr = 0 if SWAP else 1
    ALONG_W: gl.constexpr = 1 if SWAP else 0
    if SWAP:
        OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    else:
        OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BB, BB // 8], [4, 1], [1, 0])
    if WAITS:
        tl.extra.cuda.gdc_wait()
    tiles_a = ((N if SWAP else M) + BA - 1) // BA
    tiles_b = ((M if SWAP else N) + BB - 1) // BB
    blocks = (K + BK - 1) // BK
    steps = steps_of(tiles_a * tiles_b, blocks, SHARE, STREAM)
    i = 0
    while i < steps:
        tile, start = step_at(i, blocks, SHARE, STREAM)
        tile_a, tile_b = place(tile, tiles_a, tiles_b, BAND)
        count = gl.minimum(blocks - start, steps - i)
        acc = gl.zeros([ROWS, BB], KEPT, MMA)
        if IS_INTEGER:
            for j in range(count):
                acc = multiply(a_tiles, b_tiles, ready, i, acc, j > 0, TEAM, TEAMS, STAGES)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(free.index((i + STAGES - 1) % STAGES), count=1, pred=j > 0)
                i += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index((i + STAGES - 1) % STAGES), count=1)
            result = acc
        else:  # two partial sums in turn: one is added while the matrix unit makes the other
            other = gl.zeros([ROWS, BB], gl.float32, MMA)
            sums = gl.zeros([ROWS, BB], gl.float32, MMA)
            last = blocks - 1
            if SWAP:
                rows = tile_b * BB + gl.arange(0, BB, OF_B)
            else:
                rows = tile_a * BA + TEAM * ROWS + gl.arange(0, ROWS, OF_A)
            sx = sx_ptr + rows
            sw = sw_ptr
            if IN_BLOCKS:
                sw += (tile_a * BA + TEAM * ROWS if SWAP else tile_b * BB) // W_ROWS * GROUPS
                sx_even, sw_even = read_scales(sx, sw, start, last, M, rows < M)
                sx_odd, sw_odd = read_scales(sx, sw, start + 1, last, M, rows < M)
            else:
                sx_even, sw_even, sx_odd, sw_odd = 1.0, 1.0, 1.0, 1.0
            acc = multiply(a_tiles, b_tiles, ready, i, acc, False, TEAM, TEAMS, STAGES)
            acc = warpgroup_mma_wait(1, deps=[acc])
            for j in range((count - 1) // 2):
                other = multiply(a_tiles, b_tiles, ready, i + 1, other, False, TEAM, TEAMS, STAGES)
                factor = product_of(sx_even, sw_even, IN_BLOCKS, SWAP)
                if IN_BLOCKS:
                    sx_even, sw_even = read_scales(sx, sw, start + 2 * j + 2, last, M, rows < M)
                acc, other = warpgroup_mma_wait(1, deps=[acc, other])
                mbarrier.arrive(free.index(i % STAGES), count=1)
                sums = add_scaled(sums, acc, factor, IN_BLOCKS)
                acc = multiply(a_tiles, b_tiles, ready, i + 2, acc, False, TEAM, TEAMS, STAGES)
                factor_odd = product_of(sx_odd, sw_odd, IN_BLOCKS, SWAP)
                if IN_BLOCKS:
                    sx_odd, sw_odd = read_scales(sx, sw, start + 2 * j + 3, last, M, rows < M)
                other, acc = warpgroup_mma_wait(1, deps=[other, acc])
                mbarrier.arrive(free.index((i + 1) % STAGES), count=1)
                sums = add_scaled(sums, other, factor_odd, IN_BLOCKS)
                i += 2
            end_even = product_of(sx_even, sw_even, IN_BLOCKS, SWAP)
            end_odd = product_of(sx_odd, sw_odd, IN_BLOCKS, SWAP)
            if count % 2 == 0:
                other = multiply(a_tiles, b_tiles, ready, i + 1, other, False, TEAM, TEAMS, STAGES)
                acc, other = warpgroup_mma_wait(0, deps=[acc, other])
                mbarrier.arrive(free.index(i % STAGES), count=1)
                mbarrier.arrive(free.index((i + 1) % STAGES), count=1)
                sums = add_scaled(sums, acc, end_even, IN_BLOCKS)
                sums = add_scaled(sums, other, end_odd, IN_BLOCKS)
                i += 2
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(free.index(i % STAGES), count=1)
                sums = add_scaled(sums, acc, end_even, IN_BLOCKS)
                i += 1
            result = sums

        is_done = True
        if STREAM:
            is_done = count == blocks
            if count < blocks:  # sums of a part of K, in an order of their own: only the same team reads them again
                WHOLE: gl.constexpr = TEAMS * ROWS * BB
                mine = gl.expand_dims(gl.arange(0, ROWS, OF_A) * BB, 1) + gl.expand_dims(gl.arange(0, BB, OF_B), 0)
                part = part_ptr + TEAM * ROWS * BB
                # a program has two parts at most: of its first tile, and of its last one
                slot = 2 * gl.program_id(0) + (i > count).to(gl.int32)
                gl.store(part + slot.to(gl.int64) * WHOLE + mine, result, cache_modifier=".cg")
                tl.debug_barrier()
                earliest = tile * blocks // SHARE
                latest = (tile * blocks + blocks - 1) // SHARE
                counter = count_ptr + tile * TEAMS + TEAM
                is_done = gl.atomic_add(counter, 1, sem="acq_rel") == latest - earliest
                if is_done:
                    gl.store(counter, 0)
                    result = gl.zeros([ROWS, BB], KEPT, MMA)
                    slot = 2 * earliest + (earliest * SHARE < tile * blocks).to(gl.int32)
                    for program in range(earliest, latest + 1):  # in order, whichever came last: the same bits every time
                        result += gl.load(part + slot.to(gl.int64) * WHOLE + mine, cache_modifier=".cg")
                        slot = 2 * program + 2
        if is_done:
            END: gl.constexpr = OUT if IS_SHIFTED or W_SHIFTED else MMA  # many vectors: few columns a thread are better
            held = gl.convert_layout(result, END)
            first = tile_a * BA + TEAM * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, END))
            second = tile_b * BB + gl.arange(0, BB, gl.SliceLayout(0, END))
            row = second if SWAP else first
            out = first if SWAP else second
            x_scale, w_scale, x_zero, w_sum, x_sum, w_zero = 1.0, 1.0, 0, 0, 0, 0
            if not IN_BLOCKS:
                x_scale = gl.expand_dims(gl.load(sx_ptr + row, mask=row < M, other=0.0), ALONG_X)
                w_scale = gl.expand_dims(gl.load(sw_ptr + out, mask=out < N, other=0.0), ALONG_W)
            if IS_SHIFTED:
                x_zero = gl.expand_dims(gl.load(zx_ptr + row, mask=row < M, other=0), ALONG_X)
                w_sum = gl.expand_dims(gl.load(cs_ptr + out, mask=out < N, other=0), ALONG_W)
            if W_SHIFTED:
                x_sum = gl.expand_dims(gl.load(xs_ptr + row, mask=row < M, other=0), ALONG_X)
                w_zero = gl.expand_dims(gl.load(zw_ptr + out, mask=out < N, other=0), ALONG_W)
            r = scaled(held, x_scale, w_scale, x_zero, w_sum, x_sum, w_zero, IS_SHIFTED, W_SHIFTED)
            if HAS_BIAS:
                r += gl.expand_dims(gl.load(bias_ptr + out, mask=out < N, other=0.0).to(gl.float32), ALONG_W)
            final = gl.convert_layout(r.to(out_ptr.dtype.element_ty), OUT)
            first = tile_a * BA + TEAM * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
            second = tile_b * BB + gl.arange(0, BB, gl.SliceLayout(0, OUT))
            if SWAP:
                gl.store(out_ptr + gl.expand_dims(second.to(gl.int64) * N, 0) + gl.expand_dims(first, 1), final,
                         mask=gl.expand_dims(second < M, 0) & gl.expand_dims(first < N, 1))
            else:
                gl.store(out_ptr + gl.expand_dims(first.to(gl.int64) * N, 1) + gl.expand_dims(second, 0), final,
                         mask=gl.expand_dims(first < M, 1) & gl.expand_dims(second < N, 0))


@gluon.jit(do_not_specialize=["M", "SHARE"])
def w8a8_hopper(
    x, w, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, M, N, K, GROUPS,
    SHARE,
    IS_INTEGER: gl.constexpr, IS_SHIFTED: gl.constexpr, W_SHIFTED: gl.constexpr, IN_BLOCKS: gl.constexpr,
    W_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, BA: gl.constexpr, BB: gl.constexpr, BK: gl.constexpr,
    TEAMS: gl.constexpr, STAGES: gl.constexpr, STREAM: gl.constexpr, BAND: gl.constexpr, SWAP: gl.constexpr,
    WAITS: gl.constexpr,
):
    """out [M, N] = x [M, K] times W^T [K, N], both as codes, in true scales, plus bias.

    x, w      tensor descriptors; zeros are read beyond the matrix. The pointers are those of w8a8_matmul
    part_ptr  sums of parts of K, of two tiles a program at most: [2 * programs, BA, BB]; count_ptr [tiles * TEAMS]
    SHARE     with STREAM the blocks of K that a program multiplies
    IN_BLOCKS scales of x and of W change every BK = 128 columns, W's are shared by W_ROWS rows, a multiple of 128 or BB
    BA, BB    rows of the left and the right operand's tile: x and W, with SWAP W and x
    WAITS     launched while the kernel that makes x runs, which is waited for here (programmatic dependent launch)
    """
    TYPE: gl.constexpr = x.dtype
    ROWS: gl.constexpr = BA // TEAMS
    a = w if SWAP else x
    b = x if SWAP else w
    a_tiles = gl.allocate_shared_memory(TYPE, [STAGES * TEAMS, ROWS, BK], x.layout)
    b_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BB, BK], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=TEAMS)
    fence_async_shared()
    A = N if SWAP else M
    B = M if SWAP else N
    if TEAMS == 1:
        gl.warp_specialize([
            (multiply_tiles, (0, a_tiles, b_tiles, ready, free, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr,
                              bias_ptr, out_ptr, part_ptr, count_ptr, M, N, K, GROUPS, SHARE, IS_INTEGER, IS_SHIFTED,
                              W_SHIFTED, IN_BLOCKS, W_ROWS, HAS_BIAS, BK, BA, BB, TEAMS, STAGES, STREAM, BAND, SWAP,
                              WAITS)),
            (copy_tiles, (a, b, a_tiles, b_tiles, ready, free, A, B, K, SHARE, BK, BA, BB, TEAMS, STAGES, STREAM,
                          BAND, SWAP, WAITS)),
        ], [1], [40])
    else:
        gl.warp_specialize([
            (multiply_tiles, (0, a_tiles, b_tiles, ready, free, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr,
                              bias_ptr, out_ptr, part_ptr, count_ptr, M, N, K, GROUPS, SHARE, IS_INTEGER, IS_SHIFTED,
                              W_SHIFTED, IN_BLOCKS, W_ROWS, HAS_BIAS, BK, BA, BB, TEAMS, STAGES, STREAM, BAND, SWAP,
                              WAITS)),
            (multiply_tiles, (1, a_tiles, b_tiles, ready, free, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr,
                              bias_ptr, out_ptr, part_ptr, count_ptr, M, N, K, GROUPS, SHARE, IS_INTEGER, IS_SHIFTED,
                              W_SHIFTED, IN_BLOCKS, W_ROWS, HAS_BIAS, BK, BA, BB, TEAMS, STAGES, STREAM, BAND, SWAP,
                              WAITS)),
            (copy_tiles, (a, b, a_tiles, b_tiles, ready, free, A, B, K, SHARE, BK, BA, BB, TEAMS, STAGES, STREAM,
                          BAND, SWAP, WAITS)),
        ], [4, 1], [240, 24])
