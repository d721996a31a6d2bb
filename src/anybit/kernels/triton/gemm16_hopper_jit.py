# mypy: ignore-errors
"""Device code of the 16 bit product for sm_90, with factors of rows and a bias before the one rounding.

One warp copies tiles of both operands into shared memory by tensor memory access, as many stages ahead as fit; two
teams of four warps multiply them (wgmma), each its half of the rows of x, and send their sums through a little shared
memory to where they belong, by the same kind of access: rows and columns beyond the matrix are left out by it. Teams
wait for each other nowhere, so that one writes its results while the other still multiplies. Programs take whole tiles
in turn; HALVES: those of the last turn take half a tile each, where tiles are left for at most half of them.

The portable twin is torch's product with float32 results and `planes_kernels.finish_kernel`. Launched by
`gemm16_hopper.py` where `triton_gemm16_hopper.py` says so. Written in Gluon, Triton's language of explicit layouts.
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

from anybit.kernels.triton.w8a8_hopper_jit import load_tile, place

store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global  # its name up to Triton 3.6


@gluon.jit
def whole_tiles(tiles, HALVES: gl.constexpr):
    """How many tiles programs take whole: the last turn's are halved with HALVES."""
    whole = tiles
    if HALVES:
        whole = tiles // gl.num_programs(0) * gl.num_programs(0)
    return whole


@gluon.jit
def copy_tile(
    x, w, x_tiles, w_tiles, ready, free, i, row, column, blocks, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    WIDTH: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows of x from `row` on and BN rows of W from `column` on, along K; W's come in PARTS boxes."""
    HALF: gl.constexpr = BM // 2
    BOX: gl.constexpr = WIDTH // PARTS
    for block in range(blocks):
        stage = i % STAGES
        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(stage), (BM + BN) * BK * 2)
        load_tile(x, [row, block * BK], ready.index(stage), x_tiles.index(2 * stage))
        load_tile(x, [row + HALF, block * BK], ready.index(stage), x_tiles.index(2 * stage + 1))
        for part in gl.static_range(BN // BOX):
            load_tile(w, [column + part * BOX, block * BK], ready.index(stage),
                      w_tiles.index(stage).slice(part * BOX, BOX, dim=0))
        i += 1
    return i


@gluon.jit
def copy_tiles(
    x, w, x_tiles, w_tiles, ready, free, M, N, K, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, BAND: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    PARTS: gl.constexpr = 2 if HALVES else 1
    tiles_m = (M + BM - 1) // BM
    tiles_n = (N + BN - 1) // BN
    tiles = tiles_m * tiles_n
    whole = whole_tiles(tiles, HALVES)
    blocks = (K + BK - 1) // BK
    i = 0
    for tile in range(gl.program_id(0), whole, gl.num_programs(0)):
        tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
        i = copy_tile(x, w, x_tiles, w_tiles, ready, free, i, tile_m * BM, tile_n * BN, blocks, BK, BM, BN, BN, PARTS,
                      STAGES)
    if HALVES:
        tile = whole + gl.program_id(0) // 2
        if tile < tiles:
            tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
            column = tile_n * BN + gl.program_id(0) % 2 * (BN // 2)
            copy_tile(x, w, x_tiles, w_tiles, ready, free, i, tile_m * BM, column, blocks, BK, BM, BN // 2, BN, PARTS,
                      STAGES)


@gluon.jit
def sums_of(
    x_tiles, w_tiles, ready, free, i, blocks, TEAM: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    WIDTH: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """A team's sums [ROWS, BN] over K, from step i on; W's tiles have room for WIDTH rows."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc = gl.zeros([ROWS, BN], gl.float32, MMA)
    for block in range(blocks):
        stage = i % STAGES
        mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        rows = w_tiles.index(stage)
        if BN < WIDTH:
            rows = rows.slice(0, BN, dim=0)
        acc = warpgroup_mma(x_tiles.index(2 * stage + TEAM), rows.permute((1, 0)), acc, use_acc=block > 0,
                            is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(free.index((i + STAGES - 1) % STAGES), count=1, pred=block > 0)
        i += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index((i + STAGES - 1) % STAGES), count=1)
    return acc


@gluon.jit
def write(
    out, results, acc, token_ptr, bias_ptr, alpha, row, column, M, N, TOKENS: gl.constexpr, BIAS: gl.constexpr,
    TURN: gl.constexpr,
):  # fmt: skip
    """Sums times factors, plus bias, rounded once: 64 columns at a time, through two tiles of shared memory in turn."""
    ROWS: gl.constexpr = acc.shape[0]
    BN: gl.constexpr = acc.shape[1]
    if BN > 64:
        HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN // 2, 16])
        left, right = acc.reshape([ROWS, 2, BN // 2]).permute((0, 2, 1)).split()  # which registers, not which lanes
        left = gl.convert_layout(left, HALF, assert_trivial=True)
        right = gl.convert_layout(right, HALF, assert_trivial=True)
        write(out, results, left, token_ptr, bias_ptr, alpha, row, column, M, N, TOKENS, BIAS, TURN)
        write(out, results, right, token_ptr, bias_ptr, alpha, row, column + BN // 2, M, N, TOKENS, BIAS,
              TURN + BN // 128)
    else:
        y = acc * alpha
        if TOKENS:
            m = row + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
            y *= gl.expand_dims(gl.load(token_ptr + m, mask=m < M, other=0.0), 1)
        if BIAS:
            n = column + gl.arange(0, BN, gl.SliceLayout(0, acc.type.layout))
            y += gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32), 0)
        tma.store_wait(1)  # what was written before the last
        tl.debug_barrier()
        results.index(TURN % 2).store(y.to(out.dtype))
        fence_async_shared()
        store_tile(out, [row, column], results.index(TURN % 2))


@gluon.jit
def multiply_tiles(
    TEAM: gl.constexpr, x_tiles, w_tiles, results, ready, free, out, token_ptr, bias_ptr, alpha, M, N, K,
    TOKENS: gl.constexpr, BIAS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, BAND: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """A team's work: half of the rows of the tiles of x, all of W's."""
    ROWS: gl.constexpr = BM // 2
    tiles_m = (M + BM - 1) // BM
    tiles_n = (N + BN - 1) // BN
    tiles = tiles_m * tiles_n
    whole = whole_tiles(tiles, HALVES)
    blocks = (K + BK - 1) // BK
    i = 0
    for tile in range(gl.program_id(0), whole, gl.num_programs(0)):
        tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
        acc = sums_of(x_tiles, w_tiles, ready, free, i, blocks, TEAM, STAGES, ROWS, BN, BN)
        write(out, results, acc, token_ptr, bias_ptr, alpha, tile_m * BM + TEAM * ROWS, tile_n * BN, M, N, TOKENS,
              BIAS, 0)
        i += blocks
    if HALVES:
        tile = whole + gl.program_id(0) // 2
        if tile < tiles:
            tile_m, tile_n = place(tile, tiles_m, tiles_n, BAND)
            column = tile_n * BN + gl.program_id(0) % 2 * (BN // 2)
            acc = sums_of(x_tiles, w_tiles, ready, free, i, blocks, TEAM, STAGES, ROWS, BN, BN // 2)
            write(out, results, acc, token_ptr, bias_ptr, alpha, tile_m * BM + TEAM * ROWS, column, M, N, TOKENS, BIAS,
                  0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "alpha"])
def gemm16_hopper(
    x, w, out, token_ptr, bias_ptr, alpha, M, N, K,
    TOKENS: gl.constexpr, BIAS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, BAND: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """out [M, N] = alpha token [M] * (x [M, K] times W^T [K, N]) + bias [N]: float32 sums, one rounding.

    x, w, out  tensor descriptors; zeros are read, and nothing is written, beyond the matrix
    TOKENS     rows of x have float32 factors at token_ptr; BIAS: outputs have a bias
    BM, BN     rows of the tiles of x and of W
    """
    TYPE: gl.constexpr = x.dtype
    ROWS: gl.constexpr = BM // 2
    x_tiles = gl.allocate_shared_memory(TYPE, [STAGES * 2, ROWS, BK], x.layout)
    w_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BN, BK], w.layout)
    first = gl.allocate_shared_memory(out.dtype, [2, ROWS, 64], out.layout)
    second = gl.allocate_shared_memory(out.dtype, [2, ROWS, 64], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (multiply_tiles, (0, x_tiles, w_tiles, first, ready, free, out, token_ptr, bias_ptr, alpha, M, N, K, TOKENS,
                          BIAS, BM, BN, BK, STAGES, BAND, HALVES)),
        (multiply_tiles, (1, x_tiles, w_tiles, second, ready, free, out, token_ptr, bias_ptr, alpha, M, N, K, TOKENS,
                          BIAS, BM, BN, BK, STAGES, BAND, HALVES)),
        (copy_tiles, (x, w, x_tiles, w_tiles, ready, free, M, N, K, BM, BN, BK, STAGES, BAND, HALVES)),
    ], [4, 1], [240, 24])
