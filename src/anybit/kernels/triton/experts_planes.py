"""Experts in the layout "triton-planes": the same tensors and device code as a single weight (`planes.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.planes import PARTS, StoredPlanes
from anybit.kernels.triton.planes_form import Form
from anybit.kernels.triton.planes_launch import Config, configure, half_factor, product_constants, terms_of
from anybit.kernels.triton.recipes import ARITHMETIC
from anybit.kernels.triton.segments import Segments

if TYPE_CHECKING:
    from anybit.kernels.triton.quantizers import Quantizer

__all__ = ["UNSTACKED", "PlanesStack", "is_alike"]

UNSTACKED: Final = ("table",)  # the same for every expert


class PlanesStack:
    """The weights [N, K] of all experts, their tensors behind each other in memory.

    shape            (N, K)
    quantizes_input  the scheme's activation quantization is carried out here
    """

    def __init__(self, planes: Sequence[StoredPlanes], biases: Tensor | None) -> None:
        """`planes` are alike and hold views of stacked tensors; biases [E, N]."""
        first = planes[0]
        self.shape = first.shape
        self.quantizes_input = first.quantizes_input
        self._packed, self._parts, self._is_half = first.packed, first.parts, first.is_half
        self._biases = biases
        held = first.packed.tensors
        # elements from one expert's tensor to the next one's
        self._steps = [held[name].numel() if name in held else 0 for name in PARTS[:8]]
        self._quantizer: Quantizer | None = None
        self._given: Tensor | None = None
        if first.spec is not None:
            from anybit.kernels.triton.quantizers import Quantizer

            name = ARITHMETIC[first.spec.recipe].given
            if name:
                self._given = torch.stack([one.activation[name].reshape(()).float() for one in planes])
            self._quantizer = Quantizer(first.spec, {}, self.shape[1], values=torch.bfloat16, own=True,
                                        by_row=self._given is not None)

    def takes(self, dtype: torch.dtype) -> bool:
        """True for activations whose products are exact in their own dtype, or in that of the quantized ones."""
        return self.quantizes_input or dtype == torch.bfloat16 or (dtype == torch.float16 and self._is_half)

    def __call__(self, x: Tensor, segments: Segments) -> Tensor:
        """Rows x [P, K] in the segments' order, each times its expert's weight: [P, N] in x's dtype.

        Rows of experts elsewhere are 0.
        """
        if self._quantizer is None:
            return self._multiply(x, segments, None, x.dtype)
        found = self._quantizer(x, None if self._given is None else self._given[segments.row_experts])
        return self._multiply(found.codes, segments, found.factor, x.dtype)

    def _multiply(self, x: Tensor, segments: Segments, factors: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        from anybit.kernels.triton.experts_planes_jit import experts_kernel

        rows, columns = self.shape
        form = self._packed.form
        x = x if x.stride(1) == 1 else x.contiguous()
        out = torch.zeros((x.shape[0], rows), dtype=out_dtype, device=x.device)
        count = segments.expert.numel()
        if count == 0 or rows == 0:
            return out
        arch = arch_of(x.device)
        config = _configured(form, rows, columns, segments, arch)
        row, zeros = self._parts[PARTS.index("row")], self._parts[PARTS.index("zeros")]
        padded_rows, padded = row.shape[0], form.padded(columns)
        tiles, split = padded_rows // config.rows, config.split
        parts, counters = out, segments.first
        if split > 1:
            parts = torch.empty(split * x.shape[0] * rows, dtype=torch.float32, device=x.device)
            counters = torch.zeros(count * tiles, dtype=torch.int32, device=x.device)
        is_half = x.dtype == torch.float16
        experts_kernel[(tiles, split, count)](
            x, *self._parts, row if factors is None else factors, out if self._biases is None else self._biases,
            out, parts, counters, segments.expert, segments.first, segments.length, rows, padded_rows, columns, padded,
            x.stride(0), padded_rows if zeros.shape[0] > 1 else 0, half_factor(form, is_half=is_half), *self._steps,
            **product_constants(form, columns, arch), TERMS=terms_of(form, is_half=is_half), BM=config.tokens,
            BN=config.rows, SPLIT=split > 1, TOKENS=factors is not None, BIAS=self._biases is not None,
            EVEN=columns == padded, ASM=config.assembly, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return out


def _configured(form: Form, rows: int, columns: int, segments: Segments, arch: str) -> Config:
    """The launch of a single weight for as many tokens, with K split only as far as segments leave the chip idle."""
    config = configure(form, rows, columns, segments.longest, arch)
    split = max(1, config.split // segments.expert.numel())
    return replace(config, tokens=max(config.tokens, segments.longest), split=split)


def _is_by_row(one: StoredPlanes) -> bool:
    """True where no static number is read, or the quantizer takes another one for each row."""
    if one.spec is None:
        return True
    arithmetic = ARITHMETIC[one.spec.recipe]
    return arithmetic.optional not in one.activation and (not arithmetic.given or one.spec.granularity == "group")


def is_alike(one: StoredPlanes, other: StoredPlanes) -> bool:
    """True if two weights can lie in one stack."""
    return (
        one.packed.form == other.packed.form and one.shape == other.shape and one.is_half == other.is_half
        and one.spec == other.spec and "permutation" not in one.packed.tensors and not one.is_pinned and _is_by_row(one)
    )
