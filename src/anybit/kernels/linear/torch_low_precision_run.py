"""torch's own 8 bit products over codes that our quantizers made: see `torch_low_precision.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from anybit.kernels.linear.torch_low_precision import INT_MM, SCALED_MM
from anybit.kernels.linear.triton_w8a8_tiles import Operands
from anybit.kernels.triton.quantizers import Quantized

__all__ = ["PRODUCTS"]

_FLAVOURS: Final = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e4m3fnuz": torch.float8_e4m3fnuz}
_FEWEST_INT_ROWS: Final = 17

Run = Callable[[Quantized, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Operands], Tensor]


def scaled_mm(
    xq: Quantized, codes: Tensor, factor: Tensor, sums: Tensor | None, zeros: Tensor | None,
    bias: Tensor | None, out: Tensor, given: Operands,
) -> Tensor:
    """x [M, K] times W^T by row scales, without a bias: `w8a8.multiply` gives a call with one to our kernel."""
    flavour = _FLAVOURS[given.kind]
    assert bias is None and out.dtype == torch.bfloat16 and xq.scale is not None
    product: Tensor = torch._scaled_mm(
        xq.codes.view(flavour), codes.view(flavour).t(), scale_a=xq.scale[:, None], scale_b=factor[None, :],
        out_dtype=torch.bfloat16, use_fast_accum=False,
    )
    return product


def int_mm(
    xq: Quantized, codes: Tensor, factor: Tensor, sums: Tensor | None, zeros: Tensor | None,
    bias: Tensor | None, out: Tensor, given: Operands,
) -> Tensor:
    """x [M, K] times W^T in int32, then zero points, scales and bias in one pass."""
    from anybit.kernels.triton.w8a8 import epilogue

    m = len(xq.codes)
    x = xq.codes
    if m < _FEWEST_INT_ROWS:  # torch refuses fewer: rows of code 0 below them
        x = torch.nn.functional.pad(x, (0, 0, 0, _FEWEST_INT_ROWS - m))
    parts = torch._int_mm(x, codes.t())
    shifted = sums if xq.zero_point is not None else None
    epilogue(parts, xq, factor, shifted, zeros, bias, out)
    return out


PRODUCTS: Final[Mapping[str, Run]] = {SCALED_MM.name: scaled_mm, INT_MM.name: int_mm}
