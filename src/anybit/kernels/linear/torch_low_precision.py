"""Specs of torch's own 8 bit products: cuBLASLt and hipBLASLt through torch, on the layouts of `triton_w8a8.py`.

x is quantized by our own kernel, so codes are those of the recipe; torch multiplies them. What torch refuses (shapes
that are not multiples of 16, few rows for int8, scales that change along K) is refused here, beforehand. Torch-free.

fp8 is multiplied without "fast accumulation", which leaves all sums of a row in Hopper's own adder. That one truncates
to about 13 bits: on an H200 products of positive numbers lost 7 % at K = 4096, 21 % at 14336, 33 % at 28672, and the
error of normal ones grew from 2.1e-3 to 4.7e-3. Promoted every 128 products it is 1.7e-3, bfloat16's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from anybit.kernels.linear.triton_w8a8 import fp8_rounds, reasons_against, stored_bytes
from anybit.kernels.linear.triton_w8a8_tiles import FP8_NAME, INT8_NAME, product_of
from anybit.kernels.request import Execution, KernelSpec, Reason, Request, Verdict, gather
from anybit.platforms import Platform

__all__ = ["INT_MM", "SCALED_MM", "SPECS"]

_IMPLEMENTATION: Final = "anybit.kernels.triton.w8a8:Rows8"
# torch's row-wise scaled product (torch 2.9): CUTLASS for these, hipBLASLt for those with the flavour that they have
_SCALED_MM_ARCHS: Final[Mapping[str, str]] = {
    "sm_89": "fp8_e4m3fn", "sm_90": "fp8_e4m3fn", "sm_100": "fp8_e4m3fn", "gfx942": "fp8_e4m3fnuz",
    "gfx950": "fp8_e4m3fn",
}
_INT_MM_ARCHS: Final = ("sm_80", "sm_86", "sm_89", "sm_90")
_LAUNCH_SECONDS: Final = 5e-6
# share of bandwidth and of the matrix rate that these reached on an H200 (planning/priors)
_SCALED_REACHED: Final = (0.55, 0.67)
_INT_REACHED: Final = (0.50, 0.37)


def can_scaled_mm(request: Request, platform: Platform) -> Verdict:
    """fp8 with one scale a row on both sides, multiples of 16, bfloat16 results."""
    return gather(*_shared(request, platform, ("fp8_e4m3fn",), FP8_NAME, tuple(_SCALED_MM_ARCHS)),
                  *_multiples(request, 16), _only_bfloat16(request), _by_row(request), _same_element(request))


def can_int_mm(request: Request, platform: Platform) -> Verdict:
    """int8 with one scale a row on both sides, multiples of 8, more than 16 rows."""
    few = request.regime != "prefill"
    return gather(*_shared(request, platform, ("int8", "uint8"), INT8_NAME, _INT_MM_ARCHS), *_multiples(request, 8),
                  _by_row(request),
                  Reason("regime", "torch multiplies int8 for more than 16 rows only", {"tokens": request.tokens})
                  if few else None)


def _shared(
    request: Request, platform: Platform, elements: tuple[str, ...], twin: str, archs: tuple[str, ...]
) -> list[Reason]:
    """What the Triton twin refuses, for the quantizer is Triton's, and the architectures that torch covers."""
    reasons = reasons_against(request, platform, elements, twin)
    if platform.vendor in ("nvidia", "amd") and platform.arch not in archs:
        reasons.append(Reason("arch", f"torch has no such product on {platform.arch}", {"wanted": list(archs),
                                                                                         "found": platform.arch}))
    return reasons


def _multiples(request: Request, of: int) -> list[Reason]:
    n = request.shape[-2]
    return [Reason("shape", f"N {n} is no multiple of {of}", {"N": n, "wanted": of})] if n % of else []


def _only_bfloat16(request: Request) -> Reason | None:
    if request.dtype == "bfloat16":
        return None
    return Reason("dtype", "torch's row-wise product writes bfloat16", {"found": request.dtype})


def _same_element(request: Request) -> Reason | None:
    spec = request.scheme.activation
    if spec is None or spec.element == "fp8_e4m3fn":
        return None
    return Reason("activation", f"both sides are fp8_e4m3fn, the input is {spec.element}", {"found": spec.element})


def _by_row(request: Request) -> Reason | None:
    product = product_of(request.scheme)
    if product is None or not (product.x_group or product.w_group):
        return None
    return Reason("group", "a scale changes along K", {"weight": product.w_group, "activation": product.x_group})


def _seconds(request: Request, platform: Platform, rate: str, reached: tuple[float, float], launches: int) -> float:
    n, k = request.shape[-2:]
    read = n * k / max(platform.bandwidth * reached[0], 1e9)
    quantize = 4.0 * request.tokens * k / max(platform.bandwidth, 1e9)
    multiply = request.flops / max(platform.rates.get(rate, 1e12) * reached[1], 1e9)
    return launches * _LAUNCH_SECONDS + quantize + max(read, multiply)


def scaled_mm_seconds(request: Request, platform: Platform) -> float:
    """Quantization, then reading W or multiplying."""
    return _seconds(request, platform, "fp8", _SCALED_REACHED, 2)


def int_mm_seconds(request: Request, platform: Platform) -> float:
    """Quantization, product, and the int32 sums written and read again."""
    sums = 8.0 * request.tokens * request.shape[-2] / max(platform.bandwidth, 1e9)
    return _seconds(request, platform, "int8", _INT_REACHED, 3) + sums


def native(request: Request, platform: Platform) -> Execution:
    """Codes are multiplied as codes."""
    return "native"


SCALED_MM = KernelSpec(
    name="torch-scaled-mm", layout="fp8-rows", implementation=_IMPLEMENTATION, can_implement=can_scaled_mm,
    seconds=scaled_mm_seconds, stored_bytes=stored_bytes, executes=native, rounds=fp8_rounds,
    about="torch._scaled_mm by row, without fast accumulation; x quantized by our kernel",
    workspace=lambda request: request.tokens * (request.shape[-1] + 8),
)
INT_MM = KernelSpec(
    name="torch-int-mm", layout="int8-rows", implementation=_IMPLEMENTATION, can_implement=can_int_mm,
    seconds=int_mm_seconds, stored_bytes=stored_bytes, executes=native,
    about="torch._int_mm, then scales, zero points and bias in one pass; x quantized by our kernel",
    workspace=lambda request: request.tokens * (request.shape[-1] + 8 + 4 * request.shape[-2]),
)
SPECS: Final = (SCALED_MM, INT_MM)
