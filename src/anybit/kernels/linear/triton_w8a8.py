"""Specs of the 8 bit by 8 bit products: int8 x int8 and fp8 x fp8, codes multiplied as codes. Torch-free.

Layouts "int8-rows" and "fp8-rows": codes one a byte, [N, K] with K padded to 16 by code 0; one float32 factor a row, or
one a block where a scale changes along K. The same layouts are read by torch's own kernels (`torch_low_precision.py`).
What is claimed is what compiles: see `triton_w8a8_tiles.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from anybit.kernels.linear.triton_rows8 import one_cases
from anybit.kernels.linear.triton_w8a8_hopper import hopper_cases, takes
from anybit.kernels.linear.triton_w8a8_tiles import (
    FP8_EXACT_NAME,
    FP8_NAME,
    INT8_NAME,
    PAD,
    UNITS,
    Product8,
    column_block,
    compile_cases,
    has_zero_points,
    is_shifted,
    operands,
    product_of,
)
from anybit.kernels.request import NARROW_ADDER, Execution, KernelSpec, Reason, Request, Verdict, gather, scale_bytes
from anybit.kernels.triton.recipes import can_quantize, statistic_of
from anybit.platforms import Platform
from anybit.platforms.archs import ARCHS
from anybit.schemes import Scheme

__all__ = ["FP8", "FP8_EXACT", "INT8", "SPECS", "fp8_rounds", "reasons_against", "stored_bytes"]

_FP8: Final = ("fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2")
_NAN_FREE_K: Final = 65_536  # int32 holds the sums of shifted codes up to here
_SHIFTED_K: Final = 32_768  # and where both sides are shifted
_DTYPES: Final = ("bfloat16", "float16")
# share of the bandwidth (decode, small) and of the matrix rate (prefill) that kernels of this form reached on an H200
_REACHED: Final[Mapping[str, tuple[float, float]]] = {
    INT8_NAME: (0.90, 0.60), FP8_NAME: (0.90, 0.48), FP8_EXACT_NAME: (0.50, 0.36),
}
_IN_BLOCKS: Final[Mapping[str, float]] = {INT8_NAME: 0.7, FP8_NAME: 0.90, FP8_EXACT_NAME: 0.45}  # of the latter
# the same of the kernel whose warps have different work (sm_90)
_ROLES_REACHED: Final[Mapping[str, tuple[float, float]]] = {INT8_NAME: (0.90, 0.72), FP8_NAME: (0.90, 0.64)}
_ROLES_IN_BLOCKS: Final = 0.93
_QUANTIZE_SECONDS: Final = 3e-6
_LAUNCH_SECONDS: Final = 3.5e-6


# --- what can be run --------------------------------------------------------------------------------------------------


def reasons_against(request: Request, platform: Platform, elements: tuple[str, ...], name: str) -> list[Reason]:
    """All reasons why codes of `elements` cannot be multiplied as codes for this request."""
    scheme = request.scheme
    reasons = [*_chip_reasons(platform), *_request_reasons(request)]
    if scheme.element not in elements:
        reasons.append(Reason("element", f"multiplies {', '.join(elements)}, the weight is {scheme.element}",
                              {"wanted": list(elements), "found": scheme.element}))
    if _has_other_offset(scheme) or scheme.act_order or scheme.round_to is not None:
        what = "act-order" if scheme.act_order else "an offset" if _has_other_offset(scheme) else "rounded values"
        reasons.append(Reason("scheme", f"the weight has {what}", {"scheme": str(scheme)}))
    if scheme.activation is None:
        reasons.append(Reason("activation", "the input is not quantized: a weight-only product is another kernel", {}))
        return reasons
    cannot = can_quantize(scheme.activation)
    if cannot is not None:
        reasons.append(Reason("recipe", cannot, {"recipe": scheme.activation.recipe}))
    product = product_of(scheme)
    if product is None:
        reasons.append(Reason("placement", "the weight's scales do not lie on a grid", {"scheme": str(scheme)}))
        return reasons
    return [*reasons, *_product_reasons(request, platform, product, name)]


def _has_other_offset(scheme: Scheme) -> bool:
    """An offset that is no integer zero point of whole rows."""
    return scheme.offset is not None and not has_zero_points(scheme)


def _product_reasons(request: Request, platform: Platform, product: Product8, name: str) -> list[Reason]:
    activation, reasons = product.activation, []
    allowed = ("int8", "int7") if product.is_integer else ("fp8_e4m3fn", "fp8_e5m2")
    if activation.element not in allowed and product.element in ("int8", *_FP8):
        reasons.append(Reason("activation", f"{product.element} weights are not multiplied with {activation.element}",
                              {"wanted": list(allowed), "found": activation.element}))
    if column_block(product) == 0:
        reasons.append(Reason("group", "scales change within 32 columns",
                              {"weight": product.w_group, "activation": product.x_group}))
    if product.element == "uint8":
        reasons.append(Reason("offset", "unsigned codes without zero points", {"found": product.element}))
    if product.w_shifted and (product.x_group or product.w_group):
        reasons.append(Reason("group", "zero points of W beside scales that change along K",
                              {"weight": product.w_group, "activation": product.x_group}))
    longest = 2**31 if not product.is_integer else _SHIFTED_K if product.w_shifted else _NAN_FREE_K
    if request.shape[-1] > longest:
        reasons.append(Reason("shape", f"sums of more than {longest} products do not fit int32",
                              {"K": request.shape[-1], "wanted": longest}))
    if platform.arch not in ARCHS:
        return reasons
    found = operands(product, platform.arch, exact=name == FP8_EXACT_NAME)
    if found is None:
        reasons.append(Reason("matrix", f"Triton has no matrix instruction for it on {platform.arch}",
                              {"arch": platform.arch}))
    elif found.kind == "float16" and platform.arch == "gfx90a" and "fp8_e5m2" in (product.element, activation.element):
        reasons.append(Reason("subnormal", "the matrix unit reads subnormal float16 as zero, and fp8_e5m2 has them",
                              {"arch": platform.arch}))
    elif name == FP8_EXACT_NAME and not operands(product, platform.arch).promote:  # type: ignore[union-attr]
        reasons.append(Reason("superseded", f"{FP8_NAME} rounds nothing here either", {"arch": platform.arch}))
    return reasons


def _chip_reasons(platform: Platform) -> list[Reason]:
    reasons = []
    if platform.vendor not in ("nvidia", "amd"):
        reasons.append(Reason("vendor", f"runs on a GPU, this is {platform.vendor} {platform.arch}",
                              {"wanted": ["nvidia", "amd"], "found": platform.vendor}))
    else:
        if platform.arch not in UNITS:
            why = "Triton emits no matrix instruction for Turing" if platform.arch == "sm_75" else "not compiled for it"
            reasons.append(Reason("arch", f"{platform.arch}: {why}", {"found": platform.arch, "wanted": list(UNITS)}))
        if "triton" not in platform.providers:
            reasons.append(Reason("provider", "Triton is not installed", {"wanted": "triton"}))
    return reasons


def _request_reasons(request: Request) -> list[Reason]:
    reasons = []
    if request.kind == "embedding":
        reasons.append(Reason("kind", "a lookup multiplies nothing", {"kind": request.kind}))
    if request.dtype not in _DTYPES:
        reasons.append(Reason("dtype", f"activations of {request.dtype}", {"wanted": list(_DTYPES),
                                                                           "found": request.dtype}))
    return reasons


# --- price, execution -------------------------------------------------------------------------------------------------


def stored_bytes(request: Request) -> int:
    """Codes with K padded to 16, a float32 factor for each row or block beside the scales as stored, sums of codes."""
    *stacked_rows, k = request.shape
    rows = math.prod(stacked_rows)
    product = product_of(request.scheme)
    factors = rows
    if product is not None and product.w_group:
        factors = -(-rows // product.w_rows) * -(-k // product.w_group)
    sums = rows * (is_shifted(request.scheme) + (request.scheme.offset is not None))
    scheme = replace(request.scheme, offset=None)  # zero points are kept as int32
    return rows * (-(-k // PAD) * PAD) + 4 * (factors + sums) + scale_bytes(scheme, request.shape)


def _seconds(name: str, request: Request, platform: Platform) -> float:
    n, k = request.shape[-2:]
    product = product_of(request.scheme)
    given = operands(product, platform.arch, exact=name == FP8_EXACT_NAME) if product else None
    rates = platform.rates
    half = rates.get("float16", 1e12)
    rate = half if given is None or given.kind == "float16" else rates.get("int8" if given.kind == "int8" else "fp8",
                                                                           half)
    alike = FP8_EXACT_NAME if given is not None and given.kind == "float16" else name
    has_roles = platform.arch == "sm_90" and product is not None and given is not None and takes(product, given)
    of_bandwidth, of_rate = _ROLES_REACHED[alike] if has_roles else _REACHED[alike]
    if product is not None and (product.x_group or product.w_group):
        of_rate *= _ROLES_IN_BLOCKS if has_roles else _IN_BLOCKS[alike]  # scaled sums wait for the matrix unit
    read = n * k / max(platform.bandwidth * of_bandwidth, 1e9)
    is_by_call = product is not None and can_quantize(product.activation) is None \
        and statistic_of(product.activation).startswith("call")
    passes = 2 if is_by_call else 1
    quantize = _QUANTIZE_SECONDS * passes + 4.0 * request.tokens * k / max(platform.bandwidth, 1e9)
    return _LAUNCH_SECONDS + quantize + max(read, request.flops / max(rate * of_rate, 1e9))


def executes(request: Request, platform: Platform) -> Execution:
    """Native where the matrix unit takes the codes."""
    product = product_of(request.scheme)
    given = operands(product, platform.arch) if product else None
    return "exact emulation" if given is None or given.kind == "float16" else "native"


def fp8_rounds(request: Request, platform: Platform) -> str | None:
    """The adder of some matrix units, where partial sums leave it every block."""
    product = product_of(request.scheme)
    given = operands(product, platform.arch) if product else None
    if given is None or not given.promote or product is None:
        return None
    return f"sums of {column_block(product)} products in {NARROW_ADDER}"


def _workspace(request: Request) -> int:
    """Codes of x, and partial sums of at most 16 programs along K for at most 256 rows."""
    n, k = request.shape[-2:]
    return request.tokens * (2 * k + 8) + 4 * 16 * min(request.tokens, 256) * n


def _spec(name: str, layout: str, elements: tuple[str, ...], about: str, *, exact: bool = False) -> KernelSpec:
    def can_implement(request: Request, platform: Platform) -> Verdict:
        """Codes of the named elements under scales by row or block, quantized inputs, on a listed GPU."""
        return gather(*reasons_against(request, platform, elements, name))

    def seconds(request: Request, platform: Platform) -> float:
        """Quantization of x, then the larger of reading W and multiplying."""
        return _seconds(name, request, platform)

    def exactly(request: Request, platform: Platform) -> Execution:
        """Values in float16."""
        return "exact emulation"

    def nothing(request: Request, platform: Platform) -> str | None:
        """Products are exact and sums are float32 (int8: int32, exact)."""
        return None

    return KernelSpec(
        name=name, layout=layout, implementation="anybit.kernels.triton.w8a8:Rows8", can_implement=can_implement,
        seconds=seconds, stored_bytes=stored_bytes, about=about, executes=exactly if exact else executes,
        rounds=nothing if exact or name == INT8_NAME else fp8_rounds, workspace=_workspace,
        is_batch_invariant=True,
        cases=lambda arch: [c for made in (compile_cases, hopper_cases, one_cases) for c in made(arch)
                            if c.kernel == name],
    )


INT8 = _spec(INT8_NAME, "int8-rows", ("int8", "uint8"),
             "int8 codes multiplied as int8, zero points taken out in int32; x quantized in one pass")
FP8 = _spec(FP8_NAME, "fp8-rows", _FP8,
            "fp8 codes multiplied as fp8 where the chip can, else exactly in float16; x quantized in one pass")
FP8_EXACT = _spec(FP8_EXACT_NAME, "fp8-rows", _FP8,
                  "fp8 codes multiplied exactly in float16, for chips whose fp8 adder is narrow", exact=True)
SPECS: Final = (INT8, FP8, FP8_EXACT)
