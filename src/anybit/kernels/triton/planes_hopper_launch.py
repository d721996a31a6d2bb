"""How 4 bit products are launched on sm_90, torch-free: which forms the kernels in Gluon take, tiles, constants.

Up to 32 tokens `planes_hopper`, beyond them `planes_hopper_roles`, whose tiles are in `planes_hopper_roles_launch`.

Where they take a product on sm_90, `planes_launch.configure` is not asked. Measured on an H200 for 4096 x 6144,
14336 x 4096, 4096 x 28672, 8192 x 57344 and, to see what holds beyond, 5120 x 13824, 4096 x 1024, 2048 x 8192.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, NamedTuple

from anybit.kernels.compiling import overlap
from anybit.kernels.triton.planes_form import ROWS, Form
from anybit.kernels.triton.planes_hopper_roles_launch import RolesConfig, roles_parts, roles_planned
from anybit.kernels.triton.planes_launch import MULTIPROCESSORS, PINNED_CALL, PINNED_TOKENS, constants

__all__ = ["HopperConfig", "has_gluon", "hopper_config", "hopper_constants", "hopper_parts", "hopper_seconds",
           "planned", "shared_bytes", "takes"]

_ARCH: Final = "sm_90"
_FIRST, _LAST = (3, 5), (3, 9)  # versions of Triton whose Gluon the kernels are written for
_SPECIALIZES: Final = (3, 6)  # the first in which warps are given different work as `planes_hopper_roles` does
_AT_ONCE: Final = 256  # inputs that the kernels take at once
_LEAST_SHARE: Final = 1.75  # steps of a program on average, from which even shares are faster than parts of K
_ALIGNED: Final = 16  # what K and the stride of x are multiples of, so that x is copied 16 bytes at a time


class Line(NamedTuple):
    """All tiles' steps in a line, shared by programs: what `few_kernel` says of them."""

    programs: int
    blocks: int
    share: int
    longer: int


@dataclass(frozen=True)
class HopperConfig:
    """One launch of `few_kernel`: tile of tokens and rows, warps, and what its docstring says of.

    split      parts of K, each a program of its own; or
    resident   programs of each multiprocessor, which have even shares of all steps, where it is not 0
    registers  of a thread at most, so that so many fit; 0 where they do by themselves
    """

    tokens: int
    rows: int
    split: int = 1
    warps: int = 4
    stages: int = 2
    flight: int = 2
    resident: int = 0
    registers: int = 0

    @property
    def is_shared(self) -> bool:
        """True if several programs may have parts of a tile."""
        return self.split > 1 or self.resident > 0

    @property
    def options(self) -> dict[str, Any]:
        """Of the launch, beside the number of warps."""
        return overlap(True) | ({"maxnreg": self.registers} if self.registers else {})

    def tiles(self, tokens: int, rows: int) -> int:
        """Tiles of a product [tokens, rows], rows padded."""
        return -(-tokens // self.tokens) * (rows // self.rows)

    def part_bytes(self, tokens: int, rows: int, columns: int) -> int:
        """Bytes of the sums that programs leave for others: two a program."""
        line = self.line(tokens, rows, columns)
        return 2 * line.programs * self.tokens * self.rows * 4 if self.is_shared else 0

    def line(self, tokens: int, rows: int, columns: int) -> Line:
        """How programs share the steps of a product of a weight [rows, columns], rows padded."""
        tiles, blocks = self.tiles(tokens, rows), -(-columns // _AT_ONCE)
        if self.resident:
            programs = min(self.resident * MULTIPROCESSORS, tiles * blocks)
            return Line(programs, blocks, *divmod(tiles * blocks, programs))
        share = -(-blocks // self.split)
        return Line(tiles * self.split, share * self.split, share, 0)


@cache
def _triton() -> tuple[int, int]:
    """The installed version, as far as Gluon depends on it; (0, 0) without one."""
    try:
        found = re.match(r"(\d+)\.(\d+)", version("triton"))
    except PackageNotFoundError:
        return 0, 0
    return (int(found[1]), int(found[2])) if found else (0, 0)


def has_gluon() -> bool:
    """True if a Triton is installed whose Gluon compiles `few_kernel`."""
    return _FIRST <= _triton() <= _LAST


def takes(form: Form) -> bool:
    """Codes of 4 bits: integers with float scales of groups or rows, fp4 with folded scales."""
    if form.widths != (4,) or form.terms != 1 or form.addend != "none" or form.kind == "table":
        return False
    if form.scaling == "group":
        return form.kind == "int" and form.scale_kind == "float" and not form.super_groups and not form.words
    return form.scaling == "fold" or (form.scaling == "row" and form.kind == "int")


@lru_cache(maxsize=4096)
def hopper_config(
    form: Form, rows: int, columns: int, tokens: int, arch: str, *, pinned: bool = False
) -> HopperConfig | RolesConfig | None:
    """The launch for a product of `tokens` with a weight [rows, columns]; None where `planes_launch` has it.

    pinned  one launch for every number of tokens, so that a row's result does not depend on the other rows
    """
    if arch != _ARCH or not has_gluon():
        return None
    made = planned(form, rows, columns, tokens, pinned=pinned)
    return None if isinstance(made, RolesConfig) and _triton() < _SPECIALIZES else made


def hopper_seconds(form: Form, rows: int, columns: int, tokens: int, arch: str) -> float | None:
    """How long such a launch takes on an H200, where that is modelled."""
    if not isinstance(hopper_config(form, rows, columns, tokens, arch), RolesConfig):
        return None
    return roles_planned(form, -(-rows // ROWS) * ROWS, columns, tokens)[0]


def planned(
    form: Form, rows: int, columns: int, tokens: int, *, pinned: bool = False
) -> HopperConfig | RolesConfig | None:
    """The same, whatever is installed; pure."""
    if columns % _ALIGNED or not rows or not takes(form):
        return None
    rows = -(-rows // ROWS) * ROWS
    if tokens > 32:
        return roles_planned(form, rows, columns, tokens)[1]
    if pinned or tokens > 16:
        return _in_parts(form, rows, columns, tokens)
    made = _in_line(form, rows, columns, tokens)
    steps = made.tiles(tokens, rows) * -(-columns // _AT_ONCE)
    # where most shares would be a single step, tiles have as many parts as K has steps, and their sums cost more
    if made.resident and steps < _LEAST_SHARE * made.resident * MULTIPROCESSORS:
        return _in_parts(form, rows, columns, tokens)
    return made


def hopper_parts(form: Form, rows: int, columns: int, tokens: int) -> int:
    """Bytes of the sums that programs leave for others in calls of up to so many tokens, pinned or not; pure."""
    padded, found = -(-rows // ROWS) * ROWS, [0]
    launches = [(m, planned(form, rows, columns, m)) for m in {min(tokens, most) for most in (8, 16, 32)}]
    pinned = planned(form, rows, columns, PINNED_TOKENS, pinned=True)
    for m, config in [*launches, (min(tokens, PINNED_CALL), pinned)]:
        if isinstance(config, HopperConfig):
            found.append(config.part_bytes(m, padded, form.padded(columns)))
    more = roles_parts(form, rows, columns, tokens) if tokens > 32 and takes(form) and columns % _ALIGNED == 0 else 0
    return max(*found, more)


def shared_bytes(form: Form, config: HopperConfig) -> int:
    """Shared memory of a launch: x, words, and what groups of rows have."""
    scales = _AT_ONCE // form.tile // (4 if form.scaling == "fold" else form.run)
    beside = scales * config.rows * (4 + form.has_zeros)
    return config.stages * (config.tokens * 2 * _AT_ONCE + config.rows * _AT_ONCE // 2 + beside)


def _in_line(form: Form, rows: int, columns: int, tokens: int) -> HopperConfig:
    """At most 16 tokens: even shares, with as many programs on a multiprocessor as hide each other's gaps.

    Integers: their sums of groups take registers, so more tokens have fewer rows. fp4 with scales of 16: tiles of 128
    rows read x less often; where there are few steps, programs of eight warps, which each take twice as many at a time.
    """
    bm, is_broad = 8 if tokens <= 8 else 16, rows % 128 == 0
    tiles, steps = rows // 128, rows // 128 * -(-columns // _AT_ONCE)
    if form.scaling != "fold":
        if bm == 16 and is_broad and 0.8 <= tiles / (2 * MULTIPROCESSORS) <= 1 and not form.has_zeros:
            return HopperConfig(16, 128)  # nothing to share: two whole tiles a multiprocessor, nearly everywhere
        if bm == 8 and is_broad:
            return _resident(HopperConfig(8, 128), 3)
        return _resident(HopperConfig(bm, 64), 5 if bm == 8 else 4)
    if form.group != 16:
        return HopperConfig(bm, 64, resident=5)
    if is_broad and steps < 8 * MULTIPROCESSORS:
        return HopperConfig(bm, 128, warps=8, flight=4, resident=3)
    if is_broad and (bm == 8 or tiles >= 40):
        return HopperConfig(bm, 128, flight=4, resident=4 if bm == 8 else 3)
    return HopperConfig(bm, 64, flight=4, resident=7 if bm == 8 else 5)


def _resident(config: HopperConfig, count: int) -> HopperConfig:
    """With so many programs on a multiprocessor, held to the registers that this leaves each."""
    return replace(config, resident=count, registers=65536 // (32 * config.warps * count) // 8 * 8)


def _in_parts(form: Form, rows: int, columns: int, tokens: int) -> HopperConfig | None:
    """Parts of K for all tiles: 17 to 32 tokens, small weights, and where a row's result must not depend on the others.

    Left out: fp4 where programs of two warps, which hide more of its decoding, are faster.
    """
    is_sum, is_fine = form.scaling != "fold", form.group == 16
    bm, blocks = 8 if tokens <= 8 else 16 if tokens <= 16 else 32, -(-columns // _AT_ONCE)
    is_broad, is_huge = rows >= 12800 and rows % 128 == 0, rows >= 3 * 128 * MULTIPROCESSORS
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
        return replace(tile, split=_parts(blocks, 3 * MULTIPROCESSORS // (rows // 128), 8))
    if bm == 8 or not is_broad or (bm == 16 and not is_sum):
        if bm == 8 and is_huge and is_sum:
            narrow = replace(narrow, stages=3)
        wanted, most = (650, 8) if bm < 32 else (400, 8 if rows <= 2048 else 4)
        tiles = rows // 64
        # parts of less than four times 256 inputs only where the chip would not be filled
        least = 4 if tiles * (blocks // 4) >= 2 * MULTIPROCESSORS or (bm == 32 and tiles >= 64) else 2
        return replace(narrow, split=_parts(blocks, wanted // tiles, most, least))
    tile = replace(narrow, rows=128)
    return replace(tile, split=_even_parts(blocks, rows // 128))


def _parts(blocks: int, wanted: int, most: int, least: int = 2) -> int:
    """Parts of K: at most `most`, each with at least `least` times 256 inputs, none without work."""
    split = max(1, min(wanted, most, blocks // least))
    while split > 1 and -(-blocks // split) * (split - 1) >= blocks:
        split -= 1
    return split


def _even_parts(blocks: int, tiles: int) -> int:
    """The fewest parts of K with which programs, two on a multiprocessor, keep four fifths of the chip to the end."""
    at_once = 2 * MULTIPROCESSORS
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
    return {name: shared[name] for name in ("P", "G", "SCALING", "SKIND", "ZERO", "ZEROS")} | {
        "R": form.run, "BM": config.tokens, "BN": config.rows, "STAGES": config.stages, "FLIGHT": config.flight,
        "SPLIT": config.is_shared, "TOKENS": has_factors, "BIAS": has_bias, "EVEN": columns % _AT_ONCE == 0,
        "WARPS": config.warps, "WAITS": True,
    }  # fmt: skip
