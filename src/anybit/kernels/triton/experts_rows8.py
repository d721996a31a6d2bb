"""Experts in the layouts "int8-rows" and "fp8-rows": tensors and device code of a single weight (`w8a8.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anybit.kernels.linear.triton_w8a8 import FP8_EXACT
from anybit.kernels.linear.triton_w8a8_tiles import Config, configure, constants_of, of_experts
from anybit.kernels.triton.segments import Segments
from anybit.kernels.triton.w8a8 import StoredRows8
from anybit.platforms.archs import ARCHS

__all__ = ["Rows8Stack", "is_alike"]


def is_alike(one: StoredRows8, other: StoredRows8) -> bool:
    """True if two weights can lie in one stack: nothing static, which is one number for all rows of a call."""
    return (one.product == other.product and one.shape == other.shape and not one.static and not one.is_pinned
            and one.product.activation.dynamic)


class Rows8Stack:
    """The weights [N, K] of all experts, their tensors behind each other in memory."""

    def __init__(self, stored: Sequence[StoredRows8], biases: Tensor | None) -> None:
        """`stored` are alike and hold views of stacked tensors; biases [E, N]."""
        first = stored[0]
        self._first, self._biases = first, biases
        exact = any(FP8_EXACT.name in one.kernels.used for one in stored)
        self._given = first.operands(exact=exact)
        self._quantizer = first.quantizer(self._given)

    def takes(self, dtype: torch.dtype) -> bool:
        """Any: rows are quantized from it."""
        return dtype in (torch.bfloat16, torch.float16, torch.float32)

    def __call__(self, x: Tensor, segments: Segments) -> Tensor:
        """As `Stack` says."""
        from anybit.kernels.triton.experts_rows8_jit import experts8_kernel

        first, product, given = self._first, self._first.product, self._given
        codes, factor, sums, zeros = first.codes, first.factor, first.sums, first.zeros
        (rows, n), k = (x.shape[0], first.shape[0]), codes.shape[1]
        out = torch.zeros((rows, n), dtype=x.dtype, device=x.device)
        count = segments.expert.numel()
        if count == 0 or n == 0:
            return out
        config, fused = self._configured(segments)
        found = self._quantizer(x)
        assert found.scale is not None
        scale, of_row = found.scale, 1
        if product.x_group:
            scale, of_row = segments.together(scale), len(scale)
        tiles, is_split = -(-n // config.bn), config.split > 1
        parts, counters = out, segments.first
        if is_split:
            kept = torch.int32 if product.is_integer and not (product.x_group or product.w_group) else torch.float32
            parts = torch.empty(config.split * rows * n, dtype=kept, device=x.device)
            counters = torch.zeros(count * tiles, dtype=torch.int32, device=x.device)
        shifted = sums is not None and found.zero_point is not None
        constants = constants_of(product, given, config, k, shifted=shifted, has_bias=self._biases is not None,
                                 fused=fused)
        view = first.view(given)
        experts8_kernel[(tiles, config.split, count)](
            found.codes if given.kind == "float16" else found.codes.view(view), codes.view(view), scale, factor,
            found.zero_point if shifted else scale, sums if shifted else factor,
            scale if found.sums is None else found.sums, factor if zeros is None else zeros,
            out if self._biases is None else self._biases, out, parts, counters, segments.expert, segments.first,
            segments.length, n, k, factor.shape[1] if product.w_group else 1, 1.0,
            of_row, factor.numel(),
            **{name: value for name, value in constants.items() if name not in ("TMA", "WAITS")},
            num_warps=config.warps, num_stages=config.stages,
        )
        return out

    def _configured(self, segments: Segments) -> tuple[Config, bool]:
        """The launch of a single weight for as many rows, with K split only as far as segments leave the chip idle.

        And whether the last program of a tile adds its parts: elsewhere K is not split.
        """
        first, arch = self._first, self._first.arch
        n, k = first.shape[0], first.codes.shape[1]
        found = configure(n, k, segments.longest, arch, first.product, self._given)
        fused = ARCHS[arch].vendor == "nvidia"
        split = max(1, found.split // segments.expert.numel()) if fused else 1
        return replace(of_experts(found), split=split, bm=max(found.bm, segments.longest)), fused and split > 1
