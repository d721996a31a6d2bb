"""Launches of the kernels of `planes_hopper`, for calls of one kind; `planes.py` says when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anybit.kernels.triton.launching import ALIGNED, Argument, Call, Launch, Piece, Zeros
from anybit.kernels.triton.planes_form import Form
from anybit.kernels.triton.planes_hopper_launch import HopperConfig, hopper_constants
from anybit.kernels.triton.planes_launch import half_factor

if TYPE_CHECKING:
    from anybit.kernels.triton.quantizers import QuantizerPlan

__all__ = ["hopper_call"]


def hopper_call(
    config: HopperConfig, form: Form, rows: int, parts: list[Tensor], captured: list[Tensor], x: Tensor,
    factors: Piece | torch.dtype | None, bias: Tensor | None, out_dtype: torch.dtype, quantize: QuantizerPlan | None,
) -> Call:  # fmt: skip
    """Launches of calls like this one: x [M, K], of whose rows 16 bytes divide the addresses, times a weight's parts.

    rows      N, without padding
    parts     in the order of `planes.PARTS`
    captured  zeros that graphs count in
    factors   of x's rows, and `quantize` as in `StoredPlanes`
    """
    from anybit.kernels.triton import planes_hopper

    (tokens, columns), row, zeros = x.shape, parts[8], parts[5]
    padded_rows, padded = row.shape[0], form.padded(columns)
    tiles, is_split = -(-tokens // config.tokens) * (padded_rows // config.rows), config.split > 1
    size = 0 if quantize is None else quantize.scratch_bytes
    sums: Argument = row  # stands in for what a specialization does not read
    if is_split:
        sums = Piece(size, torch.float32)
        size += -(-config.split * tiles * config.tokens * config.rows * 4 // ALIGNED) * ALIGNED
    is_half = quantize is None and x.dtype == torch.float16
    made = Launch(
        getattr(planes_hopper, config.kernel),
        [x.dtype if quantize is None else quantize.pieces["codes"], parts[0], parts[3], zeros, row,
         row if factors is None else factors, row if bias is None else bias.dtype, out_dtype, sums,
         Zeros(tiles, captured) if is_split else row, int, rows, padded_rows, columns, padded,
         x.stride(0) if quantize is None and tokens > 1 else columns,
         padded_rows if zeros.shape[0] > 1 else 0, half_factor(form, is_half=is_half)],
        hopper_constants(form, config, columns, has_factors=factors is not None, has_bias=bias is not None),
        x.device, num_warps=config.warps,
    )  # fmt: skip
    return Call((tokens, rows), out_dtype, x.device, size, quantize, made, (tiles, config.split))
