# mypy: ignore-errors
"""The product of one token with a weight of "triton-planes" in Gluon: words go from memory to registers, no further.

A matrix instruction has eight columns where one token has one. Here they are the eight fields of a block: x's part of
field i stands in column i, zeros in the others, so one accumulator [rows, 8] gathers the sums of all groups of a block
apart, and a scale meets each of them once. Sums of x by group are one more product, with ones on the left. Operands,
scales and sums are those of `planes_kernels.matmul_kernel`; only integer zero points meet the sums of x instead of the
codes. No shared memory and no barrier: each warp reads the words of its rows in the order in which it multiplies them,
the next block's while it works on one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from anybit.kernels.triton.planes_pairs import (
    _BYTES_BF16,
    _BYTES_FP16,
    _F1_REGISTERS,
    _F2_REGISTERS,
    _F8_REGISTERS,
    _FB1,
    _FB2,
    _FB8,
    _FH1,
    _FH2,
    _FH8,
    _I1_REGISTERS,
    _I2_REGISTERS,
    _I3_REGISTERS,
    _IB1,
    _IB2,
    _IB3,
    _IH1,
    _IH2,
    _IH3,
    _MAGIC_BF16,
    _MAGIC_FP16,
    _ONE_BF16,
    _ONE_FP16,
    _T_REGISTERS,
    _TB,
    _TH,
    _TS_REGISTERS,
    _TSB,
    _TSH,
    KEEP_TABLE,
    LOOK_UP,
    NEGATIVE_2_23,
    REST,
    UPPER,
)

# a pair of x where its column is the field's, zeros elsewhere
_COLUMN = gl.constexpr("{.reg .pred p; setp.eq.s32 p, $2, $4; selp.b32 $0, $1, 0, p;}")
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _turn(field: gl.constexpr, WIDTH: gl.constexpr, to: gl.constexpr):
    place: gl.constexpr = (field % 4) * 4 if WIDTH == 4 else field * WIDTH
    return (place - to) % 32


@gluon.jit
def _twice(mask: gl.constexpr):
    both: gl.constexpr = mask * 0x10001
    return both - 2**32 if both >= 2**31 else both


@gluon.jit
def _half(q, i: gl.constexpr, WIDTH: gl.constexpr):
    """The 16 bits of a plane's elements that hold field i."""
    if WIDTH == 4 and i >= 4:
        return (q >> 16).to(gl.int16)
    else:
        return q.to(gl.int16)


@gluon.jit
def _asm(text: gl.constexpr, registers: gl.constexpr, arguments, PACK: gl.constexpr, D: gl.constexpr):
    if gl.bfloat16 == D:
        return gl.inline_asm_elementwise(text, registers, arguments, dtype=gl.bfloat16, is_pure=True, pack=PACK)
    else:
        return gl.inline_asm_elementwise(text, registers, arguments, dtype=gl.float16, is_pure=True, pack=PACK)


@gluon.jit
def _integers(q0, q1, q2, i: gl.constexpr, ZERO: gl.constexpr, W0: gl.constexpr, W1: gl.constexpr, W2: gl.constexpr,
              D: gl.constexpr):
    """Field i as integers minus ZERO in D (`planes_pairs.integer_pairs`, `byte_pairs`)."""
    IS_BRAIN: gl.constexpr = gl.bfloat16 == D
    magic: gl.constexpr = _MAGIC_BF16 if IS_BRAIN else _MAGIC_FP16
    one: gl.constexpr = _ONE_BF16 if IS_BRAIN else _ONE_FP16
    pair = _twice((0xC300 if IS_BRAIN else 0xE400) + int(ZERO))
    h0 = _half(q0, i, W0)
    r0 = _turn(i, W0, 0)
    m0 = _twice((1 << W0) - 1)
    if W1 == 0:
        return _asm(_IB1 if IS_BRAIN else _IH1, _I1_REGISTERS, [h0, r0, m0, magic, one, pair], 2, D)
    elif W2 == 0:
        return _asm(_IB2 if IS_BRAIN else _IH2, _I2_REGISTERS,
                    [h0, q1.to(gl.int16), r0, m0, _turn(i, W1, W0), _twice(((1 << W1) - 1) << W0), magic, one, pair],
                    2, D)  # fmt: skip
    else:
        return _asm(_IB3 if IS_BRAIN else _IH3, _I3_REGISTERS,
                    [h0, q1.to(gl.int16), q2.to(gl.int16), r0, m0, _turn(i, W1, W0), _twice(((1 << W1) - 1) << W0),
                     _turn(i, W2, W0 + W1), _twice(((1 << W2) - 1) << (W0 + W1)), magic, one, pair], 2, D)


@gluon.jit
def _floats(q0, q1, i: gl.constexpr, BITS: gl.constexpr, MANTISSA: gl.constexpr, BIAS: gl.constexpr, W0: gl.constexpr,
            W1: gl.constexpr, D: gl.constexpr):
    """Field i as small floats in D (`planes_pairs.float_pairs`)."""
    IS_BRAIN: gl.constexpr = gl.bfloat16 == D
    below: gl.constexpr = (7 if IS_BRAIN else 10) - MANTISSA
    factor = _twice((254 - BIAS) << 7 if IS_BRAIN else (30 - BIAS) << 10)
    h0 = _half(q0, i, W0)
    if W1 == 0:
        return _asm(_FB1 if IS_BRAIN else _FH1, _F1_REGISTERS,
                    [h0, _turn(i, W0, below), _twice(((1 << (BITS - 1)) - 1) << below), _turn(i, W0, 16 - BITS),
                     factor], 2, D)  # fmt: skip
    else:
        return _asm(_FB2 if IS_BRAIN else _FH2, _F2_REGISTERS,
                    [h0, q1.to(gl.int16), _turn(i, W0, below), _twice(((1 << W0) - 1) << below),
                     _turn(i, W1, W0 + below), _twice(((1 << (BITS - 1 - W0)) - 1) << (W0 + below)),
                     _turn(i, W1, 16 - BITS + W0), factor], 2, D)  # fmt: skip


@gluon.jit
def _bytes(q, ZERO: gl.constexpr, D: gl.constexpr):
    """Bytes minus ZERO in D (`planes_pairs.byte_pairs`)."""
    minus: gl.constexpr = int(ZERO) + NEGATIVE_2_23
    return _asm(_BYTES_BF16 if gl.bfloat16 == D else _BYTES_FP16, "=r,=r,r,r,r,r,r", [q, minus], 4, D)


@gluon.jit
def _float_bytes(q, MANTISSA: gl.constexpr, BIAS: gl.constexpr, D: gl.constexpr):
    """Bytes as small floats in D (`planes_pairs.float_pairs`)."""
    IS_BRAIN: gl.constexpr = gl.bfloat16 == D
    below: gl.constexpr = (7 if IS_BRAIN else 10) - MANTISSA
    factor = _twice((254 - BIAS) << 7 if IS_BRAIN else (30 - BIAS) << 10)
    return _asm(_FB8 if IS_BRAIN else _FH8, _F8_REGISTERS, [q, 8 - below, _twice(0x7F << below), factor], 4, D)


@gluon.jit
def _looked_up(q, i: gl.constexpr, f, SCALED: gl.constexpr, D: gl.constexpr):
    """Field i as entries of the table, times f if SCALED, rounded to D (`planes_pairs.table_pairs`)."""
    IS_BRAIN: gl.constexpr = gl.bfloat16 == D
    if SCALED:
        factor = f.to(gl.int32, bitcast=True)
        return _asm(_TSB if IS_BRAIN else _TSH, _TS_REGISTERS, [q, 4 * i, factor], 2, D)
    else:
        return _asm(_TB if IS_BRAIN else _TH, _T_REGISTERS, [q, 4 * i], 2, D)


@gluon.jit
def _value(q, i: gl.constexpr, f, SCALED: gl.constexpr, ROUND: gl.constexpr):
    """Field i as float32 entries of the table, times f and rounded by the format if SCALED; as their bits, int32."""
    bits = gl.inline_asm_elementwise(LOOK_UP, "=r,r,r", [q, 4 * i], dtype=gl.int32, is_pure=True, pack=1)
    if SCALED:
        value = bits.to(gl.float32, bitcast=True) * f
        if ROUND == 1:
            value = value.to(gl.float16).to(gl.float32)
        elif ROUND == 2:
            value = value.to(gl.bfloat16).to(gl.float32)
        return value.to(gl.int32, bitcast=True)
    else:
        return bits


@gluon.jit
def _number(stored, KIND: gl.constexpr, SIGNED: gl.constexpr):
    """A stored scale as float32: 0 a float, 1 an integer's byte, 2 an e8m0 byte."""
    if KIND == 1:
        byte = stored.to(gl.int32) & 0xFF
        if SIGNED:
            byte = byte ^ 0x80
        return (byte | 0x4B000000).to(gl.float32, bitcast=True) - (8388736.0 if SIGNED else 8388608.0)
    elif KIND == 2:
        byte = stored.to(gl.int32)
        bits = gl.where(byte == 0, 0x00400000, gl.where(byte == 255, 0x7FC00000, byte << 23))
        return bits.to(gl.float32, bitcast=True)
    else:
        return stored.to(gl.float32)


@gluon.jit
def _at_groups(p, b, rn, n, NP, WORDS: gl.constexpr, P: gl.constexpr, F: gl.constexpr, G: gl.constexpr):
    """What is stored of the groups of block b's fields n for rows rn: [BN, 8]."""
    if WORDS:
        at = ((b * 2 + n // 4)[None, :] * NP + rn[:, None]) * 4 + (n % 4)[None, :]
        return gl.load(p.to(gl.pointer_type(gl.uint8), bitcast=True) + at)
    else:
        g = (b * (F * P) + gl.minimum(n, F - 1) * P) // G if G > 0 else n * 0
        return gl.load(p + (g[None, :] * NP + rn[:, None]))


@gluon.jit
def _of_rows(p, b, j: gl.constexpr, rn, NP, P: gl.constexpr, F: gl.constexpr, R: gl.constexpr, G: gl.constexpr):
    """The scales of run j of block b's fields for rows rn; of runs that no block has, the last one's."""
    run: gl.constexpr = j if j < F // R else F // R - 1
    return gl.load(p + ((b * (F * P) + run * R * P) // G * NP + rn))


@gluon.jit
def _of_run(j: gl.constexpr, f0, f1, f2, f3, f4, f5, f6, f7):
    return (f0 if j == 0 else f1 if j == 1 else f2 if j == 2 else f3 if j == 3 else f4 if j == 4 else f5 if j == 5
            else f6 if j == 6 else f7)  # fmt: skip


@gluon.jit
def _held(
    b, at, x_at, rows, rn, n, x_ptr, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, NP, K, z_stride,
    W0: gl.constexpr, W1: gl.constexpr, W2: gl.constexpr, P: gl.constexpr, F: gl.constexpr, R: gl.constexpr,
    G: gl.constexpr, SCALING: gl.constexpr, SSUPER: gl.constexpr, SWORDS: gl.constexpr, ZEROS: gl.constexpr,
    ADD: gl.constexpr, ASUPER: gl.constexpr, AWORDS: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """All that block b reads, as it is stored; what stands in for the rest is not read."""
    q0 = gl.load(c0_ptr + (at + b * P)) if W0 < 8 else at
    q1 = gl.load(c1_ptr + (at + b * P)) if W1 > 0 else q0
    q2 = gl.load(c2_ptr + (at + b * P)) if W2 > 0 else q0
    if EVEN and F == 8:
        x = gl.load(x_ptr + b * (F * P) + x_at)
    else:
        x = gl.load(x_ptr + b * (F * P) + x_at, mask=(b * (F * P) + x_at < K) & (x_at < F * P), other=0.0)
    s = _at_groups(s_ptr, b, rn, n, NP, SWORDS, P, F, G) if SCALING == 1 else n
    above = _at_groups(ss_ptr, b, rn, n, NP, False, P, F, G * SSUPER) if SCALING == 1 and SSUPER > 0 else n
    a = _at_groups(a_ptr, b, rn, n, NP, AWORDS, P, F, G) if ADD > 0 else n
    a_above = _at_groups(as_ptr, b, rn, n, NP, False, P, F, G * ASUPER) if ADD > 0 and ASUPER > 0 else n
    z = _at_groups(z_ptr, b, rn, n, z_stride, False, P, F, G) if ZEROS else n
    if SCALING == 3:
        f0 = _of_rows(s_ptr, b, 0, rows, NP, P, F, R, G)
        f1 = _of_rows(s_ptr, b, 1, rows, NP, P, F, R, G) if F // R > 1 else f0
        f2 = _of_rows(s_ptr, b, 2, rows, NP, P, F, R, G) if F // R > 2 else f0
        f3 = _of_rows(s_ptr, b, 3, rows, NP, P, F, R, G) if F // R > 2 else f0
        f4 = _of_rows(s_ptr, b, 4, rows, NP, P, F, R, G) if F // R > 4 else f0
        f5 = _of_rows(s_ptr, b, 5, rows, NP, P, F, R, G) if F // R > 4 else f0
        f6 = _of_rows(s_ptr, b, 6, rows, NP, P, F, R, G) if F // R > 4 else f0
        f7 = _of_rows(s_ptr, b, 7, rows, NP, P, F, R, G) if F // R > 4 else f0
    else:
        f0 = n
        f1 = n
        f2 = n
        f3 = n
        f4 = n
        f5 = n
        f6 = n
        f7 = n
    return q0, q1, q2, x, s, above, a, a_above, z, f0, f1, f2, f3, f4, f5, f6, f7


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
    WARPS: gl.constexpr,
):  # fmt: skip
    """o [1, N] = x [1, K] W^T + bias: program (BN rows, part of K). Constants as in `matmul_kernel`."""
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
    x_at = xn * P + xk
    blocks = KP // (F * P)
    per = gl.cdiv(blocks, gl.num_programs(1))
    first = gl.program_id(1) * per
    last = gl.minimum(first + per, blocks)
    E: gl.constexpr = F * P if W0 == 8 else P  # elements of a block: bytes have one field each
    at = rows.to(gl.int64)[:, None] * (blocks * E) + columns[None, :]
    if DECODE == 2:
        gl.inline_asm_elementwise(KEEP_TABLE, "=r,l", [table_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)
    acc = gl.zeros([BN, 8], gl.float32, MMA)
    ones = gl.full([BN, P], 1.0, D, LEFT)
    q0, q1, q2, x, s, above, a, a_above, z, f0, f1, f2, f3, f4, f5, f6, f7 = _held(
        first, at, x_at, rows, rn, n, x_ptr, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, NP, K,
        z_stride, W0, W1, W2, P, F, R, G, SCALING, SSUPER, SWORDS, ZEROS, ADD, ASUPER, AWORDS, EVEN)  # fmt: skip
    for b in range(first, last):
        # the next block, or the last one again
        r0, r1, r2, rx, rs, r_above, ra, ra_above, rz, g0, g1, g2, g3, g4, g5, g6, g7 = _held(
            gl.minimum(b + 1, last - 1), at, x_at, rows, rn, n, x_ptr, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr,
            a_ptr, as_ptr, NP, K, z_stride, W0, W1, W2, P, F, R, G, SCALING, SSUPER, SWORDS, ZEROS, ADD, ASUPER, AWORDS,
            EVEN)  # fmt: skip
        part = gl.zeros([BN, 8], gl.float32, MMA)
        for i in gl.static_range(F):
            xi = _asm(_COLUMN, "=r,r,r,r,r,r", [x, xn, i], 2, D)
            f = _of_run(i // R, f0, f1, f2, f3, f4, f5, f6, f7)[:, None] if SCALING == 3 else 1.0
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
                q = gl.load(c0_ptr + (at + (b * E + i * P)))
                w = _float_bytes(q, MANTISSA, BIAS_E, D) if DECODE == 1 else _bytes(q, 0 if ZEROS else ZERO, D)
                part = mma_v2(w, xi, part)
            elif DECODE == 1:
                part = mma_v2(_floats(q0, q1, i, BITS, MANTISSA, BIAS_E, W0, W1, D), xi, part)
            else:
                part = mma_v2(_integers(q0, q1, q2, i, 0 if ZEROS else ZERO, W0, W1, W2, D), xi, part)
        if SUMS:
            sums = mma_v2(ones, x, gl.zeros([BN, 8], gl.float32, MMA))
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
    y = gl.sum(acc, axis=1) * mult * gl.load(row_ptr + rn)
    if TOKENS:
        y = y * gl.load(token_ptr)
    inside = rn < N
    if SPLIT:
        gl.store(part_ptr + gl.program_id(1) * N + rn, y, mask=inside, cache_modifier=".cg")
        _barrier()
        arrived = gl.atomic_add(count_ptr + gl.program_id(0), 1, sem="acq_rel")
        if arrived == gl.num_programs(1) - 1:
            gl.store(count_ptr + gl.program_id(0), 0)  # ready for the next call
            total = gl.zeros([BN], gl.float32, gl.SliceLayout(1, MMA))
            for p in range(gl.num_programs(1)):
                total += gl.load(part_ptr + p * N + rn, mask=inside, other=0.0, cache_modifier=".cg")
            if BIAS:
                total += gl.load(bias_ptr + rn, mask=inside, other=0.0).to(gl.float32)
            gl.store(o_ptr + rn, total.to(o_ptr.dtype.element_ty), mask=inside)
    else:
        if BIAS:
            y += gl.load(bias_ptr + rn, mask=inside, other=0.0).to(gl.float32)
        gl.store(o_ptr + rn, y.to(o_ptr.dtype.element_ty), mask=inside)


# --- a few tokens -----------------------------------------------------------------------------------------------------


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
