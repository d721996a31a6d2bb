"""How the kernels of `planes_hopper` are launched, torch-free: which forms they take, tiles by shape, constants.

Where they take a product on sm_90, `planes_launch.configure` is not asked. Measured on an H200 for 4096 x 6144,
14336 x 4096, 4096 x 28672, 8192 x 57344 and, to see what holds beyond, 5120 x 13824, 4096 x 1024, 2048 x 8192.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from anybit.kernels.triton.planes_form import ROWS, Form
from anybit.kernels.triton.planes_launch import constants

__all__ = ["HopperConfig", "has_gluon", "hopper_config", "hopper_constants", "planned", "shared_bytes", "takes"]

_ARCH: Final = "sm_90"
_MULTIPROCESSORS: Final = 132
_COMPILES: Final = ((3, 5), (3, 9))  # versions of Triton whose Gluon the kernel is written for, first and last
_AT_ONCE: Final = 256  # inputs that the kernels take at once
_ALIGNED: Final = 16  # what K and the stride of x are multiples of, so that x is copied 16 bytes at a time


@dataclass(frozen=True)
class HopperConfig:
    """One launch: tile of tokens and rows, parts of K, warps, and what the kernels' docstrings say of the rest.

    steps  0: `few_kernel`, else XS of `many_kernel`
    """

    tokens: int
    rows: int
    split: int = 1
    warps: int = 4
    steps: int = 0
    stages: int = 3
    flight: int = 2

    @property
    def kernel(self) -> str:
        """Its name in `planes_hopper`."""
        return "many_kernel" if self.steps else "few_kernel"


@cache
def has_gluon() -> bool:
    """True if a Triton is installed whose Gluon compiles the kernel."""
    try:
        found = re.match(r"(\d+)\.(\d+)", version("triton"))
    except PackageNotFoundError:
        return False
    return found is not None and _COMPILES[0] <= (int(found[1]), int(found[2])) <= _COMPILES[1]


def takes(form: Form) -> bool:
    """Codes of 4 bits: integers with float scales of groups or rows, fp4 with folded scales."""
    if form.widths != (4,) or form.terms != 1 or form.addend != "none" or form.kind == "table":
        return False
    if form.scaling == "group":
        return form.kind == "int" and form.scale_kind == "float" and not form.super_groups and not form.words
    return form.scaling == "fold" or (form.scaling == "row" and form.kind == "int")


@lru_cache(maxsize=4096)
def hopper_config(form: Form, rows: int, columns: int, tokens: int, arch: str) -> HopperConfig | None:
    """The launch for a product of `tokens` with a weight [rows, columns]; None where `planes_launch` has it."""
    return planned(form, rows, columns, tokens) if arch == _ARCH and has_gluon() else None


def planned(form: Form, rows: int, columns: int, tokens: int) -> HopperConfig | None:
    """The same, whatever is installed; pure."""
    if columns % _ALIGNED or not takes(form):
        return None
    padded = -(-rows // ROWS) * ROWS
    tile = _tile(form, padded, tokens)
    if tile is None:
        return None
    tiles = padded // tile.rows * -(-tokens // tile.tokens)
    wanted = 396 if tokens <= _FEW else _MULTIPROCESSORS
    return replace(tile, split=_parts(-(-columns // _AT_ONCE), wanted // tiles, 8 if tokens <= 64 else 4))


def shared_bytes(form: Form, config: HopperConfig) -> int:
    """Shared memory of a launch: x, words, and what groups of rows have."""
    steps = max(config.steps, 1)
    held = (config.stages + steps - 2) // steps + 1  # of _AT_ONCE inputs
    scales = _AT_ONCE // form.tile // (4 if form.scaling == "fold" else form.run)
    beside = scales * config.rows * (4 + form.has_zeros)
    return config.stages * config.tokens * 2 * _AT_ONCE // steps + held * (config.rows * _AT_ONCE // 2 + beside)


_FEW: Final = 32


def _tile(form: Form, rows: int, tokens: int) -> HopperConfig | None:
    is_sum, even = form.scaling == "group", rows % 128 == 0
    if tokens <= _FEW:
        if not is_sum:
            return None
        bm = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
        return HopperConfig(bm, 128) if even and rows >= 100 * 128 else HopperConfig(bm, 64)
    if tokens <= 64:
        return HopperConfig(64, 128, warps=8, steps=2, stages=4) if even else HopperConfig(64, 64, steps=2, stages=4)
    if is_sum or tokens <= 128 or not even:
        wide = HopperConfig(128, 128, warps=8, steps=2, stages=4, flight=1)
        return wide if even else HopperConfig(128, 64, steps=2, stages=4, flight=1)
    return HopperConfig(256, 128, warps=8, steps=4, stages=5, flight=1)


def _parts(blocks: int, wanted: int, most: int) -> int:
    """Parts of K: at most `most`, each with at least two times 256 inputs, none without work."""
    split = max(1, min(wanted, most, blocks // 2))
    while split > 1 and -(-blocks // split) * (split - 1) >= blocks:
        split -= 1
    return split


def hopper_constants(
    form: Form, config: HopperConfig, columns: int, *, has_factors: bool, has_bias: bool
) -> dict[str, Any]:
    """The kernel's compile-time constants."""
    shared = constants(form)
    steps = {"XS": config.steps} if config.steps else {}
    return steps | {name: shared[name] for name in ("P", "G", "SCALING", "SKIND", "ZERO", "ZEROS")} | {
        "R": form.run, "BM": config.tokens, "BN": config.rows, "STAGES": config.stages, "FLIGHT": config.flight,
        "SPLIT": config.split > 1, "TOKENS": has_factors, "BIAS": has_bias, "EVEN": columns % _AT_ONCE == 0,
        "WARPS": config.warps,
    }  # fmt: skip
