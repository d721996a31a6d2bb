"""The layout "triton-planes" as data, torch-free: which form a scheme takes, and its bytes.

Codes of a row are cut into blocks of `fields` tiles of `tile` inputs each. A plane of width w holds, for input
k = block * fields * tile + i * tile + j, the bits of that code at bit w*i of its element block * tile + j: each field
of the loaded elements is a contiguous range of inputs inside one scale group, and x is read in its natural order.
Planes of 4, 2 and 1 bits are int32, int16 and uint8 (eight fields); codes of 8 bits are bytes (one field).
Rows are padded to 64, inputs to whole blocks (code 0, which x masks out).

How a scale acts:

    row     one factor a row, in the float32 epilogue
    group   float32, on the float32 partial sum of a group: exact for every format and range
    fold    8-bit scales of fp4, multiplied into the operand, which stays exact in 16 bits (docs/formats/numerics.md §4)
    decode  the float32 value is rounded by the format itself (`round_to`) and is the operand
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from anybit.numerics.formats import NumberFormat, number_format
from anybit.schemes import Offset, ScaleLevel, Scheme

__all__ = ["Form", "form_of", "reasons_against", "stored_bytes"]

ROWS: Final = 64  # N is padded to a multiple of it
SMALL_FLOATS: Final = ("e8m0", "fp8_e4m3fn", "ue4m3", "ue5m3")  # scale formats of 8 bits
_FOLDED: Final = ("fp4_e2m1", "fp4_doubled")
# mxint4 is sign and quarter steps: an integer after all
_INTEGERS: Final = ("mxint4",)
# an element whose codes become another format's, value by value: (format, factor)
ALIASES: Final = {"fp4_doubled": ("fp4_e2m1", 2.0), "mxint4": ("uint4", 0.25)}
_WASTE: Final = 1.04  # padding of K beyond which narrower tiles are taken

Scaling = Literal["row", "group", "fold", "decode"]
Kind = Literal["int", "float", "table"]
Addend = Literal["none", "zero", "minimum", "subtracted"]


@dataclass(frozen=True)
class Form:
    """One specialization of the layout: everything that the kernels take as compile-time constants.

    widths         bits of the planes, low bits first
    tile, fields   inputs a field, fields a block
    group          inputs that share a scale (and a zero point, an addend); 0 where only rows have scales
    scale_kind     stored group scales: "float" (as their dtype says), "integer", "e8m0"; for `fold` "e8" or "e53"
    super_groups   groups under one scale of the second level, 0 = none
    words          group scales lie four to an int32 word, eight a block
    has_zeros      integer zero points by group or row; else `zero` is the one of all
    addend         what the sums of x enter with: a float zero point (before the scale), or a minimum after it
    addend_kind, addend_super, addend_words   as for the scales
    terms          16-bit pieces of an operand that is not exact in one
    special        codes of NaN and infinities occur, and how (planes_kernels._small_float)
    signed_scales, signed_addends   integers of two's complement
    """

    kind: Kind
    bits: int
    widths: tuple[int, ...]
    tile: int
    fields: int
    group: int
    scaling: Scaling
    scale_kind: str = "float"
    super_groups: int = 0
    words: bool = False
    zero: int = 0
    has_zeros: bool = False
    addend: Addend = "none"
    addend_kind: str = "float"
    addend_super: int = 0
    addend_words: bool = False
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0
    terms: int = 1
    special: int = 0
    round_to: str | None = None
    signed_scales: bool = False
    signed_addends: bool = False

    @property
    def block(self) -> int:
        """Inputs a block."""
        return self.tile * self.fields

    @property
    def run(self) -> int:
        """Consecutive fields of a block that share a scale."""
        if self.group == 0 or (self.group // self.tile) % self.fields == 0:
            return self.fields
        return math.gcd(self.group // self.tile, self.fields)

    def padded(self, columns: int) -> int:
        """K rounded up to whole blocks."""
        return -(-columns // self.block) * self.block


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of codes of `bits` bits, low bits first."""
    return (8,) if bits == 8 else tuple(width for width in (4, 2, 1) if bits & width)


def element_of(scheme: Scheme) -> NumberFormat:
    """The element format as the kernels see it."""
    return number_format(ALIASES.get(scheme.element, (scheme.element, 1.0))[0])


def _levels(scheme: Scheme) -> list[ScaleLevel | Offset]:
    offset = scheme.offset
    return [*scheme.scales] if offset is None else [*scheme.scales, offset, *offset.levels]


def group_of(scheme: Scheme) -> int:
    """Inputs that share all finest scales and offsets; 0 where none depends on the input."""
    finest: list[ScaleLevel | Offset] = [*scheme.scales[:1], *([scheme.offset] if scheme.offset else [])]
    return math.gcd(*(lv.block[1] for lv in finest))


def reasons_against(scheme: Scheme) -> list[str]:
    """Why the layout cannot hold a weight of this scheme; empty if it can. Activations are not judged here."""
    why = []
    form = number_format(scheme.element)
    if not scheme.is_quantized:
        return [f"unquantized {scheme.element} elements"]
    if form.kind == "exponent" or form.bits > 8 or (form.kind == "float" and not form.signed):
        why.append(f"elements {scheme.element}")
    for level in _levels(scheme):
        if level.placement in ("flat", "strided"):
            why.append(f"scales laid out over the flattened matrix ({level.placement})")
    if group_of(scheme) % 16:
        why.append(f"groups of {group_of(scheme)} inputs, not a multiple of 16")
    grouped = [lv for lv in scheme.scales[1:] if lv.block[1]]
    if scheme.scales and scheme.scales[0].divide and scheme.scales[0].block[1]:
        why.append("division by the finest scale")
    if len(grouped) > 1 or any(lv.divide or lv.placement != "grid" for lv in grouped):
        why.append("more than one level of group scales above the finest, or one that divides")
    if scheme.scales[:1] and not scheme.scales[0].block[1] and grouped:
        why.append("a group scale above a row scale")
    if scheme.round_to not in (None, "float32") and any(not lv.block[1] for lv in scheme.scales[1:]):
        why.append("a rounding of the format itself after a scale of rows")
    why += _offset_reasons(scheme)
    return list(dict.fromkeys(why))


def _offset_reasons(scheme: Scheme) -> list[str]:
    offset = scheme.offset
    if offset is None:
        return []
    is_integer = number_format(offset.format).is_integer
    why = []
    if number_format(scheme.element).kind == "codebook" and offset.kind == "zero_point":
        why.append("a zero point beside a code book")
    if offset.kind == "zero_point" and offset.levels:
        why.append("a zero point of several levels")
    if offset.kind == "zero_point" and is_integer and not number_format(scheme.element).is_integer:
        why.append("an integer zero point beside elements that are no integers")
    if len(offset.levels) > 1 or any(lv.divide or not lv.block[1] for lv in offset.levels):
        why.append("a minimum with scales of another kind than groups of groups")
    if scheme.round_to is not None:
        why.append("an offset beside a rounding of the format itself")
    return why


def form_of(scheme: Scheme, columns: int) -> Form:
    """The form that a weight of `scheme` with K = `columns` takes unless its data forbid (`planes_prepare`)."""
    element = element_of(scheme)
    group = group_of(scheme)
    tile, fields = _tiling(element.bits, group, columns)
    offset = scheme.offset
    level = scheme.scales[0] if scheme.scales else None
    addend = _addend(offset)
    kind: Kind = "int" if element.is_integer else "table" if element.kind == "codebook" else "float"
    scaling: Scaling = "group" if level is not None and (level.block[1] or addend != "none") else "row"
    if scheme.round_to not in (None, "float32"):
        scaling = "decode"
    elif scaling == "group" and scheme.element in _FOLDED and can_fold(scheme):
        scaling, group = "fold", tile
    if (addend != "none" or scaling == "decode") and group == 0:
        group = -(-columns // (tile * fields)) * tile * fields
    scale_kind = _scale_kind(level.format if level is not None and level.block[1] else "float32")
    if scaling == "fold" and level is not None:
        scale_kind = "e8" if level.format == "e8m0" else "e53"
    supers = _super(scheme.scales, group) if scaling in ("group", "decode") else 0
    addend_super = _super((offset, *offset.levels), group) if offset and addend != "none" else 0
    aligned = group == tile and fields == 8
    addend_kind = _scale_kind(offset.format) if offset and addend != "none" else "float"
    return Form(
        kind=kind, bits=element.bits, widths=plane_widths(element.bits), tile=tile, fields=fields, group=group,
        scaling=scaling, scale_kind=scale_kind, super_groups=supers,
        words=aligned and scaling != "row" and scale_kind != "float" and supers % 8 == 0,
        zero=_constant_zero(scheme, element), has_zeros=_has_zeros(offset), addend=addend,
        addend_kind=addend_kind, addend_super=addend_super,
        addend_words=aligned and addend_kind != "float" and addend_super % 8 == 0,
        exponent=element.exponent, mantissa=element.mantissa, bias=element.bias, terms=_terms(scheme),
        round_to=scheme.round_to if scaling == "decode" else None,
        signed_scales=level is not None and number_format(level.format).kind == "int",
        signed_addends=offset is not None and addend != "none" and number_format(offset.format).kind == "int",
    )  # fmt: skip


def can_fold(scheme: Scheme) -> bool:
    """True if the finest scale has a form of 8 bits that a 16-bit operand of fp4 takes in exactly."""
    return scheme.scales[0].format in SMALL_FLOATS and scheme.offset is None and not any(
        lv.block[1] for lv in scheme.scales[1:])


def _tiling(bits: int, group: int, columns: int) -> tuple[int, int]:
    """Inputs of a field and fields of a block: as wide as the group and little padding allow."""
    fields = 1 if bits == 8 else 8
    sizes = (128, 64, 32, 16) if bits == 8 else (32, 16)
    fitting = [size for size in sizes if group % size == 0]
    lean = [size for size in fitting if -(-columns // (size * fields)) * size * fields <= _WASTE * columns]
    return (lean or fitting[-1:])[0], fields


def _scale_kind(format: str) -> str:
    spec = number_format(format)
    return "integer" if spec.is_integer else "e8m0" if format == "e8m0" else "float"


def _super(levels: tuple[ScaleLevel | Offset, ...], group: int) -> int:
    above = [lv.block[1] for lv in levels[1:] if lv.block[1]]
    return above[0] // group if above else 0


def _addend(offset: Offset | None) -> Addend:
    if offset is None or (offset.kind == "zero_point" and number_format(offset.format).is_integer):
        return "none"
    if offset.kind == "zero_point":
        return "zero"
    return "subtracted" if offset.subtract else "minimum"


def _has_zeros(offset: Offset | None) -> bool:
    return offset is not None and offset.kind == "zero_point" and number_format(offset.format).is_integer


def _constant_zero(scheme: Scheme, element: NumberFormat) -> int:
    """What is subtracted from each stored (unsigned) code: signed integers are stored in offset binary."""
    signed = number_format(scheme.element).kind == "int" or scheme.element in _INTEGERS
    return 2 ** (element.bits - 1) if signed else 0


def _terms(scheme: Scheme) -> int:
    """Pieces of an operand in bfloat16: 8 significant bits each."""
    if scheme.round_to in ("float16", "bfloat16"):
        return 2 if scheme.round_to == "float16" else 1
    return 3 if scheme.element in ("nf4", "fp4_bnb") else 1


def stored_bytes(scheme: Scheme, rows: int, columns: int) -> int:
    """Bytes of the layout for a weight [rows, columns]: planes, scales and offsets spread to rows, row factors."""
    form = form_of(scheme, columns)
    n, k = -(-rows // ROWS) * ROWS, form.padded(columns)
    groups = -(-k // form.group) if form.group else 0
    total = n * k * form.bits // 8 + 4 * n
    if form.scaling in ("group", "fold", "decode") and scheme.scales:
        total += n * groups * _bytes_of(scheme.scales[0].format, form.scaling == "fold")
        if form.super_groups:
            total += 2 * n * -(-groups // form.super_groups)
    offset = scheme.offset
    if offset is not None:
        total += n * (groups if offset.block[1] else 1) * _bytes_of(offset.format)
        if form.addend_super:
            total += 2 * n * -(-groups // form.addend_super)
    consumed = form.scaling != "row"
    by_row = [lv for i, lv in enumerate(scheme.scales) if not lv.block[1] and not (i == 0 and consumed)]
    total += sum(4 * (rows if lv.block[0] else 1) for lv in by_row)
    return total + (64 if form.kind == "table" else 0) + (8 * columns if scheme.act_order else 0)


def _bytes_of(format: str, folded: bool = False) -> int:
    if folded or number_format(format).is_integer or format == "e8m0":
        return 1
    return 4 if format == "float32" else 2
