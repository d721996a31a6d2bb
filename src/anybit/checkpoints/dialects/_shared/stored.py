"""Stored tensors as canonical parts: float8 and e8m0 as bytes, scales on their grid; what no writer means is refused.

Pure functions on tensors; the one module of this folder that imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from anybit.checkpoints.checks import refuse_bad_scales
from anybit.errors import Damaged
from anybit.numerics.formats import number_format
from anybit.numerics.packing import unpack_fields
from anybit.weights import scale_values

_ELEMENTS_AT_ONCE: Final = 2**24
_REMEDY: Final = "the file is damaged: download it again, or get it from its writer"


def fp8_codes(stored: Tensor, where: str) -> Tensor:
    """Bytes of an e4m3fn weight, uint8 of the same shape; refuses the NaN codes 7F and FF, which no writer stores."""
    codes = stored.view(torch.uint8)
    _refuse_values(codes, lambda part: (part & 0x7F) == 0x7F, "NaN codes in an fp8 weight", where, "none")
    return codes


def finite_codes(stored: Tensor, format: str, where: str) -> Tensor:
    """Bytes of a weight in a float format of 8 bits, uint8 of the same shape; refuses its NaN and infinity codes."""
    codes = stored.view(torch.uint8)
    spec = number_format(format)
    bad = torch.zeros(256, dtype=torch.bool)
    bad[[*spec.nan_codes, *spec.inf_codes]] = True
    _refuse_values(codes, lambda part: bad[part.int()], f"NaN or infinity codes in an {format} weight", where, "none")
    return codes


def int_codes(stored: Tensor, bits: int, where: str) -> Tensor:
    """Signed codes of `bits` bits that a file keeps one an int8; refuses values that do not fit."""
    most = 2 ** (bits - 1) - 1
    if bits < 8:
        _refuse_values(stored, lambda part: (part > most) | (part < -most - 1), f"codes outside int{bits}", where,
                       f"{-most - 1} … {most}")
    return stored


def _refuse_values(
    stored: Tensor, is_bad: Callable[[Tensor], Tensor], problem: str, where: str, wanted: str
) -> None:
    """Raise Damaged if an element is bad; a part at a time, so that masks of a large stack take little memory."""
    flat = stored.flatten()
    for start in range(0, flat.numel(), _ELEMENTS_AT_ONCE):
        part = flat[start : start + _ELEMENTS_AT_ONCE]
        bad = is_bad(part)
        if bool(bad.any()):
            first = int(bad.byte().argmax())
            raise Damaged(problem, where=where, found=f"{int(part[first])} at element {start + first}", wanted=wanted,
                          remedy=_REMEDY)


def padded_codes(words: Tensor, bits: int, count: int) -> Tensor:
    """Signed codes [.., count] int8 of offset-binary fields that do not cross int32 words."""
    codes: Tensor = unpack_fields(words, bits, count).view(torch.int8) - 2 ** (bits - 1)
    return codes


def scales(stored: Tensor, format: str, where: str, *, allow_zero: bool = True, allow_negative: bool = False) -> Tensor:
    """Stored scales as canonical scales: wide floats as they are, e4m3 and e8m0 as uint8; refuses NaN and Inf.

    e8m0 byte 255 is its NaN; a sign bit in an e4m3 scale, on -0 too, is refused unless `allow_negative`.
    """
    if stored.element_size() == 1:
        stored = stored.view(torch.uint8)
    if format == "fp8_e4m3fn" and not allow_negative and bool((stored & 0x80).any()):
        raise Damaged("a sign bit in unsigned scales", where=where, found=f"{int((stored >= 0x80).sum())} scales",
                      wanted="unsigned e4m3", remedy=_REMEDY)
    refuse_bad_scales(scale_values(format, stored), where, allow_zero=allow_zero, allow_negative=allow_negative)
    return stored


def one_value(stored: Tensor, where: str, *, allow_zero: bool = False) -> Tensor:
    """A single positive float, stored as [], [1] or [1, 1], as float32 of shape [1]."""
    value = stored.reshape(1).float()
    refuse_bad_scales(value, where, allow_zero=allow_zero, allow_negative=False)
    return value
