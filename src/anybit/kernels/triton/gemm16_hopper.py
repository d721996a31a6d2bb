"""The 16 bit product of sm_90 after an expansion, launched: x times decoded rows of a weight, with its epilogue.

What it takes, and with which tiles: `linear/triton_gemm16_hopper.py`. Device code: `gemm16_hopper_jit.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.kernels.linear.triton_gemm16_hopper import (
    ALIGNED,
    ARCH,
    BLOCK,
    LAYOUT,
    VERSIONS,
    configure_gemm16,
    constants_of_gemm16,
)
from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.launching import described, launch
from anybit.kernels.triton.straight import version

__all__ = ["product_into", "takes"]

_DTYPES = (torch.bfloat16, torch.float16)


def takes(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """True where `product_into` computes out [M, N] from x [M, K] and a weight [N, K]."""
    return (
        x.device.type == "cuda" and arch_of(x.device) == ARCH and version() in VERSIONS
        and x.dtype in _DTYPES and out.dtype in _DTYPES and x.stride(1) == 1 and x.stride(0) >= x.shape[1]
        and weight.is_contiguous() and all(_is_aligned(t) for t in (x, weight, out))
        and configure_gemm16(*out.shape, x.shape[1]) is not None
    )  # fmt: skip


def _is_aligned(tensor: Tensor) -> bool:
    return not tensor.data_ptr() & 15 and not tensor.stride(0) % ALIGNED


def product_into(
    out: Tensor, x: Tensor, weight: Tensor, factors: Tensor | None, bias: Tensor | None, alpha: float
) -> None:
    """out [M, N] = alpha x W^T (times float32 factors [M] of rows) + bias [N], with float32 sums and one rounding."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    from anybit.kernels.triton.gemm16_hopper_jit import gemm16_hopper

    (tokens, rows), columns = out.shape, x.shape[1]
    config, layout = configure_gemm16(tokens, rows, columns), NVMMASharedLayout(*LAYOUT)
    assert config is not None
    half = config.bm // 2
    launch(
        gemm16_hopper, (config.programs,),
        [described(x, (half, BLOCK), layout), described(weight, (config.bn // config.boxes, BLOCK), layout),
         described(out, (half, BLOCK), layout), out if factors is None else factors, out if bias is None else bias,
         alpha, tokens, rows, columns],
        x.device, **constants_of_gemm16(config, has_factors=factors is not None, has_bias=bias is not None),
        num_warps=4,
    )  # fmt: skip
