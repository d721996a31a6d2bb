"""The compiled CPU kernel: finding and opening it. No torch here.

The library is built when anybit is installed, where a C compiler is at hand; without it anybit works, slower.
`library()` opens it once and checks that it is of this version; ANYBIT_NATIVE=0 leaves it out. What it computes and its
data layout: `anybit_native.h`; the tensors around it: `planes.py`; what it can run: `support.py`.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Final

__all__ = [
    "ABI", "ArrayStruct", "BlockStruct", "Library", "MinifloatStruct", "ProductStruct", "WeightStruct", "isa",
    "library", "why_missing",
]

ABI: Final = 5  # ANYBIT_ABI of anybit_native.h
_FILES: Final = ("libanybit_native.so", "libanybit_native.dylib")


class MinifloatStruct(ctypes.Structure):
    """anybit_minifloat."""

    _fields_ = [
        *((name, c_int32) for name in ("left", "right", "mask", "nan_and", "nan_is")),
        ("power", ctypes.c_float),
    ]


class ArrayStruct(ctypes.Structure):
    """anybit_array: scales or offsets."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("row_stride", "row_block", "group")),
        ("format", c_int32),
        ("negate", c_int32),
    ]


class WeightStruct(ctypes.Structure):
    """anybit_weight."""

    _fields_ = [
        *((name, c_int32) for name in ("abi", "size")),
        *((name, c_int64) for name in ("rows", "cols")),
        *((name, c_int32) for name in ("kind", "bits", "offset_kind", "divide", "bias", "is_signed")),
        ("minifloat", MinifloatStruct),
        ("table", ctypes.c_float * 16),
        ("plane", c_void_p * 3),
        ("plane_row_stride", c_int64 * 3),
        *((name, ArrayStruct) for name in ("scale", "scale2", "offset", "offset2", "factor")),
    ]


class ProductStruct(ctypes.Structure):
    """anybit_product."""

    _fields_ = [("part", c_void_p * 3), ("bias", c_void_p * 3), ("bias_format", c_int32 * 3), ("parts", c_int32)]


class BlockStruct(ctypes.Structure):
    """anybit_block."""

    _fields_ = [
        *((name, c_int32) for name in ("abi", "size")),
        *((name, ProductStruct) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("norm1", "norm2", "q_norm", "k_norm")),
        *((name, ctypes.c_float) for name in ("eps", "scaling")),
        *((name, c_int64) for name in ("hidden", "inner", "heads", "kv_heads", "dim", "rotated")),
    ]


class Library:
    """The functions of the opened library; calls release the interpreter's lock."""

    def __init__(self, path: Path) -> None:
        """Open `path`; OSError if that fails, ValueError for a library of another version."""
        self.path = path
        native = ctypes.CDLL(str(path))
        abi = native.anybit_abi
        abi.restype = c_int32
        if abi() != ABI:
            raise ValueError(f"{path.name} is of interface version {abi()}, wanted {ABI}")

        def declare(name: str, *arguments: type, result: type = c_int32) -> ctypes._NamedFuncPointer:
            function = getattr(native, name)
            function.argtypes, function.restype = arguments, result
            return function  # type: ignore[no-any-return]

        self._isa = declare("anybit_isa", result=c_char_p)
        self._set_isa = declare("anybit_set_isa", c_char_p)
        self.check = declare("anybit_check", POINTER(WeightStruct))
        self.linear = declare(
            "anybit_linear", c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int32, c_int32
        )
        self.gemm_rows = declare(
            "anybit_gemm_rows", c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64,
            c_int32, c_int32,
        )
        self.linear_each = declare(
            "anybit_linear_each", c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p,
            c_int64, c_int32, c_int32,
        )  # fmt: skip
        self.decode_rows = declare(
            "anybit_decode_rows", c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int32, c_int32
        )

        self.block_scratch = declare("anybit_block_scratch", c_void_p, c_int64, result=c_int64)
        self.block_step = declare(
            "anybit_block_step", c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64,
            c_void_p, c_int32,
        )
        self.blocks_step = declare(
            "anybit_blocks_step", c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p,
            c_void_p, c_int64, c_void_p, c_int32,
        )  # fmt: skip
        self.block_many_scratch = declare(
            "anybit_block_many_scratch", c_void_p, c_int64, c_int64, c_int32, result=c_int64
        )
        self.block_many = declare(
            "anybit_block_many", c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64,
            c_int64, c_void_p, c_int32,
        )

    def isa(self) -> str:
        """The instruction set in use: "generic", "avx2" or "avx512"."""
        return str(self._isa().decode())

    def set_isa(self, name: str) -> bool:
        """Use one instruction set ("" for the best); False, and no change, if the processor lacks it."""
        return bool(self._set_isa(name.encode()) == 0)


_opened: Library | None = None
_why: str | None = None  # None: not yet tried


def library() -> Library | None:
    """The kernel library, or None: see `why_missing`."""
    global _opened, _why
    if _why is None:
        _opened, _why = _open()
    return _opened


def why_missing() -> str:
    """Why `library()` is None, in a few words; "" when it is there."""
    library()
    return _why or ""


def isa() -> str:
    """The instruction set in use, or "" without the library."""
    opened = library()
    return opened.isa() if opened else ""


def _open() -> tuple[Library | None, str]:
    if os.environ.get("ANYBIT_NATIVE") == "0":
        return None, "switched off by ANYBIT_NATIVE=0"
    path = next((p for p in _places() if p.is_file()), None)
    if path is None:
        return None, "not built: no C compiler was found when anybit was installed"
    try:
        return Library(path), ""
    except (OSError, ValueError) as error:
        return None, str(error)


def _places() -> list[Path]:
    """Where the library may be: beside this file, or, in editable installs, in the package's other half."""
    return [Path(folder) / name for folder in __path__ for name in _FILES]
