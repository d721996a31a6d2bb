"""What every chip of an architecture has in common: facts that decide whether and how exactly a kernel runs.

Which operand types the matrix units take is a fact of what a compiler makes of them as much as of the chip: the column
`matrix` names the formats for which the pinned Triton emits a matrix instruction of that very format (the gate compiles
them), the rest is upcast or refused. Capability is never ordered: nothing here compares two architectures by number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

__all__ = ["ARCHS", "Arch", "Fp8", "Vendor"]

Vendor = Literal["cpu", "nvidia", "amd"]
Fp8 = Literal["fn", "fnuz", "none"]


def _nothing() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Arch:
    """One architecture.

    matrix         operand formats that its matrix units multiply themselves (tl.dot)
    scaled         block-scaled pairs that they multiply themselves (tl.dot_scaled): "mxfp4", "mxfp8", "nvfp4", ...
    shared_bytes   shared memory (LDS) that one workgroup may use
    wave           threads that run in lockstep
    fp8            flavour of its 8-bit floats; weights in the other flavour are converted exactly, or decoded
    accumulators   operand format -> how sums are kept where that is not a plain float32 or int32
    flushes        operand formats whose subnormals the matrix unit reads as zero
    source         where the facts come from
    """

    name: str
    vendor: Vendor
    matrix: frozenset[str]
    scaled: frozenset[str] = frozenset()
    shared_bytes: int = 0
    wave: int = 32
    fp8: Fp8 = "none"
    accumulators: Mapping[str, str] = field(default_factory=_nothing)
    flushes: frozenset[str] = frozenset()
    source: str = ""


_KIB: Final = 1024
_HALVES: Final = ("bfloat16", "float16")
_FN: Final = ("fp8_e4m3fn", "fp8_e5m2")
_FP22: Final = dict.fromkeys(_FN, "sums of one instruction keep about 13 mantissa bits: promote to float32 within K")
_SATURATES: Final = {"int8": "int32, saturating; unreachable below K = 131,072"}
_CUDA: Final = "CUDA C++ programming guide, table of compute capabilities; instructions as compiled by `make gate`"
_HOPPER: Final = _CUDA + "; accumulator: DeepSeek-V3 report, section 3.3.2"
_CDNA: Final = "AMD instruction set guide of this generation; instructions as compiled by `make gate`"
_FLUSH: Final = "; subnormals: PyTorch documentation, Numerical accuracy, AMD Instinct MI200"


def _arch(
    name: str, vendor: Vendor, matrix: tuple[str, ...], *, kib: int, source: str, scaled: tuple[str, ...] = (),
    wave: int = 32, fp8: Fp8 = "none", accumulators: Mapping[str, str] | None = None, flushes: tuple[str, ...] = (),
) -> Arch:
    return Arch(name, vendor, frozenset(matrix), frozenset(scaled), kib * _KIB, wave, fp8,
                MappingProxyType(dict(accumulators or {})), frozenset(flushes), source)


ARCHS: Final[Mapping[str, Arch]] = MappingProxyType({
    row.name: row
    for row in (
        _arch("sm_75", "nvidia", (), kib=64, source=_CUDA + "; Triton emits no matrix instruction for Turing"),
        _arch("sm_80", "nvidia", (*_HALVES, "int8"), kib=163, accumulators=_SATURATES, source=_CUDA),
        _arch("sm_86", "nvidia", (*_HALVES, "int8"), kib=99, accumulators=_SATURATES, source=_CUDA),
        _arch("sm_89", "nvidia", (*_HALVES, "int8", *_FN), kib=99, fp8="fn", accumulators={**_SATURATES, **_FP22},
              source=_CUDA + "; accumulator: SageAttention2, section 3"),
        _arch("sm_90", "nvidia", (*_HALVES, "int8", *_FN), kib=227, fp8="fn", accumulators=_FP22, source=_HOPPER),
        _arch("sm_100", "nvidia", (*_HALVES, "int8", *_FN), scaled=("mxfp4", "mxfp8", "mxfp8_mxfp4", "nvfp4"), kib=227,
              fp8="fn", source=_CUDA),
        _arch("sm_103", "nvidia", (*_HALVES, "int8", *_FN), scaled=("mxfp4", "mxfp8", "mxfp8_mxfp4", "nvfp4"), kib=227,
              fp8="fn", accumulators=_SATURATES, source=_CUDA),
        _arch("sm_120", "nvidia", (*_HALVES, "int8", *_FN), scaled=("mxfp4", "nvfp4"), kib=99, fp8="fn",
              accumulators=_SATURATES, source=_CUDA),
        _arch("sm_121", "nvidia", (*_HALVES, "int8", *_FN), scaled=("mxfp4", "nvfp4"), kib=99, fp8="fn",
              accumulators=_SATURATES, source=_CUDA),
        _arch("gfx90a", "amd", (*_HALVES, "int8"), kib=64, wave=64, flushes=_HALVES, source=_CDNA + _FLUSH),
        _arch("gfx942", "amd", (*_HALVES, "int8", "fp8_e4m3fnuz", "fp8_e5m2fnuz"), kib=64, wave=64, fp8="fnuz",
              source=_CDNA),
        _arch("gfx950", "amd", (*_HALVES, "int8", *_FN), scaled=("mxfp4", "mxfp6", "mxfp8", "mxfp8_mxfp4"), kib=160,
              wave=64, fp8="fn", source=_CDNA),
        _arch("gfx1100", "amd", (*_HALVES, "int8"), kib=64, source=_CDNA),
        _arch("gfx1151", "amd", (*_HALVES, "int8"), kib=64, source=_CDNA),
        _arch("gfx1200", "amd", (*_HALVES, "int8", *_FN), kib=64, fp8="fn", source=_CDNA),
        _arch("gfx1201", "amd", (*_HALVES, "int8", *_FN), kib=64, fp8="fn", source=_CDNA),
    )
})
