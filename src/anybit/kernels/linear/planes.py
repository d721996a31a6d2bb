"""Specs of the compiled CPU family: code planes read packed by a small C library.

Two kernels share one layout: a matrix-vector product that decodes in registers (small M), and for prefill the same
decoding into a tile that torch multiplies. Both form the float32 reference weight bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import replace

from anybit.kernels.native.support import reasons_against
from anybit.kernels.request import KernelSpec, Reason, Request, Verdict, gather, scale_bytes
from anybit.numerics.formats import number_format
from anybit.platforms import Platform
from anybit.schemes import Scheme

_CALL_SECONDS = 6e-6
# of the platform's float32 rate: 345 to 390 GFLOP/s on two cores of Zen 5 (rate 250) at M >= 64, where torch's product
# makes 105 to 170; without wide vectors it is slower
_GEMM_SHARE_WIDE, _GEMM_SHARE = 1.5, 0.7
_GEMM_TOKENS = 32  # a panel: fewer tokens cost as much
_DECODE_RATE = 8e9  # weights decoded to a tile per second and core
# weights multiplied per second and core, one token: 20 to 60e9 on Zen 5 by format (benchmarks/cpu_matvec.py)
_MATVEC_RATE_WIDE, _MATVEC_RATE = 25e9, 8e9


def _cannot(request: Request, platform: Platform) -> list[Reason]:
    reasons = []
    if platform.vendor != "cpu":
        reasons.append(Reason("vendor", f"runs on a CPU, this is {platform.vendor} {platform.arch}",
                              {"wanted": "cpu", "found": platform.vendor}))
    elif "native" not in platform.providers:
        reasons.append(Reason("provider", "the compiled library is not installed (no C compiler at install time?)",
                              {"wanted": "native"}))
    reasons += [Reason("scheme", text, {"scheme": str(request.scheme)})
                for text in reasons_against(in_order(request.scheme), request.shape)]
    return reasons


def in_order(scheme: Scheme) -> Scheme:
    """The scheme after its columns were sorted by group, as this layout stores act-order weights; x is permuted.

    Whether the groups are of one size, which sorting needs, shows when the map is read: a weight whose groups are not
    is stored by the reference family instead.
    """
    if not scheme.act_order:
        return scheme
    scales = tuple(replace(lv, placement="grid") if lv.placement == "gathered" else lv for lv in scheme.scales)
    offset = scheme.offset
    if offset is not None and offset.placement == "gathered":
        offset = replace(offset, placement="grid")
    return replace(scheme, scales=scales, offset=offset, act_order=False)


def _is_matvec(request: Request) -> bool:
    return request.regime != "prefill"


def can_matvec(request: Request, platform: Platform) -> Verdict:
    """Small M, or a lookup, of a scheme that the library stores."""
    many = request.kind != "embedding" and not _is_matvec(request)
    return gather(
        *_cannot(request, platform),
        Reason("regime", "made for few tokens: decoding is repeated for every eight", {"tokens": request.tokens})
        if many else None,
    )


def can_expand(request: Request, platform: Platform) -> Verdict:
    """Any M of a scheme that the library stores."""
    lookup = request.kind == "embedding"
    return gather(
        *_cannot(request, platform),
        Reason("kind", "a lookup multiplies nothing", {"kind": request.kind}) if lookup else None,
    )


def matvec_seconds(request: Request, platform: Platform) -> float:
    """Packed bytes at the memory's rate, or decoding at the cores' rate."""
    blocks = -(-request.tokens // 8)
    n, k = request.shape[-2:]
    read = n * k * request.scheme.weight_bits / 8 / max(platform.bandwidth, 1e9)
    rate = _MATVEC_RATE_WIDE if "avx512f" in platform.features else _MATVEC_RATE
    decode = n * k * (1 + 0.45 * (min(request.tokens, 8) - 1)) / (rate * max(platform.cores, 1))
    return _CALL_SECONDS + blocks * max(read, decode)


def expand_seconds(request: Request, platform: Platform) -> float:
    """Decoding once, a tile written and read, then the float32 product."""
    n, k = request.shape[-2:]
    decode = n * k / (_DECODE_RATE * max(platform.cores, 1)) + 4 * n * k / max(platform.bandwidth, 1e9)
    return 2 * _CALL_SECONDS + decode + request.flops / max(platform.rates.get("float32", 1e11), 1e9)


def gemm_seconds(request: Request, platform: Platform) -> float:
    """Decoding once, and a float32 product of our own that uses vectors of 16 where the processor has them."""
    n, k = request.shape[-2:]
    wide = "avx512f" in platform.features
    packing = 4.0 * request.tokens * k / max(platform.bandwidth, 1e9)
    rate = (_GEMM_SHARE_WIDE if wide else _GEMM_SHARE) * max(platform.rates.get("float32", 1e11), 1e9)
    decode = n * k / (_DECODE_RATE * max(platform.cores, 1))
    return _CALL_SECONDS + decode + packing + max(request.flops, 2.0 * _GEMM_TOKENS * n * k) / rate


def assumes_equal_groups(request: Request) -> str | None:
    """Act-order is known from headers, the sizes of its groups are not."""
    return "every group of the act-order map has the same number of columns" if request.scheme.act_order else None


def stored_bytes(request: Request) -> int:
    """Planes of codes with K padded to 32, scales as stored."""
    *stacked_rows, k = request.shape
    rows = math.prod(stacked_rows)
    bits = number_format(request.scheme.element).bits
    return rows * (-(-k // 32) * 32 * bits // 8) + scale_bytes(request.scheme, request.shape)


MATVEC = KernelSpec(
    name="native-matvec",
    layout="planes",
    implementation="anybit.kernels.linear.planes_native:Planes",
    can_implement=can_matvec,
    seconds=matvec_seconds,
    stored_bytes=stored_bytes,
    about="compiled: packed codes decoded in registers, float32 accumulation",
    assumes=assumes_equal_groups,
    is_batch_invariant=True,
)
GEMM = KernelSpec(
    name="native-gemm",
    layout="planes",
    implementation="anybit.kernels.linear.planes_native:Planes",
    can_implement=can_expand,
    seconds=gemm_seconds,
    stored_bytes=stored_bytes,
    about="compiled: a few rows decoded at a time and multiplied from the cache, float32 accumulation",
    assumes=assumes_equal_groups,
    is_batch_invariant=True,
)
EXPAND = KernelSpec(
    name="native-expand",
    layout="planes",
    implementation="anybit.kernels.linear.planes_native:Planes",
    can_implement=can_expand,
    seconds=expand_seconds,
    stored_bytes=stored_bytes,
    about="compiled: packed codes decoded to a float32 tile, then torch's matrix product",
    assumes=assumes_equal_groups,
)
