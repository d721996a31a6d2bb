"""Spec of the unquantized product for few rows: W streamed once, K split until the chip is full. Torch-free.

It reads the stored tensor of `torch-dense`, which takes prefill. cuBLAS and hipBLASLt split K less than a memory-bound
product wants at one to sixteen rows; from 64 rows on they are as fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from anybit.kernels.compiling import OVERLAPPING, CompileCase, overlap
from anybit.kernels.linear import dense
from anybit.kernels.linear.triton_endings import sums_cases
from anybit.kernels.linear.triton_w8a8_tiles import UNITS, expected_instruction
from anybit.kernels.request import KernelSpec, Reason, Request, Verdict, gather
from anybit.platforms import Platform
from anybit.platforms.archs import ARCHS

__all__ = ["LARGEST_M", "SPEC", "Config", "compile_cases", "configure"]

LARGEST_M: Final = 64
NAME: Final = "triton-skinny"
_DTYPES: Final = {"bfloat16": "bf16", "float16": "fp16"}
# measured on an H200, 18 MB to 940 MB: 0.86 to 1.0 times as fast as cuBLAS
_LAUNCH_SECONDS: Final = 6.5e-6
_OF_BANDWIDTH: Final = 0.8
_MORE_ROWS_SHARE: Final = 0.75  # of that beyond 16 rows


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options; `split` programs share K."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    split: int


def configure(n: int, k: int, m: int, arch: str) -> Config:
    """Tiles for at most 64 rows by [N, K]; pure."""
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    is_amd = ARCHS[arch].vendor == "amd"
    bk, bn = (64 if is_amd else 128), 64
    stages = 2 if is_amd else 4
    while stages > 2 and stages * bk * (bm + bn) * 2 > ARCHS[arch].shared_bytes - 4096:
        stages -= 1
    tiles, blocks = -(-n // bn), -(-k // bk)
    split = max(1, min(UNITS.get(arch, 64) * 4 // max(tiles, 1), blocks // 4, 16))
    while split > 1 and -(-blocks // split) * (split - 1) >= blocks:
        split -= 1  # no program without work
    return Config(bm, bn, bk, 4, stages, split)


def can_implement(request: Request, platform: Platform) -> Verdict:
    """Unquantized layers on a listed GPU, up to 64 rows."""
    reasons = [*dense.can_implement(request, platform).reasons]
    if platform.vendor not in ("nvidia", "amd"):
        reasons.append(Reason("vendor", f"runs on a GPU, this is {platform.vendor} {platform.arch}",
                              {"wanted": ["nvidia", "amd"], "found": platform.vendor}))
    elif platform.arch not in UNITS:
        reasons.append(Reason("arch", f"{platform.arch}: not compiled for it", {"found": platform.arch,
                                                                                 "wanted": list(UNITS)}))
    elif "triton" not in platform.providers:
        reasons.append(Reason("provider", "Triton is not installed", {"wanted": "triton"}))
    if request.dtype not in _DTYPES:
        reasons.append(Reason("dtype", f"activations of {request.dtype}", {"wanted": list(_DTYPES),
                                                                           "found": request.dtype}))
    if request.kind == "embedding":
        reasons.append(Reason("kind", "a lookup multiplies nothing", {"kind": request.kind}))
    if request.regime == "prefill":
        reasons.append(Reason("regime", f"made for up to {LARGEST_M} rows", {"tokens": request.tokens}))
    return gather(*reasons)


def seconds(request: Request, platform: Platform) -> float:
    """Reading W once."""
    share = _OF_BANDWIDTH * (_MORE_ROWS_SHARE if request.tokens > 16 else 1.0)
    read = 2.0 * request.shape[-1] * request.shape[-2] / max(platform.bandwidth * share, 1e9)
    return _LAUNCH_SECONDS + max(read, request.flops / max(platform.rates.get(request.dtype, 1e11) * 0.3, 1e9))


def compile_cases(arch: str) -> list[CompileCase]:
    """One and 64 rows by [4096, 4096], as `configure` launches them on `arch`."""
    if arch not in UNITS:
        return []
    cases = []
    for dtype, name in _DTYPES.items():
        for m in (1, LARGEST_M):
            config = configure(4096, 4096, m, arch)
            pointer = f"*{name}"
            types = {"x_ptr": pointer, "w_ptr": pointer, "bias_ptr": pointer, "out_ptr": pointer, "part_ptr": "*fp32",
                     "count_ptr": "*i32", "M": "i32", "N": "i32", "K": "i32", "stride": "i32"}
            constants = {"HAS_BIAS": True, "BM": config.bm, "BN": config.bn, "BK": config.bk, "SPLIT": config.split,
                         "FUSED": not arch.startswith("gfx"), "EVEN_K": True, "WAITS": arch in OVERLAPPING}
            instruction = expected_instruction(arch, "float16", 16)
            cases.append(CompileCase(
                NAME, "anybit.kernels.triton.skinny_jit:skinny_matmul", arch, f"{dtype} M={m}", types, constants,
                divisible=("N", "K", "stride"), num_warps=config.warps, num_stages=config.stages,
                options=overlap(arch in OVERLAPPING),
                expects=(instruction.replace("f16", "b?f16"),),
            ))
    return [*cases, *sums_cases(NAME, arch)]


SPEC = KernelSpec(
    name=NAME,
    layout="dense",
    implementation="anybit.kernels.triton.skinny:Skinny",
    can_implement=can_implement,
    seconds=seconds,
    rounds=dense.rounds,
    stored_bytes=dense.stored_bytes,
    about="unquantized product for few rows: W streamed once, K split, float32 sums and bias",
    cases=compile_cases,
    workspace=lambda request: 4 * 16 * min(request.tokens, LARGEST_M) * request.shape[-2],
)
