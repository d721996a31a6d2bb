"""Activation quantization on a GPU in one pass over x: the recipes of numerics/activations.py, equal bit for bit.

Two faces. `quantize` makes codes and scales for a product of low-precision operands; `fake_quantize` makes the values
of those codes in a 16 bit float that holds them exactly, with one float32 factor a row for the epilogue, for a product
that emulates. A weight keeps a `Quantizer`, whose plans its launches share. Which recipe can do which is answered
without torch by `recipes.py`; device code: `quantizers_jit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from anybit.errors import Inconsistent
from anybit.kernels.compiling import OVERLAPPING, overlap
from anybit.kernels.triton import quantizers_jit as jit
from anybit.kernels.triton.devices import arch_of, on_device
from anybit.kernels.triton.launching import ALIGNED, Launch, Piece, remember, stream_of
from anybit.kernels.triton.recipes import (
    ARITHMETIC,
    Arithmetic,
    Spec,
    constants_of,
    edges,
    element_of,
    group_launch,
    has_native_e4m3,
    is_heavy,
    reads_row,
    row_launch,
    statistic_of,
)
from anybit.numerics.scales import quotient

__all__ = ["Form", "Quantized", "Quantizer", "QuantizerPlan", "fake_quantize", "quantize"]

_FOLLOWING_ROWS: Final = 64
_NONE: Final[Mapping[str, Tensor]] = MappingProxyType({})


@dataclass(frozen=True)
class Quantized:
    """Codes of x [M, K] and what they mean.

    codes        [M, columns] int8 or uint8, code 0 beyond K; packed: [M, columns / 2], two a byte, the first low;
                 or their values in a float dtype
    scale        float32 [M], or [G, M] for groups (those of `columns`); what a code is multiplied with, all levels;
                 None where the values of groups hold their own
    zero_point   int32 [M], or None
    scale_codes  uint8 [M, G]: the groups' 8 bit scales without the global one, or None
    outer        float32 [M]: the global scale that multiplies beside `scale_codes`, or None where there is none
    sums         int32 [M]: sums of a row's integer codes, or None
    """

    codes: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    scale_codes: Tensor | None = None
    outer: Tensor | None = None
    sums: Tensor | None = None

    @property
    def factor(self) -> Tensor | None:
        """What values are still to be multiplied with: float32 [M], or None for 1."""
        return self.outer if self.scale is None else self.scale


def quantize(
    x: Tensor, spec: Spec, tensors: Mapping[str, Tensor] = _NONE, *, columns: int = 0, fnuz: bool = False,
    packed: bool = False, values: torch.dtype | None = None, sums: bool = False,
) -> Quantized:
    """Codes and scales of x [M, K] (bf16, fp16 or fp32) by the recipe that the spec names: one call of a Quantizer."""
    return Quantizer(spec, tensors, columns or x.shape[1], fnuz=fnuz, packed=packed, values=values, sums=sums)(x)


def fake_quantize(
    x: Tensor, spec: Spec, tensors: Mapping[str, Tensor] = _NONE, *, dtype: torch.dtype = torch.bfloat16,
    columns: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Values [M, columns] in `dtype`, exact in bfloat16, and the float32 factor [M] of each row or None.

    values * factor is what the recipe's `dequantize` gives, up to the rounding of that product to float32; below 2^-126
    a bfloat16 keeps fewer bits than float32 does (micro-scaled fp8 blocks whose largest magnitude is below 2^-116).
    """
    found = Quantizer(spec, tensors, columns or x.shape[1], values=dtype, own=True)(x)
    return found.codes, found.factor


class Form(NamedTuple):
    """All that decides what a Quantizer makes of rows, but for its static number: its arguments, and what follows.

    is_shifted  codes carry a zero point
    is_static   what the rule reads beside a row is the same at every call, or nothing
    """

    spec: Spec
    columns: int
    values: torch.dtype | None
    own: bool
    fnuz: bool
    packed: bool
    sums: bool
    by_row: bool
    is_shifted: bool
    is_static: bool


class Quantizer:
    """A recipe with its static tensors, and what is wanted of it.

    columns  width of the code rows, at least K (the rest is code 0)
    fnuz     e4m3fn codes as the e4m3fnuz codes of half the value: the product is doubled by whoever multiplies
    packed   4 bit codes, two a byte
    values   a float dtype: instead of codes their values (less the zero point, without any scale)
    own      of groups: values times the groups' own (8 bit) scales; what remains is one factor a row
    sums     also the sums of integer codes, where rows have scales
    by_row   of groups: the static number is another one for each row, and calls bring it (experts of a layer)
    """

    def __init__(
        self, spec: Spec, tensors: Mapping[str, Tensor], columns: int, *, fnuz: bool = False, packed: bool = False,
        values: torch.dtype | None = None, own: bool = False, sums: bool = False, by_row: bool = False,
    ) -> None:  # fmt: skip
        self.spec, self.columns, self.by_row = spec, columns, by_row
        self._arithmetic: Arithmetic = ARITHMETIC[spec.recipe]
        self._element = element_of(spec.element)
        self._in_groups = spec.granularity == "group"
        self._statistic = statistic_of(spec)
        self._fnuz, self._packed, self._values, self._own, self._sums = fnuz, packed, values, own, sums
        arithmetic = self._arithmetic
        has_zero = arithmetic.optional == "zero_point"
        self._zero_point = _one(tensors, "zero_point") if has_zero else None
        static = _one(tensors, arithmetic.given, required=True) if arithmetic.given and not by_row else None
        self._static = static if arithmetic.given or has_zero else _one(tensors, arithmetic.optional)
        self._plans: dict[Any, QuantizerPlan] = {}

    def __call__(self, x: Tensor, given: Tensor | None = None) -> Quantized:
        """Codes (or values) and scales of x [M, K] as tensors; `given` float32 [M] with `by_row`."""
        x = x if x.stride(1) == 1 else x.contiguous()
        plan = self.plan(x)
        scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=x.device)
        if x.shape[0]:
            with on_device(x.device):
                plan(stream_of(x.device.index), scratch, x, given)
        return plan.quantized(scratch)

    def plan(self, x: Tensor, *, leads: bool = False, follows: bool = False) -> QuantizerPlan:
        """How rows like those of x are quantized: as many, of that dtype and stride.

        leads    the kernel launched next waits for this one itself (sm_90: programmatic dependent launch)
        follows  the launch may overlap the end of the kernel before it, as that of a few rows always does there
        """
        follows = (follows or x.shape[0] <= _FOLLOWING_ROWS) and arch_of(x.device) in OVERLAPPING
        key = (x.shape, x.stride(), x.dtype, x.device, leads, follows)
        found = self._plans.get(key)
        return (remember(self._plans, key, QuantizerPlan(self, x, leads=leads, follows=follows)) if found is None
                else found)

    def given(self, x: Tensor) -> Tensor | None:
        """The number that the rule reads beside x: static, or a statistic of the whole call."""
        arithmetic, static = self._arithmetic, self._static
        if arithmetic.given:
            return static
        if self._statistic == "call_range":
            return torch.stack(torch.aminmax(x))
        if self._statistic == "call_absmax":
            largest = _largest(x)
            return largest if static is None else torch.maximum(largest, static.float())
        if arithmetic.rule == "torchao_nvfp4" and static is None:
            return quotient(_largest(x), 448 * 6)
        return None if arithmetic.rule == "nvfp4_token" else static

    @property
    def _is_static(self) -> bool:
        """True where `given` is the same at every call."""
        return not self.by_row and not self._statistic.startswith("call") and (
            self._arithmetic.rule != "torchao_nvfp4" or self._static is not None)

    def _given_dtype(self, x: Tensor) -> torch.dtype | Tensor | None:
        """`given` as an argument of a launch."""
        if self._is_static:
            return self.given(x)
        return x.dtype if self._statistic == "call_range" else torch.float32

    @property
    def form(self) -> Form:
        """What it makes; equal for quantizers that make the same by the same static number."""
        return Form(self.spec, self.columns, self._values, self._own, self._fnuz, self._packed, self._sums, self.by_row,
                    self._is_shifted, self._is_static)

    @property
    def static(self) -> Tensor | None:
        """The number that the rule reads, where it is the same at every call."""
        return self._static if self._is_static else None

    @property
    def has_zero_point(self) -> bool:
        """True where codes carry a zero point that is stored beside them."""
        return self._is_shifted and self._values is None and not self._in_groups

    @property
    def _is_shifted(self) -> bool:
        return self._arithmetic.is_shifted or self._zero_point is not None

    def _is_native(self, arch: str) -> bool:
        """True where the chip's own conversion makes e4m3 codes: it rounds as the definition says."""
        return (self.spec.element == "fp8_e4m3fn" and not self._fnuz and self._values is None
                and has_native_e4m3(arch))


class QuantizerPlan:
    """A Quantizer for rows of one shape: where in a scratch its results lie, and the launch.

    pieces         name of a field of `Quantized` -> its part of the scratch
    scratch_bytes  of all of them
    """

    def __init__(self, quantizer: Quantizer, x: Tensor, *, leads: bool, follows: bool) -> None:
        """For x [M, K] and others of its shape, stride and dtype."""
        self.pieces: dict[str, Piece] = {}
        self.scratch_bytes = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._quantizer = quantizer
        self._is_static = quantizer._is_static
        place = self._in_groups if quantizer._in_groups else self._in_rows
        self._launch, self._grid = place(quantizer, x, {"LEADS": leads, "FOLLOWS": follows})

    def __call__(self, stream: int | None, scratch: Tensor, x: Tensor, given: Tensor | None = None) -> None:
        """Fill the pieces from x with M rows of K in all; `stream` as `Launch` takes it."""
        x_programs, y_programs = self._grid
        if self._is_static:
            self._launch(x_programs, y_programs, stream, scratch, (x,))
        else:
            given = self._quantizer.given(x) if given is None else given
            assert given is not None
            self._launch(x_programs, y_programs, stream, scratch, (x, given))

    @property
    def quantizer(self) -> Quantizer:
        """The recipe, and what is wanted of it."""
        return self._quantizer

    def quantized(self, scratch: Tensor) -> Quantized:
        """The pieces as tensors."""
        found = {name: scratch[piece.offset :].view(piece.dtype)[: prod(shape)].view(shape)
                 for (name, piece), shape in zip(self.pieces.items(), self._shapes.values(), strict=True)}
        return Quantized(**found)

    def _place(self, name: str, dtype: torch.dtype, *shape: int) -> Piece:
        piece = Piece(self.scratch_bytes, dtype)
        self.pieces[name], self._shapes[name] = piece, shape
        self.scratch_bytes += -(-prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
        return piece

    def _place_codes(self, quantizer: Quantizer, rows: int) -> Piece:
        dtype = quantizer._values or (torch.int8 if quantizer._element.is_integer else torch.uint8)
        width = quantizer.columns // 2 if quantizer._packed else quantizer.columns
        return self._place("codes", dtype, rows, width)

    def _in_rows(
        self, quantizer: Quantizer, x: Tensor, overlaps: Mapping[str, bool]
    ) -> tuple[Launch, tuple[int, int]]:
        (rows, k), spec = x.shape, quantizer.spec
        out = self._place_codes(quantizer, rows)
        scale = self._place("scale", torch.float32, rows)
        zero = self._place("zero_point", torch.int32, rows) if quantizer.has_zero_point else None
        sums = self._place("sums", torch.int32, rows) if quantizer._sums else None
        columns = max(k, quantizer.columns)
        block, part, warps = row_launch(columns, rows, is_shared=sums is None, is_heavy=is_heavy(spec))
        given = quantizer._given_dtype(x)
        values = quantizer._values is not None
        zero_point = quantizer._zero_point
        # what a specialization does not read is given the place of the scales
        made = Launch(
            jit.quantize_rows,
            [x.dtype, out, scale, zero or scale, sums or scale, scale if given is None else given,
             scale if zero_point is None else zero_point, k, quantizer.columns, x.stride(0) if rows > 1 else k],
            {**constants_of(spec), "IS_SHIFTED": quantizer._is_shifted, "FLOOR": quantizer._arithmetic.floor,
             "STATISTIC": quantizer._statistic, "HAS_GIVEN": given is not None, "HAS_ZERO": zero_point is not None,
             "VALUES": values, "FNUZ": quantizer._fnuz, "NATIVE": quantizer._is_native(arch_of(x.device)),
             "SUMS": sums is not None, "WHOLE": columns <= block and not part, "BK": block, "PART": part,
             **edges(k, quantizer.columns, max(block, part)), **overlaps},
            x.device, num_warps=warps, enable_fp_fusion=False, **overlap(overlaps["FOLLOWS"]),
        )  # fmt: skip
        return made, (rows, -(-quantizer.columns // part) if part else 1)

    def _in_groups(
        self, quantizer: Quantizer, x: Tensor, overlaps: Mapping[str, bool]
    ) -> tuple[Launch, tuple[int, int]]:
        (rows, k), spec, arithmetic = x.shape, quantizer.spec, quantizer._arithmetic
        groups = -(-quantizer.columns // spec.group_size)  # those beyond K hold zeros
        own = quantizer._own
        out = self._place_codes(quantizer, rows)
        scale = None if own else self._place("scale", torch.float32, groups, rows)
        codes = self._place("scale_codes", torch.uint8, rows, groups) if arithmetic.scale_codes and not own else None
        outer = self._place("outer", torch.float32, rows) if arithmetic.scale_codes == "fp8_e4m3fn" else None
        given = quantizer._given_dtype(x)
        padded, at_a_time, row, warps = group_launch(spec.group_size, k if reads_row(spec) else 0, rows)
        made = Launch(
            jit.quantize_groups,
            [x.dtype, out, scale or out, codes or out, outer or out, out if given is None else given, rows, k,
             quantizer.columns, groups, x.stride(0) if rows > 1 else k, int(quantizer.by_row)],
            {**constants_of(spec), "HAS_GIVEN": given is not None, "ROW": row, "SCALES": scale is not None,
             "SCALE_CODES": codes is not None, "OUTER": outer is not None, "VALUES": quantizer._values is not None,
             "OWN": own, "PACKED": quantizer._packed, "FNUZ": quantizer._fnuz,
             "NATIVE": quantizer._is_native(arch_of(x.device)), "SIZE": spec.group_size, "GS": padded,
             "BG": at_a_time, **edges(k, quantizer.columns, at_a_time * padded * (padded == spec.group_size)),
             **overlaps},
            x.device, num_warps=warps, enable_fp_fusion=False, **overlap(overlaps["FOLLOWS"]),
        )  # fmt: skip
        return made, (rows, -(-groups // at_a_time))


def _largest(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def _one(tensors: Mapping[str, Tensor], name: str, *, required: bool = False) -> Tensor | None:
    """A static number; None where it is not stored."""
    found = tensors.get(name) if name else None
    if found is None and required:
        raise Inconsistent("static activation quantization without its tensors", found=", ".join(tensors) or "none",
                           wanted=name, remedy="run it weight-only, or export the checkpoint again")
    if found is not None and found.numel() != 1:
        raise Inconsistent("a static activation scale of several numbers", found=f"{name} {list(found.shape)}",
                           wanted="one number for the layer", remedy="--kernel torch-tiled runs it")
    return found
