"""The number formats as a table; no torch here.

A code with exponent field e > 0 is (-1)^s * 2^(e-bias) * (1 + m/2^M); with e = 0 it is (-1)^s * 2^(1-bias) * m/2^M.
Sources: OCP 8-bit floating point (OFP8) 1.0, OCP Microscaling Formats (MX) 1.0; code books from bitsandbytes 0.50
(nf4, fp4_bnb) and ggml-common.h (iq4_nl). Encoding, decoding and rounding: `codec.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["int", "uint", "float", "exponent", "codebook"]


@dataclass(frozen=True)
class NumberFormat:
    """What one stored number is: a value set with codes of `bits` bits.

    kind       int (two's complement), uint, float, exponent (2^(code-bias), no zero), codebook (`values[code]`)
    bits       width of a code
    exponent, mantissa, bias    fields of a float; `mantissa` counts the explicit bits
    signed     whether a float has a sign bit
    maximum    largest finite value
    nan_codes  codes that are NaN; codes of infinities are in `inf_codes`
    values     the code book, index = code
    """

    name: str
    kind: Kind
    bits: int
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0
    signed: bool = False
    maximum: float = 0.0
    nan_codes: tuple[int, ...] = ()
    inf_codes: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def is_integer(self) -> bool:
        """True for int and uint formats."""
        return self.kind in ("int", "uint")

    @property
    def minimum(self) -> float:
        """Smallest finite value (the negative of the maximum for signed floats)."""
        if self.kind == "int":
            return float(-(2 ** (self.bits - 1)))
        if self.kind == "codebook":
            return min(self.values)
        return -self.maximum if self.signed else 0.0


def _float(
    name: str, exponent: int, mantissa: int, bias: int, maximum: float, *, signed: bool = True,
    nan: tuple[int, ...] = (), inf: tuple[int, ...] = (),
) -> NumberFormat:
    bits = exponent + mantissa + (1 if signed else 0)
    return NumberFormat(name, "float", bits, exponent, mantissa, bias, signed, maximum, nan, inf)


# float32 bit patterns of these decimals are tested literally: bitsandbytes stores the same table in its files
NF4_VALUES: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
_FP4_BNB_HALF: Final = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
                        0.1666666716337204, 0.25)
FP4_BNB_VALUES: Final = _FP4_BNB_HALF + tuple(-v for v in _FP4_BNB_HALF)  # not in e2m1 order
IQ4_NL_VALUES: Final = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
                        89.0, 113.0)
# ggml writes e2m1 doubled and halves the scale; code 8 decodes to +0 there
FP4_DOUBLED_VALUES: Final = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)
# AutoRound's MXINT4: sign bit 3, magnitude * 0.25
MXINT4_VALUES: Final = tuple(0.25 * v for v in range(8)) + tuple(-0.25 * v for v in range(8))


def _table() -> dict[str, NumberFormat]:
    formats = [
        *(NumberFormat(f"int{b}", "int", b, maximum=float(2 ** (b - 1) - 1), signed=True) for b in range(1, 9)),
        *(NumberFormat(f"uint{b}", "uint", b, maximum=float(2**b - 1)) for b in range(1, 9)),
        _float("fp4_e2m1", 2, 1, 1, 6.0),
        _float("fp6_e2m3", 2, 3, 1, 7.5),
        _float("fp6_e3m2", 3, 2, 3, 28.0),
        _float("fp8_e4m3fn", 4, 3, 7, 448.0, nan=(0x7F, 0xFF)),
        _float("fp8_e4m3fnuz", 4, 3, 8, 240.0, nan=(0x80,)),
        _float("fp8_e5m2", 5, 2, 15, 57344.0, nan=(0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF), inf=(0x7C, 0xFC)),
        _float("fp8_e5m2fnuz", 5, 2, 16, 57344.0, nan=(0x80,)),
        _float("ue4m3", 4, 3, 7, 448.0, signed=False, nan=(0x7F,)),
        _float("ue5m3", 5, 3, 15, 114688.0, signed=False, nan=(0xFF,)),
        NumberFormat("e8m0", "exponent", 8, exponent=8, bias=127, maximum=2.0**127, nan_codes=(0xFF,)),
        _float("bfloat16", 8, 7, 127, 3.3895313892515355e38),
        _float("float16", 5, 10, 15, 65504.0),
        _float("float32", 8, 23, 127, 3.4028234663852886e38),
        NumberFormat("nf4", "codebook", 4, maximum=1.0, values=NF4_VALUES, signed=True),
        NumberFormat("fp4_bnb", "codebook", 4, maximum=1.0, values=FP4_BNB_VALUES, signed=True),
        NumberFormat("iq4_nl", "codebook", 4, maximum=113.0, values=IQ4_NL_VALUES, signed=True),
        NumberFormat("fp4_doubled", "codebook", 4, maximum=12.0, values=FP4_DOUBLED_VALUES, signed=True),
        NumberFormat("mxint4", "codebook", 4, maximum=1.75, values=MXINT4_VALUES, signed=True),
    ]
    return {f.name: f for f in formats}


FORMATS: Final[dict[str, NumberFormat]] = _table()

# Formats whose tensors keep a floating torch dtype; every other format is kept as integer codes.
WIDE_FLOATS: Final = ("float32", "float16", "bfloat16")


def number_format(name: str) -> NumberFormat:
    """The format called `name`; KeyError for a name that is not in the table (a mistake of ours, not of a file)."""
    return FORMATS[name]
