"""Packed codes: the worked bytes of the documents, and pack∘unpack = identity for everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anybit.errors import Damaged
from anybit.numerics.packing import (
    PLANES,
    PackedCodes,
    Sign,
    as_bytes,
    pack_fields,
    pack_halves32,
    pack_planar,
    pack_stream,
    unpack_fields,
    unpack_halves32,
    unpack_planar,
    unpack_stream,
)

WORD_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32]


def words(text: str) -> Tensor:
    """Hexadecimal 32-bit words as the int32 that files hold."""
    return torch.tensor([int(w, 16) for w in text.split()], dtype=torch.int64).to(torch.int32)


def hexadecimal(tensor: Tensor) -> str:
    return " ".join(f"{w & 0xFFFFFFFF:08x}" for w in tensor.tolist())


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split()]


@pytest.mark.parametrize(
    ("bits", "stored", "codes"),
    [
        # docs/formats/gptq.md §3, auto_round.md §2, compressed_tensors.md §4 (offset binary fields)
        (4, "4890a788", "8 8 7 10 0 9 8 4"),
        (3, "5d9a392d 4b5b5b5b a638a48a", "5 5 4 4 3 4 6 4 5 3 5 5 5 6 6 2 3 3 5 5 4 4 2 4 4 4 2 4 3 4 1 5"),
        (3, "5badd6e7 3f1cb5a7 6ac7559b", "7 4 3 3 5 3 3 5 3 3 5 3 2 3 5 5 4 3 4 7 3 6 6 4 5 2 5 3 4 5 2 3"),
        (4, "77886777", "7 7 7 6 8 8 7 7"),
        (8, "9283907b", "123 144 131 146"),
        (5, "8a418820 c5a92839 ca307b9a 38bdab49 ffbbcdeb", " ".join(map(str, range(32)))),
        (6, "440c2040 a2481c61 3ce34c2c 544d2450 a6585d65 7de75c6d", " ".join(map(str, range(32)))),
        (7, "40608080 880e1828 68c16284 88901e38 58a94264 668c982e 3e78e9c3", " ".join(map(str, range(32)))),
    ],
)
def test_words_of_genuine_files_unpack_to_the_codes_in_the_documents(bits: int, stored: str, codes: str) -> None:
    wanted = numbers(codes)
    assert unpack_stream(words(stored), bits, len(wanted)).tolist() == wanted
    packed = pack_stream(torch.tensor(wanted, dtype=torch.uint8), bits, torch.int32)
    assert hexadecimal(packed) == stored


def test_dense_3_bit_fields_straddle_words_and_subtract_4() -> None:  # ct-llama-w3a16-dense
    data = as_bytes(words("a6acc715 a895b328 8b6aa9d8"))[None]
    codes = PackedCodes(data, 3, 14, sign="offset_binary").unpack()
    assert codes.tolist() == [[1, -2, 0, -1, 0, -3, -1, 1, 2, 0, -2, 0, -2, 2]]


def test_padded_fields_do_not_cross_words() -> None:  # ct-llama-w6a16-padded
    fields = unpack_fields(words("0b6df6a7 14722699"), 6)
    assert (fields.int() - 32).tolist() == [7, -6, -1, -5, -21, -7, -6, 2, -4, -12]
    assert hexadecimal(pack_fields(fields, 6)) == "0b6df6a7 14722699"


def test_nibbles_have_the_even_column_low() -> None:  # autoround-mxfp4-llama, NVFP4
    data = torch.tensor([[0x81, 0x55, 0xBA, 0xBA]], dtype=torch.uint8)
    assert unpack_stream(data, 4, 8).tolist() == [[1, 8, 5, 5, 10, 11, 10, 11]]


@pytest.mark.parametrize(
    ("bits", "stored"),
    [
        (5, "76543210 fedcba98 76543210 fedcba98 ffff0000"),
        (6, "76543210 fedcba98 76543210 fedcba98 00000000 55555555"),
        (7, "76543210 fedcba98 76543210 fedcba98 00000000 55555555 00000000"),
    ],
)
def test_planes_of_0_to_31_are_those_of_gptqmodel(bits: int, stored: str) -> None:
    codes = torch.arange(32, dtype=torch.uint8)
    assert hexadecimal(pack_planar(codes, bits)) == stored
    assert torch.equal(unpack_planar(words(stored), bits), codes)


def test_3_bit_planes_differ_from_the_3_bit_stream() -> None:
    codes = torch.arange(32, dtype=torch.uint8) % 8
    assert hexadecimal(pack_planar(codes, 3)) == "e4e4e4e4 e4e4e4e4 f0f0f0f0"
    assert hexadecimal(pack_stream(codes, 3, torch.int32)) == "88fac688 c688fac6 fac688fa"


def test_planes_of_a_genuine_file() -> None:  # gptq-p-w5-llama
    stored = words("e6abb96f aa5975de 8b3096e2 fc16d6de d4fda467")
    wanted = "31 22 25 11 11 26 22 14 14 13 21 7 9 21 10 26 18 14 22 25 16 19 27 24 14 13 22 13 22 1 28 31"
    assert unpack_planar(stored, 5).tolist() == numbers(wanted)
    assert unpack_stream(stored, 5, 4).tolist() == [15, 11, 14, 23]  # read as the other layout: wrong


def test_halves_put_code_16_above_code_0() -> None:  # ggml Q4_0
    data = torch.arange(16, dtype=torch.uint8) | 0xF0 - torch.arange(0, 256, 16).to(torch.uint8)
    codes = unpack_halves32(data[None])
    assert codes.tolist() == [[*range(16), *range(15, -1, -1)]]


@st.composite
def packed_shapes(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits = draw(st.integers(1, 8))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 100)))
    seed = draw(st.integers(0, 2**16))
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return codes, bits


@given(packed_shapes(), st.sampled_from(WORD_DTYPES))
@settings(max_examples=150, deadline=None)
def test_streams_and_fields_unpack_what_was_packed(case: tuple[Tensor, int], dtype: torch.dtype) -> None:
    codes, bits = case
    count = codes.shape[-1]
    assert torch.equal(unpack_stream(pack_stream(codes, bits, dtype), bits, count), codes)
    assert torch.equal(unpack_fields(pack_fields(codes, bits, dtype), bits, count), codes)


@given(packed_shapes())
@settings(max_examples=60, deadline=None)
def test_a_stream_is_bit_i_of_the_row(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    row = codes[0, 0].tolist()
    stream = sum(code << (i * bits) for i, code in enumerate(row))  # Python's integers as the oracle
    data = pack_stream(codes[0, 0], bits)
    assert int.from_bytes(bytes(data.tolist()), "little") == stream


@given(st.sampled_from(sorted(PLANES)), st.integers(1, 4), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_planes_and_halves_unpack_what_was_packed(bits: int, runs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, 32 * runs), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_planar(pack_planar(codes, bits), bits), codes)
    if bits in (2, 4, 8):
        assert torch.equal(pack_planar(codes, bits), pack_stream(codes, bits, torch.int32))
    nibbles = codes & 15
    assert torch.equal(unpack_halves32(pack_halves32(nibbles)), nibbles)


@given(packed_shapes(), st.sampled_from(["offset_binary", "twos_complement"]))
@settings(max_examples=80, deadline=None)
def test_signed_codes_come_back_signed(case: tuple[Tensor, int], sign: Sign) -> None:
    stored, bits = case
    half = 2 ** (bits - 1)
    wanted = stored.int() - half if sign == "offset_binary" else (stored.int() + half) % (2 * half) - half
    packed = PackedCodes(pack_stream(stored, bits), bits, stored.shape[-1], sign=sign)
    assert packed.unpack().dtype == torch.int8
    assert torch.equal(packed.unpack().int(), wanted)


def test_packed_codes_are_cut_by_rows_and_experts() -> None:
    codes = torch.randint(0, 64, (4, 6, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = PackedCodes(pack_stream(codes, 6), 6, 40)
    assert packed.shape == (4, 6, 40)
    assert packed.nbytes == 4 * 6 * 30
    assert torch.equal(packed.rows(2, 3).unpack(), codes[:, 2:5])
    assert torch.equal(packed[1].unpack(), codes[1])
    assert torch.equal(packed[1:3].rows(0, 1).unpack(), codes[1:3, :1])
    assert torch.equal(packed.to("cpu").unpack(), codes)


def test_halves_are_unpacked_by_packed_codes() -> None:
    codes = torch.randint(0, 16, (2, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(PackedCodes(pack_halves32(codes), 4, 64, "halves32").unpack(), codes)


def test_words_may_lie_apart_in_memory() -> None:  # GPTQ packs down K: the dialect transposes
    codes = torch.randint(0, 16, (5, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stored = pack_stream(codes, 4, torch.int32).T.contiguous()  # [words, N]
    assert torch.equal(unpack_stream(stored.T, 4, 64), codes)
    one_word = torch.zeros(1, 5, dtype=torch.int32)[:, :1].T
    assert unpack_stream(one_word, 4, 8).tolist() == [[0] * 8]


def test_rows_that_are_too_short_are_refused() -> None:
    data = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(Damaged):
        unpack_stream(data, 4, 7)
    with pytest.raises(Damaged):
        PackedCodes(data, 5, 5)
    with pytest.raises(Damaged):
        PackedCodes(data, 4, 6, "halves32")
    with pytest.raises(Damaged):
        unpack_fields(torch.zeros(2, dtype=torch.int32), 6, 11)
    with pytest.raises(Damaged):
        unpack_planar(torch.zeros(7, dtype=torch.int32), 5)
