# mypy: ignore-errors
"""Weights of "triton-planes" from memory to the registers of a matrix instruction, in Gluon: for `planes_one`.

What a block reads is held as it is stored, a block ahead of the one that is multiplied, and decoded two codes at a time
by the PTX of `planes_pairs`. Scales and offsets of a block's groups are a tile [BN rows, 8 fields] in the layout of the
sums, each in one lane.
"""

from __future__ import annotations

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anybit.kernels.triton.planes_kernels import _MUL_BF16, _MUL_FP16, _nibbles
from anybit.kernels.triton.planes_kernels import _floats as _small_floats
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
    LOOK_UP,
    NEGATIVE_2_23,
)

# nibbles of whole words, by field: fewer instructions than halves of words take
_NIBBLES_BF16 = gl.constexpr(tuple(_nibbles(i, "bf16") for i in range(8)))
_NIBBLES_FP16 = gl.constexpr(tuple(_nibbles(i, "f16") for i in range(8)))
_E2M1_BF16 = gl.constexpr(tuple(_small_floats(i, 6, _MUL_BF16) for i in range(8)))
_E2M1_FP16 = gl.constexpr(tuple(_small_floats(i, 9, _MUL_FP16) for i in range(8)))


def _minus(zero: int, kind: str, lacking: float) -> int:
    """Minus a zero point as decoded nibbles have it, twice in 32 bits."""
    half = struct.pack(kind, -zero / lacking)[-2:]
    return int.from_bytes(half + half, "little", signed=True)


_MINUS_BF16 = gl.constexpr(tuple(_minus(zero, "<f", 64.0) for zero in range(16)))
_MINUS_FP16 = gl.constexpr(tuple(_minus(zero, "<e", 512.0) for zero in range(16)))


@gluon.constexpr_function
def _lacks(DECODE, W0, W1, D):
    """What decoded integers of one plane of nibbles lack, a power of two (`planes_kernels._nibbles`)."""
    if DECODE != 0 or W0 != 4 or W1 != 0:
        return 1.0
    return 64.0 if gl.bfloat16 == D else 512.0


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
    """Field i as integers minus ZERO in D (`planes_pairs.integer_pairs`), over what they lack (`_lacks`)."""
    IS_BRAIN: gl.constexpr = gl.bfloat16 == D
    if W0 == 4 and W1 == 0:
        text: gl.constexpr = _NIBBLES_BF16[i] if IS_BRAIN else _NIBBLES_FP16[i]
        minus: gl.constexpr = _MINUS_BF16[int(ZERO)] if IS_BRAIN else _MINUS_FP16[int(ZERO)]
        return _asm(text, "=r,r,r,r,r", [q0, minus], 2, D)
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
    if BITS == 4 and MANTISSA == 1:
        text: gl.constexpr = _E2M1_BF16[i] if IS_BRAIN else _E2M1_FP16[i]
        return _asm(text, "=r,r,r,r,r", [q0, factor], 2, D)
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
def _folded(byte, SKIND: gl.constexpr):
    """A folded scale's byte as the float32 factor of a group's sum.

    SKIND 2: five bits of exponent and three of mantissa; 1: the exponent alone. Only groups of zeros have one so small
    that float32 lacks it.
    """
    if SKIND == 2:
        return ((byte.to(gl.int32) << 20) + (97 << 23)).to(gl.float32, bitcast=True)
    else:
        return ((gl.maximum(byte.to(gl.int32), 126) - 126) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _at_groups(p, b, rn, n, NP, WORDS: gl.constexpr, P: gl.constexpr, F: gl.constexpr, G: gl.constexpr):
    """What is stored of the groups of fields n of blocks b [W, 1, 1] for rows rn: [W, BN, 8]."""
    if WORDS:
        at = ((b * 2 + n // 4) * NP + rn) * 4 + n % 4
        return gl.load(p.to(gl.pointer_type(gl.uint8), bitcast=True) + at)
    else:
        g = (b * (F * P) + gl.minimum(n, F - 1) * P) // G if G > 0 else b * 0 + n * 0
        return gl.load(p + (g * NP + rn))


@gluon.jit
def _of_rows(p, b, j: gl.constexpr, rn, NP, P: gl.constexpr, F: gl.constexpr, R: gl.constexpr, G: gl.constexpr):
    """The scales of run j of the fields of blocks b for rows rn; of runs that no block has, the last one's."""
    run: gl.constexpr = j if j < F // R else F // R - 1
    return gl.load(p + ((b * (F * P) + run * R * P) // G * NP + rn))


@gluon.jit
def _of_run(j: gl.constexpr, f0, f1, f2, f3, f4, f5, f6, f7):
    return (f0 if j == 0 else f1 if j == 1 else f2 if j == 2 else f3 if j == 3 else f4 if j == 4 else f5 if j == 5
            else f6 if j == 6 else f7)  # fmt: skip


@gluon.jit
def _held(
    b, last, of_words, of_rows, of_sums, at, rows, rn, n, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr,
    NP, z_stride, W0: gl.constexpr, W1: gl.constexpr, W2: gl.constexpr, P: gl.constexpr, F: gl.constexpr,
    R: gl.constexpr, G: gl.constexpr, SCALING: gl.constexpr, SSUPER: gl.constexpr, SWORDS: gl.constexpr,
    ZEROS: gl.constexpr, ADD: gl.constexpr, ASUPER: gl.constexpr, AWORDS: gl.constexpr,
):  # fmt: skip
    """All that the weight has of block b and those beside it, as it is stored; what stands in for the rest is not read.

    of_words, of_rows, of_sums  which of these blocks a warp has: [W, 1, 1], [W, 1] and [W, 1, 1] in the layouts of
                                words, their rows, and sums; beyond the last block it is that one
    """
    bw = gl.minimum(b + of_words, last - 1)
    bs = gl.minimum(b + of_sums, last - 1)
    q0 = gl.load(c0_ptr + (at + bw * P)) if W0 < 8 else at
    q1 = gl.load(c1_ptr + (at + bw * P)) if W1 > 0 else q0
    q2 = gl.load(c2_ptr + (at + bw * P)) if W2 > 0 else q0
    FOLD: gl.constexpr = SCALING == 2
    s = _at_groups(s_ptr, bs, rn, n, NP, SWORDS or FOLD, P, F, G) if SCALING == 1 or FOLD else n
    above = _at_groups(ss_ptr, bs, rn, n, NP, False, P, F, G * SSUPER) if SCALING == 1 and SSUPER > 0 else n
    a = _at_groups(a_ptr, bs, rn, n, NP, AWORDS, P, F, G) if ADD > 0 else n
    a_above = _at_groups(as_ptr, bs, rn, n, NP, False, P, F, G * ASUPER) if ADD > 0 and ASUPER > 0 else n
    z = _at_groups(z_ptr, bs, rn, n, z_stride, False, P, F, G) if ZEROS else n
    if SCALING == 3:
        br = gl.minimum(b + of_rows, last - 1)
        f0 = _of_rows(s_ptr, br, 0, rows, NP, P, F, R, G)
        f1 = _of_rows(s_ptr, br, 1, rows, NP, P, F, R, G) if F // R > 1 else f0
        f2 = _of_rows(s_ptr, br, 2, rows, NP, P, F, R, G) if F // R > 2 else f0
        f3 = _of_rows(s_ptr, br, 3, rows, NP, P, F, R, G) if F // R > 2 else f0
        f4 = _of_rows(s_ptr, br, 4, rows, NP, P, F, R, G) if F // R > 4 else f0
        f5 = _of_rows(s_ptr, br, 5, rows, NP, P, F, R, G) if F // R > 4 else f0
        f6 = _of_rows(s_ptr, br, 6, rows, NP, P, F, R, G) if F // R > 4 else f0
        f7 = _of_rows(s_ptr, br, 7, rows, NP, P, F, R, G) if F // R > 4 else f0
    else:
        f0 = n
        f1 = n
        f2 = n
        f3 = n
        f4 = n
        f5 = n
        f6 = n
        f7 = n
    return q0, q1, q2, s, above, a, a_above, z, f0, f1, f2, f3, f4, f5, f6, f7


@gluon.jit
def _held_x(b, last, of_x, x_at, x_ptr, K, P: gl.constexpr, F: gl.constexpr, WK: gl.constexpr, EVEN: gl.constexpr):
    """x of block b and those beside it, a column a field: [W, P, 8]; zeros beyond the last block."""
    at = gl.minimum(b + of_x, last - 1) * (F * P) + x_at
    if EVEN and F == 8 and WK == 1:
        return gl.load(x_ptr + at)
    else:
        return gl.load(x_ptr + at, mask=(b + of_x < last) & (at < K) & (x_at < F * P), other=0.0)
