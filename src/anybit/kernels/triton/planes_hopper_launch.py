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

    @property
    def waits(self) -> bool:
        """Launched while the kernel before it ends."""
        return not self.steps


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
    rows = -(-rows // ROWS) * ROWS
    if tokens <= 32:
        return _few(form, rows, columns, tokens)
    tile = _tile_of_64(rows, columns) if tokens <= 64 else _tile_of_many(form, rows, tokens)
    tiles = rows // tile.rows * -(-tokens // tile.tokens)
    return replace(tile, split=_parts(-(-columns // _AT_ONCE), _MULTIPROCESSORS // tiles, 8))


def shared_bytes(form: Form, config: HopperConfig) -> int:
    """Shared memory of a launch: x, words, and what groups of rows have."""
    steps = max(config.steps, 1)
    held = (config.stages + steps - 2) // steps + 1  # of _AT_ONCE inputs
    scales = _AT_ONCE // form.tile // (4 if form.scaling == "fold" else form.run)
    beside = scales * config.rows * (4 + form.has_zeros)
    return config.stages * config.tokens * 2 * _AT_ONCE // steps + held * (config.rows * _AT_ONCE // 2 + beside)


def _few(form: Form, rows: int, columns: int, tokens: int) -> HopperConfig | None:
    """At most 32 tokens. Left out: fp4 where programs of two warps, which hide more of its decoding, are faster."""
    is_sum, is_fine = form.scaling != "fold", form.group == 16
    bm, blocks = 8 if tokens <= 8 else 16 if tokens <= 16 else 32, -(-columns // _AT_ONCE)
    is_broad, is_huge = rows >= 12800 and rows % 128 == 0, rows >= 3 * 128 * _MULTIPROCESSORS
    narrow = HopperConfig(bm, 64, stages=2, flight=4 if is_fine else 2)
    if is_fine and not is_sum and is_huge and tokens > 4 and rows % 128 == 0:
        narrow = replace(narrow, rows=128)
    is_short = columns <= 8192 or rows <= 3072  # beyond, eight parts of K are too long for one program each
    if is_fine and not is_sum:
        taken = (is_short and rows < 20000) or is_huge if bm == 8 else rows <= (2048 if bm == 32 else 8192) and is_short
    else:
        taken = is_sum or (is_short and rows < (50000 if bm == 32 else 20000))
    if not taken:
        return None
    if is_fine and not is_sum and bm == 16 and rows > 3072 and rows % 128 == 0:
        tile = replace(narrow, rows=128, stages=3 if rows * columns <= 2**24 else 2)
        return replace(tile, split=_parts(blocks, 3 * _MULTIPROCESSORS // (rows // 128), 8))
    if bm == 8 or not is_broad or (bm == 16 and not is_sum):
        if bm == 8 and is_huge and is_sum:
            narrow = replace(narrow, stages=3)
        wanted, most = (650, 8) if bm < 32 else (400, 8 if rows <= 2048 else 4)
        tiles = rows // 64
        # parts of less than four times 256 inputs only where the chip would not be filled
        least = 4 if tiles * (blocks // 4) >= 2 * _MULTIPROCESSORS or (bm == 32 and tiles >= 64) else 2
        return replace(narrow, split=_parts(blocks, wanted // tiles, most, least))
    tile = replace(narrow, rows=128)
    return replace(tile, split=_even_parts(blocks, rows // 128))


def _tile_of_64(rows: int, columns: int) -> HopperConfig:
    if rows * columns <= 2**24:
        return HopperConfig(64, 64, stages=3)
    even = HopperConfig(64, 128, warps=8, steps=4, stages=6)
    return even if rows % 128 == 0 else HopperConfig(64, 64, steps=2, stages=4)


def _tile_of_many(form: Form, rows: int, tokens: int) -> HopperConfig:
    """More than 64 tokens: as many as the registers have room for, beside sums of groups half as many."""
    if rows % 128 or rows <= 2048:
        return HopperConfig(128, 64, steps=4, stages=6, flight=1)
    if form.scaling == "group":
        return HopperConfig(128, 128, warps=8, steps=4, stages=6, flight=1)
    if form.group == 16:
        if rows % 256 == 0 and (rows >= 12800 or rows // 256 * -(-tokens // 128) >= 96):
            return HopperConfig(128, 256, warps=16, steps=4, stages=6)
        return HopperConfig(128, 128, warps=8, steps=4, stages=6, flight=4)
    is_double = -(-tokens // 128) % 2 == 0 and rows // 128 * -(-tokens // 256) >= 96
    if is_double:
        return HopperConfig(256, 128, warps=8, steps=4, stages=5, flight=1)
    return HopperConfig(128, 128, warps=8, steps=4, stages=6, flight=2)


def _parts(blocks: int, wanted: int, most: int, least: int = 2) -> int:
    """Parts of K: at most `most`, each with at least `least` times 256 inputs, none without work."""
    split = max(1, min(wanted, most, blocks // least))
    while split > 1 and -(-blocks // split) * (split - 1) >= blocks:
        split -= 1
    return split


def _even_parts(blocks: int, tiles: int) -> int:
    """The fewest parts of K with which programs, two on a multiprocessor, keep four fifths of the chip to the end."""
    at_once = 2 * _MULTIPROCESSORS
    for split in range(1, 9):
        programs = tiles * split
        if programs >= 0.8 * at_once * -(-programs // at_once):
            return _parts(blocks, split, 8)
    return _parts(blocks, 2, 8)


def hopper_constants(
    form: Form, config: HopperConfig, columns: int, *, has_factors: bool, has_bias: bool
) -> dict[str, Any]:
    """The kernel's compile-time constants."""
    shared = constants(form)
    steps = {"XS": config.steps} if config.steps else {"WAITS": config.waits}
    return steps | {name: shared[name] for name in ("P", "G", "SCALING", "SKIND", "ZERO", "ZEROS")} | {
        "R": form.run, "BM": config.tokens, "BN": config.rows, "STAGES": config.stages, "FLIGHT": config.flight,
        "SPLIT": config.split > 1, "TOKENS": has_factors, "BIAS": has_bias, "EVEN": columns % _AT_ONCE == 0,
        "WARPS": config.warps,
    }  # fmt: skip
