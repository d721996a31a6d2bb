"""HQQ's `qmodel.pt`: a torch zip whose pickle is read by an opcode reader of our own; nothing is unpickled.

The pickle of a genuine file is a dictionary {module: {key: value}} of tensors, numbers, text, sizes and dtypes; its
opcodes are run by `pickle_opcodes.py` over inert records. Members must be stored, not deflated, at their declared size;
a tensor must lie inside its storage, a storage must fill its member. Tensor bytes come by pread.
Layouts of the content: docs/formats/hqq.md §1. Torch is imported when a tensor is read.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from anybit import limits
from anybit.checkpoints.contents import DTYPES, JSON, Contents, TensorInfo
from anybit.checkpoints.folder import read_config, safe_file
from anybit.checkpoints.jsonfile import open_regular, refuse_lfs_pointer
from anybit.checkpoints.pickle_opcodes import DtypeName, Machine, StoredTensor, is_count
from anybit.checkpoints.safetensors import Stamp, read_bytes, stamp_of
from anybit.errors import Damaged, Inconsistent, LimitExceeded, Unsupported

if TYPE_CHECKING:
    from torch import Tensor

QMODEL: Final = "qmodel.pt"
_AGAIN: Final = "download the file again"


# --- the zip ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Member:
    """Where the bytes of a member lie, and their checksum."""

    offset: int
    size: int
    crc: int


def _members(descriptor: int, size: int, name: str) -> dict[str, _Member]:
    """Members by their path below the archive's one folder; every one stored plainly and inside the file."""
    try:
        with zipfile.ZipFile(os.fdopen(os.dup(descriptor), "rb")) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError, EOFError, OSError,
            IndexError) as error:
        raise Damaged("not a sound ZIP archive", where=name, found=str(error)[:80], wanted="a file of torch.save",
                      remedy=_AGAIN) from None
    if len(entries) > limits.MAX_TENSORS_PER_FILE:
        raise LimitExceeded("too many members", where=name, found=f"{len(entries):,}",
                            wanted=f"at most {limits.MAX_TENSORS_PER_FILE:,} (MAX_TENSORS_PER_FILE)")
    found: dict[str, _Member] = {}
    spans = []
    for entry in entries:
        top, _, path = entry.filename.partition("/")
        parts = entry.filename.split("/")
        if not path or any(part in ("", ".", "..") for part in parts) or not entry.filename.isprintable() \
                or "\\" in entry.filename or not entries[0].filename.startswith(f"{top}/") or path in found:
            raise Damaged("a member of a name that torch does not write", where=name,
                          found=repr(entry.filename)[:120], wanted="FOLDER/data/0, each once", remedy=_AGAIN)
        member = _member(descriptor, entry, size, name)
        spans.append((member.offset, member.offset + member.size, path))
        found[path] = member
    spans.sort()
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise Damaged("two members overlap", where=name, found=f"{first} and {second}", remedy=_AGAIN)
    return found


def _member(descriptor: int, entry: zipfile.ZipInfo, size: int, name: str) -> _Member:
    where = f"{name}: {entry.filename}"
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise Damaged("a member that is not stored plainly", where=where,
                      found=f"method {entry.compress_type}, {entry.compress_size:,} for {entry.file_size:,} bytes",
                      wanted="stored, at its own size", remedy=_AGAIN)
    head = os.pread(descriptor, 30, entry.header_offset) if 0 <= entry.header_offset < size else b""
    if len(head) != 30 or head[:4] != b"PK\x03\x04":
        raise Damaged("a member without its header", where=where, found=f"offset {entry.header_offset:,}",
                      remedy=_AGAIN)
    offset = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
    if offset + entry.file_size > size:
        raise Damaged("a member runs past the end of the file", where=where, found=f"{size:,} bytes",
                      wanted=f"{offset + entry.file_size:,} at least", remedy=_AGAIN)
    return _Member(offset, entry.file_size, entry.CRC)


# --- the folder ------------------------------------------------------------------------------------------------------

def is_native(folder: Path) -> bool:
    """True for a folder of HQQ's own: qmodel.pt and no safetensors."""
    return os.path.lexists(folder / QMODEL) and not any(folder.glob("*.safetensors"))


def read_folder(folder: Path) -> tuple[Contents, Reader]:
    """What a folder with qmodel.pt holds, and the reader of its tensors.

    Tensors are called MODULE.KEY, and MODULE.meta.KEY where HQQ 0.1 nests them; everything else of a module lies under
    its name in `side["qmodel.pt"]`, sizes as lists and dtypes as text. Raises Unsafe, Damaged, LimitExceeded.
    """
    path = safe_file(folder, QMODEL)
    config = read_config(folder)
    descriptor = open_regular(path)
    try:
        stamp = stamp_of(descriptor)
        refuse_lfs_pointer(os.pread(descriptor, 512, 0), QMODEL)
        members = _members(descriptor, stamp[2], QMODEL)
        raw = _pickle(descriptor, members)
    finally:
        os.close(descriptor)
    walk = _Walk(path, members)
    root = Machine(raw, f"{QMODEL}: data.pkl").run()
    if type(root) is not dict or not all(type(module) is dict for module in root.values()):
        raise Inconsistent("not a file of HQQ", where=QMODEL, found=type(root).__name__,
                           wanted="a dictionary of modules", remedy="use the model's safetensors release")
    modules: JSON = {name: walk.values(name, module) for name, module in root.items()}
    contents = Contents(folder, config, walk.tensors, {QMODEL: modules})
    return contents, Reader({path: stamp}, walk.strides)


def _pickle(descriptor: int, members: Mapping[str, _Member]) -> bytes:
    member = members.get("data.pkl")
    if member is None:
        raise Damaged("no data.pkl", where=QMODEL, found=", ".join(list(members)[:4]), wanted="a file of torch.save",
                      remedy=_AGAIN)
    if member.size > limits.MAX_PICKLE:
        raise LimitExceeded("the pickle is too large", where=QMODEL, found=f"{member.size:,} bytes",
                            wanted=f"at most {limits.MAX_PICKLE:,} (MAX_PICKLE)")
    order = members.get("byteorder")
    if order is not None and os.pread(descriptor, 16, order.offset)[: order.size] != b"little":
        raise Unsupported("numbers of another byte order", where=QMODEL, found="byteorder is not little",
                          wanted="little", remedy="save the model on a little-endian machine")
    raw = os.pread(descriptor, member.size, member.offset)
    if len(raw) != member.size or zlib.crc32(raw) != member.crc:
        raise Damaged("the pickle's checksum differs", where=QMODEL, found=f"{zlib.crc32(raw):08x}",
                      wanted=f"{member.crc:08x}", remedy=_AGAIN)
    return raw


class _Walk:
    """Sorts what the pickle made into tensors and plain values."""

    def __init__(self, path: Path, members: Mapping[str, _Member]) -> None:
        self.path, self.members = path, members
        self.tensors: dict[str, TensorInfo] = {}
        self.strides: dict[str, tuple[int, ...]] = {}
        self.visited = 0

    def values(self, name: str, holder: dict[str, Any], depth: int = 1) -> JSON:
        """The values of a dictionary that are no tensors; its tensors go into `tensors`."""
        found: JSON = {}
        for key, value in holder.items():
            self.visited += 1  # shared dictionaries count each time: a small pickle may stand for a huge tree
            if depth > limits.MAX_PICKLE_DEPTH or self.visited > limits.MAX_TENSORS_PER_FILE:
                raise LimitExceeded("too many values, or too deep", where=f"{QMODEL}: {name[:200]}",
                                    found=f"{self.visited:,} values, {depth} levels",
                                    wanted=f"at most {limits.MAX_TENSORS_PER_FILE:,} (MAX_TENSORS_PER_FILE), "
                                           f"{limits.MAX_PICKLE_DEPTH} levels")
            if isinstance(value, StoredTensor):
                self.add(f"{name}.{key}", value)
            elif type(value) is dict:
                found[key] = self.values(f"{name}.{key}", value, depth + 1)
            elif type(value) is tuple and all(map(is_count, value)):
                found[key] = list(value)
            elif isinstance(value, DtypeName):
                found[key] = value.name
            elif value is None or type(value) in (bool, int, float, str):
                found[key] = value
            else:
                raise Unsupported("a value that HQQ does not write", where=f"{QMODEL}: {name[:160]}.{key[:40]}",
                                  found=type(value).__name__, wanted="a tensor, number, text, size or dtype")
        return found

    def add(self, name: str, tensor: StoredTensor) -> None:
        """A tensor, its storage checked against its member."""
        where = f"{QMODEL}: {name[:200]}"
        storage = tensor.storage
        member = self.members.get(f"data/{storage.key}")
        size = DTYPES[storage.dtype][0] // 8
        if member is None or member.size != storage.count * size:
            raise Damaged("a storage does not fill its member", where=where,
                          found="no member" if member is None else f"{member.size:,} bytes",
                          wanted=f"{storage.count * size:,} in data/{storage.key}", remedy=_AGAIN)
        if not name or len(name.encode("utf-8", "surrogatepass")) > limits.MAX_NAME_BYTES or name in self.tensors:
            raise Damaged("a tensor's name is empty, too long, or used twice", where=where,
                          wanted=f"at most {limits.MAX_NAME_BYTES} bytes (MAX_NAME_BYTES)", remedy=_AGAIN)
        self.tensors[name] = TensorInfo(name, storage.dtype, tensor.shape, self.path,
                                        member.offset + tensor.offset * size, math.prod(tensor.shape) * size)
        if tensor.strides != _contiguous(tensor.shape):
            self.strides[name] = tensor.strides


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class Reader:
    """Reads tensors of qmodel.pt, refusing a file that has changed since its pickle was read."""

    def __init__(self, stamps: Mapping[Path, Stamp], strides: Mapping[str, tuple[int, ...]]) -> None:
        """`strides` of those tensors that do not lie row by row, by name."""
        self._stamps, self._strides = dict(stamps), dict(strides)

    def __call__(self, info: TensorInfo, /) -> Tensor:
        """The tensor, in a buffer of its own."""
        import torch

        dtype = getattr(torch, DTYPES[info.dtype][1])
        strides = self._strides.get(info.name)
        if strides is None or info.elements == 0:
            return read_bytes(info, self._stamps.get(info.file)).view(dtype).reshape(info.shape)
        last = sum((size - 1) * step for size, step in zip(info.shape, strides, strict=True))
        span = replace(info, nbytes=(last + 1) * (DTYPES[info.dtype][0] // 8))  # inside the storage: proven when opened
        flat = read_bytes(span, self._stamps.get(info.file)).view(dtype)
        return flat.as_strided(info.shape, strides).contiguous()
