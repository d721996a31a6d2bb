"""Platforms as values: what a chip is, as data, so that every decision can be made and tested without it.

`named("mi300x")` gives a described device, `detect()` the one at hand (no torch). Capability is
(vendor, arch, features), never one number compared across vendors.
"""

from anybit.platforms.archs import ARCHS, Arch
from anybit.platforms.detection import detect
from anybit.platforms.platform import Platform
from anybit.platforms.table import PLATFORMS, named

__all__ = ["ARCHS", "PLATFORMS", "Arch", "Platform", "detect", "named"]
