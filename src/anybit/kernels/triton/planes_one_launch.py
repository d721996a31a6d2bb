"""How the kernel of `planes_one` is launched, torch-free: which forms it takes, rows and parts of K, constants.

It takes the product of one token where `planes_hopper_launch` does not; `planes_launch` is then not asked. Measured on
an H200 for 4096 x 4096, 14336 x 4096, 4096 x 14336, 4096 x 28672 and 2560 x 9728.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any, Final

from anybit.kernels.triton.planes_form import ROWS, Form
from anybit.kernels.triton.planes_hopper_launch import has_gluon
from anybit.kernels.triton.planes_launch import constants, decodes_in_pairs, parts_of, terms_of

__all__ = ["ONE_ARCHS", "OneConfig", "fields_of", "one_config", "one_constants", "planned_one", "takes_one"]

ONE_ARCHS: Final = ("sm_90",)  # where it was measured
_ROWS: Final = 64  # of a program of four warps
_PROGRAMS: Final = 6 * 132  # that an H200 holds at once, which wait for memory in turn


@dataclass(frozen=True)
class OneConfig:
    """One launch: rows of a program, parts of K, warps."""

    rows: int
    split: int
    warps: int = 4


@cache
def has_product() -> bool:
    """True if a Triton is installed whose Gluon has the matrix product of registers, which 3.5 lacks."""
    return has_gluon() and not version("triton").startswith("3.5.")


def takes_one(form: Form) -> bool:
    """All that is decoded in pairs but for folded scales; of bytes those with fine groups."""
    return form.scaling != "fold" and decodes_in_pairs(form) and (form.bits != 8 or form.tile < 128)


@lru_cache(maxsize=4096)
def one_config(form: Form, rows: int, columns: int, arch: str) -> OneConfig | None:
    """The launch for one token and a weight [rows, columns]; None where another kernel has it."""
    return planned_one(form, rows, columns) if arch in ONE_ARCHS and has_product() else None


def planned_one(form: Form, rows: int, columns: int) -> OneConfig | None:
    """The same, whatever is installed; pure."""
    if not takes_one(form):
        return None
    blocks = form.padded(columns) // (fields_of(form, columns) * form.tile)
    wanted = round(_PROGRAMS / (-(-rows // ROWS) * ROWS // _ROWS))
    return OneConfig(_ROWS, parts_of(blocks, wanted, 16))


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
    }  # fmt: skip
