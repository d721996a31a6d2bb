"""The header of one GGUF file, proven: counts, strings, types and dimensions against the bytes that are there.

    magic "GGUF" | version u32 | n_tensors u64 | n_kv u64
    n_kv      x  key: string | type u32 | value
    n_tensors x  name: string | n_dims u32 | dims u64[n_dims], fastest first | ggml type u32 | offset u64
    zeros up to a multiple of the alignment | tensor data

All little-endian; a string is a u64 length and UTF-8. Nothing is sized from a number before that number was held
against the file; products are Python ints. Arrays stay bytes until somebody looks into them, so that a vocabulary does
not slow `inspect`. Source: ggml 0c1e57098, docs/formats/gguf.md §2, §3.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, overload

from anybit.errors import AnybitError, Damaged, LimitExceeded, Unsupported
from anybit.limits import (
    MAX_GGUF_ALIGNMENT,
    MAX_GGUF_ARRAY,
    MAX_GGUF_HEADER,
    MAX_GGUF_KV,
    MAX_GGUF_RANK,
    MAX_GGUF_STRING,
    MAX_NAME_BYTES,
    MAX_TENSORS_PER_FILE,
)

__all__ = ["GGML_TYPES", "GgmlType", "GgufArray", "GgufHeader", "RawTensor", "parse_header"]

FIXED_BYTES: Final = 24  # magic, version, two counts
DEFAULT_ALIGNMENT: Final = 32
_WINDOW: Final = 2**21  # bytes read at once; most headers fit


@dataclass(frozen=True)
class GgmlType:
    """A storage type of ggml: `block` elements take `nbytes` bytes."""

    id: int
    name: str
    block: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` elements, a multiple of the block."""
        return columns // self.block * self.nbytes


# name, id, elements of a block, its bytes; the bytes are the sum of the struct's fields in ggml-common.h, which the
# tests spell out
_TYPES: Final = (
    ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("BF16", 30, 1, 2), ("F64", 28, 1, 8),
    ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8),
    ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34),
    ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("IQ4_NL", 20, 32, 18), ("IQ4_XS", 23, 256, 136), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74),
    ("IQ2_S", 22, 256, 82), ("IQ3_XXS", 18, 256, 98), ("IQ3_S", 21, 256, 110), ("IQ1_S", 19, 256, 50),
    ("IQ1_M", 29, 256, 56),
    ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18), ("Q2_0", 42, 64, 18),
)  # fmt: skip
GGML_TYPES: Final[dict[str, GgmlType]] = {name: GgmlType(id, name, block, size) for name, id, block, size in _TYPES}
_BY_ID: Final = {t.id: t for t in GGML_TYPES.values()}

_REMOVED: Final = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
_RUN_TIME_ONLY: Final = {9: "Q8_1", 15: "Q8_K"}

# GGUF value type -> struct letter
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32: Final = 4
_BOOL: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9
_U64: Final = struct.Struct("<Q")

# first four bytes of relatives: what they are
_OTHER_MAGICS: Final = {
    b"lmgg": "an unversioned ggml file of 2023",
    b"fmgg": "a ggmf file of 2023",
    b"tjgg": "a ggjt file of 2023",
    b"algg": "a ggla adapter file of 2023",
    b"FUGG": "a GGUF file with its magic reversed (big-endian)",
}


@dataclass(frozen=True)
class RawTensor:
    """A tensor as the header lists it; `dims` fastest first, `offset` from the start of the data."""

    name: str
    dims: tuple[int, ...]
    type: GgmlType
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What a header says; scalars of `metadata` are Python values, strings that are no UTF-8 stay bytes."""

    version: int
    metadata: dict[str, Any]
    tensors: tuple[RawTensor, ...]
    alignment: int
    data_start: int


class GgufArray(Sequence[Any]):
    """An array value, decoded at the first look."""

    def __init__(self, raw: bytes, element: int, count: int) -> None:
        self._raw = raw
        self.element = element
        self._count = count
        self._values: list[Any] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self.values[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    @property
    def is_strings(self) -> bool:
        """True for an array of strings."""
        return self.element == _STRING

    @property
    def values(self) -> list[Any]:
        """The elements: int, float, bool, or str (bytes where a string is no UTF-8)."""
        if self._values is None:
            self._values = self._strings() if self.is_strings else self._scalars()
        return self._values

    def _scalars(self) -> list[Any]:
        return list(struct.unpack(f"<{self._count}{_SCALARS[self.element]}", self._raw))

    def _strings(self) -> list[str | bytes]:
        raw, position = self._raw, 0
        strings: list[str | bytes] = []
        for _ in range(self._count):
            begin = position + 8
            position = begin + _U64.unpack_from(raw, position)[0]
            strings.append(_text(raw[begin:position]))
        return strings


class _Cursor:
    """A position in a file whose header is read window by window; every step is held against the file's size."""

    def __init__(self, fd: int, size: int, where: str) -> None:
        self.fd = fd
        self.size = size
        self.where = where
        self.buffer = bytearray()
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes of the file after the position."""
        return self.size - self.position

    def claim(self, nbytes: int, what: str) -> None:
        """Refuse `nbytes` more than the file holds."""
        if nbytes > self.left:
            raise Damaged(
                f"{what} goes past the end of the file",
                where=self.where,
                found=f"{nbytes:,} bytes declared at byte {self.position:,}, {self.left:,} left",
                wanted="a header that lies inside the file",
                remedy="download the file again",
            )

    def fill(self, end: int) -> None:
        """Have the first `end` bytes of the file in the buffer."""
        if end > MAX_GGUF_HEADER:
            raise LimitExceeded("header too large", where=self.where, found=f"more than {end:,} bytes",
                                wanted=f"at most {MAX_GGUF_HEADER:,} (MAX_GGUF_HEADER)")
        while len(self.buffer) < end:
            want = min(max(end, len(self.buffer) + _WINDOW), self.size) - len(self.buffer)
            part = os.pread(self.fd, want, len(self.buffer)) if want > 0 else b""
            if not part:
                raise Damaged("changed while being read", where=self.where, found=f"{len(self.buffer):,} bytes",
                              wanted=f"{self.size:,} bytes")
            self.buffer += part

    def take(self, nbytes: int, what: str) -> bytes:
        """The next `nbytes` bytes."""
        self.claim(nbytes, what)
        end = self.position + nbytes
        self.fill(end)
        raw = bytes(self.buffer[self.position : end])
        self.position = end
        return raw

    def number(self, letter: str, what: str) -> Any:
        """One little-endian scalar by its struct letter."""
        form = struct.Struct("<" + letter)
        return form.unpack(self.take(form.size, what))[0]

    def string(self, what: str) -> bytes:
        """A length and that many bytes."""
        length = self.number("Q", f"the length of {what}")
        self.claim(length, what)
        if length > MAX_GGUF_STRING:
            raise LimitExceeded(f"{what} is too long", where=self.where, found=f"{length:,} bytes",
                                wanted=f"at most {MAX_GGUF_STRING:,} (MAX_GGUF_STRING)")
        return self.take(length, what)

    def skip_strings(self, count: int, what: str) -> bytes:
        """The raw bytes of `count` strings, their lengths walked but nothing decoded."""
        self.claim(8 * count, what)
        begin = position = self.position
        buffer, size, length_at = self.buffer, self.size, _U64.unpack_from
        for _ in range(count):
            if position + 8 > len(buffer):
                self.position = min(position, size)
                self.claim(8, what)
                self.fill(position + 8)
            length = length_at(buffer, position)[0]
            position += 8 + length
            if length > MAX_GGUF_STRING and position <= size:
                raise LimitExceeded(f"a string of {what} is too long", where=self.where, found=f"{length:,} bytes",
                                    wanted=f"at most {MAX_GGUF_STRING:,} (MAX_GGUF_STRING)")
            if position > size:
                self.position = position - length
                self.claim(length, f"a string of {what}")
        self.fill(position)
        self.position = position
        return bytes(buffer[begin:position])


def parse_header(fd: int, size: int, where: str) -> GgufHeader:
    """The header of the open file `fd` of `size` bytes; `where` names it in errors.

    Raises Damaged, Unsupported or LimitExceeded (docs/formats/gguf.md §8). Spans of tensors are not checked here.
    """
    cursor = _Cursor(fd, size, where)
    version, tensor_count, pair_count = _fixed_part(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        _pair(cursor, metadata)
    seen: set[str] = set()
    tensors = tuple(_tensor(cursor, seen) for _ in range(tensor_count))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    return GgufHeader(version, metadata, tensors, alignment, -(-cursor.position // alignment) * alignment)


def _fixed_part(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of pairs."""
    where = cursor.where
    head = os.pread(cursor.fd, 4, 0)
    if head in _OTHER_MAGICS:
        raise Unsupported(f"this is {_OTHER_MAGICS[head]}", where=where, found=repr(head)[1:],
                          wanted="'GGUF', version 2 or 3",
                          remedy="convert the original model with llama.cpp's convert_hf_to_gguf.py")
    if cursor.size < FIXED_BYTES:
        raise Damaged(f"a GGUF file needs {FIXED_BYTES} bytes before its first pair", where=where,
                      found=f"{cursor.size} bytes", wanted=f"at least {FIXED_BYTES}", remedy="download the file again")
    if head != b"GGUF":
        raise Damaged("this is no GGUF file", where=where, found=f"first bytes {head.hex(' ')}",
                      wanted="47 47 55 46 (GGUF)")
    _magic, version, tensor_count, pair_count = struct.unpack("<IIQQ", cursor.take(FIXED_BYTES, "the fixed header"))
    if version and version & 0xFFFF == 0:
        raise Unsupported("this is a big-endian GGUF file", where=where, found=f"version {version:#x}",
                          wanted="little-endian, version 2 or 3",
                          remedy="convert it with gguf-py's gguf_convert_endian.py")
    if version not in (2, 3):
        raise Unsupported(f"GGUF version {version} is not read", where=where, found=f"version {version}",
                          wanted="version 2 or 3", remedy="export the model again with a current llama.cpp")
    _check_count(cursor, pair_count, 8 + 1 + 4 + 1, MAX_GGUF_KV, "pairs", "MAX_GGUF_KV")
    _check_count(cursor, tensor_count, 8 + 1 + 4 + 4 + 8, MAX_TENSORS_PER_FILE, "tensors", "MAX_TENSORS_PER_FILE")
    return version, tensor_count, pair_count


def _check_count(cursor: _Cursor, count: int, smallest: int, limit: int, what: str, constant: str) -> None:
    if count * smallest > cursor.left:
        raise Damaged(f"more {what} declared than the file can hold", where=cursor.where,
                      found=f"{count:,} {what}, {cursor.left:,} bytes left",
                      wanted=f"at most {cursor.left // smallest:,}", remedy="download the file again")
    if count > limit:
        raise LimitExceeded(f"too many {what}", where=cursor.where, found=f"{count:,}",
                            wanted=f"at most {limit:,} ({constant})")


def _name(cursor: _Cursor, what: str) -> str:
    """A key or tensor name: 1 to MAX_NAME_BYTES bytes of UTF-8."""
    length = cursor.number("Q", f"the length of a {what}")
    cursor.claim(length, f"a {what}")
    if not 1 <= length <= MAX_NAME_BYTES:
        raise Damaged(f"a {what} of {length:,} bytes", where=cursor.where, found=f"at byte {cursor.position - 8:,}",
                      wanted=f"1 … {MAX_NAME_BYTES} bytes (MAX_NAME_BYTES)")
    name = _text(cursor.take(length, f"a {what}"))
    if isinstance(name, bytes):
        raise Damaged(f"a {what} is not UTF-8", where=cursor.where, found=repr(name)[1:][:80], wanted="UTF-8")
    return name


def _pair(cursor: _Cursor, metadata: dict[str, Any]) -> None:
    key = _name(cursor, "key")
    if key in metadata:
        raise Damaged(f"key {key} is declared twice", where=cursor.where, wanted="each key once")
    kind = cursor.number("I", f"the type of {key}")
    if key == "general.alignment":
        metadata[key] = _alignment(cursor, kind)
        return
    metadata[key] = _array(cursor, key) if kind == _ARRAY else _value(cursor, kind, key)


def _alignment(cursor: _Cursor, kind: int) -> int:
    wanted = f"a power of two up to 1 MiB, uint32 ({MAX_GGUF_ALIGNMENT:,}, MAX_GGUF_ALIGNMENT)"
    if kind != _UINT32:
        raise Damaged("general.alignment has the wrong type", where=cursor.where, found=f"value type {kind}",
                      wanted=wanted)
    value: int = cursor.number("I", "general.alignment")
    if value == 0 or value & (value - 1) or value > MAX_GGUF_ALIGNMENT:
        raise Damaged("general.alignment is no alignment", where=cursor.where, found=f"{value}", wanted=wanted)
    return value


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return _text(cursor.string(key))
    if kind not in _SCALARS:
        raise _unknown_type(cursor, kind, key)
    if kind == _BOOL:
        return _booleans(cursor, cursor.take(1, key), key)[0] == 1
    return cursor.number(_SCALARS[kind], key)


def _array(cursor: _Cursor, key: str) -> GgufArray:
    element = cursor.number("I", f"the element type of {key}")
    count = cursor.number("Q", f"the length of {key}")
    if element == _ARRAY:
        raise Unsupported(f"{key}: nested arrays are not read", where=cursor.where, wanted="an array of plain values",
                          remedy="export the model again with a current llama.cpp")
    if element != _STRING and element not in _SCALARS:
        raise _unknown_type(cursor, element, key)
    size = 8 if element == _STRING else struct.calcsize("<" + _SCALARS[element])
    cursor.claim(count * size, f"array {key}")
    if count > MAX_GGUF_ARRAY:
        raise LimitExceeded(f"array {key} is too long", where=cursor.where, found=f"{count:,} elements",
                            wanted=f"at most {MAX_GGUF_ARRAY:,} (MAX_GGUF_ARRAY)")
    raw = cursor.skip_strings(count, key) if element == _STRING else cursor.take(count * size, key)
    return GgufArray(_booleans(cursor, raw, key) if element == _BOOL else raw, element, count)


def _booleans(cursor: _Cursor, raw: bytes, key: str) -> bytes:
    if raw.translate(None, b"\0\1"):
        raise Damaged(f"{key}: a boolean is neither 0 nor 1", where=cursor.where, wanted="bytes 0 or 1")
    return raw


def _unknown_type(cursor: _Cursor, kind: int, key: str) -> AnybitError:
    return Damaged(f"{key} has an unknown value type", where=cursor.where, found=f"type {kind}", wanted="0 … 12")


def _tensor(cursor: _Cursor, seen: set[str]) -> RawTensor:
    name = _name(cursor, "tensor name")
    if name in seen:
        raise Damaged(f"tensor {name} is declared twice", where=cursor.where, wanted="each tensor once")
    seen.add(name)
    rank = cursor.number("I", f"the rank of {name}")
    if rank > MAX_GGUF_RANK:
        raise LimitExceeded(f"tensor {name} has too many dimensions", where=cursor.where, found=f"{rank:,}",
                            wanted=f"at most {MAX_GGUF_RANK} (MAX_GGUF_RANK)")
    dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, f"the dimensions of {name}"))
    kind, offset = struct.unpack("<IQ", cursor.take(12, f"type and offset of {name}"))
    ggml_type = _ggml_type(cursor, kind, name)
    columns = dims[0] if dims else 1
    if columns % ggml_type.block:
        raise Damaged(f"tensor {name}: a row is no whole number of blocks", where=cursor.where,
                      found=f"K = {columns}", wanted=f"a multiple of {ggml_type.block} ({ggml_type.name} blocks)")
    return RawTensor(name, dims, ggml_type, offset)


def _ggml_type(cursor: _Cursor, kind: int, tensor: str) -> GgmlType:
    if kind in _BY_ID:
        return _BY_ID[kind]
    remedy = "quantize the original model again with a current llama.cpp"
    if kind in _REMOVED:
        problem = f"tensor {tensor} has a type that no current ggml reads"
        found = f"{_REMOVED[kind]}, removed from ggml (id {kind})"
    elif kind in _RUN_TIME_ONLY:
        problem, found = f"tensor {tensor} has a type of intermediate results", f"{_RUN_TIME_ONLY[kind]} (id {kind})"
    else:
        problem, found, remedy = f"tensor {tensor} has an unknown ggml type", f"id {kind}", "update anybit"
    raise Unsupported(problem, where=cursor.where, found=found, wanted=", ".join(GGML_TYPES), remedy=remedy)


def _text(raw: bytes) -> str | bytes:
    """UTF-8 as str, anything else as it is."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
