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
def place(tile, tiles_m, tiles_n, BAND: gl.constexpr):
    """Tile of x and of W: BAND rows of tiles are walked together, for the cache."""
    width = BAND * tiles_n
    first = tile // width * BAND
    height = gl.minimum(tiles_m - first, BAND)
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
    x, w, x_tiles, w_tiles, ready, free, M, N, K, SHARE, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    TEAMS: gl.constexpr, STAGES: gl.constexpr, STREAM: gl.constexpr, BAND: gl.constexpr, WAITS: gl.constexpr,
):
    """The copying warp. With WAITS its first tiles of W are on the way before the kernel that makes x is done."""
    BYTES: gl.constexpr = (BM + BN) * BK
    ROWS: gl.constexpr = BM // TEAMS
    tiles_m = (M + BM - 1) // BM
    tiles_n = (N + BN - 1) // BN
    blocks = (K + BK - 1) // BK
    steps = steps_of(tiles_m * tiles_n, blocks, SHARE, STREAM)
    ahead = 0
    if WAITS:
        ahead = gl.minimum(steps, STAGES)
        i = 0
        while i < ahead:
            tile, start = step_at(i, blocks, SHARE, STREAM)
            tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
            for block in range(start, start + gl.minimum(blocks - start, ahead - i)):
                mbarrier.expect(ready.index(i), BYTES)
                load_tile(w, [tile_n * BN, block * BK], ready.index(i), w_tiles.index(i))
                i += 1
        tl.extra.cuda.gdc_wait()
    i = 0
    while i < steps:
        tile, start = step_at(i, blocks, SHARE, STREAM)
        tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
        for block in range(start, start + gl.minimum(blocks - start, steps - i)):
            stage = i % STAGES
            is_new = i >= ahead
            mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), BYTES, pred=is_new)
            for g in gl.static_range(TEAMS):
                load_tile(x, [tile_m * BM + g * ROWS, block * BK], ready.index(stage), x_tiles.index(stage * TEAMS + g))
            load_tile(w, [tile_n * BN, block * BK], ready.index(stage), w_tiles.index(stage), pred=is_new)
            i += 1


@gluon.jit
def multiply(x_tiles, w_tiles, ready, i, acc, use_acc, TEAM: gl.constexpr, TEAMS: gl.constexpr,
             STAGES: gl.constexpr):
    """Start the product of the tiles of step i."""
    stage = i % STAGES
    mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
    return warpgroup_mma(x_tiles.index(stage * TEAMS + TEAM), w_tiles.index(stage).permute((1, 0)), acc,
                         use_acc=use_acc, is_async=True)


@gluon.jit
def read_scales(sx_ptr, sw, first, rows, blocks, M, SCALES: gl.constexpr):
    """Scales of x [rows, 8] and of a tile of W [8] in eight blocks of K from `first` on, each read by one thread alone.

    One block at a time would be read by all four threads of a row, too late to be there when it is needed. The other
    threads of a row are asked in `factor_of`. Beyond the last block and row of x they are 0.
    """
    block = first + gl.arange(0, 8, gl.SliceLayout(0, SCALES))
    inside = gl.expand_dims(rows < M, 1) & gl.expand_dims(block < blocks, 0)
    sx = gl.load(sx_ptr + gl.expand_dims(block * M, 0) + gl.expand_dims(rows, 1), mask=inside, other=0.0)
    return sx, gl.load(sw + block, mask=block < blocks, other=0.0)


@gluon.jit
def first_scales(
    sx_ptr, sw_ptr, i, tiles_m, tiles_n, blocks, M, GROUPS, SHARE, W_ROWS: gl.constexpr, FIRST: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, ROWS: gl.constexpr, STREAM: gl.constexpr, BAND: gl.constexpr,
    SCALES: gl.constexpr,
):
    """Scales of the tile that begins with step i: of its rows of x from FIRST on, in its first eight blocks of K."""
    tile, start = step_at(i, blocks, SHARE, STREAM)
    tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
    rows = tile_m * BM + FIRST + gl.arange(0, ROWS, gl.SliceLayout(1, SCALES))
    return read_scales(sx_ptr, sw_ptr + tile_n * BN // W_ROWS * GROUPS, start, rows, blocks, M, SCALES)


@gluon.jit
def factor_of(factors, block, OF_X: gl.constexpr, SCALES: gl.constexpr, IN_BLOCKS: gl.constexpr):
    """Column block % 8 of the factors of eight blocks of K, [rows, 1]."""
    if IN_BLOCKS:
        each = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, SCALES)), 0)
        one = gl.sum(gl.where(each == block % 8, factors, 0.0), 1)
        return gl.expand_dims(gl.convert_layout(one, OF_X), 1)
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
def read_ending(sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, m, n, M, N, ROWS: gl.constexpr, BN: gl.constexpr,
                LAYOUT: gl.constexpr, IS_SHIFTED: gl.constexpr, W_SHIFTED: gl.constexpr, IN_BLOCKS: gl.constexpr):
    """The vectors that `scaled` reads, for ROWS rows of x from m on and BN rows of W from n on."""
    row = m + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    out = n + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    sx, sw, zx, cs, xs, zw = 1.0, 1.0, 0, 0, 0, 0
    if not IN_BLOCKS:
        sx = gl.expand_dims(gl.load(sx_ptr + row, mask=row < M, other=0.0), 1)
        sw = gl.expand_dims(gl.load(sw_ptr + out, mask=out < N, other=0.0), 0)
    if IS_SHIFTED:
        zx = gl.expand_dims(gl.load(zx_ptr + row, mask=row < M, other=0), 1)
        cs = gl.expand_dims(gl.load(cs_ptr + out, mask=out < N, other=0), 0)
    if W_SHIFTED:
        xs = gl.expand_dims(gl.load(xs_ptr + row, mask=row < M, other=0), 1)
        zw = gl.expand_dims(gl.load(zw_ptr + out, mask=out < N, other=0), 0)
    return sx, sw, zx, cs, xs, zw


@gluon.jit
def multiply_tiles(
    TEAM: gl.constexpr, x_tiles, w_tiles, ready, free, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, bias_ptr,
    out_ptr, part_ptr, count_ptr, M, N, K, GROUPS, SHARE,
    IS_INTEGER: gl.constexpr, IS_SHIFTED: gl.constexpr, W_SHIFTED: gl.constexpr, IN_BLOCKS: gl.constexpr,
    W_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    TEAMS: gl.constexpr, STAGES: gl.constexpr, STREAM: gl.constexpr, BAND: gl.constexpr, WAITS: gl.constexpr,
):
    """A team's work: rows TEAM * 64 ... of the tiles of x, all of W's."""
    ROWS: gl.constexpr = BM // TEAMS
    KEPT: gl.constexpr = gl.int32 if IS_INTEGER else gl.float32
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    OF_X: gl.constexpr = gl.SliceLayout(1, MMA)
    OF_W: gl.constexpr = gl.SliceLayout(0, MMA)
    SCALES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])  # its rows lie where those of MMA do
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
    # vectors that many columns a thread need are read late where no other team multiplies meanwhile
    END: gl.constexpr = OUT if (IS_SHIFTED or W_SHIFTED) and TEAMS == 1 else MMA
    if WAITS:
        tl.extra.cuda.gdc_wait()
    tiles_m = (M + BM - 1) // BM
    tiles_n = (N + BN - 1) // BN
    blocks = (K + BK - 1) // BK
    steps = steps_of(tiles_m * tiles_n, blocks, SHARE, STREAM)
    i = 0
    if IN_BLOCKS:
        first_sx, first_sw = first_scales(sx_ptr, sw_ptr, 0, tiles_m, tiles_n, blocks, M, GROUPS, SHARE, W_ROWS,
                                          TEAM * ROWS, BM, BN, ROWS, STREAM, BAND, SCALES)
    while i < steps:
        tile, start = step_at(i, blocks, SHARE, STREAM)
        tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
        count = gl.minimum(blocks - start, steps - i)
        acc = gl.zeros([ROWS, BN], KEPT, MMA)
        if IS_INTEGER:
            for j in range(count):
                acc = multiply(x_tiles, w_tiles, ready, i, acc, j > 0, TEAM, TEAMS, STAGES)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(free.index((i + STAGES - 1) % STAGES), count=1, pred=j > 0)
                i += 1
            if not STREAM:
                ending = read_ending(sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, tile_m * BM + TEAM * ROWS,
                                     tile_n * BN, M, N, ROWS, BN, END, IS_SHIFTED, W_SHIFTED, IN_BLOCKS)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index((i + STAGES - 1) % STAGES), count=1)
            result = acc
        else:  # two partial sums in turn: one is added while the matrix unit makes the other
            other = gl.zeros([ROWS, BN], gl.float32, MMA)
            sums = gl.zeros([ROWS, BN], gl.float32, MMA)
            rows = tile_m * BM + TEAM * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCALES))
            sw = sw_ptr
            factors = 1.0
            if IN_BLOCKS:
                sw += tile_n * BN // W_ROWS * GROUPS
                next_sx, next_sw = read_scales(sx_ptr, sw, start + 8, rows, blocks, M, SCALES)
            acc = multiply(x_tiles, w_tiles, ready, i, acc, False, TEAM, TEAMS, STAGES)
            acc = warpgroup_mma_wait(1, deps=[acc])
            if IN_BLOCKS:
                factors = first_sx * gl.expand_dims(first_sw, 0)
            factor = factor_of(factors, 0, OF_X, SCALES, IN_BLOCKS)
            factor_odd = factor_of(factors, 1, OF_X, SCALES, IN_BLOCKS)
            for j in range((count - 1) // 2):
                other = multiply(x_tiles, w_tiles, ready, i + 1, other, False, TEAM, TEAMS, STAGES)
                acc, other = warpgroup_mma_wait(1, deps=[acc, other])
                mbarrier.arrive(free.index(i % STAGES), count=1)
                sums = add_scaled(sums, acc, factor, IN_BLOCKS)
                acc = multiply(x_tiles, w_tiles, ready, i + 2, acc, False, TEAM, TEAMS, STAGES)
                if IN_BLOCKS:  # noqa: SIM102 - known when compiled, the other is not
                    if j % 4 == 3:
                        factors = next_sx * gl.expand_dims(next_sw, 0)
                        next_sx, next_sw = read_scales(sx_ptr, sw, start + 2 * j + 10, rows, blocks, M, SCALES)
                other, acc = warpgroup_mma_wait(1, deps=[other, acc])
                mbarrier.arrive(free.index((i + 1) % STAGES), count=1)
                # here the sums that follow hide how long it takes to ask other threads; before a product it would wait
                factor = factor_of(factors, 2 * j + 2, OF_X, SCALES, IN_BLOCKS)
                next_odd = factor_of(factors, 2 * j + 3, OF_X, SCALES, IN_BLOCKS)
                sums = add_scaled(sums, other, factor_odd, IN_BLOCKS)
                factor_odd = next_odd
                i += 2
            if not STREAM:
                ending = read_ending(sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, tile_m * BM + TEAM * ROWS,
                                     tile_n * BN, M, N, ROWS, BN, END, IS_SHIFTED, W_SHIFTED, IN_BLOCKS)
            if count % 2 == 0:
                other = multiply(x_tiles, w_tiles, ready, i + 1, other, False, TEAM, TEAMS, STAGES)
                acc, other = warpgroup_mma_wait(0, deps=[acc, other])
                mbarrier.arrive(free.index(i % STAGES), count=1)
                mbarrier.arrive(free.index((i + 1) % STAGES), count=1)
                sums = add_scaled(sums, acc, factor, IN_BLOCKS)
                sums = add_scaled(sums, other, factor_odd, IN_BLOCKS)
                i += 2
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(free.index(i % STAGES), count=1)
                sums = add_scaled(sums, acc, factor, IN_BLOCKS)
                i += 1
            result = sums
            if IN_BLOCKS:  # on the way while this tile ends
                first_sx, first_sw = first_scales(sx_ptr, sw_ptr, gl.minimum(i, steps - 1), tiles_m, tiles_n, blocks, M,
                                                  GROUPS, SHARE, W_ROWS, TEAM * ROWS, BM, BN, ROWS, STREAM, BAND,
                                                  SCALES)

        is_done = True
        if STREAM:
            is_done = count == blocks
            if count < blocks:  # sums of a part of K, in an order of their own: only the same team reads them again
                WHOLE: gl.constexpr = TEAMS * ROWS * BN
                mine = gl.expand_dims(gl.arange(0, ROWS, OF_X) * BN, 1) + gl.expand_dims(gl.arange(0, BN, OF_W), 0)
                part = part_ptr + TEAM * ROWS * BN
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
                    result = gl.zeros([ROWS, BN], KEPT, MMA)
                    slot = 2 * earliest + (earliest * SHARE < tile * blocks).to(gl.int32)
                    for program in range(earliest, latest + 1):  # in order, whichever came last: the same bits
                        result += gl.load(part + slot.to(gl.int64) * WHOLE + mine, cache_modifier=".cg")
                        slot = 2 * program + 2
        if is_done:
            if STREAM:  # not held while parts are added
                ending = read_ending(sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, tile_m * BM + TEAM * ROWS,
                                     tile_n * BN, M, N, ROWS, BN, END, IS_SHIFTED, W_SHIFTED, IN_BLOCKS)
            held = gl.convert_layout(result, END)
            r = scaled(held, ending[0], ending[1], ending[2], ending[3], ending[4], ending[5], IS_SHIFTED, W_SHIFTED)
            if HAS_BIAS:
                out = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(0, END))
                r += gl.expand_dims(gl.load(bias_ptr + out, mask=out < N, other=0.0).to(gl.float32), 0)
            final = gl.convert_layout(r.to(out_ptr.dtype.element_ty), OUT)
            m = tile_m * BM + TEAM * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
            n = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(0, OUT))
            gl.store(out_ptr + gl.expand_dims(m.to(gl.int64) * N, 1) + gl.expand_dims(n, 0), final,
                     mask=gl.expand_dims(m < M, 1) & gl.expand_dims(n < N, 0))


@gluon.jit(do_not_specialize=["M", "SHARE"])
def w8a8_hopper(
    x, w, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, M, N, K, GROUPS,
    SHARE,
    IS_INTEGER: gl.constexpr, IS_SHIFTED: gl.constexpr, W_SHIFTED: gl.constexpr, IN_BLOCKS: gl.constexpr,
    W_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    TEAMS: gl.constexpr, STAGES: gl.constexpr, STREAM: gl.constexpr, BAND: gl.constexpr, WAITS: gl.constexpr,
):
    """out [M, N] = x [M, K] times W^T [K, N], both as codes, in true scales, plus bias.

    x, w      tensor descriptors; zeros are read beyond the matrix. The pointers are those of w8a8_matmul
    part_ptr  sums of parts of K, of two tiles a program at most: [2 * programs, BM, BN]; count_ptr [tiles * TEAMS]
    SHARE     with STREAM the blocks of K that a program multiplies
    IN_BLOCKS scales of x and of W change every BK = 128 columns, W's are shared by W_ROWS rows, a multiple of 128 or BN
    BM, BN    rows of the tiles of x and of W
    WAITS     launched while the kernel that makes x runs, which is waited for here (programmatic dependent launch)
    """
    TYPE: gl.constexpr = x.dtype
    ROWS: gl.constexpr = BM // TEAMS
    x_tiles = gl.allocate_shared_memory(TYPE, [STAGES * TEAMS, ROWS, BK], x.layout)
    w_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BN, BK], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=TEAMS)
    fence_async_shared()
    if TEAMS == 1:
        gl.warp_specialize([
            (multiply_tiles, (0, x_tiles, w_tiles, ready, free, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr,
                              bias_ptr, out_ptr, part_ptr, count_ptr, M, N, K, GROUPS, SHARE, IS_INTEGER, IS_SHIFTED,
                              W_SHIFTED, IN_BLOCKS, W_ROWS, HAS_BIAS, BK, BM, BN, TEAMS, STAGES, STREAM, BAND, WAITS)),
            (copy_tiles, (x, w, x_tiles, w_tiles, ready, free, M, N, K, SHARE, BK, BM, BN, TEAMS, STAGES, STREAM,
                          BAND, WAITS)),
        ], [1], [40])
    else:
        gl.warp_specialize([
            (multiply_tiles, (0, x_tiles, w_tiles, ready, free, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr,
                              bias_ptr, out_ptr, part_ptr, count_ptr, M, N, K, GROUPS, SHARE, IS_INTEGER, IS_SHIFTED,
                              W_SHIFTED, IN_BLOCKS, W_ROWS, HAS_BIAS, BK, BM, BN, TEAMS, STAGES, STREAM, BAND, WAITS)),
            (multiply_tiles, (1, x_tiles, w_tiles, ready, free, sx_ptr, sw_ptr, zx_ptr, cs_ptr, xs_ptr, zw_ptr,
                              bias_ptr, out_ptr, part_ptr, count_ptr, M, N, K, GROUPS, SHARE, IS_INTEGER, IS_SHIFTED,
                              W_SHIFTED, IN_BLOCKS, W_ROWS, HAS_BIAS, BK, BM, BN, TEAMS, STAGES, STREAM, BAND, WAITS)),
            (copy_tiles, (x, w, x_tiles, w_tiles, ready, free, M, N, K, SHARE, BK, BM, BN, TEAMS, STAGES, STREAM,
                          BAND, WAITS)),
        ], [4, 1], [240, 24])
