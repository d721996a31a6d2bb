"""Two codes at a time: the PTX of `planes_pairs` for every code of every form, run by an interpreter of a few lines."""

from __future__ import annotations

import pytest
import torch
from test_triton_planes import run_ptx

from anybit.numerics.codec import code_values
from anybit.numerics.formats import number_format

pairs = pytest.importorskip("anybit.kernels.triton.planes_pairs")

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def letter(dtype: torch.dtype) -> str:
    return "B" if dtype == torch.bfloat16 else "H"


def values_of(word: int, dtype: torch.dtype, count: int = 2) -> list[float]:
    halves = [word >> 16 * i & 0xFFFF for i in range(count)]
    return torch.tensor(halves, dtype=torch.int32).to(torch.int16).view(dtype).double().tolist()


def planes_of(codes: tuple[int, int], field: int, bits: int) -> list[int]:
    """A register a plane: field `field` of two neighbours has their codes' bits, the others have noise."""
    words, shift = [], 0
    for width in WIDTHS[bits]:
        at = field % (16 // width) * width
        mask = (2**width - 1) << at
        halves = [0x96C3 & ~mask | (code >> shift & (2**width - 1)) << at for code in codes]
        words.append(halves[0] | halves[1] << 16)
        shift += width
    return words


def twice(*numbers: int) -> list[int]:
    """Each number in the two registers that an argument of 32 bits has."""
    return [number for number in numbers for _ in range(2)]


def bits_of(value: float, dtype: torch.dtype) -> int:
    bits = int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF
    return bits << 16 | bits


@DTYPES
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_integer_of_every_field_is_decoded(bits: int, dtype: torch.dtype) -> None:
    text = getattr(pairs, f"_I{letter(dtype)}{len(WIDTHS[bits])}").value
    base = 128.0 if dtype == torch.bfloat16 else 1024.0
    for field in range(8):
        moves, to = [], 0
        for width in WIDTHS[bits]:
            moves += [pairs._turn.fn(field, width, to), pairs._twice.fn((2**width - 1) << to)]
            to += width
        for code in range(2**bits):
            codes, zero = (code, (5 * code + 3) % 2**bits), 2 ** (bits - 1)
            inputs = planes_of(codes, field, bits) + twice(*moves, bits_of(base, dtype), bits_of(1.0, dtype),
                                                           bits_of(-base - zero, dtype))
            assert values_of(run_ptx(text, inputs), dtype) == [c - zero for c in codes], (field, codes)


@DTYPES
@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2"])
def test_every_small_float_of_every_field_is_decoded(name: str, dtype: torch.dtype) -> None:
    form = number_format(name)
    wanted = code_values(name, "cpu").double().tolist()
    widths = WIDTHS[form.bits]
    text = getattr(pairs, f"_F{letter(dtype)}{len(widths)}").value
    below = (7 if dtype == torch.bfloat16 else 10) - form.mantissa
    factor = bits_of(2.0 ** ((127 if dtype == torch.bfloat16 else 15) - form.bias), dtype)
    for field in range(8):
        moves, to = [], 0
        for width in widths:
            kept = min(width, form.bits - 1 - to)  # the sign has a move of its own
            moves += [pairs._turn.fn(field, width, to + below), pairs._twice.fn((2**kept - 1) << (to + below))]
            to += width
        sign = pairs._turn.fn(field, widths[-1], 16 - form.bits + to - widths[-1])
        for code in range(2**form.bits):
            codes = (code, (5 * code + 3) % 2**form.bits)
            inputs = planes_of(codes, field, form.bits) + twice(*moves, sign, factor)
            assert values_of(run_ptx(text, inputs), dtype) == [wanted[c] for c in codes], (field, codes)


@DTYPES
@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fnuz"])
def test_every_finite_float_of_a_byte_is_decoded(name: str, dtype: torch.dtype) -> None:
    form = number_format(name)
    wanted = code_values(name, "cpu").double().tolist()
    below = (7 if dtype == torch.bfloat16 else 10) - form.mantissa
    factor = bits_of(2.0 ** ((127 if dtype == torch.bfloat16 else 15) - form.bias), dtype)
    odd = {*form.nan_codes, *form.inf_codes}
    arguments = [n for number in (8 - below, pairs._twice.fn(0x7F << below), factor) for n in [number] * 4]
    for start in range(0, 256, 4):
        codes = [code if code not in odd else 0 for code in range(start, start + 4)]
        word = int.from_bytes(bytes(codes), "little")
        text = getattr(pairs, f"_F{letter(dtype)}8").value
        found = run_ptx(text, [word, *arguments], outputs=2)
        assert values_of(found, dtype, 4) == [wanted[c] for c in codes]


@DTYPES
@pytest.mark.parametrize("zero", [0, 127, 128, 255])
def test_every_integer_of_a_byte_is_decoded(zero: int, dtype: torch.dtype) -> None:
    text = (pairs._BYTES_BF16 if dtype == torch.bfloat16 else pairs._BYTES_FP16).value
    for start in range(0, 256, 4):
        word = int.from_bytes(bytes(range(start, start + 4)), "little")
        found = run_ptx(text, [word, *[zero + pairs.NEGATIVE_2_23.value] * 4], outputs=2)
        assert values_of(found, dtype, 4) == [code - zero for code in range(start, start + 4)]


def test_upper_halves_and_rests_are_the_number() -> None:
    for value in (*code_values("nf4", "cpu").tolist(), *code_values("fp4_bnb", "cpu").tolist(), 3.14159274, -1e-30):
        rest, parts = torch.tensor([value]), []
        for _ in range(3):
            bits = int(rest.view(torch.int32)) & 0xFFFFFFFF
            upper = run_ptx(pairs.UPPER.value, [bits, bits])
            parts.append(values_of(upper, torch.bfloat16)[0])
            left = run_ptx(pairs.REST.value, [bits])
            rest = torch.tensor([left - (left >> 31 << 32)], dtype=torch.int32).view(torch.float32)
        assert sum(parts) == torch.tensor(value, dtype=torch.float32).double().item()
        assert rest.item() == 0.0
