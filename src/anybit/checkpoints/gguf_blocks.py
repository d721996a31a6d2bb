"""ggml's blocks taken apart: the bytes of a row of blocks become codes, scales and minima, no value computed.

Every function takes blocks [.., B, bytes of a block] uint8 and gives `Parts` of tensors [.., K], [.., B * s]. Four-bit
types whose order `PackedCodes` knows stay packed. Layouts: ggml-common.h 0c1e57098, docs/formats/gguf.md §3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from anybit.checkpoints.gguf_header import GGML_TYPES
from anybit.numerics.packing import PackedCodes

__all__ = ["DECODERS", "GRID_TYPES", "Parts", "decode_grid", "take_apart"]


@dataclass(frozen=True)
class Parts:
    """codes [.., K]; scales a level each, finest first, [.., blocks]; minimum and its own scales likewise."""

    codes: Tensor | PackedCodes
    scales: tuple[Tensor, ...]
    minimum: Tensor | None = None
    minimum_scales: tuple[Tensor, ...] = ()


def take_apart(kind: str, raw: Tensor) -> Parts:
    """Rows of blocks [.., row_bytes] uint8 of ggml type `kind`, a key of DECODERS."""
    size = GGML_TYPES[kind].nbytes
    return DECODERS[kind](raw.view(*raw.shape[:-1], raw.shape[-1] // size, size))


# fields ---------------------------------------------------------------------------------------------------------------


def _cut(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Bytes [start, stop) of every block, contiguous [.., B, stop - start].

    Whole blocks, start and stop being even allows copying two bytes at a time, and four where all are multiples of 4:
    several times faster than single bytes.
    """
    for dtype, step in ((torch.int32, 4), (torch.int16, 2)):
        aligned = blocks.storage_offset() % step == 0 and blocks.is_contiguous()
        if aligned and not any(n % step for n in (blocks.shape[-1], start, stop)):
            words: Tensor = blocks.view(dtype)[..., start // step : stop // step]
            return words.contiguous().view(torch.uint8)
    return blocks[..., start:stop].contiguous()


def _halves(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of every block [.., B]."""
    return _cut(blocks, start, start + 2).view(torch.float16).squeeze(-1)


def _row(fields: Tensor, inner: int) -> Tensor:
    """[.., B, inner dimensions] as rows [.., K]: the last `inner` dimensions and the blocks become one."""
    return fields.flatten(-1 - inner)


def _split(data: Tensor, outer: int, inner: int, axis: int = -1) -> Tensor:
    """One dimension of `outer * inner` as two."""
    axis %= data.dim()
    return data.reshape(*data.shape[:axis], outer, inner, *data.shape[axis + 1 :])


def _shifted(data: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """[.., L] -> [.., len(shifts), L]: the field at each shift."""
    steps = torch.tensor(shifts, dtype=torch.uint8, device=data.device).unsqueeze(-1)
    return (data.unsqueeze(-2) >> steps) & mask


def _stream_nibbles(blocks: Tensor, run: int) -> Tensor:
    """Nibbles in runs of `run` bytes, all low ones before all high ones, as a plain little-endian stream of nibbles."""
    runs = _split(blocks, blocks.shape[-1] // run, run)
    even, odd = runs[..., 0::2], runs[..., 1::2]
    low = (even & 15) | (odd << 4)
    high = (even >> 4) | (odd & 0xF0)
    return torch.cat((low, high), dim=-1).flatten(-2)


def _packed_halves(data: Tensor, sign: str = "unsigned") -> PackedCodes:
    rows = data.flatten(-2)
    count = rows.shape[-1] * 2
    if sign == "offset_binary":
        return PackedCodes(rows, 4, count, order="halves32", sign="offset_binary")
    return PackedCodes(rows, 4, count, order="halves32")


def _packed_stream(data: Tensor) -> PackedCodes:
    rows = data.flatten(-2)
    return PackedCodes(rows, 4, rows.shape[-1] * 2)


# blocks of 32 ---------------------------------------------------------------------------------------------------------


def _q4_0(b: Tensor) -> Parts:
    return Parts(_packed_halves(_cut(b, 2, 18), "offset_binary"), (_halves(b, 0),))


def _q4_1(b: Tensor) -> Parts:
    both = _cut(b, 0, 4).view(torch.float16)
    return Parts(_packed_halves(_cut(b, 4, 20)), (both[..., 0].contiguous(),), both[..., 1].contiguous())


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    """Codes [.., B, 32] of 4 bytes with the fifth bits and 16 bytes of nibbles."""
    codes = torch.cat((low & 15, low >> 4), dim=-1)
    fifth = (high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=high.device)) & 1
    return codes | (fifth.flatten(-2) << 4)


def _q5_0(b: Tensor) -> Parts:
    codes = _five_bits(b[..., 2:6], b[..., 6:22]).view(torch.int8) - 16
    return Parts(_row(codes, 1), (_halves(b, 0),))


def _q5_1(b: Tensor) -> Parts:
    codes = _five_bits(b[..., 4:8], b[..., 8:24])
    return Parts(_row(codes, 1), (_halves(b, 0),), _halves(b, 2))


def _q8_0(b: Tensor) -> Parts:
    return Parts(_row(_cut(b, 2, 34), 1).view(torch.int8), (_halves(b, 0),))


def _iq4_nl(b: Tensor) -> Parts:
    return Parts(_packed_halves(_cut(b, 2, 18)), (_halves(b, 0),))


def _mxfp4(b: Tensor) -> Parts:
    # half(e) * V = 2^(e-128) * 2 * e2m1 = e8m0(e) * e2m1, exact for every e below 255
    return Parts(_packed_halves(b[..., 1:].contiguous()), (b[..., 0].contiguous(),))


def _nvfp4(b: Tensor) -> Parts:
    # (ue4m3 / 2) * V = ue4m3 * e2m1; bit 7 counts for nothing, and 0x7f is zero where e4m3fn has NaN
    scales = b[..., :4] & 0x7F
    scales = scales.masked_fill(scales == 0x7F, 0)
    return Parts(_packed_stream(_stream_nibbles(b[..., 4:], 8)), (_row(scales, 1),))


# blocks of 256 --------------------------------------------------------------------------------------------------------


def _q2_k(b: Tensor) -> Parts:
    codes = _shifted(_split(b[..., 16:80], 2, 32), (0, 2, 4, 6), 3)
    sub = _cut(b, 0, 16)
    return Parts(
        _row(codes, 3), (_row(sub & 15, 1), _halves(b, 80)), _row(sub >> 4, 1), (_halves(b, 82),)
    )


def _q3_k(b: Tensor) -> Parts:
    low = _shifted(_split(b[..., 32:96], 2, 32), (0, 2, 4, 6), 3)
    # bit 4h + shift/2; set means that nothing is taken off
    high = _split(_shifted(b[..., :32], tuple(range(8)), 1), 2, 4, axis=-2)
    codes = (low | (high << 2)).view(torch.int8) - 4
    packed = b[..., 96:108]
    nibbles = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), dim=-1)
    top = _shifted(packed[..., 8:], (0, 2, 4, 6), 3).flatten(-2)
    sub = (nibbles | (top << 4)).view(torch.int8) - 32
    return Parts(_row(codes, 3), (_row(sub, 1), _halves(b, 108)))


def _six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of six bits in 12 bytes."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=-1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=-1)
    return _row(scales, 1), _row(minima, 1)


def _q4_k(b: Tensor) -> Parts:
    scales, minima = _six_bit_pairs(b[..., 4:16])
    codes = _packed_stream(_stream_nibbles(b[..., 16:144], 32))
    return Parts(codes, (scales, _halves(b, 0)), minima, (_halves(b, 2),))


def _q5_k(b: Tensor) -> Parts:
    scales, minima = _six_bit_pairs(b[..., 4:16])
    low = _shifted(_split(b[..., 48:176], 4, 32), (0, 4), 15)
    fifth = _split(_shifted(b[..., 16:48], tuple(range(8)), 1), 4, 2, axis=-2)
    return Parts(_row(low | (fifth << 4), 3), (scales, _halves(b, 0)), minima, (_halves(b, 2),))


def _q6_k(b: Tensor) -> Parts:
    low = _split(b[..., :128], 2, 64)
    low = _split(torch.cat((low & 15, low >> 4), dim=-1), 4, 32)
    high = _shifted(_split(b[..., 128:192], 2, 32), (0, 2, 4, 6), 3)
    codes = (low | (high << 4)).view(torch.int8) - 32
    return Parts(_row(codes, 3), (_row(_cut(b, 192, 208), 1).view(torch.int8), _halves(b, 208)))


def _iq4_xs(b: Tensor) -> Parts:
    low = _shifted(b[..., 4:8].unsqueeze(-1), (0, 4), 15).flatten(-3)
    high = _shifted(b[..., 2:4].unsqueeze(-1), (0, 2, 4, 6), 3).flatten(-3)
    sub = (low | (high << 4)).view(torch.int8) - 32
    return Parts(_packed_halves(_cut(b, 8, 136)), (_row(sub, 1), _halves(b, 0)))


def _tq1_0(b: Tensor) -> Parts:
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=b.device).unsqueeze(-1)

    def digits(data: Tensor, count: int) -> Tensor:
        wrapped = data.unsqueeze(-2) * powers[:count]  # uint8 wraps, as the format wants
        return ((wrapped.to(torch.int16) * 3) >> 8).to(torch.int8).flatten(-2)

    codes = torch.cat((digits(b[..., :32], 5), digits(b[..., 32:48], 5), digits(b[..., 48:52], 4)), dim=-1) - 1
    return Parts(_row(codes, 1), (_halves(b, 52),))


def _tq2_0(b: Tensor) -> Parts:
    codes = _shifted(_split(b[..., :64], 2, 32), (0, 2, 4, 6), 3)
    return Parts(_row(codes, 3), (_halves(b, 64),))


# other blocks ---------------------------------------------------------------------------------------------------------


def _q1_0(b: Tensor) -> Parts:
    bits = _shifted(b[..., 2:18].unsqueeze(-1), tuple(range(8)), 1).view(torch.int8)
    return Parts(_row(bits * 2 - 1, 3), (_halves(b, 0),))


def _q2_0(b: Tensor) -> Parts:
    return Parts(_row(_shifted(b[..., 2:18].unsqueeze(-1), (0, 2, 4, 6), 3), 3), (_halves(b, 0),))


DECODERS: Final[Mapping[str, Callable[[Tensor], Parts]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4, "NVFP4": _nvfp4,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0, "TQ2_0": _tq2_0, "Q1_0": _q1_0, "Q2_0": _q2_0,
}  # fmt: skip

# Code books of 256 … 2048 vectors: the gguf package has the tables and ggml's arithmetic, bit for bit.
GRID_TYPES: Final = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


def decode_grid(kind: str, raw: Tensor) -> Tensor:
    """Rows [.., row_bytes] of a grid type as float32 values [.., K]."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values = dequantize(raw.numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(values)
