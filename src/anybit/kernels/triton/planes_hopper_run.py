"""Launches of the kernels of `planes_hopper`, for calls of one kind; `planes.py` says when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from anybit.kernels.triton.launching import ALIGNED, Argument, Call, Launch, Piece, Zeros
from anybit.kernels.triton.planes_form import Form
from anybit.kernels.triton.planes_hopper_launch import HopperConfig, hopper_constants
from anybit.kernels.triton.planes_launch import half_factor

if TYPE_CHECKING:
    from anybit.kernels.triton.quantizers import QuantizerPlan

__all__ = ["AlignedCall", "hopper_call"]

_ALIGNED_ELEMENTS: Final = 16  # what a stride is known to be a multiple of, or not, when a kernel is compiled


@dataclass(slots=True)
class AlignedCall(Call):
    """A call whose kernel wants rows of x that begin at multiples of 16 bytes: x is copied where they do not.

    copies  its strides forbid it, whatever its address
    """

    copies: bool = False

    def __call__(self, x: Tensor, bias: Tensor | None, factors: Tensor | None = None) -> Tensor:
        """x [M, K] (columns side by side) times the weight: a new [M, N]."""
        if self.quantize is None and (self.copies or x.data_ptr() & 15):
            x = x.clone(memory_format=torch.contiguous_format)
        return Call.__call__(self, x, bias, factors)


def hopper_call(
    config: HopperConfig, form: Form, rows: int, parts: list[Tensor], pitch: int, captured: list[Tensor], x: Tensor,
    factors: Piece | torch.dtype | None, bias: Tensor | None, out_dtype: torch.dtype, quantize: QuantizerPlan | None,
) -> Call:  # fmt: skip
    """Launches of calls like this one: x [M, K], or what `quantize` makes of it, times a weight's parts.

    rows      N, without padding
    parts     in the order of `planes.PARTS`
    pitch     how far apart values of neighbouring groups lie
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
    apart = x.stride(0) if quantize is None and tokens > 1 else columns
    copies = apart % _ALIGNED_ELEMENTS != 0
    made = Launch(
        getattr(planes_hopper, config.kernel),
        [x.dtype if quantize is None else quantize.pieces["codes"], parts[0], parts[3], zeros, row,
         row if factors is None else factors, row if bias is None else bias.dtype, out_dtype, sums,
         Zeros(tiles, captured) if is_split else row, int, rows, pitch, columns, padded,
         columns if copies else apart,
         pitch if zeros.shape[0] > 1 else 0, half_factor(form, is_half=is_half)],
        hopper_constants(form, config, columns, has_factors=factors is not None, has_bias=bias is not None),
        x.device, num_warps=config.warps, **({"launch_pdl": True} if config.waits else {}),
    )  # fmt: skip
    return AlignedCall((tokens, rows), out_dtype, x.device, tokens, size, quantize, made, (tiles, config.split),
                       copies=copies)
