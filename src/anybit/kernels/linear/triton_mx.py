"""Spec of the block-scaled products: MXFP4, MXFP8 and NVFP4 on chips whose matrix unit takes them. Torch-free.

Layout "mx-rows": codes [N, K], 4 bit ones two a byte, with their 8 bit scales [N, K / group] as the chip reads them; K
is padded to 128 by code 0. Compiled for each architecture that claims a pair, and run on none of them by us yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from anybit.kernels.compiling import CompileCase
from anybit.kernels.request import Execution, KernelSpec, Reason, Request, Verdict, gather, scale_bytes
from anybit.kernels.triton.recipes import ARITHMETIC, can_quantize
from anybit.platforms import Platform
from anybit.platforms.archs import ARCHS
from anybit.schemes import ActivationSpec, Scheme

__all__ = ["NAME", "PAD", "SPEC", "Config", "Pair", "compile_cases", "configure", "constants_of", "pair_of"]

NAME: Final = "triton-mx-native"
PAD: Final = 128
PINNED_M: Final = 64  # rows for which tiles are chosen where every M must give the same bits
_FORMATS: Final[Mapping[str, str]] = {"fp4_e2m1": "e2m1", "fp8_e4m3fn": "e4m3", "fp8_e5m2": "e5m2"}
_DTYPES: Final = ("bfloat16", "float16")
_LAUNCH_SECONDS: Final = 6e-6  # of the quantizer and the product
# modelled, not measured: no chip with these instructions was at hand
_OF_BANDWIDTH: Final = 0.6
_OF_RATE: Final = 0.35


@dataclass(frozen=True)
class Pair:
    """The formats of x and W and the columns that share a scale; what `tl.dot_scaled` is specialized on."""

    x: str
    w: str
    group: int

    @property
    def name(self) -> str:
        """The pair as `platforms.archs` names it."""
        if self.group == 16:
            return "nvfp4"
        if self.x == self.w:
            return "mxfp4" if self.w == "e2m1" else "mxfp8"
        return "mxfp8_mxfp4" if self.w == "e2m1" else "mxfp8" if self.x != "e2m1" else "mxfp4_mxfp8"


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    band: int = 8


def pair_of(scheme: Scheme) -> Pair | None:
    """The pair of a scheme, None for one that is not block-scaled on both sides in the same groups."""
    spec = scheme.activation
    if spec is None or not scheme.scales or spec.recipe not in ARITHMETIC:
        return None
    finest, *others = scheme.scales
    x, w = _FORMATS.get(spec.element), _FORMATS.get(scheme.element)
    expected = ("e8m0", 32, ()) if finest.format == "e8m0" else ("fp8_e4m3fn", 16, (0,))
    format, group, coarse = expected
    fits = (finest.format == format and finest.block == (1, group) and spec.group_size == group
            and ARITHMETIC[spec.recipe].scale_codes == format and not finest.divide
            and all(level.placement == "grid" for level in scheme.scales)
            and all(level.block[1] in coarse for level in others))
    return Pair(x, w, group) if fits and x is not None and w is not None else None


def configure(k: int, m: int, arch: str, pair: Pair) -> Config:
    """Tiles for M rows by K columns; pure. The matrix unit of sm_100 works on 128 rows at once, the others on 16."""
    bk = 256 if pair.name == "mxfp4" and m > 64 and k % 256 == 0 else 128
    if arch in ("sm_100", "sm_103"):
        return Config(128, 128, bk, 4, 3)
    bm = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    stages = 2 if arch.startswith("gfx") else 3
    return Config(bm, 64 if bm <= 32 else 128, bk, 4 if bm <= 64 else 8, stages)


def can_implement(request: Request, platform: Platform) -> Verdict:
    """Block-scaled weights and inputs, on a chip with block-scaled matrix instructions for the pair."""
    scheme, reasons = request.scheme, []
    pair = pair_of(scheme)
    facts = ARCHS.get(platform.arch)
    if pair is None:
        reasons.append(Reason("scheme", "not micro-scaled on both sides in the same groups", {"scheme": str(scheme)}))
    if platform.vendor not in ("nvidia", "amd") or facts is None:
        reasons.append(Reason("vendor", f"runs on a GPU, this is {platform.vendor} {platform.arch}",
                              {"wanted": ["nvidia", "amd"], "found": platform.vendor}))
    elif pair is not None and pair.name not in facts.scaled:
        reasons.append(Reason("matrix", f"{platform.arch} has no block-scaled matrix instruction for {pair.name}",
                              {"pair": pair.name, "has": sorted(facts.scaled)}))
    if platform.vendor in ("nvidia", "amd") and "triton" not in platform.providers:
        reasons.append(Reason("provider", "Triton is not installed", {"wanted": "triton"}))
    cannot = can_quantize(scheme.activation) if scheme.activation is not None else None
    if cannot is not None:
        reasons.append(Reason("recipe", cannot, {}))
    if scheme.offset is not None or scheme.act_order or scheme.round_to is not None:
        reasons.append(Reason("form", "offsets, act-order and rounded values have no block-scaled form", {}))
    if request.dtype not in _DTYPES:
        reasons.append(Reason("dtype", f"activations of {request.dtype}", {"wanted": list(_DTYPES)}))
    if request.kind == "embedding":
        reasons.append(Reason("kind", "a lookup multiplies nothing", {"kind": request.kind}))
    return gather(*reasons)


def seconds(request: Request, platform: Platform) -> float:
    """Quantization of x, then the larger of reading W and multiplying."""
    n, k = request.shape[-2:]
    pair = pair_of(request.scheme)
    is_four = pair is not None and pair.x == pair.w == "e2m1"
    rate = platform.rates.get("fp4" if is_four else "fp8", platform.rates.get("bfloat16", 1e12))
    read = n * k * (request.scheme.weight_bits / 8 + 1 / 16) / max(platform.bandwidth * _OF_BANDWIDTH, 1e9)
    quantize = 4.0 * request.tokens * k / max(platform.bandwidth, 1e9)
    rows = max(request.tokens, 128 if platform.arch in ("sm_100", "sm_103") else 16)
    multiply = 2.0 * rows * n * k / max(rate * _OF_RATE, 1e9)
    return _LAUNCH_SECONDS + quantize + max(read, multiply)


def stored_bytes(request: Request) -> int:
    """Codes of a K padded to 128, their scales, a float32 factor a row, coarse scales as stored."""
    *stacked_rows, k = request.shape
    rows = math.prod(stacked_rows)
    padded = -(-k // PAD) * PAD
    pair = pair_of(request.scheme)
    blocks = rows * padded // (pair.group if pair else 32)
    coarse = Scheme(request.scheme.element, request.scheme.scales[1:])
    return rows * padded * request.scheme.weight_bits // 8 + blocks + 4 * rows + scale_bytes(coarse, request.shape)


def native(request: Request, platform: Platform) -> Execution:
    """The matrix unit takes codes and scales."""
    return "native"


# --- what must compile ------------------------------------------------------------------------------------------------

_CASES: Final[tuple[tuple[Pair, ActivationSpec], ...]] = (
    (Pair("e2m1", "e2m1", 32), ActivationSpec("fp4_e2m1", True, "group", "mxfp4_even", 32)),
    (Pair("e4m3", "e4m3", 32), ActivationSpec("fp8_e4m3fn", True, "group", "mxfp8_log2", 32)),
    (Pair("e4m3", "e2m1", 32), ActivationSpec("fp8_e4m3fn", True, "group", "mx_even", 32)),
    (Pair("e2m1", "e2m1", 16), ActivationSpec("fp4_e2m1", False, "group", "nvfp4", 16)),
)


def constants_of(
    pair: Pair, config: Config, *, has_outer: bool, has_factor: bool, has_bias: bool
) -> dict[str, Any]:
    """Compile-time arguments of `mx_matmul`."""
    return {
        "X_FORMAT": pair.x, "W_FORMAT": pair.w, "GROUP": pair.group, "X_PACK": 2 if pair.x == "e2m1" else 1,
        "W_PACK": 2 if pair.w == "e2m1" else 1, "HAS_OUTER": has_outer, "HAS_FACTOR": has_factor, "HAS_BIAS": has_bias,
        "BM": config.bm, "BN": config.bn, "BK": config.bk, "BAND": config.band,
    }


def compile_cases(arch: str) -> list[CompileCase]:
    """Each pair that the architecture claims, in two sizes of M, as `configure` launches it."""
    facts = ARCHS.get(arch)
    codes = {"e2m1": "*u8", "e4m3": "*fp8e4nv", "e5m2": "*fp8e5"}
    cases = []
    for pair, _ in _CASES:
        if facts is None or pair.name not in facts.scaled:
            continue
        is_global = pair.group == 16
        for m in (16, 512):
            config = configure(4096, m, arch, pair)
            scale = "*fp8e4nv" if is_global else "*u8"
            types = {"x_ptr": codes[pair.x], "xs_ptr": scale, "w_ptr": codes[pair.w], "ws_ptr": scale,
                     "outer_ptr": "*fp32", "factor_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16",
                     "M": "i32", "N": "i32", "K": "i32"}
            constants = constants_of(pair, config, has_outer=is_global, has_factor=is_global, has_bias=False)
            instruction = r"v_mfma_scale_f32" if arch.startswith("gfx") else r"mma\S*(block_scale|scale_vec)"
            cases.append(CompileCase(NAME, "anybit.kernels.triton.mx_native_jit:mx_matmul", arch, f"{pair.name} M={m}",
                                     types, constants, divisible=("N", "K"), num_warps=config.warps,
                                     num_stages=config.stages, expects=(instruction,)))
    return cases


SPEC = KernelSpec(
    name=NAME,
    layout="mx-rows",
    implementation="anybit.kernels.triton.mx_native:MxRows",
    can_implement=can_implement,
    seconds=seconds,
    stored_bytes=stored_bytes,
    about="block-scaled products in the matrix unit: MXFP4, MXFP8, NVFP4 on both sides; compiled, not run",
    executes=native,
    is_batch_invariant=True,
    cases=compile_cases,
    workspace=lambda request: request.tokens * (2 * request.shape[-1] + 8),
)
