"""What the compiled CPU kernel can run, and its parameters for each format; no torch here.

The kernel knows containers, not dialects: a code becomes a value by a table (up to 4 bits), as an integer, or as a
small float that is moved into a float16. Which parameters make which format stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from anybit.numerics.formats import NumberFormat, number_format
from anybit.schemes import Block, Offset, Placement, ScaleLevel, Scheme

__all__ = ["Code", "code", "plane_bits", "reasons_against", "stored_format"]

TABLE, INTEGER, MINIFLOAT, FLOAT = range(4)  # enum anybit_kind
NO_OFFSET, ZERO_POINT, MINIMUM, ROUND_F16, ROUND_BF16 = range(5)  # enum anybit_offset

# enum anybit_format, by the number formats that are stored that way
STORED_FORMATS: Final = {
    "float32": 0,
    "float16": 1,
    "bfloat16": 2,
    "e8m0": 3,
    "fp8_e4m3fn": 4,
    "ue4m3": 4,
    "ue5m3": 5,
    **{f"uint{b}": 6 for b in range(1, 9)},
    **{f"int{b}": 7 for b in range(1, 9)},
}
ROUNDINGS: Final = {None: NO_OFFSET, "float32": NO_OFFSET, "float16": ROUND_F16, "bfloat16": ROUND_BF16}
_FLOAT_BITS: Final = {"float32": 32, "float16": 16, "bfloat16": 17}
_HALF_MANTISSA: Final = 10
_HALF_BIAS: Final = 15


@dataclass(frozen=True)
class Code:
    """How the kernel reads one element format (the fields of anybit_weight and anybit_minifloat).

    kind    TABLE, INTEGER, MINIFLOAT or FLOAT
    flip    exclusive-or of each code when planes are made: two's complement to offset binary
    values  the table, repeated to 16
    """

    kind: int
    bits: int
    is_signed: bool = False
    bias: int = 0
    flip: int = 0
    values: tuple[float, ...] = ()
    minifloat: tuple[int, int, int, int, int, float] = (0, 0, 0, 0, 1, 1.0)


def code(element: str) -> Code | None:
    """The kernel's parameters for an element format; None if it cannot read it."""
    form = number_format(element)
    if element in _FLOAT_BITS:
        return Code(FLOAT, _FLOAT_BITS[element])
    if form.bits <= 4 and form.kind != "exponent":
        values = tuple(value(form, c) for c in range(2**form.bits))
        return Code(TABLE, form.bits, values=values * (16 >> form.bits))
    if form.is_integer and form.bits == 8:
        return Code(INTEGER, 8, is_signed=form.kind == "int")
    if form.is_integer:
        sign = 2 ** (form.bits - 1) if form.kind == "int" else 0
        return Code(INTEGER, form.bits, bias=sign, flip=sign)
    return _minifloat(form)


def _minifloat(form: NumberFormat) -> Code | None:
    """Parameters that move a signed float of 6 or 8 bits into a float16, whose exponent field is wider or equal."""
    if form.kind != "float" or form.bits not in (6, 8) or not form.signed or form.exponent > 5:
        return None
    has_infinity = bool(form.inf_codes)
    if form.exponent == 5 and not has_infinity:  # its largest numbers would read as float16's infinities
        return None
    left = 16 - form.bits
    right = 15 - _HALF_MANTISSA - form.exponent
    magnitude = ((1 << (form.bits - 1)) - 1) << (_HALF_MANTISSA - form.mantissa)
    nan_and, nan_is = 0, 1  # never
    if not has_infinity and form.nan_codes:
        nan_is = form.nan_codes[0]
        nan_and = 0x7F if len(form.nan_codes) == 2 else 0xFF
    return Code(MINIFLOAT, form.bits, minifloat=(left, right, 0x8000 | magnitude, nan_and, nan_is,
                                                 2.0 ** (_HALF_BIAS - form.bias)))  # fmt: skip


def value(form: NumberFormat, stored: int) -> float:
    """The value of one code of at most 8 bits, NaN and infinities aside."""
    if form.kind == "codebook":
        return form.values[stored]
    if form.kind == "uint":
        return float(stored)
    if form.kind == "int":
        return float(stored - 2**form.bits if stored >> (form.bits - 1) else stored)
    mantissa = stored & ((1 << form.mantissa) - 1)
    exponent = (stored >> form.mantissa) & ((1 << form.exponent) - 1)
    sign = -1.0 if form.signed and stored >> (form.bits - 1) else 1.0
    lead = (1 << form.mantissa) if exponent else 0
    return float(sign * (lead + mantissa) * 2.0 ** (max(exponent, 1) - form.bias - form.mantissa))


def plane_bits(bits: int) -> tuple[int, ...]:
    """Widths of the planes of codes of `bits` bits, low bits first."""
    return (8,) if bits == 8 else tuple(width for width in (4, 2, 1) if bits & width)


def stored_format(name: str) -> int:
    """How scales or offsets of a format are stored for the kernel: as they are, or widened to float32."""
    return STORED_FORMATS.get(name, 0)


def reasons_against(scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
    """Why the kernel cannot run the weight of `scheme` [.., N, K]; empty if it can.

    The weight alone is judged: activation quantization and `pre_scale` are the caller's work on x.
    """
    why: list[str] = []
    rows, cols = shape[-2:]
    element = code(scheme.element)
    if element is None:
        why.append(f"elements {scheme.element}")
    if scheme.act_order:
        why.append("act-order: columns of a group are scattered")
    if len(scheme.scales) > 2:
        why.append(f"{len(scheme.scales)} levels of scales")
    for level in scheme.scales:
        why += _block_reasons(level.block, level.placement, rows, cols)
    if scheme.scales and scheme.scales[0].divide:
        why.append("division by the finest scale")
    if scheme.order == "code_first" and len(scheme.scales) == 2:
        why += _factor_reasons(scheme.scales[1], cols)
    if element is not None and element.kind == FLOAT and (scheme.scales or scheme.offset):
        why.append(f"scales over {scheme.element} elements")
    why += _rounding_reasons(scheme, element)
    if scheme.offset is not None:
        why += _offset_reasons(scheme.offset, element, rows, cols)
    return list(dict.fromkeys(why))


def _block_reasons(block: Block, placement: Placement, rows: int, cols: int) -> list[str]:
    group = block[1] or cols
    if placement == "gathered":
        return ["act-order: columns of a group are scattered"]
    if placement == "strided":
        return ["scales strided over the flattened matrix"]
    if placement == "flat" and cols % group:
        return [f"blocks of {group} that run across rows of {cols}"]
    if group < cols and group % 16:
        return [f"groups of {group} columns, not a multiple of 16"]
    return []


def _factor_reasons(level: ScaleLevel, cols: int) -> list[str]:
    if level.divide:
        return ["division of the scaled value"]
    return [] if (level.block[1] or cols) >= cols else ["a second scale by column after the first"]


def _rounding_reasons(scheme: Scheme, element: Code | None) -> list[str]:
    if scheme.round_to not in ROUNDINGS:
        return [f"weights rounded to {scheme.round_to}"]
    if ROUNDINGS[scheme.round_to] == NO_OFFSET or element is None:
        return []
    if element.kind != TABLE or element.bits != 4 or scheme.offset is not None or scheme.order == "code_first":
        return [f"weights rounded to {scheme.round_to} (only for 4-bit elements without an offset)"]
    return []


def _offset_reasons(offset: Offset, element: Code | None, rows: int, cols: int) -> list[str]:
    why = _block_reasons(offset.block, offset.placement, rows, cols)
    if element is not None and element.kind == MINIFLOAT:
        why.append("an offset beside floating-point elements of more than 4 bits")
    if len(offset.levels) > 1 or (offset.levels and offset.kind == "zero_point"):
        why.append("an offset of several levels")
    for level in offset.levels:
        why += _block_reasons(level.block, level.placement, rows, cols)
        if level.divide:
            why.append("division in an offset's scale")
    return why
