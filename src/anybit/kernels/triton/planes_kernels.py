# mypy: ignore-errors
"""Triton kernels of the layout "triton-planes" (`planes_form.py` says how it stores a weight).

`matmul_kernel` multiplies decoded operands with tl.dot, the weight as the left operand: its words go from shared memory
to the registers of the matrix instruction and are decoded there. `expand_kernel` writes decoded rows to memory.

D is the 16-bit dtype of the product. Operands are exact in D; a group's scale meets the float32 partial sum of the
group, or the operand where that stays exact (SCALING "fold"). Sums are float32; rows' factors, bias and the one
rounding to the output's dtype come last. Split-K writes float32 parts; the last program to arrive adds them in order.
Decoding tricks: an integer v becomes 128 + v (bf16) or 1024 + v (fp16) by an OR into a float's mantissa; a small float
is moved to the top of D's fields and multiplied by the power of two between the exponents' biases, which also makes
its subnormals right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anybit.kernels.triton.planes_pairs import (
    NEGATIVE_2_23,
    byte_pairs,
    float_pairs,
    halves,
    integer_pairs,
    keep_table,
    ones_like,
    rest,
    table_pairs,
    table_values,
    upper_pairs,
)

_BF16, _FP16 = tl.constexpr(tl.bfloat16), tl.constexpr(tl.float16)


def _select(field: int) -> str:
    """prmt selector: the byte of nibble `field` of two words, in the low byte of each half."""
    byte = field // 2
    return hex((4 + byte) << 12 | (4 + byte) << 8 | byte << 4 | byte)


def _integers(field: int, magic: str, add: str) -> str:
    """Two words' nibbles as 16-bit floats, plus the pair in $3: minus (magic + zero point)."""
    shift = "shr.u32 t, t, 4;" if field % 2 else ""
    body = f"prmt.b32 t, $1, $2, {_select(field)}; {shift} lop3.b32 t, t, 0x000F000F, {magic}, 0xEA; {add}"
    return "{.reg .b32 t, u; " + body + "}"


def _floats(field: int, magnitude: int, multiply: str) -> str:
    """Two words' e2m1 nibbles as 16-bit floats times the pair in $3; `magnitude` is where D's field of them begins.

    Beside the nibble's byte its sign, eight times (prmt can), which then is at D's sign too when the magnitude is moved
    to its place: one mask for both. The low nibble is moved to the upper half of its byte first.
    """
    byte = field // 2
    select = hex(12 + byte << 12 | 4 + byte << 8 | 8 + byte << 4 | byte)
    mask = f"0x{0x80008000 | 0x00070007 << magnitude:08X}"
    words = "t, $1, $2" if field % 2 else "t, t, u"
    raised = "" if field % 2 else "shl.b32 t, $1, 4; shl.b32 u, $2, 4; "
    body = f"{raised}prmt.b32 {words}, {select}; shl.b32 t, t, {magnitude - 4}; and.b32 t, t, {mask}; {multiply}"
    return "{.reg .b32 t, u; " + body + "}"


def _nibbles(field: int, type_: str) -> str:
    """Two words' nibbles as 16-bit floats times 2^-6 (bf16) or 2^-9 (fp16), plus the pair in $3: minus the zero point.

    As mantissas of subnormals, in bits 0 to 3 and 4 to 7, they are multiples of a power of two without more ado: the
    exponent's lowest bit, which bf16 has at bit 7, counts like one of the mantissa.
    """
    mask, power = ("0x00F000F0", _HIGH[type_]) if field % 2 else ("0x000F000F", _LOW[type_])
    body = (f"prmt.b32 t, $1, $2, {_select(field)}; and.b32 t, t, {mask}; mov.b32 u, {power}; "
            f"fma.rn.{type_}x2 $0, t, u, $3;")
    return "{.reg .b32 t, u; " + body + "}"


# what makes subnormals of nibbles in the low and high half of a byte multiples of 2^-6 (bf16) or 2^-9 (fp16), twice
_LOW = {"bf16": "0x7F007F00", "f16": "0x78007800"}
_HIGH = {"bf16": "0x7D007D00", "f16": "0x68006800"}


def _bytes(byte: int, then: str) -> str:
    """Byte `byte` of a word in the low byte of each half, then on: a folded scale as a pair."""
    select = hex(4 << 12 | byte << 8 | 4 << 4 | byte)
    return "{.reg .b32 t; " + f"prmt.b32 t, $1, 0, {select}; {then}" + "}"


# fma stands for add and mul, which sm_80 lacks for bf16: t * 1 + $3, t * $3 - 0
_ADD_BF16 = "mov.b32 u, 0x3F803F80; fma.rn.bf16x2 $0, t, u, $3;"
_MUL_BF16 = "mov.b32 u, 0x80008000; fma.rn.bf16x2 $0, t, $3, u;"
_ADD_FP16 = "add.f16x2 $0, t, $3;"
_MUL_FP16 = "mul.f16x2 $0, t, $3;"
# one name each: a jitted function reads no list
_IB0, _IB1, _IB2, _IB3, _IB4, _IB5, _IB6, _IB7 = (tl.constexpr(_integers(i, "0x43004300", _ADD_BF16)) for i in range(8))
_IH0, _IH1, _IH2, _IH3, _IH4, _IH5, _IH6, _IH7 = (tl.constexpr(_integers(i, "0x64006400", _ADD_FP16)) for i in range(8))
_FB0, _FB1, _FB2, _FB3, _FB4, _FB5, _FB6, _FB7 = (tl.constexpr(_floats(i, 6, _MUL_BF16)) for i in range(8))
_FH0, _FH1, _FH2, _FH3, _FH4, _FH5, _FH6, _FH7 = (tl.constexpr(_floats(i, 9, _MUL_FP16)) for i in range(8))


# a folded scale as D's fields (`_factor`): moved to the exponent, or five bits of it and the mantissa on bf16's bias
_S80, _S81, _S82, _S83 = (tl.constexpr(_bytes(i, "shl.b32 $0, t, 7;")) for i in range(4))
_S530, _S531, _S532, _S533 = (tl.constexpr(_bytes(i, "mad.lo.u32 $0, t, 16, 0x6F806F80;")) for i in range(4))
_NEGATIVE_BF16 = tl.constexpr(0xC300C300 - 2**32)  # -128 twice; of bf16 and fp16 the next integers are the next codes
_NEGATIVE_FP16 = tl.constexpr(0xE400E400 - 2**32)  # -1024 twice


@triton.jit
def _folded_pair(low, high, j: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr):
    """Byte j of two words of folded scales as the factor of fp4 operands, twice in 32 bits: inline PTX."""
    word = low if j < 4 else high
    if KIND == 2 and tl.bfloat16 == D:
        text: tl.constexpr = _S530 if j % 4 == 0 else _S531 if j % 4 == 1 else _S532 if j % 4 == 2 else _S533
        return tl.inline_asm_elementwise(text, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    else:
        text: tl.constexpr = _S80 if j % 4 == 0 else _S81 if j % 4 == 1 else _S82 if j % 4 == 2 else _S83
        return tl.inline_asm_elementwise(text, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _zero_pair(zero, D: tl.constexpr):
    """Minus a zero point (int32, below 128) on the base of decoded integers, twice in 32 bits."""
    if tl.bfloat16 == D:
        return (zero | (zero << 16)) + _NEGATIVE_BF16
    else:
        return (zero | (zero << 16)) + _NEGATIVE_FP16


@triton.jit
def _two_at_once(words, pair, i: tl.constexpr, FOLD: tl.constexpr, D: tl.constexpr):
    """Field i of pairs of words as D, with `pair` (`_zero_pair` or `_folded_pair`) applied: inline PTX."""
    if FOLD and tl.bfloat16 == D:
        text: tl.constexpr = (
            _FB0 if i == 0 else _FB1 if i == 1 else _FB2 if i == 2 else _FB3 if i == 3 else _FB4 if i == 4
            else _FB5 if i == 5 else _FB6 if i == 6 else _FB7
        )
        return tl.inline_asm_elementwise(text, "=r,r,r,r,r", [words, pair], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif FOLD:
        text: tl.constexpr = (
            _FH0 if i == 0 else _FH1 if i == 1 else _FH2 if i == 2 else _FH3 if i == 3 else _FH4 if i == 4
            else _FH5 if i == 5 else _FH6 if i == 6 else _FH7
        )
        return tl.inline_asm_elementwise(text, "=r,r,r,r,r", [words, pair], dtype=tl.float16, is_pure=True, pack=2)
    elif tl.bfloat16 == D:
        text: tl.constexpr = (
            _IB0 if i == 0 else _IB1 if i == 1 else _IB2 if i == 2 else _IB3 if i == 3 else _IB4 if i == 4
            else _IB5 if i == 5 else _IB6 if i == 6 else _IB7
        )
        return tl.inline_asm_elementwise(text, "=r,r,r,r,r", [words, pair], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        text: tl.constexpr = (
            _IH0 if i == 0 else _IH1 if i == 1 else _IH2 if i == 2 else _IH3 if i == 3 else _IH4 if i == 4
            else _IH5 if i == 5 else _IH6 if i == 6 else _IH7
        )
        return tl.inline_asm_elementwise(text, "=r,r,r,r,r", [words, pair], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _code(q0, q1, q2, i: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr):
    """The codes of field i, unsigned in int32."""
    if W0 == 8:
        return q0.to(tl.int32)
    v = (q0.to(tl.int32) >> (W0 * i)) & ((1 << W0) - 1)
    if W1 > 0:
        v = v | (((q1.to(tl.int32) >> (W1 * i)) & ((1 << W1) - 1)) << W0)
    if W2 > 0:
        v = v | (((q2.to(tl.int32) >> (W2 * i)) & ((1 << W2) - 1)) << (W0 + W1))
    return v


@triton.jit
def _integer(v, z, BITS: tl.constexpr, D: tl.constexpr):
    """Code minus zero point, exact in D; z float32, broadcastable."""
    if BITS == 8:
        return (v.to(tl.float32) - z).to(D)
    elif tl.bfloat16 == D:
        return (v | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (z + 128.0).to(tl.bfloat16)
    else:
        return (v | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (z + 1024.0).to(tl.float16)


@triton.jit
def _raised(v, MANTISSA: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """A small float's fields at the place of D's: its value times 2^(bias - bias of D)."""
    magnitude = v & ((1 << (BITS - 1)) - 1)
    sign = (v >> (BITS - 1)) << 15
    if tl.bfloat16 == D:
        return ((magnitude << (7 - MANTISSA)) | sign).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return ((magnitude << (10 - MANTISSA)) | sign).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _small_float(v, MANTISSA: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr, SPECIAL: tl.constexpr,
                 D: tl.constexpr):
    """The value of a small float, exact in D. SPECIAL: 1 NaN at 7F, 2 NaN at 80, 3 IEEE-like infinities and NaN."""
    raised = _raised(v, MANTISSA, BITS, D)
    if tl.bfloat16 == D:
        value = raised * tl.full((), 2.0 ** (127 - BIAS), tl.bfloat16)
    elif BIAS != 15:
        value = raised * tl.full((), 2.0 ** (15 - BIAS), tl.float16)
    else:
        value = raised
    if SPECIAL == 1:
        value = tl.where((v & 0x7F) == 0x7F, float("nan"), value)
    elif SPECIAL == 2:
        value = tl.where(v == 0x80, float("nan"), value)
    elif SPECIAL == 3:
        infinite = tl.where(v >= 0x80, float("-inf"), float("inf"))
        value = tl.where((v & 0x7C) == 0x7C, tl.where((v & 3) == 0, infinite, float("nan")), value)
    return value.to(D)


@triton.jit
def _factor(byte, KIND: tl.constexpr, D: tl.constexpr):
    """A folded scale's byte as the factor of `_raised` fp4: KIND 1 exponent alone (bf16), 2 five bits and mantissa."""
    if KIND == 1:
        return (byte << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif tl.bfloat16 == D:
        return ((byte << 4) + (223 << 7)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return (byte << 7).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _number(stored, KIND: tl.constexpr):
    """A stored scale as float32. KIND: 0 a float dtype, 1 an integer, 2 an e8m0 byte."""
    if KIND == 2:
        byte = stored.to(tl.int32)
        bits = tl.where(byte == 0, 0x00400000, tl.where(byte == 255, 0x7FC00000, byte << 23))
        return bits.to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def _small_integer(byte, SIGNED: tl.constexpr):
    """A byte (int32, 0 to 255) as float32: OR-ed into 2^23, for conversions are slow."""
    if SIGNED:
        byte = byte ^ 0x80
    return (byte | 0x4B000000).to(tl.float32, bitcast=True) - (8388736.0 if SIGNED else 8388608.0)


@triton.jit
def _rounded(value, ROUND: tl.constexpr):
    """float32 as the format itself rounds it: 1 to float16, 2 to bfloat16."""
    if ROUND == 1:
        value = value.to(tl.float16).to(tl.float32)
    elif ROUND == 2:
        value = value.to(tl.bfloat16).to(tl.float32)
    return value


@triton.jit
def _byte(low, high, j: tl.constexpr, SIGNED: tl.constexpr):
    """Byte j of eight that lie in two words."""
    word = low if j < 4 else high
    if SIGNED:
        return (word << (24 - 8 * (j % 4))) >> 24
    else:
        return (word >> (8 * (j % 4))) & 0xFF


@triton.jit
def _above(p, g, rn, NP):
    """Scales of the second level for rows rn, float32: so few that 32 bits address them."""
    return tl.load(p + g * NP + rn).to(tl.float32)


@triton.jit
def _group_value(p, above, g, low, high, j: tl.constexpr, rn, NP, WORDS: tl.constexpr, SIGNED: tl.constexpr,
                 KIND: tl.constexpr, SUPER: tl.constexpr):
    """The scale (or addend) of group g for rows rn, float32; from the words where they hold it."""
    if KIND == 1:
        if WORDS:
            value = _small_integer(_byte(low, high, j, False), SIGNED)
        else:
            value = _small_integer(tl.load(p + g.to(tl.int64) * NP + rn).to(tl.int32) & 0xFF, SIGNED)
    elif WORDS:
        value = _number(_byte(low, high, j, SIGNED), KIND)
    else:
        value = _number(tl.load(p + g.to(tl.int64) * NP + rn), KIND)
    if SUPER > 0:
        value = value * _above(above, g // SUPER, rn, NP)
    return value


@triton.jit
def _finish(acc, o_ptr, part_ptr, count_ptr, bias_ptr, tile, om, on, M, N, SPLIT: tl.constexpr, BIAS: tl.constexpr):
    """Bias and rounding; with split-K by the last program to arrive, which adds the parts in their order."""
    mask = (om < M) & (on < N)
    offsets = om.to(tl.int64) * N + on
    if SPLIT:
        size = M.to(tl.int64) * N
        tl.store(part_ptr + tl.program_id(1) * size + offsets, acc, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
        if arrived == tl.num_programs(1) - 1:
            tl.store(count_ptr + tile, 0)  # ready for the next call
            total = tl.zeros(acc.shape, tl.float32)
            for part in range(tl.num_programs(1)):
                total += tl.load(part_ptr + part * size + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            if BIAS:
                total += tl.load(bias_ptr + on, mask=on < N, other=0.0).to(tl.float32)
            tl.store(o_ptr + offsets, total.to(o_ptr.dtype.element_ty), mask=mask)
    else:
        if BIAS:
            acc += tl.load(bias_ptr + on, mask=on < N, other=0.0).to(tl.float32)
        tl.store(o_ptr + offsets, acc.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, row_ptr, table_ptr, token_ptr, bias_ptr, o_ptr,
    part_ptr, count_ptr, M, N, NP, K, KP, x_stride, z_stride, mult,
    DECODE: tl.constexpr, BITS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, P: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, G: tl.constexpr, SCALING: tl.constexpr, SKIND: tl.constexpr,
    SSUPER: tl.constexpr, SWORDS: tl.constexpr, SSIGNED: tl.constexpr, ZERO: tl.constexpr, ZEROS: tl.constexpr,
    ADD: tl.constexpr, AKIND: tl.constexpr, ASUPER: tl.constexpr, AWORDS: tl.constexpr, ASIGNED: tl.constexpr,
    MANTISSA: tl.constexpr, BIAS_E: tl.constexpr, SPECIAL: tl.constexpr, ROUND: tl.constexpr, TERMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] W^T + bias: program (tile of tokens and rows, part of K).

    DECODE 0 integers, 1 small floats, 2 a table of float32; SCALING 0 row, 1 group, 2 fold, 3 decode;
    ADD 0 none, 1 float zero point, 2 minimum added, 3 subtracted; ROUND 0 none, 1 float16, 2 bfloat16;
    F, R: fields that a step takes and how many share a scale (`planes_launch.steps`);
    TOKENS: x's rows have float32 factors, which belong to the epilogue.
    WAITS: launched while the kernel before it runs, which it waits for here; the next one may be launched when its sums
    are done (programmatic dependent launch).
    """
    if WAITS:
        tl.extra.cuda.gdc_wait()
    D: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    pm = tile % tiles_m
    pn = tile // tiles_m
    rn = pn * BN + tl.arange(0, BN)
    rm = pm * BM + tl.arange(0, BM)
    rp = tl.arange(0, P)
    blocks = KP // (F * P)
    per = tl.cdiv(blocks, tl.num_programs(1))
    first = tl.program_id(1) * per
    last = tl.minimum(first + per, blocks)
    E: tl.constexpr = F * P if W0 == 8 else P  # elements of a block: bytes have one field each
    c_offsets = rn.to(tl.int64)[:, None] * (blocks * E) + first * E + rp[None, :]
    x_ptrs = x_ptr + (rm % M).to(tl.int64)[None, :] * x_stride + first * (F * P) + rp[:, None]
    counted = (rm < M)[None, :]  # rows beyond x are not read: one address asked for by all is slow
    acc = tl.zeros((BN, BM), tl.float32)
    zero = tl.full((BN,), ZERO, tl.float32)
    # scales of scales that a whole block shares meet the sums of the block, where registers hold those too
    HOISTED: tl.constexpr = BM <= 32 and SCALING == 1 and SSUPER > 0 and SSUPER % (F // R) == 0
    ADD_HOISTED: tl.constexpr = BM <= 32 and ADD >= 2 and ASUPER > 0 and ASUPER % (F // R) == 0
    if ASM and DECODE == 2:
        keep_table(table_ptr)
    for b in range(first, last):
        # what the whole block shares
        q0 = tl.load(c0_ptr + c_offsets)
        q1 = tl.load(c1_ptr + c_offsets) if W1 > 0 else q0
        q2 = tl.load(c2_ptr + c_offsets) if W2 > 0 else q0
        if ASM and SCALING != 2 and DECODE != 2 and W0 < 8:
            h0 = halves(q0, False)
            h_upper = halves(q0, True) if W0 == 4 else h0
            h1 = halves(q1, False) if W1 > 0 else h0
            h2 = halves(q2, False) if W2 > 0 else h0
        if HOISTED:
            s_above = _above(ss_ptr, b * (F * P) // (G * SSUPER), rn, NP)
            whole = tl.zeros((BN, BM), tl.float32)
        if ADD_HOISTED:
            a_above = _above(as_ptr, b * (F * P) // (G * ASUPER), rn, NP)
            added = tl.zeros((BN, BM), tl.float32)
        s_low = tl.load(s_ptr + b * 2 * NP + rn) if SWORDS else rn
        s_high = tl.load(s_ptr + (b * 2 + 1) * NP + rn) if SWORDS else rn
        a_low = tl.load(a_ptr + b * 2 * NP + rn) if AWORDS else rn
        a_high = tl.load(a_ptr + (b * 2 + 1) * NP + rn) if AWORDS else rn
        for j in tl.static_range(F // R):
            # what one group shares
            g = (b * (F * P) + j * R * P) // G if G > 0 else b * 0
            if ZEROS:
                zero = tl.load(z_ptr + g * z_stride + rn).to(tl.float32)
            if SCALING == 2 and not ASM:
                if SWORDS:
                    byte = _byte(s_low, s_high, j, False)
                else:
                    byte = tl.load(s_ptr + g.to(tl.int64) * NP + rn).to(tl.int32)
                folded = _factor(byte, SKIND, D)
            if SCALING == 1 or SCALING == 3:
                s = _group_value(s_ptr, ss_ptr, g, s_low, s_high, j, rn, NP, SWORDS, SSIGNED, SKIND,
                                 0 if HOISTED else SSUPER)
            part = tl.zeros((BN, BM), tl.float32)
            ones = tl.zeros((BN, BM), tl.float32)
            for r in tl.static_range(R):
                if W0 == 8 and j * R + r > 0:
                    q0 = tl.load(c0_ptr + c_offsets + (j * R + r) * P)
                if EVEN:
                    xi = tl.load(x_ptrs + (j * R + r) * P, mask=counted, other=0.0)
                else:
                    inside = (b * (F * P) + (j * R + r) * P + rp)[:, None] < K
                    xi = tl.load(x_ptrs + (j * R + r) * P, mask=inside & counted, other=0.0)
                if ADD > 0:  # the sum of x over the group, in the layout of the product
                    ones = tl.dot(ones_like(q1, D) if ASM and W1 == 1 else tl.full((BN, P), 1.0, D), xi, ones)
                if ASM and (TERMS == 1 or DECODE != 2):
                    if SCALING == 2:
                        pair = _folded_pair(s_low, s_high, j, SKIND, D)
                        w = _two_at_once(q0, tl.broadcast_to(pair[:, None], q0.shape), j * R + r, True, D)
                    elif DECODE == 2:
                        w = table_pairs(q0, j * R + r, s[:, None] if SCALING == 3 else 0.0, SCALING == 3, D)
                    elif DECODE == 1:
                        if W0 == 8:
                            w = float_pairs(q0, q0, q0, 0, BITS, MANTISSA, BIAS_E, W0, W1, D)
                        else:
                            w = float_pairs(h0, h_upper, h1, j * R + r, BITS, MANTISSA, BIAS_E, W0, W1, D)
                    elif W0 == 8:
                        w = byte_pairs(q0, (zero.to(tl.int32) + NEGATIVE_2_23)[:, None], D)
                    elif BM > 16 and W0 == 4 and W1 == 0:  # fewer registers: the words are not held in halves
                        pair = _zero_pair(zero.to(tl.int32), D)
                        w = _two_at_once(q0, tl.broadcast_to(pair[:, None], q0.shape), j * R + r, False, D)
                    else:
                        pair = _zero_pair(zero.to(tl.int32), D)
                        w = integer_pairs(h0, h_upper, h1, h2, pair[:, None], j * R + r, W0, W1, W2, D)
                    if SCALING == 1:
                        part = tl.dot(w, xi, part)
                    else:
                        acc = tl.dot(w, xi, acc)
                elif TERMS == 1 and SCALING != 3:
                    v = _code(q0, q1, q2, j * R + r, W0, W1, W2)
                    if SCALING == 2:
                        w = _raised(v, 1, 4, D) * folded[:, None]
                    elif DECODE == 0:
                        w = _integer(v, zero[:, None], BITS, D)
                    elif DECODE == 1:
                        w = _small_float(v, MANTISSA, BIAS_E, BITS, SPECIAL, D)
                    else:
                        w = tl.load(table_ptr + v).to(D)
                    if SCALING == 1:
                        part = tl.dot(w, xi, part)
                    else:
                        acc = tl.dot(w, xi, acc)
                elif ASM:
                    # the float32 value's upper 16 bits, and those of what is left
                    value = table_values(q0, j * R + r)
                    if SCALING == 3:
                        value = _rounded(value * s[:, None], ROUND)
                    for term in tl.static_range(TERMS):
                        w = upper_pairs(value)
                        if term < TERMS - 1:
                            value = rest(value)
                        if SCALING == 1:
                            part = tl.dot(w, xi, part)
                        else:
                            acc = tl.dot(w, xi, acc)
                else:
                    # the float32 value in as many exact pieces as D needs
                    v = _code(q0, q1, q2, j * R + r, W0, W1, W2)
                    if DECODE == 0:
                        value = v.to(tl.float32) - zero[:, None]
                    elif DECODE == 1:
                        value = _small_float(v, MANTISSA, BIAS_E, BITS, SPECIAL, tl.bfloat16).to(tl.float32)
                    else:
                        value = tl.load(table_ptr + v)
                    if SCALING == 3:
                        value = _rounded(value * s[:, None], ROUND)
                    for _ in tl.static_range(TERMS):
                        w = value.to(D)
                        value = value - w.to(tl.float32)
                        if SCALING == 1:
                            part = tl.dot(w, xi, part)
                        else:
                            acc = tl.dot(w, xi, acc)
            if ADD > 0:
                a = _group_value(a_ptr, as_ptr, g, a_low, a_high, j, rn, NP, AWORDS, ASIGNED, AKIND,
                                 0 if ADD_HOISTED else ASUPER)
                if ADD == 1:
                    part -= ones * a[:, None]
                elif ADD_HOISTED:
                    added += ones * a[:, None]
                elif ADD == 2:
                    acc += ones * a[:, None]
                else:
                    acc -= ones * a[:, None]
            if HOISTED:
                whole += part * s[:, None]
            elif SCALING == 1:
                acc += part * s[:, None]
        if HOISTED:
            acc += whole * s_above[:, None]
        if ADD_HOISTED and ADD == 2:
            acc += added * a_above[:, None]
        elif ADD_HOISTED:
            acc -= added * a_above[:, None]
        c_offsets += E
        x_ptrs += F * P
    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
    acc = (acc * mult) * tl.load(row_ptr + rn)[:, None]
    if TOKENS:
        acc = acc * tl.load(token_ptr + rm, mask=rm < M, other=0.0)[None, :]
    _finish(acc, o_ptr, part_ptr, count_ptr, bias_ptr, tile, rm[None, :], rn[:, None], M, N, SPLIT, BIAS)


@triton.jit
def _decoded(
    q0, q1, q2, i: tl.constexpr, b, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, table_ptr, row, rn, NP, z_stride, mult,
    D: tl.constexpr, DECODE: tl.constexpr, BITS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    P: tl.constexpr, F: tl.constexpr, G: tl.constexpr, SCALING: tl.constexpr, SKIND: tl.constexpr, SSUPER: tl.constexpr,
    SWORDS: tl.constexpr, SSIGNED: tl.constexpr, ZERO: tl.constexpr, ZEROS: tl.constexpr, ADD: tl.constexpr,
    AKIND: tl.constexpr, ASUPER: tl.constexpr, AWORDS: tl.constexpr, ASIGNED: tl.constexpr, MANTISSA: tl.constexpr,
    BIAS_E: tl.constexpr, SPECIAL: tl.constexpr, ROUND: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Field i of blocks b [NB] for rows rn [BN], float32 arithmetic, rounded to D once: [BN, NB, P]."""
    v = _code(q0, q1, q2, i, W0, W1, W2)
    g = (b * (F * P) + i * P) // G if G > 0 else b * 0
    at = g.to(tl.int64)[None, :] * NP + rn[:, None]  # [BN, NB]
    words = b.to(tl.int64)[None, :] * 2 * NP + (NP if i >= 4 else 0) + rn[:, None]
    if DECODE == 0:
        if ZEROS:
            zero = tl.load(z_ptr + g[None, :] * z_stride + rn[:, None]).to(tl.float32)[:, :, None]
        else:
            zero = tl.full((1, 1, 1), ZERO, tl.float32)
        value = v.to(tl.float32) - zero
    elif DECODE == 1:
        value = _small_float(v, MANTISSA, BIAS_E, BITS, SPECIAL, tl.bfloat16).to(tl.float32)
    else:
        value = tl.load(table_ptr + v)
    if ADD == 1:
        value = value - _number(tl.load(a_ptr + at), AKIND)[:, :, None]
    if SCALING == 2:
        byte = (tl.load(s_ptr + words) >> (8 * (i % 4))) & 0xFF if SWORDS else tl.load(s_ptr + at).to(tl.int32)
        # the factor is made for fp4's fields as they stand in D, which are a power of two below their value
        below: tl.constexpr = 2.0**-126 if tl.bfloat16 == D else 2.0**-14
        value = value * (_factor(byte, SKIND, D).to(tl.float32) * below)[:, :, None]
    elif SCALING != 0:
        if SWORDS:
            stored = _byte(tl.load(s_ptr + words), tl.load(s_ptr + words), i, SSIGNED)
            s = _number(stored, SKIND)
        else:
            s = _number(tl.load(s_ptr + at), SKIND)
        if SSUPER > 0:
            s = s * tl.load(ss_ptr + (g // SSUPER).to(tl.int64)[None, :] * NP + rn[:, None]).to(tl.float32)
        value = value * s[:, :, None]
    if ROUND == 1:
        value = value.to(tl.float16).to(tl.float32)
    elif ROUND == 2:
        value = value.to(tl.bfloat16).to(tl.float32)
    if ADD >= 2:
        if AWORDS:
            m = _number(_byte(tl.load(a_ptr + words), tl.load(a_ptr + words), i, ASIGNED), AKIND)
        else:
            m = _number(tl.load(a_ptr + at), AKIND)
        if ASUPER > 0:
            m = m * tl.load(as_ptr + (g // ASUPER).to(tl.int64)[None, :] * NP + rn[:, None]).to(tl.float32)
        value = value + m[:, :, None] if ADD == 2 else value - m[:, :, None]
    if ROW:
        value = (value * mult) * row[:, None, None]
    return value.to(D)


@triton.jit
def _beside(a, b, BN: tl.constexpr, NB: tl.constexpr, W: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), (BN, NB, 2 * W))


@triton.jit
def expand_kernel(
    c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, row_ptr, table_ptr, o_ptr, start, rows, NP, K, KP,
    z_stride, mult,
    DECODE: tl.constexpr, BITS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, P: tl.constexpr,
    F: tl.constexpr, G: tl.constexpr, SCALING: tl.constexpr, SKIND: tl.constexpr, SSUPER: tl.constexpr,
    SWORDS: tl.constexpr, SSIGNED: tl.constexpr, ZERO: tl.constexpr, ZEROS: tl.constexpr, ADD: tl.constexpr,
    AKIND: tl.constexpr, ASUPER: tl.constexpr, AWORDS: tl.constexpr, ASIGNED: tl.constexpr, MANTISSA: tl.constexpr,
    BIAS_E: tl.constexpr, SPECIAL: tl.constexpr, ROUND: tl.constexpr, ROW: tl.constexpr, BN: tl.constexpr,
    NB: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + rows) of the weight, decoded, to o [rows, K]. ROW: with the rows' factors.

    Program (BN rows, NB blocks of K). The fields of a block are put side by side, so that whole runs are stored.
    """
    D: tl.constexpr = o_ptr.dtype.element_ty
    local = tl.program_id(0) * BN + tl.arange(0, BN)
    rn = start + local
    b = tl.program_id(1) * NB + tl.arange(0, NB)
    blocks = KP // (F * P)
    rp = tl.arange(0, P)
    inside = (local < rows)[:, None, None] & (b < blocks)[None, :, None]
    at = rn.to(tl.int64)[:, None, None] * (blocks * P) + b[None, :, None] * P + rp[None, None, :]
    rn = tl.where(local < rows, rn, 0)
    b = tl.where(b < blocks, b, 0)
    q0 = tl.load(c0_ptr + at, mask=inside, other=0)
    q1 = tl.load(c1_ptr + at, mask=inside, other=0) if W1 > 0 else q0
    q2 = tl.load(c2_ptr + at, mask=inside, other=0) if W2 > 0 else q0
    row = tl.load(row_ptr + rn)
    if F == 1:
        whole = _decoded(q0, q1, q2, 0, b, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, table_ptr, row, rn, NP, z_stride, mult,
                         D, DECODE, BITS, W0, W1, W2, P, F, G, SCALING, SKIND, SSUPER, SWORDS, SSIGNED, ZERO, ZEROS,
                         ADD, AKIND, ASUPER, AWORDS, ASIGNED, MANTISSA, BIAS_E, SPECIAL, ROUND, ROW)  # fmt: skip
    else:
        f0 = _decoded(q0, q1, q2, 0, b, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, table_ptr, row, rn, NP, z_stride, mult,
                      D, DECODE, BITS, W0, W1, W2, P, F, G, SCALING, SKIND, SSUPER, SWORDS, SSIGNED, ZERO, ZEROS, ADD,
                      AKIND, ASUPER, AWORDS, ASIGNED, MANTISSA, BIAS_E, SPECIAL, ROUND, ROW)  # fmt: skip
        f1 = _decoded(q0, q1, q2, 1, b, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, table_ptr, row, rn, NP, z_stride, mult,
                      D, DECODE, BITS, W0, W1, W2, P, F, G, SCALING, SKIND, SSUPER, SWORDS, SSIGNED, ZERO, ZEROS, ADD,
                      AKIND, ASUPER, AWORDS, ASIGNED, MANTISSA, BIAS_E, SPECIAL, ROUND, ROW)  # fmt: skip
        f2 = _decoded(q0, q1, q2, 2, b, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, table_ptr, row, rn, NP, z_stride, mult,
                      D, DECODE, BITS, W0, W1, W2, P, F, G, SCALING, SKIND, SSUPER, SWORDS, SSIGNED, ZERO, ZEROS, ADD,
                      AKIND, ASUPER, AWORDS, ASIGNED, MANTISSA, BIAS_E, SPECIAL, ROUND, ROW)  # fmt: skip
        f3 = _decoded(q0, q1, q2, 3, b, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, table_ptr, row, rn, NP, z_stride, mult,
                      D, DECODE, BITS, W0, W1, W2, P, F, G, SCALING, SKIND, SSUPER, SWORDS, SSIGNED, ZERO, ZEROS, ADD,
                      AKIND, ASUPER, AWORDS, ASIGNED, MANTISSA, BIAS_E, SPECIAL, ROUND, ROW)  # fmt: skip
        f4 = _decoded(q0, q1, q2, 4, b, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, table_ptr, row, rn, NP, z_stride, mult,
                      D, DECODE, BITS, W0, W1, W2, P, F, G, SCALING, SKIND, SSUPER, SWORDS, SSIGNED, ZERO, ZEROS, ADD,
                      AKIND, ASUPER, AWORDS, ASIGNED, MANTISSA, BIAS_E, SPECIAL, ROUND, ROW)  # fmt: skip
        f5 = _decoded(q0, q1, q2, 5, b, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, table_ptr, row, rn, NP, z_stride, mult,
                      D, DECODE, BITS, W0, W1, W2, P, F, G, SCALING, SKIND, SSUPER, SWORDS, SSIGNED, ZERO, ZEROS, ADD,
                      AKIND, ASUPER, AWORDS, ASIGNED, MANTISSA, BIAS_E, SPECIAL, ROUND, ROW)  # fmt: skip
        f6 = _decoded(q0, q1, q2, 6, b, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, table_ptr, row, rn, NP, z_stride, mult,
                      D, DECODE, BITS, W0, W1, W2, P, F, G, SCALING, SKIND, SSUPER, SWORDS, SSIGNED, ZERO, ZEROS, ADD,
                      AKIND, ASUPER, AWORDS, ASIGNED, MANTISSA, BIAS_E, SPECIAL, ROUND, ROW)  # fmt: skip
        f7 = _decoded(q0, q1, q2, 7, b, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, table_ptr, row, rn, NP, z_stride, mult,
                      D, DECODE, BITS, W0, W1, W2, P, F, G, SCALING, SKIND, SSUPER, SWORDS, SSIGNED, ZERO, ZEROS, ADD,
                      AKIND, ASUPER, AWORDS, ASIGNED, MANTISSA, BIAS_E, SPECIAL, ROUND, ROW)  # fmt: skip
        low = _beside(_beside(f0, f1, BN, NB, P), _beside(f2, f3, BN, NB, P), BN, NB, 2 * P)
        high = _beside(_beside(f4, f5, BN, NB, P), _beside(f6, f7, BN, NB, P), BN, NB, 2 * P)
        whole = _beside(low, high, BN, NB, 4 * P)
    k = (tl.program_id(1) * NB + tl.arange(0, NB))[None, :, None] * (F * P) + tl.arange(0, F * P)[None, None, :]
    mask = (local < rows)[:, None, None] & (k < K)
    tl.store(o_ptr + local.to(tl.int64)[:, None, None] * K + k, whole, mask=mask)


@triton.jit(do_not_specialize=["M"])
def finish_kernel(y_ptr, token_ptr, bias_ptr, o_ptr, M, N, o_stride, alpha, TOKENS: tl.constexpr, BIAS: tl.constexpr,
                  BN: tl.constexpr):
    """o [M, N] (rows o_stride apart) = y * alpha * token + bias for float32 y: the epilogue of torch's product."""
    m = tl.program_id(0).to(tl.int64)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = rn < N
    y = tl.load(y_ptr + m * N + rn, mask=mask, other=0.0) * alpha
    if TOKENS:
        y = y * tl.load(token_ptr + m)
    if BIAS:
        y += tl.load(bias_ptr + rn, mask=mask, other=0.0).to(tl.float32)
    tl.store(o_ptr + m * o_stride + rn, y.to(o_ptr.dtype.element_ty), mask=mask)
