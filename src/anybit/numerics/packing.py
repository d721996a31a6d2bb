"""Codes that share bytes: the little-endian bit stream and its few relatives.

One rule underlies most files: along the packed dimension code i occupies bits [i*b, (i+1)*b) of one stream whose bit t
is bit t mod 8 of byte t // 8. NVFP4 and MXFP4 nibbles (even column low), MXFP6's 3-byte runs, compressed-tensors' int32
words, GPTQ's words of any width are this stream, words being little-endian. What differs has its own pair of
functions: fields that do not cross words, GPTQ's planes, ggml's halves of 32.
Which order a dialect uses is the dialect's matter. Sources: docs/formats/gptq.md §3, compressed_tensors.md §4, gguf.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from anybit.errors import Damaged

__all__ = [
    "PackedCodes",
    "as_bytes",
    "pack_fields",
    "pack_halves32",
    "pack_planar",
    "pack_stream",
    "unpack_fields",
    "unpack_halves32",
    "unpack_planar",
    "unpack_stream",
]

Order = Literal["stream", "halves32"]
Sign = Literal["unsigned", "offset_binary", "twos_complement"]

# widths of the planes, low plane first (gptqmodel 7.7, docs/formats/gptq.md §3)
PLANES: Final = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True, eq=False)
class PackedCodes:
    """Codes [.., N, K] kept as the file packs them; each row begins at a byte of its own.

    data   [.., N, row_bytes] uint8 (`as_bytes` of wider words); bits after the last code are ignored
    bits   width of a code
    count  K
    order  stream: little-endian bit stream along K; halves32: 4-bit runs of 32 codes, byte j = code j | code 16+j << 4
    sign   unsigned -> uint8; offset_binary (stored = code + 2^(bits-1)) and twos_complement -> int8

    Raises Damaged if a row holds fewer than `count` codes.
    """

    data: Tensor
    bits: int
    count: int
    order: Order = "stream"
    sign: Sign = "unsigned"

    def __post_init__(self) -> None:
        assert self.data.dtype == torch.uint8 and self.data.dim() >= 2
        assert self.order == "stream" or self.bits == 4
        run = 32 if self.order == "halves32" else 1
        _refuse_short(self.data.shape[-1] * 8, -(-self.count // run) * run * self.bits)

    def unpack(self) -> Tensor:
        """All codes, one a byte: [.., N, K] uint8, or int8 for the signed kinds."""
        if self.order == "stream":
            codes = unpack_stream(self.data, self.bits, self.count)
        else:
            codes = unpack_halves32(self.data)[..., : self.count]
        return _signed(codes, self.bits, self.sign)

    def rows(self, start: int, length: int) -> PackedCodes:
        """The rows [start, start + length), a view."""
        return replace(self, data=self.data.narrow(-2, start, length))

    def __getitem__(self, index: int | slice) -> PackedCodes:
        """One expert, or a range of experts, of a stack [E, N, K]; a view."""
        assert self.data.dim() >= 3
        return replace(self, data=self.data[index])

    def to(self, device: torch.device | str) -> PackedCodes:
        """The same codes on `device`."""
        return replace(self, data=self.data.to(device))

    @property
    def shape(self) -> tuple[int, ...]:
        """[.., N, K]."""
        return (*self.data.shape[:-1], self.count)

    @property
    def nbytes(self) -> int:
        """Bytes held, packed."""
        return self.data.nbytes


def as_bytes(words: Tensor) -> Tensor:
    """Words [.., W] of any integer dtype as little-endian bytes [.., W * size] uint8; a view where possible."""
    words = words.contiguous()
    if words.stride(-1) != 1:  # a last dimension of size 1 counts as contiguous whatever its stride
        words = words.clone(memory_format=torch.contiguous_format)
    return words.view(torch.uint8)


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of `bits` bits of the little-endian bit stream along the last dimension.

    words [.., W] of an integer dtype -> [.., count] uint8; fields may cross words, unused high bits are ignored.
    Raises Damaged if the words hold fewer codes.

    >>> unpack_stream(torch.tensor([0x3210]), bits=4, count=4).tolist()
    [0, 1, 2, 3]
    """
    data = as_bytes(words)
    _refuse_short(data.shape[-1] * 8, count * bits)
    if bits == 8:
        return data[..., :count]
    if 8 % bits == 0:
        return _split_bytes(data, bits)[..., :count]
    # 8 codes take `bits` bytes: code i of the run starts in byte i*bits // 8 and ends there or in the next one
    runs = -(-count // 8)
    data = _runs(_fit(data, runs * bits), bits)
    codes = data.new_empty(*data.shape[:-1], 8)
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        field = data[..., first] >> shift
        if shift + bits > 8:
            field = field | (data[..., first + 1] << (8 - shift))
        codes[..., i] = field & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def pack_stream(codes: Tensor, bits: int, word_dtype: torch.dtype = torch.uint8) -> Tensor:
    """Inverse of `unpack_stream`: codes [.., K] uint8 < 2^bits -> words [.., ceil(K * bits / width)], spare bits 0."""
    count = codes.shape[-1]
    runs = -(-count // 8)
    codes = _runs(_fit(codes, runs * 8), 8)
    data = codes.new_zeros(*codes.shape[:-1], bits)
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        data[..., first] |= codes[..., i] << shift
        if shift + bits > 8:
            data[..., first + 1] |= codes[..., i] >> (8 - shift)
    size = word_dtype.itemsize
    words = -(-count * bits // (8 * size))
    data = _fit(data.flatten(-2), words * size)
    # a clone has regular strides; contiguous() keeps odd ones of dimensions of size 1, which a wider view refuses
    return data.clone(memory_format=torch.contiguous_format).view(word_dtype)


def unpack_fields(words: Tensor, bits: int, count: int | None = None) -> Tensor:
    """Codes in words of width w that hold w // bits fields each, lowest first, their high bits unused.

    words [.., W] of an integer dtype -> [.., count] uint8, all fields without `count`.
    Raises Damaged if the words hold fewer codes. Source: docs/formats/compressed_tensors.md §4 (padded).
    """
    fields = words.element_size() * 8 // bits
    available = words.shape[-1] * fields
    count = available if count is None else count
    _refuse_short(available * bits, count * bits)
    shifts = torch.arange(0, fields * bits, bits, dtype=words.dtype, device=words.device)
    # an arithmetic shift drags the sign in from above; the mask cuts it off again
    codes: Tensor = ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., :count]


def pack_fields(codes: Tensor, bits: int, word_dtype: torch.dtype = torch.int32) -> Tensor:
    """Inverse of `unpack_fields`: codes [.., K] uint8 < 2^bits -> [.., ceil(K / fields)] words."""
    width = word_dtype.itemsize * 8
    fields = width // bits
    words = -(-codes.shape[-1] // fields)
    runs = _runs(_fit(codes, words * fields), fields).to(torch.int64)
    shifts = torch.arange(0, fields * bits, bits, device=codes.device)
    words64: Tensor = (runs << shifts).sum(-1)  # fields do not overlap: the sum is their union
    return words64.to(word_dtype)


def unpack_planar(words: Tensor, bits: int) -> Tensor:
    """GPTQ's planes: words [.., K * bits / 32] int32 -> codes [.., K] uint8; K is a multiple of 32.

    Each 32 codes take `bits` words: for each plane of width p, p words with the p-bit pieces of the codes as a stream.
    Raises Damaged for a width that is not whole runs. Source: docs/formats/gptq.md §3.
    """
    if words.shape[-1] % bits:
        found = f"{words.shape[-1]} words"
        raise Damaged("planes end inside a run of 32 codes", found=found, wanted=f"a multiple of {bits}")
    words = _runs(words, bits)
    codes = torch.zeros(*words.shape[:-1], 32, dtype=torch.uint8, device=words.device)
    start = 0
    for width in PLANES[bits]:
        codes |= unpack_stream(words[..., start : start + width], width, 32) << start
        start += width
    return codes.flatten(-2)


def pack_planar(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `unpack_planar`: codes [.., K] uint8 -> [.., K * bits / 32] int32; K is a multiple of 32."""
    runs = _runs(codes, 32)
    planes = []
    start = 0
    for width in PLANES[bits]:
        planes.append(pack_stream(runs >> start & (2**width - 1), width, torch.int32))
        start += width
    return torch.cat(planes, dim=-1).flatten(-2)


def unpack_halves32(data: Tensor) -> Tensor:
    """Codes [.., 32 * R] of ggml's 4-bit order: data [.., 16 * R] uint8; byte j of a run: code j low, 16 + j high."""
    runs = _runs(data, 16)
    return torch.cat((runs & 15, runs >> 4), dim=-1).flatten(-2)


def pack_halves32(codes: Tensor) -> Tensor:
    """Inverse of `unpack_halves32`: codes [.., 32 * R] uint8 -> [.., 16 * R]."""
    runs = _runs(codes, 32)
    return (runs[..., :16] | runs[..., 16:] << 4).flatten(-2)


def _runs(t: Tensor, size: int) -> Tensor:
    """The last dimension, a multiple of `size`, as [.., runs, size]."""
    return t.reshape(*t.shape[:-1], t.shape[-1] // size, size)


def _split_bytes(data: Tensor, bits: int) -> Tensor:
    mask = 2**bits - 1
    return torch.stack([data >> shift & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)


def _signed(codes: Tensor, bits: int, sign: Sign) -> Tensor:
    if sign == "unsigned":
        return codes
    if sign == "offset_binary":
        if bits == 8:
            return (codes ^ 0x80).view(torch.int8)
        shifted: Tensor = codes.view(torch.int8) - 2 ** (bits - 1)
        return shifted
    extended: Tensor = (codes << (8 - bits)).view(torch.int8) >> (8 - bits)  # an arithmetic shift
    return extended


def _fit(data: Tensor, size: int) -> Tensor:
    """The last dimension cut or zero-padded to `size`."""
    have = data.shape[-1]
    return data[..., :size] if have >= size else torch.nn.functional.pad(data, (0, size - have))


def _refuse_short(have_bits: int, want_bits: int) -> None:
    if have_bits < want_bits:
        raise Damaged("packed codes are cut short", found=f"{have_bits} bits a row", wanted=f"{want_bits} bits")
