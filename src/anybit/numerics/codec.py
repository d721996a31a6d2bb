"""Codes to float32 and back, for every format of `formats.py`.

`decode` is exact: each value of a format of 16 bits or less is a float32. `encode` clamps first, always, then rounds:
what casts do beyond the maximum differs from library to library (docs/formats/numerics.md §2). Scales, blocks and
activation recipes live elsewhere. Definitions: OCP OFP8 1.0, OCP MX 1.0; oracle of the tests: ml_dtypes.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Final, Literal

import torch
from torch import Tensor

from anybit.errors import Damaged
from anybit.numerics.formats import WIDE_FLOATS, NumberFormat, number_format

__all__ = ["Rounding", "code_values", "decode", "encode", "to_fnuz"]

Rounding = Literal["even", "up", "down"]
"""What a tie becomes: the even code, the larger magnitude, the smaller magnitude."""

# Casts of these are right for every float32 within the range (all midpoints checked), and faster than bit operations.
_TORCH_FLOAT8: Final = {
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
}
_SIGN_AND_MAGNITUDE_BOOKS: Final = ("fp4_bnb", "fp4_doubled", "mxint4")  # code = sign bit | code of the magnitude
_CHUNK: Final = 2**18  # elements; temporaries stay in the cache: 8 times faster than whole matrices on a CPU


def decode(format: str, codes: Tensor) -> Tensor:
    """Values of codes, float32, exact, of the same shape.

    codes: int8 for int formats, uint8 for all others; float8 dtypes are taken by their bytes, wide floats as they are.
    Byte 0 of e8m0 is 2^-127 and 255 is NaN.

    >>> decode("fp4_e2m1", torch.tensor([1, 7, 15], dtype=torch.uint8)).tolist()
    [0.5, 6.0, -6.0]
    """
    spec = number_format(format)
    if spec.name in WIDE_FLOATS:
        return codes.float()
    if spec.is_integer:
        if codes.dtype != (torch.int8 if spec.kind == "int" else torch.uint8):
            raise TypeError(f"codes of {format} as {codes.dtype}")
        return codes.float()
    codes = _as_bytes(codes)
    if format == "fp8_e4m3fn" and codes.device.type == "cpu":
        return _decode_e4m3fn(codes)
    if format in _TORCH_FLOAT8:
        return codes.view(_TORCH_FLOAT8[format]).float()
    table = code_values(format, str(codes.device))
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def _decode_e4m3fn(codes: Tensor) -> Tensor:
    """As a cast of torch.float8_e4m3fn, in 0.6 instead of 8 ns a code on a CPU: a float16 of the same bits times 256.

    Sign and magnitude go 8 bits up, so the exponent's bias of 7 becomes 15; the carry out of magnitude 7F makes a NaN.
    """
    half = codes.view(torch.int8).to(torch.int16) << 7  # the sign comes twice: bits 15 and 14
    nan = (half & 0x3F80).add_(0x80).bitwise_and_(0x4000)
    return half.bitwise_and_(~0x4000).bitwise_or_(nan).view(torch.float16).float().mul_(256.0)


def encode(format: str, x: Tensor, *, rounding: Rounding = "even") -> Tensor:
    """Codes of the nearest values, saturating: int8 for int formats, uint8 for all others, of the shape of x.

    x float32. Infinities become the largest finite code. -0.0 keeps its sign where the format has one. NaN gives a NaN
    code where the format has one, else code 0: fp4, fp6, integers and code books cannot hold it, so the caller must
    carry NaN to its result by other means.

    `rounding` settles ties. e8m0 has its own rule (nearest in value, ties up, all x <= 2^-127 to code 0), and so have
    code books (the lower value, for iq4_nl the upper one, for signed magnitudes the smaller magnitude).
    Source: docs/formats/numerics.md §2.
    """
    spec = number_format(format)
    if x.numel() <= _CHUNK or x.device.type != "cpu":
        return _encode(spec, x.float(), rounding)
    codes = torch.empty(x.numel(), dtype=torch.int8 if spec.kind == "int" else torch.uint8, device=x.device)
    flat = x.flatten()
    for start in range(0, flat.numel(), _CHUNK):
        codes[start : start + _CHUNK] = _encode(spec, flat[start : start + _CHUNK].float(), rounding)
    return codes.view(x.shape)


def _encode(spec: NumberFormat, x: Tensor, rounding: Rounding) -> Tensor:
    if spec.kind == "codebook":
        return _encode_book(spec, x)
    if spec.kind == "exponent":
        return _encode_e8m0(x)
    x = x.clamp(spec.minimum, spec.maximum)  # keeps NaN
    if spec.is_integer:
        codes = _round(x, rounding).nan_to_num_(0.0)
        return codes.to(torch.int8 if spec.kind == "int" else torch.uint8)
    if rounding == "even" and spec.name in _TORCH_FLOAT8:
        return x.to(_TORCH_FLOAT8[spec.name]).view(torch.uint8)
    return _encode_float(spec, x, rounding)


def to_fnuz(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """fp8_e4m3fn codes with their dequantizing multiplier as fp8_e4m3fnuz: the same values, bit for bit.

    value_fn(code) = 2 value_fnuz(code) for every code but 80, 7F, FF: minus zero becomes 0, the scale doubles.
    Raises Damaged for NaN codes, which would read as +-240. Source: docs/formats/numerics.md §3.
    """
    codes = _as_bytes(codes)
    nan_count = int(((codes & 0x7F) == 0x7F).sum())
    if nan_count:
        raise Damaged("NaN in an fp8 weight", found=f"{nan_count} codes 7F or FF", wanted="finite codes")
    return codes.masked_fill(codes == 0x80, 0), scale * 2


@cache
def code_values(format: str, device: str = "cpu") -> Tensor:
    """Value of every code of a float, exponent or codebook format of 8 bits or less: [2**bits] float32 on `device`."""
    spec = number_format(format)
    values = list(spec.values) or [_value(spec, code) for code in range(2**spec.bits)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _value(spec: NumberFormat, code: int) -> float:
    """The definition of numerics.md §1."""
    if code in spec.nan_codes:
        return float("nan")
    if spec.kind == "exponent":
        return math.ldexp(1.0, code - spec.bias)
    sign = -1.0 if spec.signed and code >> (spec.bits - 1) else 1.0
    if code in spec.inf_codes:
        return sign * float("inf")
    exponent = code >> spec.mantissa & (2**spec.exponent - 1)
    fraction = (code & (2**spec.mantissa - 1)) / 2**spec.mantissa
    if exponent == 0:
        return sign * math.ldexp(fraction, 1 - spec.bias)
    return sign * math.ldexp(1 + fraction, exponent - spec.bias)


def _as_bytes(codes: Tensor) -> Tensor:
    if codes.dtype == torch.uint8:
        return codes
    if codes.is_floating_point() and codes.element_size() == 1:
        return codes.view(torch.uint8)
    raise TypeError(f"float codes as {codes.dtype}")


def _round(x: Tensor, rounding: Rounding) -> Tensor:
    """Nearest integers; x is not added to, because 0.49999997 + 0.5 is 1."""
    if rounding == "even":
        return x.round()
    whole = x.trunc()
    rest = (x - whole).abs_()  # exact
    away = rest >= 0.5 if rounding == "up" else rest > 0.5
    return whole + x.sign() * away


def _encode_float(spec: NumberFormat, x: Tensor, rounding: Rounding) -> Tensor:
    """Any small float by its definition; x is within the range of the format, or NaN.

    With E = max(exponent of x, exponent of the smallest normal), |x| is q * 2^(E - mantissa) and the code is
    (E - smallest) * 2^mantissa + q: a carry into the next binade is right by itself, and q is even iff the code is.
    """
    smallest = 1 - spec.bias
    magnitude = x.abs().nan_to_num_(0.0)
    exponent = ((magnitude.view(torch.int32) >> 23) - 127).clamp_(min=smallest)
    power = (127 + spec.mantissa - exponent << 23).view(torch.float32)  # 2^(mantissa - E), exact
    q = _round(magnitude * power, rounding)
    codes = ((exponent - smallest << spec.mantissa) + q.int()).to(torch.uint8)
    if spec.signed:
        negative = torch.signbit(x)
        if len(spec.nan_codes) == 1:  # fnuz: the code of -0 is NaN
            negative = negative & (codes != 0)
        codes |= negative.to(torch.uint8) << (spec.bits - 1)
    return codes.masked_fill_(x.isnan(), spec.nan_codes[0] if spec.nan_codes else 0)


def _encode_e8m0(x: Tensor) -> Tensor:
    bits = x.clamp(0.0, 2.0**127).nan_to_num(0.0).view(torch.int32)
    normal = (bits + 0x0040_0000) >> 23
    # code 0 is 2^-127, a subnormal float32 (bits 0040_0000); 1.5 * 2^-127 is the midpoint to code 1
    codes = torch.where(bits < 0x0080_0000, (bits >= 0x0060_0000).int(), normal).to(torch.uint8)
    return codes.masked_fill_(x.isnan(), 255)


def _encode_book(spec: NumberFormat, x: Tensor) -> Tensor:
    signed = spec.name in _SIGN_AND_MAGNITUDE_BOOKS
    boundaries, order = _book_boundaries(spec.name, str(x.device))
    index = torch.bucketize((x.abs() if signed else x).nan_to_num(0.0), boundaries, out_int32=True,
                            right=spec.name == "iq4_nl")
    codes = order.index_select(0, index.flatten()).view(x.shape)
    return codes | ((x < 0).to(torch.uint8) << 3) if signed else codes


@cache
def _book_boundaries(format: str, device: str) -> tuple[Tensor, Tensor]:
    """Midpoints of the sorted values (for sign-and-magnitude books of the first half), and the codes in that order."""
    values = number_format(format).values
    if format in _SIGN_AND_MAGNITUDE_BOOKS:
        values = values[: len(values) // 2]
    order = sorted(range(len(values)), key=values.__getitem__)
    midpoints = [(values[a] + values[b]) / 2 for a, b in pairwise(order)]
    return (torch.tensor(midpoints, dtype=torch.float32, device=device),
            torch.tensor(order, dtype=torch.uint8, device=device))
