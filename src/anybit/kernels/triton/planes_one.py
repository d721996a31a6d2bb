# mypy: ignore-errors
"""The product of one token with a weight of "triton-planes" in Gluon: words go from memory to registers, no further.

A matrix instruction has eight columns where one token has one. Here they are the eight fields of a block: x's part of
field i stands in column i, zeros in the others, so one accumulator [rows, 8] gathers the sums of all groups of a block
apart, and a scale meets each of them once. Sums of x by group are one more product, with ones on the left. Operands,
scales and sums are those of `planes_kernels.matmul_kernel`; only integer zero points, and the scales that others fold
into the codes, meet the sums instead. No shared memory and no barrier: each warp reads the words of its rows in the
order in which it multiplies them, the next block's while it works on one. Warps share the rows of a program, or its
blocks of K, whose sums then meet at the end.
"""

from __future__ import annotations

import triton.language as tl
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
    _folded,
    _held,
    _held_x,
    _integers,
    _lacks,
    _looked_up,
    _number,
    _of_run,
    _value,
)

# a pair of x where its column is the field's, zeros elsewhere
_COLUMN = gl.constexpr("{.reg .pred p; setp.eq.s32 p, $2, $4; selp.b32 $0, $1, 0, p;}")
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _along(count: gl.constexpr, axis: gl.constexpr, L: gl.constexpr):
    """0 ... count - 1 along an axis of a tensor of three in layout L."""
    if axis == 0:
        return gl.arange(0, count, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None][:, :, None]
    elif axis == 1:
        return gl.arange(0, count, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :][:, :, None]
    else:
        return gl.arange(0, count, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :][:, None, :]


@gluon.jit
def one_kernel(
    x_ptr, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, row_ptr, table_ptr, token_ptr, bias_ptr, o_ptr,
    part_ptr, count_ptr, N, NP, K, KP, z_stride, mult,
    DECODE: gl.constexpr, BITS: gl.constexpr, W0: gl.constexpr, W1: gl.constexpr, W2: gl.constexpr, P: gl.constexpr,
    F: gl.constexpr, R: gl.constexpr, G: gl.constexpr, SCALING: gl.constexpr, SKIND: gl.constexpr,
    SSUPER: gl.constexpr, SWORDS: gl.constexpr, SSIGNED: gl.constexpr, ZERO: gl.constexpr, ZEROS: gl.constexpr,
    ADD: gl.constexpr, AKIND: gl.constexpr, ASUPER: gl.constexpr, AWORDS: gl.constexpr, ASIGNED: gl.constexpr,
    MANTISSA: gl.constexpr, BIAS_E: gl.constexpr, SPECIAL: gl.constexpr, ROUND: gl.constexpr, TERMS: gl.constexpr,
    BN: gl.constexpr, SPLIT: gl.constexpr, TOKENS: gl.constexpr, BIAS: gl.constexpr, EVEN: gl.constexpr,
    WARPS: gl.constexpr, WK: gl.constexpr,
):  # fmt: skip
    """o [1, N] = x [1, K] W^T + bias: program (BN rows, part of K). Constants as in `matmul_kernel`.

    WK  warps that share K, block by block in turn; WARPS // WK share the rows

    Launched while the kernel before it ends, which it waits for once its first words are on the way; the next one may
    be launched when its sums are done (programmatic dependent launch).
    """
    D: gl.constexpr = x_ptr.dtype.element_ty
    WIDTH: gl.constexpr = P // 8
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WK, WARPS // WK, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, WIDTH)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, WIDTH)
    OUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, MMA))
    SUMS: gl.constexpr = ADD > 0 or ZEROS  # of x are wanted
    LACKS: gl.constexpr = _lacks(DECODE, W0, W1, D)
    rows = gl.program_id(0) * BN + gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :]
    rn = gl.program_id(0) * BN + _along(BN, 1, MMA)
    n = _along(8, 2, MMA)
    xn = _along(8, 2, RIGHT)
    x_at = xn * P + _along(P, 1, RIGHT)
    of_words = _along(WK, 0, LEFT)
    of_rows = gl.arange(0, WK, gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None]
    of_sums = _along(WK, 0, MMA)
    of_x = _along(WK, 0, RIGHT)
    blocks = KP // (F * P)
    per = gl.cdiv(blocks, gl.num_programs(1))
    first = gl.program_id(1) * per
    last = gl.minimum(first + per, blocks)
    E: gl.constexpr = F * P if W0 == 8 else P  # elements of a block: bytes have one field each
    at = rows.to(gl.int64)[:, :, None] * (blocks * E) + _along(P, 2, LEFT)
    if DECODE == 2:
        gl.inline_asm_elementwise(KEEP_TABLE, "=r,l", [table_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)
    acc = gl.zeros([WK, BN, 8], gl.float32, MMA)
    ones = gl.full([WK, BN, P], 1.0, D, LEFT)
    q0, q1, q2, s, above, a, a_above, z, f0, f1, f2, f3, f4, f5, f6, f7 = _held(
        first, last, of_words, of_rows, of_sums, at, rows, rn, n, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr, a_ptr,
        as_ptr, NP, z_stride, W0, W1, W2, P, F, R, G, SCALING, SSUPER, SWORDS, ZEROS, ADD, ASUPER,
        AWORDS)  # fmt: skip
    tl.extra.cuda.gdc_wait()
    x = _held_x(first, last, of_x, x_at, x_ptr, K, P, F, WK, EVEN)
    for b in range(first, last, WK):
        # the next blocks, or the last one again
        ahead = gl.minimum(b + WK, last - 1)
        r0, r1, r2, rs, r_above, ra, ra_above, rz, g0, g1, g2, g3, g4, g5, g6, g7 = _held(
            ahead, last, of_words, of_rows, of_sums, at, rows, rn, n, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr,
            a_ptr, as_ptr, NP, z_stride, W0, W1, W2, P, F, R, G, SCALING, SSUPER, SWORDS, ZEROS, ADD, ASUPER,
            AWORDS)  # fmt: skip
        rx = _held_x(ahead, last, of_x, x_at, x_ptr, K, P, F, WK, EVEN)
        part = gl.zeros([WK, BN, 8], gl.float32, MMA)
        for i in gl.static_range(F):
            xi = _asm(_COLUMN, "=r,r,r,r,r,r", [x, xn, i], 2, D)
            f = _of_run(i // R, f0, f1, f2, f3, f4, f5, f6, f7)[:, :, None] if SCALING == 3 else 1.0
            if DECODE == 2 and TERMS == 1:
                w = _looked_up(q0, i, f, SCALING == 3, D)
                part = mma_v2(w, xi, part)
            elif DECODE == 2:
                value = _value(q0, i, f, SCALING == 3, ROUND)
                for term in gl.static_range(TERMS):
                    w = _asm(UPPER, "=r,r,r", [value], 2, D)
                    if term < TERMS - 1:
                        value = gl.inline_asm_elementwise(REST, "=r,r", [value], dtype=gl.int32, is_pure=True, pack=1)
                    part = mma_v2(w, xi, part)
            elif W0 == 8:
                q = gl.load(c0_ptr + (at + (gl.minimum(b + of_words, last - 1) * E + i * P)))
                w = _float_bytes(q, MANTISSA, BIAS_E, D) if DECODE == 1 else _bytes(q, 0 if ZEROS else ZERO, D)
                part = mma_v2(w, xi, part)
            elif DECODE == 1:
                part = mma_v2(_floats(q0, q1, i, BITS, MANTISSA, BIAS_E, W0, W1, D), xi, part)
            else:
                part = mma_v2(_integers(q0, q1, q2, i, 0 if ZEROS else ZERO, W0, W1, W2, D), xi, part)
        if SUMS:
            sums = mma_v2(ones, x, gl.zeros([WK, BN, 8], gl.float32, MMA))
            part = part * LACKS
        if ZEROS:
            part -= sums * z.to(gl.float32)
        if ADD > 0:
            added = sums * _number(a, AKIND, ASIGNED)
            if ASUPER > 0:
                added = added * a_above.to(gl.float32)
            if ADD == 1:
                part -= added
            elif ADD == 2:
                acc += added
            else:
                acc -= added
        if SCALING == 1:
            part = part * _number(s, SKIND, SSIGNED)
            if SSUPER > 0:
                part = part * above.to(gl.float32)
        if SCALING == 2:
            part = part * _folded(s, SKIND)
        acc += part
        q0 = r0
        q1 = r1
        q2 = r2
        x = rx
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
    tl.extra.cuda.gdc_launch_dependents()
    y = gl.sum(gl.sum(acc, axis=2), axis=0)
    rb = gl.program_id(0) * BN + gl.arange(0, BN, OUT)
    y = y * (mult if SUMS else mult * LACKS) * gl.load(row_ptr + rb)
    if TOKENS:
        y = y * gl.load(token_ptr)
    inside = rb < N
    if SPLIT:
        gl.store(part_ptr + gl.program_id(1) * N + rb, y, mask=inside, cache_modifier=".cg")
        _barrier()
        arrived = gl.atomic_add(count_ptr + gl.program_id(0), 1, sem="acq_rel")
        if arrived == gl.num_programs(1) - 1:
            gl.store(count_ptr + gl.program_id(0), 0)  # ready for the next call
            total = gl.zeros([BN], gl.float32, OUT)
            for p in range(gl.num_programs(1)):
                total += gl.load(part_ptr + p * N + rb, mask=inside, other=0.0, cache_modifier=".cg")
            if BIAS:
                total += gl.load(bias_ptr + rb, mask=inside, other=0.0).to(gl.float32)
            gl.store(o_ptr + rb, total.to(o_ptr.dtype.element_ty), mask=inside)
    else:
        if BIAS:
            y += gl.load(bias_ptr + rb, mask=inside, other=0.0).to(gl.float32)
        gl.store(o_ptr + rb, y.to(o_ptr.dtype.element_ty), mask=inside)
