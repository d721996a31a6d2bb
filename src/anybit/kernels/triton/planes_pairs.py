# mypy: ignore-errors
"""Two codes of a plane at a time as 16-bit floats, in PTX: what `planes_kernels.matmul_kernel` decodes with on NVIDIA.

A plane's elements are read as 16 bits (a word of 4-bit codes as two), two neighbours in a register. A field of both is
rotated to where the float wants it, masked, and OR-ed into a magic number, or for small floats beside their sign; one
fused multiply-add makes the value, exact. A table of 16 lies in the lanes of a warp and is asked for by shuffles: no
address is computed and no two lanes wait for each other. The portable twins are in `planes_kernels`.

Rotations, masks and numbers are arguments, so that one text serves all fields; the assembler makes immediates of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# (a & b) | c
_AND_OR = "0xEA"


def _merge(planes: int, base: str, at: int) -> str:
    """t = the fields of `planes` planes, rotated, masked and OR-ed into `base`; rotations and masks from $at on.

    Each argument of 32 bits has two registers, of which the first counts.
    """
    text = ""
    for plane in reversed(range(planes)):
        turn, mask = f"${at + 4 * plane}", f"${at + 4 * plane + 2}"
        below = base if plane == planes - 1 else "u"
        to = "u" if plane else "t"
        text += (f"shf.r.wrap.b32 t, ${plane + 1}, ${plane + 1}, {turn}; "
                 f"lop3.b32 {to}, t, {mask}, {below}, {_AND_OR}; ")
    return text


def _integers(planes: int, kind: str) -> str:
    """(magic | fields) * 1 + pair, where the pair takes the magic and the zero point away."""
    base = planes + 1 + 4 * planes
    return ("{.reg .b32 t, u; " + _merge(planes, f"${base}", planes + 1)
            + f"fma.rn.{kind}x2 $0, t, ${base + 2}, ${base + 4};}}")


def _floats(planes: int, kind: str) -> str:
    """(fields | signs) * factor: the last plane has the sign, at a rotation of its own."""
    sign = planes + 1 + 4 * planes
    return ("{.reg .b32 t, u, v; " + f"shf.r.wrap.b32 v, ${planes}, ${planes}, ${sign}; and.b32 v, v, 0x80008000; "
            + _merge(planes, "v", planes + 1) + f"mov.b32 u, 0x80008000; fma.rn.{kind}x2 $0, t, ${sign + 2}, u;}}")


def _bytes(pack: str) -> str:
    """Four bytes as 2^23 + v in float32, minus (2^23 + zero point), as pairs: 8 significant bits at most."""
    text = "{.reg .b32 a, b, c, d, m; mov.b32 m, 0x4B000000; "
    for i, name in enumerate("abcd"):
        text += f"prmt.b32 {name}, $2, m, 0x765{i}; add.f32 {name}, {name}, ${3 + i}; "
    return text + f"{pack.format('$0', 'a', 'b')} {pack.format('$1', 'c', 'd')}}}"


def _float_bytes(kind: str) -> str:
    """Four bytes as small floats: each in the upper byte of a half, its magnitude shifted by $3 and masked by $7."""
    text = "{.reg .b32 t, u, z; mov.b32 z, 0x80008000; "
    for out, select in ((0, "0x1404"), (1, "0x3424")):
        text += (f"prmt.b32 t, $2, 0, {select}; shr.u32 u, t, $3; and.b32 u, u, $7; "
                 f"lop3.b32 t, t, z, u, {_AND_OR}; fma.rn.{kind}x2 ${out}, t, $11, z; ")
    return text + "}"


def _looked_up(scaled: bool, kind: str) -> str:
    """Two words' fields asked of the lanes that hold the table, times a scale, rounded to a pair."""
    text = "{.reg .b32 t, u; "
    for name, word in (("t", 1), ("u", 2)):
        text += (f"shr.u32 {name}, ${word}, ${word + 2}; "
                 f"shfl.sync.idx.b32 {name}, anybit_table, {name}, 31, 0xFFFFFFFF; ")
        if scaled:
            text += f"mul.f32 {name}, {name}, ${word + 4}; "
    return text + f"cvt.rn.{kind}x2.f32 $0, u, t;}}"


_R = [",".join(["=r", *["r"] * n]) for n in range(32)]
# one name each: a jitted function reads no list
_IB1, _IB2, _IB3 = (tl.constexpr(_integers(n, "bf16")) for n in (1, 2, 3))
_IH1, _IH2, _IH3 = (tl.constexpr(_integers(n, "f16")) for n in (1, 2, 3))
_I1_REGISTERS, _I2_REGISTERS, _I3_REGISTERS = (tl.constexpr(_R[5 * n + 6]) for n in (1, 2, 3))
_FB1, _FB2 = (tl.constexpr(_floats(n, "bf16")) for n in (1, 2))
_FH1, _FH2 = (tl.constexpr(_floats(n, "f16")) for n in (1, 2))
_F1_REGISTERS, _F2_REGISTERS = (tl.constexpr(_R[5 * n + 4]) for n in (1, 2))
_F8_REGISTERS = tl.constexpr("=r,=r,r," + ",".join("r" * 12))
_BYTES_BF16 = tl.constexpr(_bytes("prmt.b32 {0}, {1}, {2}, 0x7632;"))
_BYTES_FP16 = tl.constexpr(_bytes("cvt.rn.f16x2.f32 {0}, {2}, {1};"))
_FB8, _FH8 = (tl.constexpr(_float_bytes(kind)) for kind in ("bf16", "f16"))
_TB, _TH = (tl.constexpr(_looked_up(False, kind)) for kind in ("bf16", "f16"))
_TSB, _TSH = (tl.constexpr(_looked_up(True, kind)) for kind in ("bf16", "f16"))
_T_REGISTERS, _TS_REGISTERS = tl.constexpr(_R[4]), tl.constexpr(_R[6])
_ONE_BF16, _ONE_FP16 = tl.constexpr(0x3F803F80), tl.constexpr(0x3C003C00)
KEEP_TABLE = tl.constexpr(
    ".reg .b32 anybit_table; {.reg .b32 l; .reg .b64 a; mov.u32 l, %laneid; and.b32 l, l, 15; "
    "mad.wide.u32 a, l, 4, $1; ld.global.nc.b32 anybit_table, [a];} mov.b32 $0, anybit_table;")
UPPER = tl.constexpr("prmt.b32 $0, $1, $2, 0x7632;")
REST = tl.constexpr("{.reg .b32 t; and.b32 t, $1, 0xFFFF0000; sub.f32 $0, $1, t;}")
LOOK_UP = tl.constexpr("{.reg .b32 t; shr.u32 t, $1, $2; shfl.sync.idx.b32 $0, anybit_table, t, 31, 0xFFFFFFFF;}")
NEGATIVE_2_23 = tl.constexpr(0xCB000000 - 2**32)  # float32's code of -2^23; of less 1, 2 .. the next codes
_ONES_BF16 = tl.constexpr("mov.b32 $0, 0x3F803F80; mov.b32 $1, 0x3F803F80;")
_ONES_FP16 = tl.constexpr("mov.b32 $0, 0x3C003C00; mov.b32 $1, 0x3C003C00;")
_MAGIC_BF16, _MAGIC_FP16 = tl.constexpr(0x43004300), tl.constexpr(0x64006400)


@triton.jit
def halves(q, second: tl.constexpr):
    """A plane's elements as 16 bits: of words the lower or the upper half."""
    if q.dtype == tl.int32:
        return (q >> 16).to(tl.int16) if second else q.to(tl.int16)
    else:
        return q.to(tl.int16)


@triton.jit
def _turn(field: tl.constexpr, WIDTH: tl.constexpr, to: tl.constexpr):
    """The rotation to the right that moves a field to bit `to` of its 16 bits; of words, each half has four fields."""
    place: tl.constexpr = (field % 4) * 4 if WIDTH == 4 else field * WIDTH
    return (place - to) % 32


@triton.jit
def _twice(mask: tl.constexpr):
    """A mask of 16 bits for both halves of a register, as a signed integer."""
    both: tl.constexpr = mask * 0x10001
    return both - 2**32 if both >= 2**31 else both


@triton.jit
def integer_pairs(low, upper, h1, h2, pair, i: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
                  D: tl.constexpr):
    """Field i of the planes as integers in D, with `pair` (`planes_kernels._zero_pair`) added; at most 7 bits."""
    magic: tl.constexpr = _MAGIC_BF16 if tl.bfloat16 == D else _MAGIC_FP16
    one: tl.constexpr = _ONE_BF16 if tl.bfloat16 == D else _ONE_FP16
    h0 = upper if W0 == 4 and i >= 4 else low
    r0 = _turn(i, W0, 0)
    m0 = _twice((1 << W0) - 1)
    if W1 == 0:
        text: tl.constexpr = _IB1 if tl.bfloat16 == D else _IH1
        return tl.inline_asm_elementwise(text, _I1_REGISTERS, [h0, r0, m0, magic, one, pair], dtype=D.value,
                                         is_pure=True, pack=2)
    elif W2 == 0:
        text: tl.constexpr = _IB2 if tl.bfloat16 == D else _IH2
        r1 = _turn(i, W1, W0)
        m1 = _twice(((1 << W1) - 1) << W0)
        return tl.inline_asm_elementwise(text, _I2_REGISTERS, [h0, h1, r0, m0, r1, m1, magic, one, pair], dtype=D.value,
                                         is_pure=True, pack=2)
    else:
        text: tl.constexpr = _IB3 if tl.bfloat16 == D else _IH3
        r1 = _turn(i, W1, W0)
        m1 = _twice(((1 << W1) - 1) << W0)
        r2 = _turn(i, W2, W0 + W1)
        m2 = _twice(((1 << W2) - 1) << (W0 + W1))
        return tl.inline_asm_elementwise(text, _I3_REGISTERS, [h0, h1, h2, r0, m0, r1, m1, r2, m2, magic, one, pair],
                                         dtype=D.value, is_pure=True, pack=2)


@triton.jit
def float_pairs(low, upper, h1, i: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
                W0: tl.constexpr, W1: tl.constexpr, D: tl.constexpr):
    """Field i of the planes as small floats in D, exact; none of them NaN or infinite. Of bytes, `low` as they are."""
    below: tl.constexpr = (7 if tl.bfloat16 == D else 10) - MANTISSA  # where D's field of the lowest bit is
    factor = _twice((254 - BIAS) << 7 if tl.bfloat16 == D else (30 - BIAS) << 10)  # 2^(D's bias - BIAS) as D's code
    if W0 == 8:
        text: tl.constexpr = _FB8 if tl.bfloat16 == D else _FH8
        return tl.inline_asm_elementwise(text, _F8_REGISTERS, [low, 8 - below, _twice(0x7F << below), factor],
                                         dtype=D.value, is_pure=True, pack=4)
    elif W1 == 0:
        text: tl.constexpr = _FB1 if tl.bfloat16 == D else _FH1
        h0 = upper if W0 == 4 and i >= 4 else low
        m0 = _twice(((1 << (BITS - 1)) - 1) << below)
        return tl.inline_asm_elementwise(
            text, _F1_REGISTERS, [h0, _turn(i, W0, below), m0, _turn(i, W0, 16 - BITS), factor],
            dtype=D.value, is_pure=True, pack=2)
    else:
        text: tl.constexpr = _FB2 if tl.bfloat16 == D else _FH2
        h0 = upper if W0 == 4 and i >= 4 else low
        m0 = _twice(((1 << W0) - 1) << below)
        m1 = _twice(((1 << (BITS - 1 - W0)) - 1) << (W0 + below))
        return tl.inline_asm_elementwise(
            text, _F2_REGISTERS,
            [h0, h1, _turn(i, W0, below), m0, _turn(i, W1, W0 + below), m1, _turn(i, W1, 16 - BITS + W0), factor],
            dtype=D.value, is_pure=True, pack=2)


@triton.jit
def byte_pairs(q, minus, D: tl.constexpr):
    """Bytes minus zero points in D; `minus` is a zero point plus NEGATIVE_2_23, int32, broadcast to q."""
    text: tl.constexpr = _BYTES_BF16 if tl.bfloat16 == D else _BYTES_FP16
    return tl.inline_asm_elementwise(text, "=r,=r,r,r,r,r,r", [q, minus], dtype=D.value, is_pure=True, pack=4)


@triton.jit
def ones_like(q, D: tl.constexpr):
    """Ones in D that Triton lays out as it does what is decoded from bytes q, so that both products read one x."""
    text: tl.constexpr = _ONES_BF16 if tl.bfloat16 == D else _ONES_FP16
    return tl.inline_asm_elementwise(text, "=r,=r,r", [q], dtype=D.value, is_pure=True, pack=4)


@triton.jit
def keep_table(table_ptr):
    """Entry l % 16 of a table of 32 bits into a register of lane l, which the look-ups name.

    Not a value: Triton takes the number that differs between threads for one that does not, and for an operand that is
    the same everywhere it sends the decoded weights through shared memory.
    """
    tl.inline_asm_elementwise(KEEP_TABLE, "=r,l", [table_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def table_pairs(q, i: tl.constexpr, s, SCALED: tl.constexpr, D: tl.constexpr):
    """Field i of words as entries of the kept table, times s (float32, broadcast to q) if SCALED, rounded to D."""
    if SCALED:
        factor = s.to(tl.int32, bitcast=True)
        text: tl.constexpr = _TSB if tl.bfloat16 == D else _TSH
        return tl.inline_asm_elementwise(text, _TS_REGISTERS, [q, 4 * i, factor], dtype=D.value, is_pure=True, pack=2)
    else:
        text: tl.constexpr = _TB if tl.bfloat16 == D else _TH
        return tl.inline_asm_elementwise(text, _T_REGISTERS, [q, 4 * i], dtype=D.value, is_pure=True, pack=2)


@triton.jit
def table_values(q, i: tl.constexpr):
    """Field i of words as float32 entries of the kept table."""
    return tl.inline_asm_elementwise(
        LOOK_UP, "=r,r,r", [q, 4 * i], dtype=tl.int32, is_pure=True, pack=1).to(tl.float32, bitcast=True)


@triton.jit
def upper_pairs(value):
    """The upper 16 bits of float32, as bfloat16: eight significant bits of it."""
    return tl.inline_asm_elementwise(UPPER, "=r,r,r", [value.to(tl.int32, bitcast=True)], dtype=tl.bfloat16,
                                     is_pure=True, pack=2)


@triton.jit
def rest(value):
    """What is left of float32 without its upper 16 bits, exact."""
    return tl.inline_asm_elementwise(REST, "=r,r", [value.to(tl.int32, bitcast=True)], dtype=tl.int32, is_pure=True,
                                     pack=1).to(tl.float32, bitcast=True)
