"""Activation quantization on a GPU in one pass over x: the recipes of numerics/activations.py, equal bit for bit.

Two faces. `quantize` makes codes and scales for a product of low-precision operands; `fake_quantize` makes the values
of those codes in a 16 bit float that holds them exactly, with one float32 factor a row for the epilogue, for a product
that emulates. Which recipe can do which is answered without torch by `recipes.py`; device code: `quantizers_jit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from anybit.errors import Inconsistent
from anybit.kernels.triton import quantizers_jit as jit
from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.recipes import (
    ARITHMETIC,
    Arithmetic,
    Spec,
    constants_of,
    edges,
    element_of,
    group_launch,
    has_native_e4m3,
    reads_row,
    row_launch,
    statistic_of,
)
from anybit.numerics.scales import quotient

__all__ = ["Quantized", "fake_quantize", "quantize"]

FOLLOWS = False
_NONE: Final[Mapping[str, Tensor]] = MappingProxyType({})


@dataclass(frozen=True)
class Quantized:
    """Codes of x [M, K] and what they mean.

    codes        [M, columns] int8 or uint8, code 0 beyond K; packed: [M, columns / 2], two a byte, the first low
    scale        float32 [M], or [G, M] for groups (those of `columns`); what a code is multiplied with, all levels
    zero_point   int32 [M], or None
    scale_codes  uint8 [M, G]: the groups' 8 bit scales without the global one, or None
    outer        float32 [M]: the global scale that multiplies beside `scale_codes`, or None where there is none
    sums         int32 [M]: sums of a row's integer codes, or None
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    scale_codes: Tensor | None = None
    outer: Tensor | None = None
    sums: Tensor | None = None


def quantize(
    x: Tensor, spec: Spec, tensors: Mapping[str, Tensor] = _NONE, *, columns: int = 0, fnuz: bool = False,
    packed: bool = False, values: torch.dtype | None = None, sums: bool = False,
    leads: bool = False,
) -> Quantized:
    """Codes and scales of x [M, K] (bf16, fp16 or fp32) by the recipe that the spec names.

    columns  width of the code rows, at least K (the rest is code 0); 0 = K
    fnuz     e4m3fn codes as the e4m3fnuz codes of half the value: the product is doubled by whoever multiplies
    packed   4 bit codes, two a byte
    values   a float dtype: instead of codes their values (less the zero point, without any scale)
    sums     also the sums of integer codes, where rows have scales
    leads    the kernel launched next waits for this one itself (sm_90: programmatic dependent launch)
    """
    return _Call(x, spec, tensors, columns or x.shape[1], leads=leads).codes(fnuz, packed, values, sums)


def fake_quantize(
    x: Tensor, spec: Spec, tensors: Mapping[str, Tensor] = _NONE, *, dtype: torch.dtype = torch.bfloat16,
    columns: int = 0, leads: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Values [M, columns] in `dtype`, exact in bfloat16, and the float32 factor [M] of each row or None.

    values * factor is what the recipe's `dequantize` gives, up to the rounding of that product to float32; below 2^-126
    a bfloat16 keeps fewer bits than float32 does (micro-scaled fp8 blocks whose largest magnitude is below 2^-116).
    `leads` as in `quantize`.
    """
    return _Call(x, spec, tensors, columns or x.shape[1], leads=leads).values(dtype)


class _Call:
    """One call: x, the recipe, and what of x or the checkpoint its rule reads."""

    def __init__(
        self, x: Tensor, spec: Spec, tensors: Mapping[str, Tensor], columns: int, *, leads: bool = False
    ) -> None:
        self.x = x if x.stride(1) == 1 else x.contiguous()
        self.spec, self.columns, self.leads = spec, columns, leads
        self.arithmetic: Arithmetic = ARITHMETIC[spec.recipe]
        self.element = element_of(spec.element)
        self.rows, self.k = x.shape
        self.arch = arch_of(x.device)
        self.in_groups = spec.granularity == "group"
        self.zero_point = _one(tensors, "zero_point") if self.arithmetic.optional == "zero_point" else None
        self.statistic = statistic_of(spec)
        self.given, self.given_stride = self._given(tensors)

    def _given(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, int]:
        """The number that the rule reads beside x, and its stride over rows."""
        arithmetic = self.arithmetic
        if arithmetic.given:
            return _one(tensors, arithmetic.given, required=True), 0
        found = None if arithmetic.optional == "zero_point" else _one(tensors, arithmetic.optional)
        if self.rows == 0:
            return found, 0
        if self.statistic == "call_range":
            return torch.stack(torch.aminmax(self.x)), 0
        if self.statistic == "call_absmax":
            largest = self._largest()
            return (largest if found is None else torch.maximum(largest, found.float())), 0
        if arithmetic.rule == "torchao_nvfp4" and found is None:
            return quotient(self._largest(), 448 * 6), 0
        if arithmetic.rule == "nvfp4_token":
            return None, 0
        return found, 0

    def _largest(self) -> Tensor:
        low, high = torch.aminmax(self.x)
        return torch.maximum(-low, high).float()

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def codes(self, fnuz: bool, packed: bool, values: torch.dtype | None, with_sums: bool) -> Quantized:
        """The first face."""
        dtype = values or (torch.int8 if self.element.is_integer else torch.uint8)
        as_values = values is not None
        width = self.columns // 2 if packed else self.columns
        out = self._empty(self.rows, width, dtype=dtype)
        if not self.in_groups:
            scale = self._empty(self.rows, dtype=torch.float32)
            shifted = self.arithmetic.is_shifted or self.zero_point is not None
            zero = self._empty(self.rows, dtype=torch.int32) if shifted and not as_values else None
            sums = self._empty(self.rows, dtype=torch.int32) if with_sums else None
            self._launch_rows(out, scale, zero, sums, fnuz=fnuz, values=as_values)
            return Quantized(out, scale, zero, sums=sums)
        groups = self._groups()
        scale = self._empty(groups, self.rows, dtype=torch.float32)
        eight = bool(self.arithmetic.scale_codes)
        scale_codes = self._empty(self.rows, groups, dtype=torch.uint8) if eight else None
        outer = self._empty(self.rows, dtype=torch.float32) if self._has_outer() else None
        self._launch_groups(out, scale, scale_codes, outer, fnuz=fnuz, packed=packed, values=as_values, own=False)
        return Quantized(out, scale, None, scale_codes, outer)

    def values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The second face."""
        out = self._empty(self.rows, self.columns, dtype=dtype)
        if not self.in_groups:
            scale = self._empty(self.rows, dtype=torch.float32)
            self._launch_rows(out, scale, None, None, fnuz=False, values=True)
            return out, scale
        outer = self._empty(self.rows, dtype=torch.float32) if self._has_outer() else None
        self._launch_groups(out, None, None, outer, fnuz=False, packed=False, values=True, own=True)
        return out, outer

    def _groups(self) -> int:
        """Groups of a row as wide as the codes: those beyond K hold zeros."""
        return -(-self.columns // self.spec.group_size)

    def _has_outer(self) -> bool:
        return self.arithmetic.scale_codes == "fp8_e4m3fn"

    def _is_native(self, fnuz: bool, values: bool) -> bool:
        """True where the chip's own conversion makes e4m3 codes: it rounds as the definition says."""
        return self.spec.element == "fp8_e4m3fn" and not fnuz and not values and has_native_e4m3(self.arch)

    def _launch_rows(
        self, out: Tensor, scale: Tensor, zero: Tensor | None, sums: Tensor | None, *, fnuz: bool, values: bool
    ) -> None:
        if self.rows == 0:
            return
        columns = max(self.k, self.columns)
        block, part, warps = row_launch(columns, self.rows, is_shared=sums is None)
        jit.quantize_rows[(self.rows, -(-self.columns // part) if part else 1)](
            self.x, out, scale, scale if zero is None else zero, scale if sums is None else sums,
            self._or_x(self.given), self._or_x(self.zero_point), self.k, self.columns, self.x.stride(0),
            **constants_of(self.spec), IS_SHIFTED=self.arithmetic.is_shifted or self.zero_point is not None,
            FLOOR=self.arithmetic.floor, STATISTIC=self.statistic, HAS_GIVEN=self.given is not None,
            HAS_ZERO=self.zero_point is not None, VALUES=values, FNUZ=fnuz, NATIVE=self._is_native(fnuz, values),
            SUMS=sums is not None, WHOLE=columns <= block and not part, BK=block, PART=part, num_warps=warps,
            **edges(self.k, self.columns, max(block, part)), LEADS=self.leads, FOLLOWS=FOLLOWS,
            enable_fp_fusion=False, **({"launch_pdl": True} if FOLLOWS else {}),
        )

    def _launch_groups(
        self, out: Tensor, scale: Tensor | None, scale_codes: Tensor | None, outer: Tensor | None, *, fnuz: bool,
        packed: bool, values: bool, own: bool,
    ) -> None:
        if self.rows == 0:
            return
        size = self.spec.group_size
        groups = self._groups()
        padded, at_a_time, row, warps = group_launch(size, self.k if reads_row(self.spec) else 0, self.rows)
        jit.quantize_groups[(self.rows, -(-groups // at_a_time))](
            self.x, out, self._or_x(scale), self._or_x(scale_codes), self._or_x(outer), self._or_x(self.given),
            self.rows, self.k, self.columns, groups, self.x.stride(0), self.given_stride, **constants_of(self.spec),
            HAS_GIVEN=self.given is not None, ROW=row, SCALES=scale is not None, SCALE_CODES=scale_codes is not None,
            OUTER=outer is not None, VALUES=values, OWN=own, PACKED=packed, FNUZ=fnuz,
            NATIVE=self._is_native(fnuz, values), SIZE=size, GS=padded, BG=at_a_time, LEADS=self.leads, FOLLOWS=FOLLOWS,
            **({"launch_pdl": True} if FOLLOWS else {}), **edges(self.k, self.columns, at_a_time * padded * (padded == size)), num_warps=warps, enable_fp_fusion=False,
        )

    def _or_x(self, tensor: Tensor | None) -> Tensor:
        """A pointer for an argument that the specialization does not read."""
        return self.x if tensor is None else tensor


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
