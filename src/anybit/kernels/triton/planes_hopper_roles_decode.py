# mypy: ignore-errors
"""Operands of `planes_hopper_roles`: two fields of a word at a time, which share the selection of their byte.

The values are those of `planes_kernels`; integers come out times 2^-6 (bf16) or 2^-9 (fp16), which the results' factor
makes good.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anybit.kernels.triton.planes_hopper import _ZEROS_BF16, _ZEROS_FP16, _factor
from anybit.kernels.triton.planes_kernels import _HIGH, _LOW, _MUL_BF16, _MUL_FP16, _select

__all__ = ["folded", "operands"]


def _integers(byte: int, type_: str) -> str:
    """A byte of two words as two integers each, times 2^-6 or 2^-9, plus $4 and $6 (`planes_kernels._nibbles`)."""
    body = (f"prmt.b32 t, $2, $3, {_select(2 * byte)}; "
            f"and.b32 u, t, 0x000F000F; mov.b32 v, {_LOW[type_]}; fma.rn.{type_}x2 $0, u, v, $4; "
            f"and.b32 u, t, 0x00F000F0; mov.b32 v, {_HIGH[type_]}; fma.rn.{type_}x2 $1, u, v, $6;")
    return "{.reg .b32 t, u, v; " + body + "}"


def _floats(byte: int, magnitude: int, multiply: str) -> str:
    """A byte of two words as two e2m1 each, times $4 and $6; `magnitude` is where D's field of them begins.

    The high nibble's sign is where D has it in the byte's copy. The low one is put at both its places by a product,
    which is free beside the logic; in float16 these places overlap.
    """
    mask = f"0x{0x00070007 << magnitude:08X}"
    first, second = multiply.replace("t, $3", "w, $4"), multiply.replace("t, $3", "w, $6").replace("$0", "$1")
    low = (f"and.b32 w, t, 0x000F000F; mul.lo.u32 w, w, {1 << 12 | 1 << magnitude}; and.b32 w, w, 0x81C081C0;"
           if magnitude == 6 else
           f"shl.b32 u, t, 12; and.b32 u, u, 0x80008000; shl.b32 w, t, {magnitude}; lop3.b32 w, w, {mask}, u, 0xEA;")
    body = (f"prmt.b32 t, $2, $3, {_select(2 * byte)}; {low} {first} "
            f"and.b32 u, t, 0x80008000; shl.b32 w, t, {magnitude - 4}; lop3.b32 w, w, {mask}, u, 0xEA; {second}")
    return "{.reg .b32 t, u, w; " + body + "}"


_INTEGERS_BF16 = gl.constexpr(tuple(_integers(i, "bf16") for i in range(4)))
_INTEGERS_FP16 = gl.constexpr(tuple(_integers(i, "f16") for i in range(4)))
_FLOATS_BF16 = gl.constexpr(tuple(_floats(i, 6, _MUL_BF16) for i in range(4)))
_FLOATS_FP16 = gl.constexpr(tuple(_floats(i, 9, _MUL_FP16) for i in range(4)))


@gluon.jit
def _beside(a, b, DOT: gl.constexpr):
    """Operands of inputs that follow each other as one: [R, C] twice, [R, 2 C]; registers stay where they are."""
    both = gl.join(a, b).permute((0, 2, 1)).reshape([a.shape[0], 2 * a.shape[1]])
    return gl.convert_layout(both, DOT, assert_trivial=True)


@gluon.jit
def _two_fields(words, even, odd, byte: gl.constexpr, FOLD: gl.constexpr, D: gl.constexpr):
    """Fields 2 * byte and the one after it of words [ROWS, P] as D, with the pair [ROWS] of each (`_pair`) applied.

    Not pure, though it is: so it stays between the products that it stands between.
    """
    if gl.bfloat16 == D:
        return gl.inline_asm_elementwise(_FLOATS_BF16[byte] if FOLD else _INTEGERS_BF16[byte], "=r,=r,r,r,r,r,r,r",
                                         [words, even[:, None], odd[:, None]], dtype=(gl.bfloat16, gl.bfloat16),
                                         is_pure=False, pack=2)
    else:
        return gl.inline_asm_elementwise(_FLOATS_FP16[byte] if FOLD else _INTEGERS_FP16[byte], "=r,=r,r,r,r,r,r,r",
                                         [words, even[:, None], odd[:, None]], dtype=(gl.float16, gl.float16),
                                         is_pure=False, pack=2)


@gluon.jit
def _pair(s0, s1, s2, s3, z_tiles, at, first, f: gl.constexpr, FOLD: gl.constexpr, SKIND: gl.constexpr,
          ZERO: gl.constexpr, ZEROS: gl.constexpr, ROWS: gl.constexpr, DOT: gl.constexpr, D: gl.constexpr):
    """What field f meets on its way to D, twice in 32 bits: its folded scale, or minus its zero point, scaled down."""
    if FOLD:
        return _factor(s0 if f < 4 else s1 if f < 8 else s2 if f < 12 else s3, f % 4, SKIND, D)
    else:
        if ZEROS:
            zero = z_tiles.index(at).slice(first, ROWS).load(gl.SliceLayout(1, DOT)).to(gl.int32)
        else:
            zero = gl.full([ROWS], ZERO, gl.float32, gl.SliceLayout(1, DOT)).to(gl.int32)
        return gl.inline_asm_elementwise(_ZEROS_BF16 if gl.bfloat16 == D else _ZEROS_FP16, "=r,r",
                                         [zero | (zero << 16)], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _fields(words, s0, s1, s2, s3, z_tiles, at, first, f: gl.constexpr, P: gl.constexpr, R: gl.constexpr,
            FOLD: gl.constexpr, SKIND: gl.constexpr, ZERO: gl.constexpr, ZEROS: gl.constexpr, ROWS: gl.constexpr,
            DOT: gl.constexpr, D: gl.constexpr):
    """Field f, an even one, and f + 1 of 256 inputs: [ROWS, P] twice; `at` counts groups of zero points."""
    even = _pair(s0, s1, s2, s3, z_tiles, at + f // R, first, f, FOLD, SKIND, ZERO, ZEROS, ROWS, DOT, D)
    odd = even
    if FOLD or R == 1:
        odd = _pair(s0, s1, s2, s3, z_tiles, at + (f + 1) // R, first, f + 1, FOLD, SKIND, ZERO, ZEROS, ROWS, DOT, D)
    return _two_fields(words, even, odd, f % 8 // 2, FOLD, D)


@gluon.jit
def operands(words, s0, s1, s2, s3, z_tiles, at, first, u: gl.constexpr, U: gl.constexpr, P: gl.constexpr,
             R: gl.constexpr, FOLD: gl.constexpr, SKIND: gl.constexpr, ZERO: gl.constexpr, ZEROS: gl.constexpr,
             ROWS: gl.constexpr, DOT: gl.constexpr, D: gl.constexpr):
    """Inputs u * U ... of 256 as D: [ROWS, U], and what was decoded with them of those after, or the same again."""
    f: gl.constexpr = u * U // P
    a, b = _fields(words, s0, s1, s2, s3, z_tiles, at, first, f, P, R, FOLD, SKIND, ZERO, ZEROS, ROWS, DOT, D)
    if U == P:
        return a, b
    else:
        a = _beside(a, b, DOT)
        if U == 4 * P:
            c, d = _fields(words, s0, s1, s2, s3, z_tiles, at, first, f + 2, P, R, FOLD, SKIND, ZERO, ZEROS, ROWS, DOT,
                           D)
            a = _beside(a, _beside(c, d, DOT), DOT)
        return a, a


@gluon.jit
def folded(s_tiles, stage, first, SCALES: gl.constexpr, FOLD: gl.constexpr, ROWS: gl.constexpr, DOT: gl.constexpr):
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
