"""Described devices. Figures are vendors' dense peaks; a source stands beside each.

Only what planning needs today: memory, bandwidth, matrix rates by operand format, and the flavour of FP8. A row is
added with its source or not at all.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Final, Literal

from anybit.errors import Unsupported
from anybit.platforms.platform import Platform

GIB: Final = 2**30
_TERA: Final = 1e12
FLAVOURS: Final[dict[str, Literal["fn", "fnuz", "none"]]] = {"fn": "fn", "fnuz": "fnuz", "none": "none"}

_CPU_SOURCE: Final = {"all": "modelled: a desktop with two channels of DDR5 and eight cores at their sustained clock"}


def _gpu(
    name: str, vendor: str, arch: str, gib: float, gb_per_second: float, flavour: str, source: str, **teraflops: float
) -> Platform:
    features = {f"{vendor}-{arch}", *teraflops}
    return Platform(
        name=name,
        vendor="nvidia" if vendor == "nvidia" else "amd",
        arch=arch,
        features=frozenset(features),
        providers=frozenset({"torch", "triton"}),
        memory_bytes=int(gib * GIB),
        bandwidth=gb_per_second * 1e9,
        rates={k: v * _TERA for k, v in teraflops.items()},
        fp8=FLAVOURS[flavour],
        sources={"all": source},
    )


def _table() -> dict[str, Platform]:
    rows = [
        Platform(
            "cpu", "cpu", "x86_64", frozenset({"avx2", "fma", "f16c"}), frozenset({"torch", "native"}),
            memory_bytes=16 * GIB, bandwidth=40e9, rates={"float32": 0.5e12, "bfloat16": 0.25e12}, cores=8,
            sources=_CPU_SOURCE,
        ),
        Platform(
            "cpu-avx512", "cpu", "x86_64",
            frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}),
            frozenset({"torch", "native"}),
            memory_bytes=64 * GIB, bandwidth=60e9, rates={"float32": 1e12, "bfloat16": 2e12}, cores=8,
            sources=_CPU_SOURCE,
        ),
        Platform(
            "cpu-arm", "cpu", "aarch64", frozenset({"neon"}), frozenset({"torch", "native"}),
            memory_bytes=16 * GIB, bandwidth=60e9, rates={"float32": 0.3e12}, cores=8, sources=_CPU_SOURCE,
        ),
        _gpu("a100", "nvidia", "sm_80", 80, 2039, "none", "NVIDIA A100 80GB SXM data sheet",
             float32=19.5, bfloat16=312, float16=312, int8=624),
        _gpu("l40s", "nvidia", "sm_89", 48, 864, "fn", "NVIDIA L40S data sheet",
             float32=91.6, bfloat16=362, float16=362, int8=733, fp8=733),
        _gpu("rtx4090", "nvidia", "sm_89", 24, 1008, "fn", "NVIDIA Ada GPU architecture whitepaper",
             float32=82.6, bfloat16=165.2, float16=165.2, int8=660.6, fp8=330.3),
        _gpu("rtx3090", "nvidia", "sm_86", 24, 936, "none", "NVIDIA Ampere GA102 whitepaper",
             float32=35.6, bfloat16=71, float16=71, int8=284),
        _gpu("h100", "nvidia", "sm_90", 80, 3350, "fn", "NVIDIA H100 SXM data sheet",
             float32=67, bfloat16=989, float16=989, int8=1979, fp8=1979),
        _gpu("h200", "nvidia", "sm_90", 141, 4800, "fn", "NVIDIA H200 SXM data sheet",
             float32=67, bfloat16=989, float16=989, int8=1979, fp8=1979),
        _gpu("b200", "nvidia", "sm_100", 180, 8000, "fn", "NVIDIA DGX B200 data sheet, per GPU",
             float32=75, bfloat16=2250, float16=2250, int8=4500, fp8=4500, fp4=9000),
        _gpu("rtx5090", "nvidia", "sm_120", 32, 1792, "fn", "NVIDIA RTX Blackwell GPU architecture whitepaper",
             float32=104.8, bfloat16=209.5, float16=209.5, int8=838, fp8=419, fp4=1676),
        _gpu("mi250x", "amd", "gfx90a", 64, 1638, "none", "AMD Instinct MI250X data sheet, one of two dies",
             float32=47.9, bfloat16=191.5, float16=191.5, int8=191.5),
        _gpu("mi300x", "amd", "gfx942", 192, 5300, "fnuz", "AMD Instinct MI300X data sheet",
             float32=163.4, bfloat16=1307.4, float16=1307.4, int8=2614.9, fp8=2614.9),
        _gpu("mi325x", "amd", "gfx942", 256, 6000, "fnuz", "AMD Instinct MI325X data sheet",
             float32=163.4, bfloat16=1307.4, float16=1307.4, int8=2614.9, fp8=2614.9),
        _gpu("mi355x", "amd", "gfx950", 288, 8000, "fn", "AMD Instinct MI355X data sheet",
             float32=157.3, bfloat16=2516.6, float16=2516.6, int8=5033.2, fp8=5033.2, fp6=10066, fp4=10066),
        _gpu("rx7900xtx", "amd", "gfx1100", 24, 960, "none", "AMD Radeon RX 7900 XTX product page",
             float32=61.4, bfloat16=122.8, float16=122.8, int8=122.8),
        _gpu("rx9070xt", "amd", "gfx1201", 16, 640, "fn", "AMD Radeon RX 9070 XT product page",
             float32=48.7, bfloat16=194.6, float16=194.6, int8=389, fp8=389),
    ]
    return {row.name: row for row in rows}


PLATFORMS: Final[dict[str, Platform]] = _table()


def named(name: str) -> Platform:
    """The described platform called `name`; Unsupported with the near names otherwise."""
    found = PLATFORMS.get(name.lower())
    if found is None:
        near = get_close_matches(name.lower(), PLATFORMS, n=3)
        raise Unsupported(
            f"no platform is called {name!r}",
            found=name,
            wanted="one of: " + ", ".join(PLATFORMS),
            remedy=f"perhaps {' or '.join(near)}" if near else "choose one of the list",
        )
    return found
