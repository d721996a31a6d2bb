"""What HQQ says about one packed matrix: numbers, texts and shapes beside `W_q`, in any of its three layouts.

A: small tensors M.key (numbers as [], text as ASCII bytes). B: values of qmodel.pt's module. C: the same inside "meta".
Torch-free. Source: docs/formats/hqq.md §1, 3, 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need
from anybit.checkpoints.contents import FLOAT_DTYPES, JSON, Contents, TensorInfo
from anybit.checkpoints.dialects._shared.small_tensors import SmallTensors
from anybit.errors import Damaged, Inconsistent, Unsupported

AGAIN: Final = "the file is damaged: download it again, or quantize the model anew"

# keys of layout A that describe and are not needed once the layer is declared
NUMBERS: Final = ("nbits", "axis", "group_size", "view_as_float", "channel_wise", "quant_scale", "quant_zero",
                  "optimize", "round_zero", "offload_meta", "encoded_state_dict", "stores_quant_config")
TEXTS: Final = ("packing", "unpack_view_dtype", "compute_dtype")
DTYPE_BYTES: Final = {"torch.uint8": 1, "torch.int32": 4, "torch.float16": 2, "torch.bfloat16": 2, "torch.float32": 4}


@dataclass(frozen=True)
class Packing:
    """How codes share words: `slabs` of rows, the first in the highest bits, `bits` apart; words of `word` bytes."""

    slabs: int
    bits: int
    word: int


PACKINGS: Final[Mapping[str, Packing]] = {
    "8bit_u8": Packing(1, 8, 1),
    "4bit_u8": Packing(2, 4, 1),
    "3bit_32": Packing(10, 3, 4),
    "2bit_u8": Packing(4, 2, 1),
    "1bit_u8": Packing(8, 1, 1),
}
# nbits -> (number format of a code, packing)
BITS: Final[Mapping[float, tuple[str, str]]] = {
    8: ("uint8", "8bit_u8"), 6: ("uint6", "8bit_u8"), 5: ("uint5", "8bit_u8"), 4: ("uint4", "4bit_u8"),
    3: ("uint3", "3bit_32"), 2: ("uint2", "2bit_u8"), 1.58: ("uint2", "2bit_u8"), 1: ("uint1", "1bit_u8"),
}


@dataclass(frozen=True)
class Meta:
    """One packed matrix, checked.

    shape    of what it stands for, [N, K]
    element  number format of a code
    axis     1: groups are runs of the flat weight; 0: they are strided through it
    groups   how many; 0 where one scale serves everything
    size     numbers in a group
    rows, columns    of the group matrix that is packed
    """

    shape: tuple[int, int]
    element: str
    packing: Packing
    axis: int
    groups: int
    size: int
    rows: int
    columns: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of W_q."""
        return -(-self.rows // self.packing.slabs) * self.columns * self.packing.word


class Source:
    """The values of one module: plain ones, or small tensors under `prefix`."""

    def __init__(self, contents: Contents, prefix: str, plain: JSON, small: SmallTensors) -> None:
        """`plain` holds what qmodel.pt has as values; keys that it lacks are looked for as tensors."""
        self.contents, self.prefix, self.plain, self._small = contents, prefix, plain, small

    def tensor(self, key: str) -> TensorInfo | None:
        """The stored tensor called so."""
        return self.contents.tensors.get(f"{self.prefix}.{key}")

    def need(self, key: str) -> TensorInfo:
        """The stored tensor called so; raises Inconsistent without it."""
        return need(self.contents, f"{self.prefix}.{key}", self.prefix)

    def number(self, key: str) -> int | float | None:
        """A number or flag, None where it is absent or null."""
        if key in self.plain or (info := self.tensor(key)) is None:
            found = self.plain.get(key)
            if found is not None and not isinstance(found, int | float):
                raise self.unsound(key, found, "a number")
            return found
        found = self._small.numbers(info)
        if len(found) != 1 or not math.isfinite(found[0]):
            raise self.unsound(key, found[:4], "one number")
        return found[0]

    def text(self, key: str) -> str | None:
        """A text, None where it is absent or null."""
        if key in self.plain or (info := self.tensor(key)) is None:
            found = self.plain.get(key)
            if found is not None and not isinstance(found, str):
                raise self.unsound(key, found, "a text")
            return found
        return self._small.text(info)

    def sizes(self, key: str) -> tuple[int, ...]:
        """A shape."""
        if key in self.plain or (info := self.tensor(key)) is None:
            found: Any = self.plain.get(key)
        else:
            found = self._small.numbers(info)
        if not isinstance(found, list) or len(found) > 4 or not all(type(v) is int and 0 < v < 2**31 for v in found):
            raise self.unsound(key, found, "positive integers")
        return tuple(found)

    def inner(self, key: str) -> Source | None:
        """The dictionary called so, as another source."""
        found = self.plain.get(key)
        return Source(self.contents, f"{self.prefix}.{key}", found, self._small) if isinstance(found, dict) else None

    def unsound(self, key: str, found: object, wanted: str) -> Damaged:
        """The error for a value that nothing writes."""
        return Damaged(f"{key} has no sound value", where=f"{self.prefix}.{key}", found=repr(found)[:80],
                       wanted=wanted, remedy=AGAIN)


def read_meta(source: Source, codes: TensorInfo, *, own: tuple[int, ...] | None = None) -> Meta:
    """The checked description of `codes`; `own` is the shape where a description of scales has none.

    Raises Unsupported for pairs of bits and packing outside the format, Inconsistent where the codes do not fit.
    """
    element, packing = _packing(source, codes)
    shape = _matrix(source.sizes("shape") if own is None else own)
    elements = shape[0] * shape[1]
    axis = source.number("axis")
    if axis not in (0, 1):
        raise source.unsound("axis", axis, "0 or 1")
    size = source.number("group_size")
    is_whole = source.number("channel_wise") is False or source.number("channel_wise") == 0 or _is_scalar(source)
    if is_whole:
        groups, group, rows, columns = 0, elements, *shape
    else:
        group = (shape[1] if axis == 1 else shape[0]) if size is None else int(size)
        if group < 1 or elements % group:
            raise Inconsistent("groups do not fill the weight", where=source.prefix,
                               found=f"group_size {group} for {list(shape)}", wanted="a divisor of the elements",
                               remedy=AGAIN)
        groups = elements // group
        rows, columns = (groups, group) if axis == 1 else (group, groups)
    if packing.slabs != 10 and rows % packing.slabs:
        raise Inconsistent("rows do not fill the slabs of the packing", where=source.prefix, found=f"{rows} rows",
                           wanted=f"a multiple of {packing.slabs}", remedy=AGAIN)
    meta = Meta(shape, element, packing, int(axis), groups, group, rows, columns)
    if codes.nbytes != meta.packed_bytes:
        raise Inconsistent("packed codes do not fit shape and groups", where=codes.name,
                           found=f"{codes.nbytes:,} bytes", wanted=f"{meta.packed_bytes:,} for {list(shape)}",
                           remedy=AGAIN)
    return meta


def _is_scalar(source: Source) -> bool:
    scale = source.tensor("scale")
    return scale is not None and scale.shape == ()


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) == 2:
        return shape[0], shape[1]
    return 1, math.prod(shape)


def _packing(source: Source, codes: TensorInfo) -> tuple[str, Packing]:
    bits, told = source.number("nbits"), source.text("packing")
    key = 1.58 if isinstance(bits, float) and abs(bits - 1.58) < 1e-6 else bits
    if isinstance(key, float) and key.is_integer():
        key = int(key)
    if key is None or key not in BITS or isinstance(key, bool):
        raise _unsupported(source, "nbits", bits, ", ".join(map(str, BITS)))
    element, usual = BITS[key]
    if told is None or told.lower() == "none":  # unpacked: integers as they are
        if codes.dtype not in ("U8", "I32"):
            raise _unsupported(source, "packing", f"none, codes in {codes.dtype}", usual)
        return element, Packing(1, 8, 1 if codes.dtype == "U8" else 4)
    if told != usual:
        raise _unsupported(source, "packing", f"{told[:40]} with nbits {bits}", usual)
    packing = PACKINGS[told]
    view = source.text("unpack_view_dtype")
    if view is not None and DTYPE_BYTES.get(view) != packing.word:
        raise _unsupported(source, "unpack_view_dtype", view[:40], "torch.uint8, or torch.int32 for 3 bits")
    if source.number("view_as_float"):
        expect_dtype(codes, *FLOAT_DTYPES)
    else:
        expect_dtype(codes, *(("I32",) if packing.word == 4 else ("U8",)))
    return element, packing


def _unsupported(source: Source, key: str, found: object, wanted: str) -> Unsupported:
    return Unsupported(f"another {key} than HQQ writes", where=source.prefix, found=str(found)[:80], wanted=wanted,
                       remedy="quantize the model anew with hqq's own packing")


def expect_scales(info: TensorInfo, meta: Meta) -> None:
    """Raise Inconsistent unless a tensor holds one float a group."""
    expect_dtype(info, *FLOAT_DTYPES)
    count = max(meta.groups, 1)
    expect_shape(info, (count, 1), (1, count), *(((), (1,)) if count == 1 else ()))


