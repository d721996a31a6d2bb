"""Launches of the kernel of `planes_one`, for calls of one kind; `planes.py` says when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anybit.kernels.compiling import overlap
from anybit.kernels.triton.launching import ALIGNED, Argument, Call, Launch, Piece, Zeros
from anybit.kernels.triton.planes_form import Form
from anybit.kernels.triton.planes_one_launch import OneConfig, one_constants

if TYPE_CHECKING:
    from anybit.kernels.triton.quantizers import QuantizerPlan

__all__ = ["one_call"]


def one_call(
    config: OneConfig, form: Form, rows: int, parts: list[Tensor], pitch: int, captured: list[Tensor], x: Tensor,
    factors: Piece | torch.dtype | None, bias: Tensor | None, out_dtype: torch.dtype, quantize: QuantizerPlan | None,
) -> Call:  # fmt: skip
    """Launches of calls like this one: x [1, K], or what `quantize` makes of it, times a weight's parts.

    Arguments as those of `planes_hopper_run.hopper_call`.
    """
    from anybit.kernels.triton.planes_one import one_kernel

    columns, row, zeros = x.shape[1], parts[8], parts[5]
    tiles, is_split = row.shape[0] // config.rows, config.split > 1
    size = 0 if quantize is None else quantize.scratch_bytes
    sums: Argument = row  # stands in for what a specialization does not read
    if is_split:
        sums = Piece(size, torch.float32)
        size += -(-config.split * rows * 4 // ALIGNED) * ALIGNED
    is_half = quantize is None and x.dtype == torch.float16
    made = Launch(
        one_kernel,
        [x.dtype if quantize is None else quantize.pieces["codes"], *parts, row if factors is None else factors,
         row if bias is None else bias.dtype, out_dtype, sums, Zeros(tiles, captured) if is_split else row, rows, pitch,
         columns, form.padded(columns), pitch if zeros.shape[0] > 1 else 0, 1.0],
        one_constants(form, config, columns, is_half=is_half, has_factors=factors is not None,
                      has_bias=bias is not None),
        x.device, num_warps=config.warps, **overlap(True),
    )  # fmt: skip
    return Call((1, rows), out_dtype, x.device, 1, size, quantize, made, (tiles, config.split))
