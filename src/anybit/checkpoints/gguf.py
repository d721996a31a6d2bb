"""The GGUF container: from one file, any part of a split set or a folder to `Contents`, and from a TensorInfo to bytes.

`gguf_header.py` proves one header; here its tensors are held against the file: spans inside it, aligned, without
overlap or gap. Split sets (`NAME-00001-of-00003.gguf`) are found from any part and read as one checkpoint.
Files are read by pread into buffers of the checked size, never mapped: a mapped file that shrinks kills the process.
Source: ggml 0c1e57098, docs/formats/gguf.md §2, §5.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from anybit.checkpoints.contents import Contents, TensorInfo
from anybit.checkpoints.gguf_config import config_from_metadata
from anybit.checkpoints.gguf_header import GGML_TYPES, GgufHeader, RawTensor, parse_header
from anybit.errors import Damaged, Inconsistent, LimitExceeded, Unsafe, Unsupported
from anybit.limits import MAX_DIM, MAX_ELEMENTS, MAX_SHARDS, MAX_TENSORS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["candidates", "read_contents", "read_tensor", "remarks"]

_PART_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_PIECE: Final = 2**28  # bytes a pread may ask for; Linux gives at most 2 GiB at once

# ggml types whose elements stand alone -> torch dtype
_PLAIN_DTYPES: Final = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """One file: its header, its tensors with proven spans, what `verify` should say about it."""

    path: Path
    header: GgufHeader
    tensors: dict[str, TensorInfo]
    remarks: tuple[str, ...]


def read_contents(path: Path) -> Contents:
    """Headers of the model at `path`: a .gguf file, any part of a split set, or a folder that holds one model.

    `Contents.path` is the first file. Raises AnybitError kinds as docs/formats/gguf.md §8 and `bad_inputs` GG01…GG23
    say; costs what the headers cost, imports no torch.
    """
    parts = [_read_part(file) for file in _files_of(path)]
    if len(parts) > 1 or "split.count" in parts[0].header.metadata:
        _check_split(parts)
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for name, info in part.tensors.items():
            if name in tensors:
                raise Inconsistent(f"tensor {name} stands in two parts", where=part.path.name,
                                   found=f"{tensors[name].file.name} and {part.path.name}", wanted="each tensor once")
            tensors[name] = info
    if len(tensors) > MAX_TENSORS:
        raise LimitExceeded("too many tensors", where=parts[0].path.name, found=f"{len(tensors):,}",
                            wanted=f"at most {MAX_TENSORS:,} (MAX_TENSORS)")
    metadata = parts[0].header.metadata
    said = {"remarks": [remark for part in parts for remark in part.remarks]}
    config, unasked = config_from_metadata(metadata, tensors, parts[0].path.name, _read_floats)
    said["unasked_keys"] = list(unasked)
    return Contents(
        path=parts[0].path,
        config=config,
        tensors=tensors,
        metadata={name: "\n".join(lines) for name, lines in said.items() if lines},
        gguf=metadata,
    )


def remarks(contents: Contents) -> tuple[str, ...]:
    """What is odd but legal about the files, one sentence each."""
    said = contents.metadata.get("remarks", "")
    return tuple(said.splitlines())


def read_tensor(info: TensorInfo) -> Tensor:
    """The bytes of a tensor in a fresh buffer.

    Block types come as uint8 [.., rows, row_bytes], types of single elements in their dtype and shape. Raises Damaged
    if the file ends early or cannot be read any more.
    """
    import torch

    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    _read_into(buffer, info)
    plain = _PLAIN_DTYPES.get(info.dtype)
    if plain is not None:
        dtype: torch.dtype = getattr(torch, plain)
        return buffer.view(dtype).view(info.shape)
    row = GGML_TYPES[info.dtype].row_bytes(info.shape[-1])
    return buffer.view(*info.shape[:-1], row)


def candidates(folder: Path) -> dict[str, Path]:
    """The models of a folder by name, each with its first file; vision towers and importance matrices left out."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.gguf")):
        if file.name.startswith(("mmproj", "imatrix")):
            continue
        part = _PART_NAME.fullmatch(file.name)
        name = f"{part['stem']} ({int(part['count'])} parts)" if part else file.name
        found.setdefault(name, file)
    return found


def _files_of(path: Path) -> list[Path]:
    """All files of the model, first part first; missing parts are named."""
    if path.is_dir():
        models = candidates(path)
        if len(models) != 1:
            problem = "more than one GGUF model in the folder" if models else "no GGUF model in the folder"
            raise Unsupported(problem, where=path.name, found=", ".join(models) or "none", wanted="one model",
                              remedy=f"name one: {path.name}/{next(iter(models.values())).name}" if models else "")
        path = next(iter(models.values()))
    part = _PART_NAME.fullmatch(path.name)
    if part is None:
        return [path]
    count = int(part["count"])
    if not 1 <= int(part["number"]) <= count:
        raise Inconsistent("a part's number lies outside its set", where=path.name, found=part["number"],
                           wanted=f"00001 … {count:05}")
    if count > MAX_SHARDS:
        raise LimitExceeded("too many parts", where=path.name, found=f"{count:,}",
                            wanted=f"at most {MAX_SHARDS:,} (MAX_SHARDS)")
    files = [path.with_name(f"{part['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise Inconsistent("parts of the split model are missing", where=path.name,
                           found=f"{count - len(missing)} of {count} parts, without {missing[0]}",
                           wanted="all parts in one folder", remedy="download the missing parts", more=missing[1:])
    return files


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A regular file, open for pread."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Unsafe("not a regular file", where=path.name, wanted="a .gguf file")
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        yield fd
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(fd)


def _unreadable(path: Path, error: OSError) -> Damaged:
    return Damaged("cannot be read", where=path.name, found=error.strerror or "", wanted="a readable file")


def _read_part(path: Path) -> _Part:
    with _opened(path) as fd:
        size = os.fstat(fd).st_size
        header = parse_header(fd, size, path.name)
        tensors = {raw.name: _tensor_info(raw, header, path) for raw in header.tensors}
        said = _check_layout(tensors, header, size, path, fd)
    return _Part(path, header, tensors, said)


def _tensor_info(raw: RawTensor, header: GgufHeader, path: Path) -> TensorInfo:
    """Shape and bytes of a tensor, with Python ints; a dimension beyond all sense is damage."""
    elements = math.prod(raw.dims)
    if elements > MAX_ELEMENTS or any(d > MAX_DIM for d in raw.dims):
        raise Damaged(f"tensor {raw.name} cannot be that large", where=path.name,
                      found=" x ".join(f"{d:,}" for d in raw.dims),
                      wanted=f"dimensions up to {MAX_DIM:,} (MAX_DIM), {MAX_ELEMENTS:,} elements (MAX_ELEMENTS)")
    if raw.offset % header.alignment:
        raise Damaged(f"tensor {raw.name} is not aligned", where=path.name, found=f"offset {raw.offset:,}",
                      wanted=f"a multiple of {header.alignment}")
    nbytes = elements // raw.type.block * raw.type.nbytes
    shape = tuple(reversed(raw.dims))
    return TensorInfo(raw.name, raw.type.name, shape, path, header.data_start + raw.offset, nbytes)


def _check_layout(
    tensors: dict[str, TensorInfo], header: GgufHeader, size: int, path: Path, fd: int
) -> tuple[str, ...]:
    """Tensors fill the data one after the other, each padded to the alignment, as ggml demands; returns remarks."""
    for info in tensors.values():
        if info.offset + info.nbytes > size:
            raise Damaged(f"tensor {info.name} goes past the end of the file: incomplete download?", where=path.name,
                          found=f"bytes {info.offset:,} … {info.offset + info.nbytes:,} of {size:,}",
                          wanted=f"at most {size:,}", remedy="download the file again")
    position, last = header.data_start, "the header"
    for info in sorted(tensors.values(), key=lambda i: (i.offset, i.nbytes)):
        if info.offset != position:
            what = "overlaps" if info.offset < position else "leaves a gap after"
            raise Damaged(f"tensor {info.name} {what} {last}", where=path.name,
                          found=f"begins at byte {info.offset:,}", wanted=f"byte {position:,}")
        end = info.offset + info.nbytes
        position, last = -(-end // header.alignment) * header.alignment, info.name
    if size <= position:  # the last padding may be missing
        return ()
    if os.pread(fd, 4, position) == b"GGUF":
        raise Damaged("a second GGUF header: give the first part", where=path.name, found=f"at byte {position:,}",
                      wanted="one model a file", remedy="parts are not joined by cat; keep them as they were published")
    return (f"{path.name}: {size - position:,} bytes after the last tensor, ignored",)


def _check_split(parts: list[_Part]) -> None:
    """Keys split.no, split.count and split.tensors.count agree with each other and with the names."""
    total = 0
    for index, part in enumerate(parts):
        where = part.path.name
        count = _split_key(part, "split.count")
        if count > MAX_SHARDS:
            raise LimitExceeded("too many parts", where=where, found=f"split.count {count:,}",
                                wanted=f"at most {MAX_SHARDS:,} (MAX_SHARDS)")
        if count != len(parts):
            raise Inconsistent("the number of parts differs", where=where, found=f"split.count {count}",
                               wanted=f"{len(parts)}, as the file name says",
                               remedy="give the files their published names NAME-00001-of-0000n.gguf")
        number = _split_key(part, "split.no")
        if number != index:
            raise Inconsistent("a part has another part's number", where=where, found=f"split.no {number}",
                               wanted=f"{index}, as the file name says")
        total += len(part.tensors)
    declared = [_split_key(part, "split.tensors.count") for part in parts]
    for part, count in zip(parts, declared, strict=True):
        if count != total:
            raise Inconsistent("the number of tensors differs", where=part.path.name, found=f"{total} in all parts",
                               wanted=f"{count} (split.tensors.count)", remedy="download all parts of one upload again")


def _split_key(part: _Part, key: str) -> int:
    value = part.header.metadata.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Inconsistent(f"{key} is missing", where=part.path.name, found=f"{value!r}"[:80],
                           wanted="an integer in every part of a split model")
    return value


def _read_into(buffer: torch.Tensor, info: TensorInfo) -> None:
    """Fill a uint8 buffer of info.nbytes from the file, without a copy in between."""
    import ctypes

    if info.nbytes == 0:
        return
    view = memoryview((ctypes.c_ubyte * info.nbytes).from_address(buffer.data_ptr())).cast("B")
    done = 0
    with _opened(info.file) as fd:
        while done < info.nbytes:
            got = os.preadv(fd, [view[done : done + _PIECE]], info.offset + done)
            if got == 0:
                raise Damaged(f"tensor {info.name} is cut short: the file changed while being read",
                              where=info.file.name, found=f"{done:,} bytes", wanted=f"{info.nbytes:,} bytes")
            done += got


def _read_floats(info: TensorInfo) -> list[float]:
    """The values of a small F32 tensor without torch (rope factors)."""
    import struct

    with _opened(info.file) as fd:
        raw = os.pread(fd, info.nbytes, info.offset)
    if len(raw) != info.nbytes:
        raise Damaged(f"tensor {info.name} is cut short", where=info.file.name, found=f"{len(raw):,} bytes",
                      wanted=f"{info.nbytes:,} bytes")
    values: tuple[Any, ...] = struct.unpack(f"<{info.elements}f", raw)
    return list(values)
