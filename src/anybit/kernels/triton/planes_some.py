# mypy: ignore-errors
"""Products of 2 to 16 tokens with a weight of "triton-planes" in Gluon, as `planes_one` makes those of one.

The columns of a matrix instruction are tokens, so a group's scale is wanted by all of them: the lane that has it gives
it to the three beside it. x is read from the first cache, by each warp for itself.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from anybit.kernels.triton.planes_pairs import (
    KEEP_TABLE,
    REST,
    UPPER,
)
from anybit.kernels.triton.planes_registers import (
    _asm,
    _bytes,
    _float_bytes,
    _floats,
    _held,
    _integers,
    _looked_up,
    _number,
    _of_run,
    _value,
)

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


# columns 2 j and 2 j + 1 of a tile [16, 8], for all columns: of a quad of lanes each has two, of two rows
_EVEN_COLUMN = gl.constexpr("shfl.sync.idx.b32 $0, $4, $8, 0x1C1F, 0xFFFFFFFF; mov.b32 $1, $0; "
                            "shfl.sync.idx.b32 $2, $6, $8, 0x1C1F, 0xFFFFFFFF; mov.b32 $3, $2;")
_ODD_COLUMN = gl.constexpr("shfl.sync.idx.b32 $0, $5, $8, 0x1C1F, 0xFFFFFFFF; mov.b32 $1, $0; "
                           "shfl.sync.idx.b32 $2, $7, $8, 0x1C1F, 0xFFFFFFFF; mov.b32 $3, $2;")
_COLUMN_REGISTERS = gl.constexpr(",".join(["=&r"] * 4 + ["r"] * 8))


@gluon.jit
def _column(tile, j: gl.constexpr):
    """Column j of a float32 tile [BN, 8] in each of its columns."""
    text: gl.constexpr = _ODD_COLUMN if j % 2 else _EVEN_COLUMN
    bits = gl.inline_asm_elementwise(text, _COLUMN_REGISTERS, [tile.to(gl.int32, bitcast=True), j // 2], dtype=gl.int32,
                                     is_pure=True, pack=4)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _joined(acc, part, sums, zero, added, scale, ZEROS: gl.constexpr, ADD: gl.constexpr, SCALING: gl.constexpr):
    """The sums acc, of all groups so far, and those of one more, with its scale and offset."""
    if ZEROS:
        part -= sums * zero
    if ADD == 1:
        part -= sums * added
    elif ADD == 2:
        acc += sums * added
    elif ADD == 3:
        acc -= sums * added
    return acc + (part * scale if SCALING == 1 else part)


@gluon.jit
def _ended(acc, rn, n, M, N, row_ptr, token_ptr, part_ptr, mult, SPLIT: gl.constexpr, TOKENS: gl.constexpr):
    """Sums [BN, 8] of tokens n with the factors of rows and tokens; written as a part where K is shared."""
    acc = (acc * mult) * gl.load(row_ptr + rn)[:, None]
    if TOKENS:
        acc = acc * gl.load(token_ptr + n, mask=n < M, other=0.0)[None, :]
    if SPLIT:
        at = (gl.program_id(1) * M + n)[None, :] * N + rn[:, None]
        gl.store(part_ptr + at, acc, mask=(n < M)[None, :] & (rn < N)[:, None], cache_modifier=".cg")
    return acc


@gluon.jit
def _stored(acc, rn, n, M, N, bias_ptr, o_ptr, part_ptr, SPLIT: gl.constexpr, BIAS: gl.constexpr):
    """The parts' sum, or acc, with bias and the one rounding."""
    mask = (n < M)[None, :] & (rn < N)[:, None]
    if SPLIT:
        acc = mask.to(gl.float32) * 0.0
        for p in range(gl.num_programs(1)):
            acc += gl.load(part_ptr + ((p * M + n)[None, :] * N + rn[:, None]), mask=mask, other=0.0,
                           cache_modifier=".cg")
    if BIAS:
        acc += gl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(gl.float32)[:, None]
    gl.store(o_ptr + (n[None, :] * N + rn[:, None]), acc.to(o_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["M"])
def some_kernel(
    x_ptr, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, row_ptr, table_ptr, token_ptr, bias_ptr, o_ptr,
    part_ptr, count_ptr, M, N, NP, K, KP, x_stride, z_stride, mult,
    DECODE: gl.constexpr, BITS: gl.constexpr, W0: gl.constexpr, W1: gl.constexpr, W2: gl.constexpr, P: gl.constexpr,
    F: gl.constexpr, R: gl.constexpr, G: gl.constexpr, SCALING: gl.constexpr, SKIND: gl.constexpr,
    SSUPER: gl.constexpr, SWORDS: gl.constexpr, SSIGNED: gl.constexpr, ZERO: gl.constexpr, ZEROS: gl.constexpr,
    ADD: gl.constexpr, AKIND: gl.constexpr, ASUPER: gl.constexpr, AWORDS: gl.constexpr, ASIGNED: gl.constexpr,
    MANTISSA: gl.constexpr, BIAS_E: gl.constexpr, SPECIAL: gl.constexpr, ROUND: gl.constexpr, TERMS: gl.constexpr,
    BN: gl.constexpr, SPLIT: gl.constexpr, TOKENS: gl.constexpr, BIAS: gl.constexpr, EVEN: gl.constexpr,
    WARPS: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """o [M, N] = x [M, K] W^T + bias for at most BM tokens, 8 or 16: the columns are tokens, two products if 16.

    Scales of a block are held as `one_kernel` holds them; each lane asks the one that has a field's scale for it.
    """
    D: gl.constexpr = x_ptr.dtype.element_ty
    WIDTH: gl.constexpr = P // 8
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, WIDTH)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, WIDTH)
    SUMS: gl.constexpr = ADD > 0 or ZEROS  # of x are wanted
    rows = gl.program_id(0) * BN + gl.arange(0, BN, gl.SliceLayout(1, LEFT))
    columns = gl.arange(0, P, gl.SliceLayout(0, LEFT))
    rn = gl.program_id(0) * BN + gl.arange(0, BN, gl.SliceLayout(1, MMA))
    n = gl.arange(0, 8, gl.SliceLayout(0, MMA))
    xk = gl.arange(0, P, gl.SliceLayout(1, RIGHT))[:, None]
    xn = gl.arange(0, 8, gl.SliceLayout(0, RIGHT))[None, :]
    blocks = KP // (F * P)
    per = gl.cdiv(blocks, gl.num_programs(1))
    first = gl.program_id(1) * per
    last = gl.minimum(first + per, blocks)
    E: gl.constexpr = F * P if W0 == 8 else P  # elements of a block: bytes have one field each
    at = rows.to(gl.int64)[:, None] * (blocks * E) + columns[None, :]
    x_from = x_ptr + (xn * x_stride + xk)
    is_token = xn + xk * 0 < M
    if DECODE == 2:
        gl.inline_asm_elementwise(KEEP_TABLE, "=r,l", [table_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)
    acc = gl.zeros([BN, 8], gl.float32, MMA)
    beside = acc  # of tokens 8 to 15
    ones = gl.full([BN, P], 1.0, D, LEFT)
    q0, q1, q2, _, s, above, a, a_above, z, f0, f1, f2, f3, f4, f5, f6, f7 = _held(
        first, at, xk * 0 + xn * 0, rows, rn, n, x_ptr, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, NP,
        K, z_stride, W0, W1, W2, P, F, R, G, SCALING, SSUPER, SWORDS, ZEROS, ADD, ASUPER, AWORDS, True)  # fmt: skip
    for b in range(first, last):
        # the next block, or the last one again
        r0, r1, r2, _, rs, r_above, ra, ra_above, rz, g0, g1, g2, g3, g4, g5, g6, g7 = _held(
            gl.minimum(b + 1, last - 1), at, xk * 0 + xn * 0, rows, rn, n, x_ptr, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr,
            z_ptr, a_ptr, as_ptr, NP, K, z_stride, W0, W1, W2, P, F, R, G, SCALING, SSUPER, SWORDS, ZEROS, ADD, ASUPER,
            AWORDS, True)  # fmt: skip
        if SCALING == 1:
            scale = _number(s, SKIND, SSIGNED)
            if SSUPER > 0:
                scale = scale * above.to(gl.float32)
        if ADD > 0:
            added = _number(a, AKIND, ASIGNED)
            if ASUPER > 0:
                added = added * a_above.to(gl.float32)
        if ZEROS:
            zero = z.to(gl.float32)
        for i in gl.static_range(F):
            k = b * (F * P) + i * P
            counted = is_token if EVEN else is_token & (xk + k < K)
            xi = gl.load(x_from + k, mask=counted, other=0.0)
            if BM == 16:
                still = (xn + xk * 0 + 8 < M) if EVEN else (xn + 8 < M) & (xk + k < K)
                xj = gl.load(x_from + (8 * x_stride + k), mask=still, other=0.0)
            if i % R == 0:
                part = gl.zeros([BN, 8], gl.float32, MMA)
                part_beside = part
                sums = part
                sums_beside = part
            if SUMS:
                sums = mma_v2(ones, xi, sums)
                if BM == 16:
                    sums_beside = mma_v2(ones, xj, sums_beside)
            if DECODE == 2 and TERMS > 1:
                f = _of_run(i // R, f0, f1, f2, f3, f4, f5, f6, f7)[:, None] if SCALING == 3 else 1.0
                value = _value(q0, i, f, SCALING == 3, ROUND)
                for term in gl.static_range(TERMS):
                    w = _asm(UPPER, "=r,r,r", [value], 2, D)
                    if term < TERMS - 1:
                        value = gl.inline_asm_elementwise(REST, "=r,r", [value], dtype=gl.int32, is_pure=True, pack=1)
                    part = mma_v2(w, xi, part)
                    if BM == 16:
                        part_beside = mma_v2(w, xj, part_beside)
            else:
                if DECODE == 2:
                    f = _of_run(i // R, f0, f1, f2, f3, f4, f5, f6, f7)[:, None] if SCALING == 3 else 1.0
                    w = _looked_up(q0, i, f, SCALING == 3, D)
                elif W0 == 8:
                    q = gl.load(c0_ptr + (at + (b * E + i * P)))
                    w = _float_bytes(q, MANTISSA, BIAS_E, D) if DECODE == 1 else _bytes(q, 0 if ZEROS else ZERO, D)
                elif DECODE == 1:
                    w = _floats(q0, q1, i, BITS, MANTISSA, BIAS_E, W0, W1, D)
                else:
                    w = _integers(q0, q1, q2, i, 0 if ZEROS else ZERO, W0, W1, W2, D)
                part = mma_v2(w, xi, part)
                if BM == 16:
                    part_beside = mma_v2(w, xj, part_beside)
            if i % R == R - 1:
                zi = _column(zero, i) if ZEROS else 0.0
                ai = _column(added, i) if ADD > 0 else 0.0
                si = _column(scale, i) if SCALING == 1 else 0.0
                acc = _joined(acc, part, sums, zi, ai, si, ZEROS, ADD, SCALING)
                if BM == 16:
                    beside = _joined(beside, part_beside, sums_beside, zi, ai, si, ZEROS, ADD, SCALING)
        q0 = r0
        q1 = r1
        q2 = r2
        s = rs
        above = r_above
        a = ra
        a_above = ra_above
        z = rz
        f0 = g0
        f1 = g1
        f2 = g2
        f3 = g3
        f4 = g4
        f5 = g5
        f6 = g6
        f7 = g7
    acc = _ended(acc, rn, n, M, N, row_ptr, token_ptr, part_ptr, mult, SPLIT, TOKENS)
    if BM == 16:
        beside = _ended(beside, rn, n + 8, M, N, row_ptr, token_ptr, part_ptr, mult, SPLIT, TOKENS)
    if SPLIT:
        _barrier()
        arrived = gl.atomic_add(count_ptr + gl.program_id(0), 1, sem="acq_rel")
        if arrived == gl.num_programs(1) - 1:
            gl.store(count_ptr + gl.program_id(0), 0)  # ready for the next call
            _stored(acc, rn, n, M, N, bias_ptr, o_ptr, part_ptr, True, BIAS)
            if BM == 16:
                _stored(beside, rn, n + 8, M, N, bias_ptr, o_ptr, part_ptr, True, BIAS)
    else:
        _stored(acc, rn, n, M, N, bias_ptr, o_ptr, part_ptr, False, BIAS)
        if BM == 16:
            _stored(beside, rn, n + 8, M, N, bias_ptr, o_ptr, part_ptr, False, BIAS)
