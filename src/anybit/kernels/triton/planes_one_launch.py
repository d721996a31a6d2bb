"""How the kernel of `planes_one` is launched, torch-free: which forms it takes, rows and parts of K, constants.

Where it takes the product of one token, `planes_hopper_launch` and `planes_launch` are not asked. Measured on
an H200 for 4096 x 6144, 14336 x 4096, 4096 x 28672, 8192 x 57344, 2560 x 9728 and 5120 x 17408.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any, Final

from anybit.kernels.triton.planes_form import ROWS, Form
from anybit.kernels.triton.planes_hopper_launch import has_gluon
from anybit.kernels.triton.planes_launch import MULTIPROCESSORS, constants, decodes_in_pairs, parts_of, terms_of

__all__ = ["ONE_ARCHS", "OneConfig", "fields_of", "one_config", "one_constants", "planned_one", "takes_one"]

ONE_ARCHS: Final = ("sm_90",)  # where it was measured
_PROGRAMS: Final = 6 * MULTIPROCESSORS  # of four warps, that an H200 holds at once, which wait for memory in turn


@dataclass(frozen=True)
class OneConfig:
    """One launch: rows of a program, parts of K, warps, and how many of these share K."""

    rows: int
    split: int
    warps: int = 4
    along: int = 1


@cache
def has_product() -> bool:
    """True if a Triton is installed whose Gluon has the matrix product of registers, which 3.5 lacks."""
    return has_gluon() and not version("triton").startswith("3.5.")


def takes_one(form: Form) -> bool:
    """All that is decoded in pairs; of bytes those with fine groups."""
    return decodes_in_pairs(form) and (form.bits != 8 or form.tile < 128)


@lru_cache(maxsize=4096)
def one_config(form: Form, rows: int, columns: int, arch: str) -> OneConfig | None:
    """The launch for one token and a weight [rows, columns]; None where another kernel has it."""
    return planned_one(form, rows, columns) if arch in ONE_ARCHS and has_product() else None


def planned_one(form: Form, rows: int, columns: int) -> OneConfig | None:
    """The same, whatever is installed; pure.

    Warps share K, so that programs are small and many: rows of 16 where that is needed to fill the chip, eight warps
    where it does not suffice; where K is long, parts of it besides. Bytes, read when they are multiplied, gain nothing.
    """
    if not takes_one(form):
        return None
    blocks = form.padded(columns) // (fields_of(form, columns) * form.tile)
    rows = -(-rows // ROWS) * ROWS
    if form.bits == 8:
        return OneConfig(64, parts_of(blocks, round(_PROGRAMS / (rows // 64)), 16))
    if rows // 16 >= 10 * MULTIPROCESSORS:
        return OneConfig(32, 1, along=4)
    if rows // 16 >= 4 * MULTIPROCESSORS:
        return OneConfig(16, 1, along=4)
    if blocks <= 32 or form.tile == 16:
        wanted = round(_PROGRAMS / 2 / (rows // 16))
        return OneConfig(16, parts_of(blocks, min(wanted, blocks // 16), 16), 8, 8)
    return OneConfig(32, parts_of(blocks, min(round(_PROGRAMS / (rows // 32)), blocks // 4), 16), along=2)


def fields_of(form: Form, columns: int) -> int:
    """Fields of a step, eight at most: a block of the layout; of bytes, whose blocks are one tile, up to 256 inputs."""
    tiles = form.padded(columns) // form.tile
    return next(n for n in (8, 4, 2, 1) if n * form.tile <= 256 and tiles % n == 0) if form.bits == 8 else form.fields


def one_constants(
    form: Form, config: OneConfig, columns: int, *, is_half: bool, has_factors: bool, has_bias: bool
) -> dict[str, Any]:
    """The kernel's compile-time constants."""
    fields = fields_of(form, columns)
    run = math.gcd(form.group // form.tile, fields) if form.bits == 8 else form.run
    return constants(form) | {
        "F": fields, "R": run, "TERMS": terms_of(form, is_half=is_half), "BN": config.rows, "SPLIT": config.split > 1,
        "TOKENS": has_factors, "BIAS": has_bias, "EVEN": columns == form.padded(columns), "WARPS": config.warps,
        "WK": config.along,
    }  # fmt: skip
