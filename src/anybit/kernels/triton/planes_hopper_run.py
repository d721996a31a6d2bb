"""Launches of the kernels of `planes_hopper`, for calls of one kind; `planes.py` says when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from anybit.kernels.compiling import overlap
from anybit.kernels.triton.launching import (
    ALIGNED,
    Argument,
    Call,
    Described,
    Given,
    Launch,
    Piece,
    Zeros,
    described,
)
from anybit.kernels.triton.planes_form import Form
from anybit.kernels.triton.planes_hopper_launch import HopperConfig, hopper_constants
from anybit.kernels.triton.planes_hopper_roles_launch import (
    X_COLUMNS,
    RolesConfig,
    roles_constants,
    scale_layout,
    word_layout,
    x_layout,
)
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
        if self.quantize is None:
            if self.copies:
                x = x.clone(memory_format=torch.contiguous_format)
            elif x.data_ptr() & 15:  # the launch knows its strides
                x = x.new_empty_strided(x.shape, x.stride()).copy_(x)
        return Call.__call__(self, x, bias, factors)


def hopper_call(
    config: HopperConfig | RolesConfig, form: Form, rows: int, parts: list[Tensor], pitch: int,
    captured: list[Tensor], x: Tensor, factors: Piece | torch.dtype | None, bias: Tensor | None,
    out_dtype: torch.dtype, quantize: QuantizerPlan | None,
) -> Call:  # fmt: skip
    """Launches of calls like this one: x [M, K], or what `quantize` makes of it, times a weight's parts.

    rows      N, without padding
    parts     in the order of `planes.PARTS`
    pitch     how far apart values of neighbouring groups lie
    captured  zeros that graphs count in
    factors   of x's rows, and `quantize` as in `StoredPlanes`
    """
    from anybit.kernels.triton.planes_hopper import few_kernel

    if isinstance(config, RolesConfig):
        return _by_roles(config, form, rows, parts, pitch, captured, x, factors, bias, out_dtype, quantize)
    (tokens, columns), row, zeros = x.shape, parts[8], parts[5]
    padded = form.padded(columns)
    tiles, line = config.tiles(tokens, row.shape[0]), config.line(tokens, row.shape[0], padded)
    size = 0 if quantize is None else quantize.scratch_bytes
    sums: Argument = row  # stands in for what a specialization does not read
    if config.is_shared:
        sums = Piece(size, torch.float32)
        size += -(-config.part_bytes(tokens, row.shape[0], padded) // ALIGNED) * ALIGNED
    is_half = quantize is None and x.dtype == torch.float16
    apart = x.stride(0) if quantize is None and tokens > 1 else columns
    copies = apart % _ALIGNED_ELEMENTS != 0
    made = Launch(
        few_kernel,
        [x.dtype if quantize is None else quantize.pieces["codes"], parts[0], parts[3], zeros, row,
         row if factors is None else factors, row if bias is None else bias.dtype, out_dtype, sums,
         Zeros(tiles, captured) if config.is_shared else row, int, rows, pitch, columns, padded,
         columns if copies else apart,
         pitch if zeros.shape[0] > 1 else 0, half_factor(form, is_half=is_half), line.blocks, line.share, line.longer],
        hopper_constants(form, config, columns, has_factors=factors is not None, has_bias=bias is not None),
        x.device, num_warps=config.warps, **config.options,
    )  # fmt: skip
    return AlignedCall((tokens, rows), out_dtype, x.device, tokens, size, quantize, made, (line.programs, 1),
                       copies=copies)


def _by_roles(
    config: RolesConfig, form: Form, rows: int, parts: list[Tensor], pitch: int, captured: list[Tensor], x: Tensor,
    factors: Piece | torch.dtype | None, bias: Tensor | None, out_dtype: torch.dtype, quantize: QuantizerPlan | None,
) -> Call:  # fmt: skip
    """The launches of the kernel whose warps have different work."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    from anybit.kernels.triton.planes_hopper_roles import roles_kernel

    (tokens, columns), row, zeros = x.shape, parts[8], parts[5]
    padded_rows = row.shape[0]
    size = 0 if quantize is None else quantize.scratch_bytes
    sums: Argument = row  # stands in for what a specialization does not read
    counters: Argument = row
    if config.share:
        sums, size = Piece(size, torch.float32), size + config.parts * 4
        counters = Zeros(config.tiles(tokens, padded_rows) * config.teams, captured)
    tile, layout = (config.tokens, X_COLUMNS), NVMMASharedLayout(*x_layout(config))
    given: Argument
    if quantize is None:
        given = Given(x.dtype, tile, layout)
    else:
        given = Described(Piece(quantize.pieces["codes"].offset, torch.bfloat16), (tokens, columns), tile, layout)
    made = Launch(
        roles_kernel,
        [given, described(parts[0], (config.rows, 32), NVMMASharedLayout(*word_layout(form))),
         _in_a_row(parts[3], config.rows) if form.scaling != "row" else row,
         _in_a_row(zeros, config.rows) if form.has_zeros else row, row,
         row if factors is None else factors, row if bias is None else bias.dtype, out_dtype, sums,
         counters, int, rows, padded_rows, pitch, config.blocks, pitch if zeros.shape[0] > 1 else 0,
         half_factor(form, is_half=quantize is None and x.dtype == torch.float16), config.waves, config.share],
        roles_constants(form, config, has_factors=factors is not None, has_bias=bias is not None),
        x.device, num_warps=4, **overlap(config.waits),
    )  # fmt: skip
    apart = x.stride(0) if tokens > 1 else columns
    return AlignedCall((tokens, rows), out_dtype, x.device, tokens, size, quantize, made,
                       (config.grid(tokens, padded_rows), 1), copies=apart % _ALIGNED_ELEMENTS != 0 or apart < columns)


def _in_a_row(values: Tensor, block: int) -> object:
    """Values of groups [.., rows], rows side by side, as a tensor descriptor of one dimension over all there is."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    count = sum((size - 1) * step for size, step in zip(values.shape, values.stride(), strict=True)) + 1
    line = values.as_strided((count,), (1,))
    return described(line, (block,), NVMMASharedLayout(*scale_layout(values.element_size())))
