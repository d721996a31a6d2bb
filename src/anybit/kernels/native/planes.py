"""Weights in the compiled kernel's layout: making it with torch, and the thin calls.

A `Planes` owns the tensors that the kernel reads and the C struct that points at them. Making one costs a pass over the
codes; a call costs a few microseconds before any arithmetic. Layout and order of evaluation: `anybit_native.h`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from anybit.kernels.native import ABI, ArrayStruct, MinifloatStruct, WeightStruct, library, why_missing
from anybit.kernels.native.memory import settled
from anybit.kernels.native.support import (
    FLOAT,
    INTEGER,
    MINIMUM,
    NO_OFFSET,
    ROUNDINGS,
    TABLE,
    ZERO_POINT,
    Code,
    code,
    plane_bits,
    reasons_against,
    stored_format,
)
from anybit.numerics.packing import PackedCodes
from anybit.schemes import Offset, ScaleLevel, Scheme
from anybit.weights import Dense, QuantizedWeight, scale_values

__all__ = ["FORMATS", "Planes", "from_weight", "keep_threads", "pack_planes", "threads"]

RUN: Final = 32  # codes that share bytes
_SLACK: Final = 64  # bytes that must be readable beyond scales and offsets
_MOST_BIAS: Final = 128  # code - bias must be exact in bfloat16, as tables of codes hold it
_CHUNK: Final = 1 << 22  # codes packed at once: bounds the temporaries
FORMATS: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum anybit_format


class Planes:
    """One weight [N, K] ready for the kernel; with its bias [N].

    nbytes   bytes held, all planes, scales, offsets and the bias
    buffers  the tensors whose addresses the kernel has; they must stay where they are
    """

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, ...],
        planes: Sequence[Tensor],
        scales: Sequence[Tensor] = (),
        offset: Tensor | None = None,
        offset_scales: Sequence[Tensor] = (),
        bias: Tensor | None = None,
    ) -> None:
        """Take planes that `pack_planes` made (or that a file holds in that order) and canonical scales and offsets.

        planes  [N, bytes of a row] uint8 each; for an unquantized weight the tensor [N, K] itself
        scales, offset, offset_scales  as in QuantizedWeight
        Raises ValueError if the kernel cannot run the scheme, RuntimeError without the library.
        """
        native = library()
        if native is None:
            raise RuntimeError(f"the compiled CPU kernel is missing: {why_missing()}")
        reasons = reasons_against(scheme, shape)
        element = code(scheme.element)
        if reasons or element is None:
            raise ValueError(f"the compiled CPU kernel cannot run {scheme}: {'; '.join(reasons)}")
        self.scheme, self.shape = scheme, shape
        self.rows, self.cols = shape
        self.bias = bias
        self.buffers: list[Tensor] = []
        self._struct = struct = WeightStruct(
            abi=ABI, size=ctypes.sizeof(WeightStruct), rows=self.rows, cols=self.cols,
            kind=element.kind, bits=element.bits, bias=element.bias, is_signed=element.is_signed,
            minifloat=MinifloatStruct(*element.minifloat), table=element.values or (0.0,) * 16,
        )  # fmt: skip
        self._point_at_planes(element, planes)
        self._point_at_scales(scales)
        self._point_at_offset(offset, offset_scales)
        if native.check(struct) != 0:
            raise ValueError(f"the compiled CPU kernel refuses {scheme} of shape {shape}")
        held = [*self.buffers, *([bias.contiguous()] if bias is not None else [])]
        self.buffers = held  # what a host registers; the struct holds their addresses
        self.nbytes = sum(t.nbytes for t in held)
        if bias is not None:
            self.bias = held[-1]
        self._bias = self.bias.data_ptr() if self.bias is not None else None
        self._bias_type = FORMATS[self.bias.dtype] << 8 if self.bias is not None else 0
        self._address = ctypes.addressof(struct)
        self._linear, self._gemm, self._decode = native.linear, native.gemm_rows, native.decode_rows

    def _point_at_planes(self, element: Code, planes: Sequence[Tensor]) -> None:
        widths = (element.bits,) if element.kind == FLOAT else plane_bits(element.bits)
        assert len(planes) == len(widths)
        for i, (plane, width) in enumerate(zip(planes, widths, strict=True)):
            assert plane.shape[:-1] == self.shape[:-1] and plane.device.type == "cpu"
            assert element.kind == FLOAT or plane.shape[-1] == -(-self.cols // RUN) * 4 * width
            plane = plane if plane.stride(-1) == 1 or plane.shape[-1] <= 1 else plane.contiguous()
            plane = plane if element.kind == FLOAT else settled(plane)  # the host may hold an unquantized tensor
            self.buffers.append(plane)
            self._struct.plane[i] = plane.data_ptr()
            self._struct.plane_row_stride[i] = plane.stride(-2) * plane.element_size()

    def _point_at_scales(self, scales: Sequence[Tensor]) -> None:
        levels = self.scheme.scales
        assert len(levels) == len(scales)
        if not levels:
            return
        self._struct.scale = self._array(levels[0], scales[0])
        if len(levels) == 2:
            second = self._array(levels[1], scales[1])
            self._struct.divide = levels[1].divide
            if self.scheme.order == "code_first":
                self._struct.factor = second
            else:
                self._struct.scale2 = second

    def _point_at_offset(self, offset: Tensor | None, offset_scales: Sequence[Tensor]) -> None:
        spec = self.scheme.offset
        self._struct.offset_kind = ROUNDINGS[self.scheme.round_to] if spec is None else NO_OFFSET
        if spec is None:
            return
        assert offset is not None and len(offset_scales) == len(spec.levels)
        if spec.kind == "zero_point" and self._fold(scale_values(spec.format, offset)):
            return
        self._struct.offset_kind = ZERO_POINT if spec.kind == "zero_point" else MINIMUM
        self._struct.offset = self._array(spec, offset)
        self._struct.offset.negate = spec.kind == "minimum" and spec.subtract
        if spec.levels:
            self._struct.offset2 = self._array(spec.levels[0], offset_scales[0])

    def _fold(self, zero_points: Tensor) -> bool:
        """True if one zero point serves all codes: their values now hold it, v - z once and not for each weight."""
        struct = self._struct
        if struct.kind not in (TABLE, INTEGER) or struct.bits == 8 or zero_points.numel() == 0:
            return False
        zero = float(zero_points.flatten()[0])
        if not bool((zero_points == zero).all()) or (struct.kind == INTEGER and not zero.is_integer()):
            return False
        if struct.kind == INTEGER:
            if abs(struct.bias + zero) > _MOST_BIAS:
                return False
            struct.bias += int(zero)
            return True
        values = torch.tensor(list(struct.table), dtype=torch.float32) - zero
        struct.table[:] = values.tolist()
        return True

    def _array(self, level: ScaleLevel | Offset, values: Tensor) -> ArrayStruct:
        """Scales or offsets [.., blocks of rows, blocks of columns] copied to where the kernel may read beyond them."""
        row_block, group = level.block
        if level.placement == "flat":  # blocks end with a row: a grid after all
            row_block, group = 1, level.block[1]
            values = values.view(*values.shape[:-1], self.rows, -1)
        stored = stored_format(level.format)
        if stored == 0:
            values = scale_values(level.format, values)
        elif values.element_size() == 1:
            values = values.view(torch.uint8)
        count = values.numel() * values.element_size()
        buffer = torch.zeros(count + _SLACK, dtype=torch.uint8)
        buffer[:count].view(values.dtype).copy_(values.flatten())
        buffer = settled(buffer)
        self.buffers.append(buffer)
        row_bytes = values.shape[-1] * values.element_size()
        return ArrayStruct(
            data=buffer.data_ptr(), format=stored, row_stride=row_bytes if values.shape[-2] > 1 else 0,
            row_block=row_block or max(self.rows, 1), group=0 if values.shape[-1] == 1 else group,
        )  # fmt: skip

    @property
    def kind(self) -> tuple[object, ...]:
        """What weights have in common that one call can multiply with: `anybit_linear_each`."""
        struct = self._struct
        return (struct.kind, struct.bits, struct.offset_kind, self.rows, self.cols, self._bias_type,
                self.bias is None)

    @property
    def bias_type(self) -> int:
        """The format of the bias, as calls are told it."""
        return self._bias_type

    @property
    def address(self) -> int:
        """Of the C struct."""
        return self._address

    def linear(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """W x + bias for every row of x: x [.., K] float32, float16 or bfloat16 -> [.., N] of x's dtype.

        `out` may have another of the three dtypes. Weights are exact, sums are float32. For few rows: each eight rows
        of x read W again.
        """
        cols = self.cols
        if x.dim() == 2 and x.stride(1) == 1:
            rows, stride, flat = x.shape[0], x.stride(0), x
        else:
            flat = x.reshape(-1, cols)
            flat = flat if flat.stride(1) == 1 else flat.contiguous()
            rows, stride = flat.shape[0], flat.stride(0)
        if out is None:
            out = torch.empty((*x.shape[:-1], self.rows), dtype=x.dtype)
        if x.shape[-1] != cols or not out.is_contiguous() or out.numel() != rows * self.rows:
            raise ValueError(f"x {tuple(x.shape)}, out {tuple(out.shape)} for a weight {self.shape}")
        types = FORMATS[x.dtype] | FORMATS[out.dtype] << 4 | self._bias_type
        wrong = self._linear(
            self._address, flat.data_ptr(), stride, out.data_ptr(), self.rows, self._bias, rows, types,
            threads(),
        )  # fmt: skip
        if wrong:
            raise MemoryError("no memory for a float32 copy of x")
        return out

    def gemm(self, x: Tensor, first: int, count: int, out: Tensor) -> Tensor:
        """As `linear` for many tokens x [M, K] and the rows [first, first + count) alone -> out [M, count].

        Each row of W is decoded once. x and out may be of any of the three dtypes; rows of x may lie apart.
        """
        flat = x if x.stride(1) == 1 else x.contiguous()
        if x.dim() != 2 or x.shape[1] != self.cols or out.shape != (x.shape[0], count) or out.stride(1) != 1:
            raise ValueError(f"x {tuple(x.shape)}, out {tuple(out.shape)} for {count} rows of a weight {self.shape}")
        types = FORMATS[x.dtype] | FORMATS[out.dtype] << 4 | self._bias_type
        wrong = self._gemm(
            self._address, flat.data_ptr(), flat.stride(0), out.data_ptr(), out.stride(0), self._bias, flat.shape[0],
            first, count, types, threads(),
        )  # fmt: skip
        if wrong == 2:
            raise IndexError(f"rows beyond the {self.rows} there are")
        if wrong:
            raise MemoryError("no memory for a packed copy of x")
        return out

    def decode(self, start: int = 0, count: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The reference weight's rows [start, start + count) (all without `count`), [count, K]."""
        count = self.rows - start if count is None else count
        return self.decode_into(torch.empty((count, self.cols), dtype=dtype), start)

    def decode_into(self, out: Tensor, start: int = 0) -> Tensor:
        """As `decode`, into rows of `out` [count, K], whose rows may lie apart."""
        return self._decode_rows(None, start, out)

    def gather(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The reference weight's rows by number: rows [..] int64 -> [.., K]; an embedding."""
        indices = rows.to(torch.int64).contiguous()
        out = torch.empty((indices.numel(), self.cols), dtype=dtype)
        return self._decode_rows(indices, 0, out).view(*rows.shape, self.cols)

    def _decode_rows(self, indices: Tensor | None, start: int, out: Tensor) -> Tensor:
        if out.dim() != 2 or out.shape[1] != self.cols or (out.stride(1) != 1 and self.cols > 1):
            raise ValueError(f"out {tuple(out.shape)} for rows of {self.cols}")
        wrong = self._decode(
            self._address, None if indices is None else indices.data_ptr(), start, out.shape[0], out.data_ptr(),
            out.stride(0), FORMATS[out.dtype], threads(),
        )  # fmt: skip
        if wrong:
            raise IndexError(f"rows beyond the {self.rows} there are")
        return out


_kept = threading.local()


def threads() -> int:
    """Threads that a call may use: torch's number, or what `keep_threads` put aside on this thread."""
    return getattr(_kept, "count", 0) or torch.get_num_threads()


def keep_threads(count: int) -> None:
    """Use `count` threads in calls from this thread whatever torch's number becomes; 0 follows torch again."""
    _kept.count = count


def from_weight(weight: QuantizedWeight | Dense) -> Planes:
    """A canonical weight in the kernel's layout; packed files are unpacked a few rows at a time."""
    if isinstance(weight, Dense):
        return Planes(weight.scheme, weight.shape, [weight.tensor], bias=weight.bias)
    element = code(weight.scheme.element)
    if element is None:
        raise ValueError(f"the compiled CPU kernel cannot read {weight.scheme.element}")
    stored = weight.stored_codes
    is_ready = isinstance(stored, PackedCodes) and stored.order == "halves32" and stored.sign == "unsigned"
    if is_ready and isinstance(stored, PackedCodes) and stored.data.shape[-1] == -(-stored.count // RUN) * 16:
        planes = [stored.data]
    else:
        planes = pack_planes(stored, element.bits, element.flip)
    return Planes(
        weight.scheme, weight.shape, planes, weight.scales, weight.offset, weight.offset_scales, weight.bias
    )  # fmt: skip


def pack_planes(codes: Tensor | PackedCodes, bits: int, flip: int = 0) -> list[Tensor]:
    """Codes [.., N, K], one a byte or packed, -> planes [.., N, bytes of a row] uint8, low bits first.

    Bits above `bits` (the sign of int8 tensors) are dropped; `flip` is an exclusive-or of every code.
    """
    *lead, rows, cols = codes.shape
    runs = -(-cols // RUN)
    widths = plane_bits(bits)
    if bits == 8 and isinstance(codes, Tensor) and cols % RUN == 0 and not flip:
        return [codes.contiguous().view(torch.uint8)]
    planes = [torch.empty((*lead, rows, runs * 4 * width), dtype=torch.uint8) for width in widths]
    for part, outs in _chunks(codes, planes, max(1, _CHUNK // max(cols, 1))):
        bytes_ = part.contiguous().view(torch.uint8)
        if flip:
            bytes_ = bytes_ ^ flip
        if cols % RUN:
            bytes_ = torch.nn.functional.pad(bytes_, (0, runs * RUN - cols))
        shift = 0
        for width, out in zip(widths, outs, strict=True):
            out.view(-1, 4 * width).copy_(_PACK[width](bytes_.view(-1, RUN), shift))
            shift += width
    return planes


def _chunks(
    codes: Tensor | PackedCodes, planes: list[Tensor], rows: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Parts of a few rows, unpacked, with the places of their planes; experts one after another."""
    if len(codes.shape) == 3:
        for e in range(codes.shape[0]):
            yield from _chunks(codes[e], [p[e] for p in planes], rows)
        return
    for start in range(0, codes.shape[0], rows):
        count = min(rows, codes.shape[0] - start)
        part = codes.rows(start, count).unpack() if isinstance(codes, PackedCodes) else codes[start : start + count]
        yield part, [p[start : start + count] for p in planes]


def _bytes(codes: Tensor, shift: int) -> Tensor:
    assert shift == 0
    return codes


def _nibbles(codes: Tensor, shift: int) -> Tensor:
    """Code j with code 16 + j: [.., 32] -> [.., 16]."""
    assert shift == 0
    return (codes[:, :16] & 15) | (codes[:, 16:] << 4)


def _pairs(codes: Tensor, shift: int) -> Tensor:
    """Two bits of each code, four codes a byte in order: [.., 32] -> [.., 8]; four codes at once as one word."""
    words = (codes.view(torch.int32) >> shift) & 0x03030303
    return (words | words >> 6 | words >> 12 | words >> 18).to(torch.uint8)


def _bits(codes: Tensor, shift: int) -> Tensor:
    """One bit of each code, eight codes a byte in order: [.., 32] -> [.., 4]; the product gathers eight bits."""
    words = (codes.view(torch.int64) >> shift) & 0x0101010101010101
    return ((words * 0x0102040810204080) >> 56).to(torch.uint8)


_PACK: Final[dict[int, Callable[[Tensor, int], Tensor]]] = {8: _bytes, 4: _nibbles, 2: _pairs, 1: _bits}
