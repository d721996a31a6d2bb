"""Described devices: memory, bandwidth and vendors' dense matrix peaks, a source beside each row.

What all chips of an architecture share stands in `archs.py`. A row is added with its source or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Final

from anybit.errors import Unsupported
from anybit.platforms.archs import ARCHS
from anybit.platforms.platform import Platform

GIB: Final = 2**30
_TERA: Final = 1e12
_DESKTOP: Final = "modelled: two channels of DDR5-5600 at 0.7 of their rate, eight cores, sustained clock"
_SERVER: Final = "modelled: eight channels of DDR5-4800 at 0.7 of their rate, 32 cores, sustained clock"

# features, each row adding to the one before; GiB, GB/s, cores, TFLOP/s
_X86: Final = (
    ("cpu", ("avx2", "fma", "f16c"), 16, 60, 8, {"float32": 0.5, "bfloat16": 0.25}, _DESKTOP),
    ("cpu-avx512", ("avx512f", "avx512bw", "avx512vl"), 64, 60, 8, {"float32": 1.0, "bfloat16": 0.5}, _DESKTOP),
    ("cpu-avx512-vnni", ("avx512_vnni",), 64, 60, 8, {"float32": 1.0, "bfloat16": 0.5, "int8": 4.0}, _DESKTOP),
    ("cpu-avx512-bf16", ("avx512_bf16",), 64, 60, 8, {"float32": 1.0, "bfloat16": 2.0, "int8": 4.0}, _DESKTOP),
    ("cpu-amx", ("amx_tile", "amx_int8", "amx_bf16"), 256, 215, 32,
     {"float32": 4.0, "bfloat16": 50.0, "int8": 100.0}, _SERVER),
)
_ARM: Final = (
    ("cpu-arm", ("neon", "asimd"), 16, 60, 8, {"float32": 0.3}, _DESKTOP),
    ("cpu-arm-sve", ("sve", "bf16", "i8mm"), 128, 215, 32, {"float32": 2.5, "bfloat16": 5.0, "int8": 10.0}, _SERVER),
)

# name, arch, GiB, GB/s, source, dense TFLOP/s by operand format
_NVIDIA: Final = (
    ("t4", "sm_75", 16, 320, "NVIDIA T4 data sheet", {"float32": 8.1, "float16": 65, "int8": 130}),
    ("a100", "sm_80", 80, 2039, "NVIDIA A100 80GB SXM data sheet",
     {"float32": 19.5, "bfloat16": 312, "float16": 312, "int8": 624}),
    ("a10", "sm_86", 24, 600, "NVIDIA A10 data sheet",
     {"float32": 31.2, "bfloat16": 125, "float16": 125, "int8": 250}),
    ("rtx-a6000", "sm_86", 48, 768, "NVIDIA RTX A6000 data sheet",
     {"float32": 38.7, "bfloat16": 154.8, "float16": 154.8, "int8": 309.7}),
    ("rtx3060", "sm_86", 12, 360, "NVIDIA Ampere GA102 whitepaper, scaled to 28 multiprocessors at 1.78 GHz",
     {"float32": 12.7, "bfloat16": 25.5, "float16": 25.5, "int8": 102}),
    ("rtx3090", "sm_86", 24, 936, "NVIDIA Ampere GA102 whitepaper",
     {"float32": 35.6, "bfloat16": 71, "float16": 71, "int8": 284}),
    ("l4", "sm_89", 24, 300, "NVIDIA L4 data sheet",
     {"float32": 30.3, "bfloat16": 121, "float16": 121, "int8": 242, "fp8": 242}),
    ("l40s", "sm_89", 48, 864, "NVIDIA L40S data sheet",
     {"float32": 91.6, "bfloat16": 362, "float16": 362, "int8": 733, "fp8": 733}),
    ("rtx4090", "sm_89", 24, 1008, "NVIDIA Ada GPU architecture whitepaper",
     {"float32": 82.6, "bfloat16": 165.2, "float16": 165.2, "int8": 660.6, "fp8": 330.3}),
    ("h100", "sm_90", 80, 3350, "NVIDIA H100 SXM data sheet",
     {"float32": 67, "bfloat16": 989, "float16": 989, "int8": 1979, "fp8": 1979}),
    ("h100-pcie", "sm_90", 80, 2000, "NVIDIA H100 PCIe data sheet",
     {"float32": 51, "bfloat16": 756, "float16": 756, "int8": 1513, "fp8": 1513}),
    ("h200", "sm_90", 141, 4800, "NVIDIA H200 SXM data sheet",
     {"float32": 67, "bfloat16": 989, "float16": 989, "int8": 1979, "fp8": 1979}),
    ("b200", "sm_100", 180, 8000, "NVIDIA DGX B200 data sheet, per GPU",
     {"float32": 75, "bfloat16": 2250, "float16": 2250, "int8": 4500, "fp8": 4500, "fp4": 9000}),
    ("b300", "sm_103", 268, 8000, "NVIDIA HGX B300 data sheet, per GPU",
     {"float32": 75, "bfloat16": 2250, "float16": 2250, "int8": 125, "fp8": 4500, "fp4": 13500}),
    ("rtx5090", "sm_120", 32, 1792, "NVIDIA RTX Blackwell GPU architecture whitepaper",
     {"float32": 104.8, "bfloat16": 209.5, "float16": 209.5, "int8": 838, "fp8": 419, "fp4": 1676}),
    ("rtx-pro-6000", "sm_120", 96, 1792, "NVIDIA RTX PRO 6000 Blackwell data sheet",
     {"float32": 125, "bfloat16": 503.8, "float16": 503.8, "int8": 1007.6, "fp8": 1007.6, "fp4": 2015}),
    ("dgx-spark", "sm_121", 119, 273,
     "NVIDIA DGX Spark product page (1 PFLOP sparse FP4), the other formats in the ratios 1:2:4 of Blackwell",
     {"float32": 31, "bfloat16": 125, "float16": 125, "int8": 250, "fp8": 250, "fp4": 500}),
)
_AMD: Final = (
    ("mi210", "gfx90a", 64, 1638, "AMD Instinct MI210 data sheet",
     {"float32": 45.3, "bfloat16": 181, "float16": 181, "int8": 181}),
    ("mi250x", "gfx90a", 64, 1638, "AMD Instinct MI250X data sheet, one of two dies",
     {"float32": 47.9, "bfloat16": 191.5, "float16": 191.5, "int8": 191.5}),
    ("mi300a", "gfx942", 128, 5300, "AMD Instinct MI300A data sheet",
     {"float32": 122.6, "bfloat16": 980.6, "float16": 980.6, "int8": 1961.2, "fp8": 1961.2}),
    ("mi300x", "gfx942", 192, 5300, "AMD Instinct MI300X data sheet",
     {"float32": 163.4, "bfloat16": 1307.4, "float16": 1307.4, "int8": 2614.9, "fp8": 2614.9}),
    ("mi325x", "gfx942", 256, 6000, "AMD Instinct MI325X data sheet",
     {"float32": 163.4, "bfloat16": 1307.4, "float16": 1307.4, "int8": 2614.9, "fp8": 2614.9}),
    ("mi355x", "gfx950", 288, 8000, "AMD Instinct MI355X data sheet",
     {"float32": 157.3, "bfloat16": 2516.6, "float16": 2516.6, "int8": 5033.2, "fp8": 5033.2, "fp6": 10066,
      "fp4": 10066}),
    ("rx7900xtx", "gfx1100", 24, 960, "AMD Radeon RX 7900 XTX product page",
     {"float32": 61.4, "bfloat16": 122.8, "float16": 122.8, "int8": 122.8}),
    ("w7900", "gfx1100", 48, 864, "AMD Radeon PRO W7900 product page",
     {"float32": 61.3, "bfloat16": 122.6, "float16": 122.6, "int8": 122.6}),
    ("strix-halo", "gfx1151", 96, 256,
     "AMD Ryzen AI Max+ 395 product page: 40 compute units at 2.9 GHz, LPDDR5X-8000; 96 of 128 GiB for the GPU",
     {"float32": 29.7, "bfloat16": 59.4, "float16": 59.4, "int8": 59.4}),
    ("rx9060xt", "gfx1200", 16, 320, "AMD Radeon RX 9060 XT product page",
     {"float32": 25.6, "bfloat16": 103, "float16": 103, "int8": 205, "fp8": 205}),
    ("rx9070xt", "gfx1201", 16, 640, "AMD Radeon RX 9070 XT product page",
     {"float32": 48.7, "bfloat16": 194.6, "float16": 194.6, "int8": 389, "fp8": 389}),
)

_Cpu = tuple[str, tuple[str, ...], float, float, int, Mapping[str, float], str]
_Gpu = tuple[str, str, float, float, str, Mapping[str, float]]


def _cpus(arch: str, rows: Sequence[_Cpu]) -> Iterator[Platform]:
    features: frozenset[str] = frozenset()
    for name, added, gib, gb_per_second, cores, teraflops, source in rows:
        features |= set(added)
        yield Platform(
            name, "cpu", arch, features, frozenset({"torch", "native"}), memory_bytes=int(gib * GIB),
            bandwidth=gb_per_second * 1e9, rates={k: v * _TERA for k, v in teraflops.items()}, cores=cores,
            sources={"all": source},
        )


def _gpus(rows: Sequence[_Gpu]) -> Iterator[Platform]:
    for name, arch, gib, gb_per_second, source, teraflops in rows:
        facts = ARCHS[arch]
        yield Platform(
            name, facts.vendor, arch, features(arch), frozenset({"torch", "triton"}), memory_bytes=int(gib * GIB),
            bandwidth=gb_per_second * 1e9, rates={k: v * _TERA for k, v in teraflops.items()}, fp8=facts.fp8,
            sources={"all": source},
        )


def features(arch: str) -> frozenset[str]:
    """What a kernel may ask of a GPU architecture: matrix formats and block-scaled pairs (prefix "scaled:")."""
    facts = ARCHS[arch]
    return facts.matrix | {f"scaled:{pair}" for pair in facts.scaled}


PLATFORMS: Final[dict[str, Platform]] = {
    p.name: p for p in (*_cpus("x86_64", _X86), *_cpus("aarch64", _ARM), *_gpus(_NVIDIA), *_gpus(_AMD))
}


# the device that stands for an architecture where a user names only that
OF_ARCH: Final[Mapping[str, str]] = {
    "sm_75": "t4", "sm_80": "a100", "sm_86": "rtx3090", "sm_89": "rtx4090", "sm_90": "h100", "sm_100": "b200",
    "sm_103": "b300", "sm_120": "rtx5090", "sm_121": "dgx-spark",
    "gfx90a": "mi250x", "gfx942": "mi300x", "gfx950": "mi355x", "gfx1100": "rx7900xtx", "gfx1151": "strix-halo",
    "gfx1200": "rx9060xt", "gfx1201": "rx9070xt",
}
assert all(PLATFORMS[device].arch == arch for arch, device in OF_ARCH.items()), "a device of another architecture"
assert set(OF_ARCH) == set(ARCHS), "an architecture that no device stands for"


def named(name: str) -> Platform:
    """The described platform called `name`, or the device that stands for an architecture ("gfx942", "sm_90").

    Case, blanks and hyphens do not count. Raises Unsupported with the near names for any other.
    """
    spellings = {_plain(device): device for device in PLATFORMS} | {_plain(a): d for a, d in OF_ARCH.items()}
    found = spellings.get(_plain(name))
    if found is None:
        near = get_close_matches(name.lower(), (*PLATFORMS, *OF_ARCH), n=3)
        raise Unsupported(
            f"no platform is called {name!r}",
            found=name,
            wanted="one of: " + ", ".join((*PLATFORMS, *OF_ARCH)),
            remedy=f"perhaps {' or '.join(near)}" if near else "choose one of the list",
        )
    return PLATFORMS[found]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in " -_")
