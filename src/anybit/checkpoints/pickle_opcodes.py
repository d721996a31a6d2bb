"""The opcodes of a torch pickle over inert values: nothing is imported, nothing is called but four makers of records.

A genuine qmodel.pt has two dozen opcodes and a handful of names. Each name here is mapped to an inert record; every
other opcode or name is refused as unsafe before anything is made of it. Source: Lib/pickletools.py of Python 3.11,
torch/serialization.py at 2.10.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from anybit import limits
from anybit.errors import Damaged, Unsafe

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
    """The type of a storage, as a dtype of safetensors."""

    dtype: str


@dataclass(frozen=True)
class DtypeName:
    """A dtype, by its name: "torch.float16"."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A persistent id: the member data/KEY with `count` elements."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A view into a storage, which lies inside it; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# --- names: what each call makes -------------------------------------------------------------------------------------

def is_count(value: object) -> bool:
    """True for an integer that may be a size or an offset."""
    return type(value) is int and 0 <= value < 2**48


def _sizes(value: Any, what: str, where: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > limits.MAX_RANK or not all(map(is_count, value)):
        raise Damaged(f"{what} of a tensor has no sound value", where=where, found=type(value).__name__,
                      wanted=f"at most {limits.MAX_RANK} non-negative integers", remedy=_AGAIN)
    return value


def _rebuild_tensor(arguments: tuple[Any, ...], where: str) -> StoredTensor:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
    if len(arguments) != 6 or not isinstance(arguments[0], Storage) or not is_count(arguments[1]) \
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
    return StoredTensor(storage, offset, shape, strides)


def _rebuild_parameter(arguments: tuple[Any, ...], where: str) -> StoredTensor:
    """torch._utils._rebuild_parameter(tensor, requires_grad, hooks): the tensor."""
    if len(arguments) != 3 or not isinstance(arguments[0], StoredTensor) or arguments[2] != {}:
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
    **{("torch", name): DtypeName(f"torch.{name}") for name in DTYPE_NAMES},
}


# --- opcodes ---------------------------------------------------------------------------------------------------------

class _Mark:
    """Where a tuple or a run of items begins."""


_MARK: Final = _Mark()
# opcode -> bytes of its argument: little-endian numbers, memo indices
_NUMBERS: Final = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_MEMO: Final = {b"q": ("put", "<B"), b"r": ("put", "<I"), b"h": ("get", "<B"), b"j": ("get", "<I")}
_CONSTANTS: Final = {b"N": None, b"\x88": True, b"\x89": False}
_SHORT_TUPLES: Final = {b"\x85": 1, b"\x86": 2, b"\x87": 3}


class Machine:
    """Runs the opcodes of one pickle over inert values."""

    def __init__(self, raw: bytes, where: str) -> None:
        """`raw` is the pickle, `where` its place for messages."""
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
            if len(self.stack) > limits.MAX_STACK:
                raise Damaged("the pickle's stack is too high", where=self.where, found=f"{len(self.stack):,} values",
                              wanted=f"at most {limits.MAX_STACK:,} (MAX_STACK)", remedy=_AGAIN)
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
        if self.marks > limits.MAX_MARKS:
            raise Damaged("the pickle nests too deep", where=self.where, found=f"{self.marks:,} open marks",
                          wanted=f"at most {limits.MAX_MARKS:,} (MAX_MARKS)", remedy=_AGAIN)
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
                or type(found[3]) is not str or not is_count(found[4]):
            raise Unsafe("a persistent id that is no storage of torch", where=self.where,
                         found=f"{type(found).__name__} before byte {self.at}",
                         wanted="(storage, type, number, device, count)", remedy=_RUN)
        self.stack.append(Storage(found[1].dtype, found[2], found[4]))

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


_STEPS: Final[Mapping[bytes, Callable[[Machine], None]]] = {
    b"(": Machine.mark,
    b"X": Machine.text,
    b"\x8a": Machine.long,
    b"c": Machine.name,
    b"Q": Machine.storage,
    b"R": Machine.call,
    b"}": lambda machine: machine.stack.append({}),
    b")": lambda machine: machine.stack.append(()),
    b"t": lambda machine: machine.stack.append(tuple(machine.pop_to_mark())),
    b"u": lambda machine: machine.set_items(machine.pop_to_mark()),
    b"s": lambda machine: machine.set_items(machine.pop(2)),
}
