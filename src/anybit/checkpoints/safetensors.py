"""safetensors: eight bytes of length, a JSON header, the tensors' bytes.

The header is proven before anything is sized from it: length against the file, JSON strictly, names, dtypes, shapes,
spans against dtype x shape and against each other; holes and overlaps are refused. Tensor bytes come by pread into a
buffer of the proven size: no mapping of foreign files (a file that shrinks would kill the process).
Torch is imported when a tensor is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from anybit import limits
from anybit.checkpoints.contents import DTYPES, TensorInfo
from anybit.checkpoints.jsonfile import open_regular, parse_json, refuse_lfs_pointer
from anybit.errors import AnybitError, Damaged, DeviceProblem, LimitExceeded, Unsupported

if TYPE_CHECKING:
    from torch import Tensor

_AGAIN: Final = "download the file again"
# first bytes of what is sometimes found under a .safetensors name
_OTHERS: Final = (
    (b"PK\x03\x04", "a ZIP archive (a PyTorch pickle file?)"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"GGUF", "a GGUF file"),
    (b"<!DO", "an HTML page"),
    (b"<!do", "an HTML page"),
    (b"<htm", "an HTML page"),
)
_PIECE: Final = 1 << 30  # bytes of one read call: the kernel returns at most 2 GiB


Stamp = tuple[int, int, int, int]  # device, inode, size, time of change in ns: another stamp is another file


@dataclass(frozen=True)
class Header:
    """A proven header, and the stamp of the file that it was read from."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    stamp: Stamp


def read_header(path: Path) -> Header:
    """The header of a file. Raises Damaged, LimitExceeded, Unsupported; costs the header's size, nothing more."""
    name = path.name
    descriptor = open_regular(path)
    try:
        stamp = stamp_of(descriptor)
        size = stamp[2]
        raw, start = _header_bytes(descriptor, size, name)
    finally:
        os.close(descriptor)
    end = len(raw.rstrip(b" \t\r\n"))
    if raw[end - 1 : end] == b"\0":  # before decoding 100 MB of them
        raise Damaged("the header ends in NUL bytes", where=name, found=f"byte 0x00 at {8 + end - 1:,}",
                      wanted="a JSON object", remedy=_AGAIN)
    try:
        header = parse_json(raw, name)
    except AnybitError as error:
        error.where = f"{name}: header"
        raise
    metadata = _metadata(header.pop("__metadata__", None), name)
    if len(header) > limits.MAX_TENSORS_PER_FILE:
        raise LimitExceeded(
            "too many tensors", where=name, found=f"{len(header):,}",
            wanted=f"at most {limits.MAX_TENSORS_PER_FILE:,} (MAX_TENSORS_PER_FILE)",
        )
    tensors = {key: _tensor(key, entry, path, start) for key, entry in header.items()}
    _prove_spans(tensors, start, size, name)
    return Header(tensors, metadata, stamp)


def stamp_of(descriptor: int) -> Stamp:
    """The stamp of an open file."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _header_bytes(descriptor: int, size: int, name: str) -> tuple[bytes, int]:
    first = os.pread(descriptor, 512, 0)
    refuse_lfs_pointer(first, name)
    if size < 8:
        raise Damaged("needs 8 bytes for the header's length", where=name, found=f"{size} bytes", remedy=_AGAIN)
    length = int.from_bytes(first[:8], "little")
    if length == 0:
        raise Damaged("header is empty", where=name, found="length 0", wanted="a JSON object")
    if length > min(size - 8, limits.MAX_SAFETENSORS_HEADER):
        _refuse_other_file(first, name)  # only now: the length of a sound header may begin like a pickle
    if 8 + length > size:
        raise Damaged(
            "header runs past the end of the file", where=name, found=f"length {length:,} in a file of {size:,} bytes",
            wanted=f"at most {size - 8:,}", remedy=_AGAIN,
        )
    if length > limits.MAX_SAFETENSORS_HEADER:
        raise LimitExceeded(
            "header is too large", where=name, found=f"{length:,} bytes",
            wanted=f"at most {limits.MAX_SAFETENSORS_HEADER:,} (MAX_SAFETENSORS_HEADER)",
        )
    raw = os.pread(descriptor, length, 8)
    if len(raw) != length:
        raise Damaged("changed while being read", where=name, found=f"{len(raw):,} bytes", wanted=f"{length:,}")
    return raw, 8 + length


def _refuse_other_file(first: bytes, name: str) -> None:
    """Raise Damaged with what the file is, if its first bytes tell."""
    what = next((what for magic, what in _OTHERS if first.startswith(magic)), "")
    if not what and all(32 <= byte < 127 or byte in b"\r\n\t" for byte in first):
        what = "a text file"
    if what:
        raise Damaged(f"this is {what}", where=name, found=repr(first[:8]), wanted="a safetensors file",
                      remedy="give the file its true ending, or " + _AGAIN)


def _metadata(found: Any, name: str) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise Damaged("__metadata__ is not a map of strings", where=name, found=repr(found)[:80],
                      wanted="an object whose values are strings", remedy=_AGAIN)
    if len(found) > limits.MAX_METADATA_ENTRIES or any(len(v) > limits.MAX_METADATA_VALUE for v in found.values()):
        raise LimitExceeded("__metadata__ is too large", where=name, wanted="MAX_METADATA_ENTRIES, MAX_METADATA_VALUE")
    return found


def _tensor(key: str, entry: Any, path: Path, start: int) -> TensorInfo:
    try:
        name_bytes = len(key) if key.isascii() else len(key.encode("utf-8"))
    except UnicodeEncodeError:
        raise Damaged("a tensor's name is not valid text", where=path.name, found=ascii(key[:80])) from None
    if not key or name_bytes > limits.MAX_NAME_BYTES:
        problem = LimitExceeded if key else Damaged
        raise problem("a tensor's name is empty or too long", where=path.name, found=f"{name_bytes} bytes",
                      wanted=f"1 … {limits.MAX_NAME_BYTES} (MAX_NAME_BYTES)")
    if (sound := _sound_entry(entry)) is not None:  # what nearly all are: large models have 400,000 of them
        kind, sizes, begin, nbytes = sound
        return TensorInfo(key, kind, sizes, path, start + begin, nbytes)
    where = f"{path.name}: {key[:200]}"
    if not isinstance(entry, dict):
        raise Damaged("a tensor's entry is not an object", where=where, found=type(entry).__name__)
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Damaged("unknown dtype", where=where, found=repr(dtype)[:80], wanted=", ".join(DTYPES))
    shape = _integers(entry.get("shape"), "shape", where)
    offsets = _integers(entry.get("data_offsets"), "data_offsets", where)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Damaged("data_offsets is not [begin, end]", where=where, found=str(offsets[:4]))
    if len(shape) > limits.MAX_RANK:  # before the product: its cost grows with the square of the rank
        raise LimitExceeded("rank is too large", where=where, found=str(len(shape)),
                            wanted=f"at most {limits.MAX_RANK} (MAX_RANK)")
    bits = math.prod(shape) * DTYPES[dtype][0]
    if bits % 8:
        raise Damaged("elements do not fill whole bytes", where=where, found=f"{dtype} {list(shape)}")
    if offsets[1] - offsets[0] != bits // 8:
        raise Damaged(
            "span differs from dtype and shape", where=where, found=f"{offsets[1] - offsets[0]:,} bytes",
            wanted=f"{bits // 8:,} for {dtype} {list(shape)}",
        )
    _limit_shape(shape, where)
    return TensorInfo(key, dtype, tuple(shape), path, start + offsets[0], bits // 8)


def _sound_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int] | None:
    """dtype, shape, begin and bytes of an entry that fulfils every condition of `_tensor`; None for any other."""
    if type(entry) is not dict:
        return None
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if type(dtype) is not str or dtype not in DTYPES or type(shape) is not list or type(offsets) is not list:
        return None
    if len(offsets) != 2 or len(shape) > limits.MAX_RANK or not {*map(type, shape), *map(type, offsets)} <= {int}:
        return None
    begin, end = offsets
    elements, bits = math.prod(shape), DTYPES[dtype][0]
    if not 0 <= begin <= end < 2**64 or (end - begin) * 8 != elements * bits:
        return None
    if shape and (min(shape) < 0 or max(shape) > limits.MAX_DIM or elements > limits.MAX_ELEMENTS):
        return None
    return dtype, tuple(shape), begin, end - begin


def _integers(found: Any, field: str, where: str) -> list[int]:
    if not isinstance(found, list) or any(type(v) is not int or v < 0 or v >= 2**64 for v in found):
        raise Damaged(f"{field} is not a list of non-negative integers", where=where, found=repr(found)[:80],
                      wanted="integers below 2^64", remedy=_AGAIN)
    return found


def _limit_shape(shape: list[int], where: str) -> None:
    if any(dim > limits.MAX_DIM for dim in shape):
        raise LimitExceeded("a dimension is too large", where=where, found=str(shape),
                            wanted=f"at most {limits.MAX_DIM:,} (MAX_DIM)")
    if math.prod(shape) > limits.MAX_ELEMENTS:
        raise LimitExceeded("too many elements", where=where, found=str(shape),
                            wanted=f"at most {limits.MAX_ELEMENTS:,} (MAX_ELEMENTS)")


def _prove_spans(tensors: dict[str, TensorInfo], start: int, size: int, name: str) -> None:
    """Spans in order of offset must touch: neither overlap nor hole, and end with the file."""
    at = start
    before = ""
    end = max((info.offset + info.nbytes for info in tensors.values()), default=start)
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset + info.nbytes > size:
            raise Damaged(
                "cut short", where=f"{name}: {info.name}", found=f"{size:,} bytes",
                wanted=f"{end:,}: {end - size:,} bytes missing: incomplete download?", remedy=_AGAIN,
            )
        if info.offset < at:
            raise Damaged("two tensors overlap", where=name, found=f"{before} and {info.name}", remedy=_AGAIN)
        if info.offset > at:
            raise Damaged(f"bytes {at:,}–{info.offset:,} belong to no tensor", where=name, remedy=_AGAIN)
        at, before = info.offset + info.nbytes, info.name
    if at != size:
        raise Damaged(f"bytes {at:,}–{size:,} belong to no tensor", where=name, remedy=_AGAIN)


def read_tensor(info: TensorInfo, stamp: Stamp | None = None) -> Tensor:
    """One tensor, read into a buffer of its own. dtypes that torch lacks come as uint8 bytes: flat where below 8 bits.

    `stamp` is that of the header; a file with another one is refused. Raises Damaged if the file has changed,
    Unsupported for dtypes that no layer uses, DeviceProblem if memory does not suffice.
    """
    import torch

    if info.dtype == "C64":
        raise Unsupported("complex tensors are not read", where=f"{info.file.name}: {info.name}", found=info.dtype,
                          wanted="a real dtype")
    bits, dtype = DTYPES[info.dtype]
    raw = read_bytes(info, stamp)
    if bits < 8:
        return raw
    return raw.view(getattr(torch, dtype)).reshape(info.shape)


def read_bytes(info: TensorInfo, stamp: Stamp | None = None) -> Tensor:
    """The tensor's bytes as a uint8 tensor [nbytes]."""
    import torch

    where = f"{info.file.name}: {info.name}"
    descriptor = open_regular(info.file)
    try:
        if stamp is not None and stamp_of(descriptor) != stamp:
            raise _changed(where, "another size, time or file", "the file whose header was read")
        try:
            raw = torch.empty(info.nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise DeviceProblem("not enough memory to read a tensor", where=where, found="refused by the system",
                                wanted=f"{info.nbytes:,} bytes", remedy="close other programs") from error
        view = raw.numpy().data
        done = 0
        while done < info.nbytes:
            count = os.preadv(descriptor, [view[done : done + _PIECE]], info.offset + done)
            if count <= 0:
                raise _changed(where, f"{done:,} bytes", f"{info.nbytes:,}")
            done += count
    except OSError as error:
        raise Damaged("cannot be read", where=where, found=error.strerror or str(error), remedy=_AGAIN) from error
    finally:
        os.close(descriptor)
    return raw


def _changed(where: str, found: str, wanted: str) -> Damaged:
    return Damaged("changed while being read", where=where, found=found, wanted=wanted,
                   remedy="open the checkpoint again when nothing writes to it")


class Reader:
    """Reads tensors of files whose headers were proven before, and refuses a file that has changed since."""

    def __init__(self, stamps: Mapping[Path, Stamp]) -> None:
        """`stamps` are those of the headers, by file."""
        self._stamps = dict(stamps)

    def __call__(self, info: TensorInfo, /) -> Tensor:
        """The tensor, as `read_tensor`."""
        return read_tensor(info, self._stamps.get(info.file))
