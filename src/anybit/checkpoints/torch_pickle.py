"""HQQ's `qmodel.pt`: a torch zip whose pickle is read by an opcode reader of our own; nothing is unpickled.

The pickle of a genuine file is a dictionary {module: {key: value}} of tensors, numbers, text, sizes and dtypes, in
two dozen opcodes. This reader knows those opcodes and these names, each mapped to an inert record; every other opcode
or name is refused as unsafe before anything is made of it. Members must be stored, not deflated, at their declared
size; a tensor must lie inside its storage, a storage must fill its member. Tensor bytes come by pread.
Layouts of the content: docs/formats/hqq.md §1. Torch is imported when a tensor is read.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from anybit import limits
from anybit.checkpoints.contents import DTYPES, JSON, Contents, TensorInfo
from anybit.checkpoints.folder import read_config, safe_file
from anybit.checkpoints.jsonfile import open_regular, refuse_lfs_pointer
from anybit.checkpoints.safetensors import Stamp, read_bytes, stamp_of
from anybit.errors import Damaged, Inconsistent, LimitExceeded, Unsafe, Unsupported

if TYPE_CHECKING:
    from torch import Tensor

QMODEL: Final = "qmodel.pt"
MAX_PICKLE: Final = 64 * 2**20  # bytes; a module takes about 1 KB, so 60,000 modules
MAX_MARKS: Final = 1_000  # open at once; genuine files nest 4 deep
MAX_DEPTH: Final = 4  # module, key, meta, key of a nested meta
_AGAIN: Final = "download the file again"
_RUN: Final = "do not load this file with any other tool; report it where you got it"

# storages that HQQ writes -> dtype of TensorInfo
STORAGES: Final[Mapping[str, str]] = {
    "ByteStorage": "U8", "IntStorage": "I32", "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
}
DTYPE_NAMES: Final = ("uint8", "int32", "float16", "bfloat16", "float32")


@dataclass(frozen=True)
class _Callable:
    """A name that a genuine pickle calls; `make` turns its arguments into an inert value."""

    name: str
    make: Callable[[tuple[Any, ...], str], Any]


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class _DtypeName:
    name: str


@dataclass(frozen=True)
class _Storage:
    """A persistent id: the member data/KEY with `count` elements."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# --- names: what each call makes ---------------------------------------------------------------------------------------

def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _sizes(value: Any, what: str, where: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > limits.MAX_RANK or not all(map(_is_count, value)):
        raise Damaged(f"{what} of a tensor has no sound value", where=where, found=type(value).__name__,
                      wanted=f"at most {limits.MAX_RANK} non-negative integers", remedy=_AGAIN)
    return value


def _rebuild_tensor(arguments: tuple[Any, ...], where: str) -> _Tensor:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
    if len(arguments) != 6 or not isinstance(arguments[0], _Storage) or not _is_count(arguments[1]) \
            or type(arguments[4]) is not bool or arguments[5] != {}:
        raise Damaged("a tensor is not made as torch makes it", where=where, found=f"{len(arguments)} arguments",
                      wanted="storage, offset, shape, strides, flag, no hooks", remedy=_AGAIN)
    storage, offset = arguments[:2]
    shape, strides = _sizes(arguments[2], "the shape", where), _sizes(arguments[3], "the stride", where)
    if len(shape) != len(strides):
        raise Damaged("shape and strides of a tensor differ in length", where=where, found=f"{shape} · {strides}",
                      wanted="one stride a dimension", remedy=_AGAIN)
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.count:
        raise Damaged("a tensor reaches past its storage", where=f"{where}: data/{storage.key}",
                      found=f"element {last:,}", wanted=f"below {storage.count:,}", remedy=_AGAIN)
    if math.prod(shape) > max(storage.count, 1):  # stride 0: a few bytes that claim to be a large tensor
        raise Damaged("a tensor is larger than its storage", where=f"{where}: data/{storage.key}",
                      found=f"{math.prod(shape):,} elements", wanted=f"at most {storage.count:,}", remedy=_AGAIN)
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(arguments: tuple[Any, ...], where: str) -> _Tensor:
    """torch._utils._rebuild_parameter(tensor, requires_grad, hooks): the tensor."""
    if len(arguments) != 3 or not isinstance(arguments[0], _Tensor) or arguments[2] != {}:
        raise Damaged("a parameter is not made as torch makes it", where=where, found=f"{len(arguments)} arguments",
                      wanted="tensor, flag, no hooks", remedy=_AGAIN)
    return arguments[0]


def _size(arguments: tuple[Any, ...], where: str) -> tuple[int, ...]:
    """torch.Size(numbers): the numbers."""
    return _sizes(arguments[0] if len(arguments) == 1 else None, "the size", where)


def _ordered_dict(arguments: tuple[Any, ...], where: str) -> dict[str, Any]:
    """collections.OrderedDict(): an empty dictionary, torch's "no hooks"."""
    if arguments:
        raise Damaged("an OrderedDict that is not empty", where=where, found=f"{len(arguments)} arguments",
                      wanted="none", remedy=_AGAIN)
    return {}


NAMES: Final[Mapping[tuple[str, str], object]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Callable("_rebuild_tensor_v2", _rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Callable("_rebuild_parameter", _rebuild_parameter),
    ("collections", "OrderedDict"): _Callable("OrderedDict", _ordered_dict),
    ("torch", "Size"): _Callable("Size", _size),
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): _DtypeName(f"torch.{name}") for name in DTYPE_NAMES},
}


# --- opcodes -----------------------------------------------------------------------------------------------------------

class _Mark:
    """Where a tuple or a run of items begins."""


_MARK: Final = _Mark()
# opcode -> bytes of its argument: little-endian numbers, memo indices
_NUMBERS: Final = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_MEMO: Final = {b"q": ("put", "<B"), b"r": ("put", "<I"), b"h": ("get", "<B"), b"j": ("get", "<I")}
_CONSTANTS: Final = {b"N": None, b"\x88": True, b"\x89": False}
_SHORT_TUPLES: Final = {b"\x85": 1, b"\x86": 2, b"\x87": 3}


class _Machine:
    """Runs the opcodes of one pickle over inert values."""

    def __init__(self, raw: bytes, where: str) -> None:
        self.raw, self.where, self.at = raw, where, 0
        self.stack: list[Any] = []
        self.marks = 0
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the pickle makes. Raises Unsafe for an opcode or name that genuine files do not have, Damaged."""
        if self.raw[:1] != b"\x80" or self.raw[1:2] not in (b"\x02", b"\x03", b"\x04"):
            raise Damaged("not a pickle of protocol 2", where=self.where, found=repr(self.raw[:2]), remedy=_AGAIN)
        self.at = 2
        while (opcode := self.take(1)) != b".":
            self.step(opcode)
        if len(self.stack) != 1 or self.at != len(self.raw):
            raise Damaged("the pickle does not end as it should", where=self.where,
                          found=f"{len(self.stack)} values, {len(self.raw) - self.at} bytes left",
                          wanted="one value, nothing left", remedy=_AGAIN)
        return self.stack[0]

    def step(self, opcode: bytes) -> None:
        """One opcode."""
        if opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _NUMBERS:
            self.stack.append(self.number(_NUMBERS[opcode]))
        elif opcode in _MEMO:
            self.remember(*_MEMO[opcode])
        elif opcode in _SHORT_TUPLES:
            self.stack.append(tuple(self.pop(_SHORT_TUPLES[opcode])))
        elif opcode in _STEPS:
            _STEPS[opcode](self)
        else:
            raise Unsafe("a pickle with an opcode that genuine files do not have", where=self.where,
                         found=f"{opcode!r} at byte {self.at - 1}", wanted="dictionaries of tensors, numbers and text",
                         remedy=_RUN)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        found = self.raw[self.at : self.at + count]
        if len(found) != count:
            raise Damaged("the pickle is cut short", where=self.where, found=f"{len(self.raw):,} bytes",
                          wanted=f"{self.at + count:,} at least", remedy=_AGAIN)
        self.at += count
        return found

    def number(self, form: str) -> Any:
        """The next number, as `struct` calls it."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def pop(self, count: int) -> list[Any]:
        """The last `count` values, none of them a mark."""
        found = self.stack[-count:] if count else []
        if len(found) != count or any(value is _MARK for value in found):
            raise Damaged("the pickle's stack is too short", where=self.where, found=f"{len(self.stack)} values",
                          wanted=f"{count} at byte {self.at - 1}", remedy=_AGAIN)
        del self.stack[len(self.stack) - count :]
        return found

    def pop_to_mark(self) -> list[Any]:
        """All values above the last mark, which goes too."""
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise Damaged("the pickle has no mark here", where=self.where, found=f"byte {self.at - 1}", remedy=_AGAIN)
        found = self.stack[at + 1 :]
        del self.stack[at:]
        self.marks -= 1
        return found

    def remember(self, action: str, form: str) -> None:
        """Put the last value into the memo, or get one out."""
        index = self.number(form)
        if action == "put":
            (self.memo[index],) = kept = self.pop(1)
            self.stack += kept
        elif index in self.memo:
            self.stack.append(self.memo[index])
        else:
            raise Damaged("the pickle uses a value that it has not made", where=self.where, found=f"memo {index}",
                          remedy=_AGAIN)

    def mark(self) -> None:
        """Open a mark."""
        self.marks += 1
        if self.marks > MAX_MARKS:
            raise Damaged("the pickle nests too deep", where=self.where, found=f"{self.marks:,} open marks",
                          wanted=f"at most {MAX_MARKS:,} (MAX_MARKS)", remedy=_AGAIN)
        self.stack.append(_MARK)

    def text(self) -> None:
        """UTF-8 text with its length before it."""
        raw = self.take(self.number("<I"))
        try:
            self.stack.append(raw.decode())
        except UnicodeDecodeError:
            raise Damaged("text of the pickle is not UTF-8", where=self.where, found=f"before byte {self.at}",
                          remedy=_AGAIN) from None

    def long(self) -> None:
        """A two's complement integer with its length before it."""
        self.stack.append(int.from_bytes(self.take(min(self.number("<B"), 9)), "little", signed=True))

    def name(self) -> None:
        """One of `NAMES`; any other would be code."""
        end = self.raw.find(b"\n", self.raw.find(b"\n", self.at) + 1)
        words = self.take(max(end + 1 - self.at, 1)).decode("utf-8", "replace").split("\n")
        found = NAMES.get((words[0], words[1])) if len(words) == 3 else None
        if found is None:
            raise Unsafe("a pickle that names code", where=self.where, found=" ".join(words)[:120].strip(),
                         wanted="tensors, sizes and dtypes only", remedy=_RUN)
        self.stack.append(found)

    def storage(self) -> None:
        """A persistent id, which can only mean a storage."""
        found = self.pop(1)[0]
        if type(found) is not tuple or len(found) != 5 or found[0] != "storage" \
                or not isinstance(found[1], _StorageType) or type(found[2]) is not str \
                or not found[2].isascii() or not found[2].isdecimal() or len(found[2]) > 12 \
                or type(found[3]) is not str or not _is_count(found[4]):
            raise Unsafe("a persistent id that is no storage of torch", where=self.where,
                         found=f"{type(found).__name__} before byte {self.at}",
                         wanted="(storage, type, number, device, count)", remedy=_RUN)
        self.stack.append(_Storage(found[1].dtype, found[2], found[4]))

    def call(self) -> None:
        """What one of the known makers makes of a tuple."""
        called, arguments = self.pop(2)
        if not isinstance(called, _Callable) or type(arguments) is not tuple:
            raise Unsafe("a pickle that calls what is no maker of tensors", where=self.where,
                         found=f"{type(called).__name__} at byte {self.at - 1}", wanted="a maker of tensors or sizes",
                         remedy=_RUN)
        self.stack.append(called.make(arguments, self.where))

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values, in turns, into the dictionary below them."""
        target = self.pop(1)[0]
        if type(target) is not dict or len(items) % 2:
            raise Damaged("the pickle sets items of what is no dictionary", where=self.where,
                          found=type(target).__name__, wanted="a dictionary", remedy=_AGAIN)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise Damaged("a key that is no text", where=self.where, found=type(key).__name__, wanted="text",
                              remedy=_AGAIN)
            if key in target:
                raise Damaged("a key twice", where=self.where, found=repr(key[:80]), wanted="each key once",
                              remedy=_AGAIN)
            target[key] = value
        self.stack.append(target)


_STEPS: Final[Mapping[bytes, Callable[[_Machine], None]]] = {
    b"(": _Machine.mark,
    b"X": _Machine.text,
    b"\x8a": _Machine.long,
    b"c": _Machine.name,
    b"Q": _Machine.storage,
    b"R": _Machine.call,
    b"}": lambda machine: machine.stack.append({}),
    b")": lambda machine: machine.stack.append(()),
    b"t": lambda machine: machine.stack.append(tuple(machine.pop_to_mark())),
    b"u": lambda machine: machine.set_items(machine.pop_to_mark()),
    b"s": lambda machine: machine.set_items(machine.pop(2)),
}


# --- the zip -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Member:
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
    for (_, end, first), (start, _, second) in zip(spans, spans[1:], strict=False):
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


# --- the folder ----------------------------------------------------------------------------------------------------------

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
    root = _Machine(raw, f"{QMODEL}: data.pkl").run()
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
    if member.size > MAX_PICKLE:
        raise LimitExceeded("the pickle is too large", where=QMODEL, found=f"{member.size:,} bytes",
                            wanted=f"at most {MAX_PICKLE:,} (MAX_PICKLE)")
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
            if depth > MAX_DEPTH or self.visited > limits.MAX_TENSORS_PER_FILE:
                raise LimitExceeded("too many values, or too deep", where=f"{QMODEL}: {name[:200]}",
                                    found=f"{self.visited:,} values, {depth} levels",
                                    wanted=f"at most {limits.MAX_TENSORS_PER_FILE:,} (MAX_TENSORS_PER_FILE), "
                                           f"{MAX_DEPTH} levels")
            if isinstance(value, _Tensor):
                self.add(f"{name}.{key}", value)
            elif type(value) is dict:
                found[key] = self.values(f"{name}.{key}", value, depth + 1)
            elif type(value) is tuple and all(map(_is_count, value)):
                found[key] = list(value)
            elif isinstance(value, _DtypeName):
                found[key] = value.name
            elif value is None or type(value) in (bool, int, float, str):
                found[key] = value
            else:
                raise Unsupported("a value that HQQ does not write", where=f"{QMODEL}: {name[:160]}.{key[:40]}",
                                  found=type(value).__name__, wanted="a tensor, number, text, size or dtype")
        return found

    def add(self, name: str, tensor: _Tensor) -> None:
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
