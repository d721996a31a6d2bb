"""Spec of the reference family: packed canonical tensors, decoded tile by tile in plain torch.

It runs every scheme on every device that torch knows, exactly, and is the twin that other kernels are tested against.
The full weight never exists: a tile of rows is decoded to float32, multiplied, dropped.
"""

from __future__ import annotations

import math

from anybit.kernels.request import KernelSpec, Reason, Request, Verdict, gather, scale_bytes
from anybit.platforms import Platform

# decoding writes and reads a float32 tile several times in separate torch operations
_PASSES = 8.0
_CALL_SECONDS = 60e-6


def can_implement(request: Request, platform: Platform) -> Verdict:
    """Every quantized layer."""
    return gather(
        None if request.scheme.is_quantized
        else Reason("unquantized", f"the weight is not quantized ({request.scheme.weight_name()})",
                    {"element": request.scheme.element})
    )


def seconds(request: Request, platform: Platform) -> float:
    """Bytes moved by the decoding passes, then the float32 product."""
    decode = _PASSES * 4 * request.shape[-1] * request.shape[-2] / max(platform.bandwidth, 1e9)
    return _CALL_SECONDS + decode + request.flops / max(platform.rates.get("float32", 1e11), 1e9)


def stored_bytes(request: Request) -> int:
    """Codes packed to their width, scales as stored."""
    bits = request.scheme.weight_bits
    *stacked_rows, k = request.shape
    rows = math.prod(stacked_rows)
    return rows * (-(-k * bits // 8)) + scale_bytes(request.scheme, request.shape)


SPEC = KernelSpec(
    name="torch-tiled",
    layout="canonical",
    implementation="anybit.kernels.linear.tiled_torch:Tiled",
    can_implement=can_implement,
    seconds=seconds,
    stored_bytes=stored_bytes,
    about="plain torch: decode a tile of rows to float32, multiply, drop it",
    is_batch_invariant=True,
)
