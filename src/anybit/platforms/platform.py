"""The value that describes a chip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anybit.platforms.archs import ARCHS, Arch, Fp8, Vendor


@dataclass(frozen=True)
class Platform:
    """A chip and what is installed for it.

    name       as the user types it ("mi300x"); for a detected one its own name
    arch       "x86_64", "aarch64", "sm_90", "gfx942"
    features   instruction-set or matrix-unit features that a kernel may ask for ("avx512f", "fp8_e4m3fn")
    providers  optional libraries that were found ("native", "triton", "aiter"), probed and never assumed
    memory_bytes, bandwidth    bytes, bytes per second
    rates      FLOP/s by operand format, dense
    driver     its version, "" where it is not known or not needed
    sources    where a figure comes from
    """

    name: str
    vendor: Vendor
    arch: str
    features: frozenset[str] = frozenset()
    providers: frozenset[str] = frozenset()
    memory_bytes: int = 0
    bandwidth: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict)
    cores: int = 0
    fp8: Fp8 = "none"
    sources: Mapping[str, str] = field(default_factory=dict)
    is_detected: bool = False
    driver: str = ""

    @property
    def facts(self) -> Arch | None:
        """What its architecture has in common; None for a CPU or an architecture without a row."""
        return ARCHS.get(self.arch)

    @property
    def title(self) -> str:
        """One short line: name and arch."""
        return self.name if self.arch in self.name else f"{self.name} ({self.arch})"

    def to_dict(self) -> dict[str, Any]:
        """The platform as data, units in the names."""
        return {
            "name": self.name,
            "vendor": self.vendor,
            "arch": self.arch,
            "features": sorted(self.features),
            "providers": sorted(self.providers),
            "memory_bytes": self.memory_bytes,
            "bandwidth_bytes_per_second": self.bandwidth,
            "rates_flop_per_second": dict(self.rates),
            "cores": self.cores,
            "fp8": self.fp8,
            "sources": dict(self.sources) | ({"arch": self.facts.source} if self.facts else {}),
            "is_detected": self.is_detected,
        }
