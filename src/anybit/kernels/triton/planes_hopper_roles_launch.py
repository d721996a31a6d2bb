"""How the kernel of `planes_hopper_roles` is launched, torch-free: tiles by shape, constants, layouts of its copies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from anybit.kernels.triton.planes_form import Form
from anybit.kernels.triton.planes_launch import constants

__all__ = ["X_COLUMNS", "RolesConfig", "roles_bytes", "roles_constants", "roles_planned", "scale_layout", "scales_of",
           "word_layout", "x_layout"]

X_COLUMNS: Final = 64  # inputs of a box of x: 128 bytes
_AT_ONCE: Final = 256  # inputs of a step
_UNITS: Final = 132


@dataclass(frozen=True)
class RolesConfig:
    """One launch: tile of tokens and rows, and what the kernel's docstring says of the rest.

    unit      inputs that are multiplied at once
    teams     of four warps, which share the tile's rows
    x_width, x_ring   inputs of x that arrive at once, and steps of x in shared memory
    share     steps that a program multiplies, of all tiles in a row; 0: programs take whole tiles in turn
    programs  with shares
    """

    tokens: int
    rows: int
    unit: int = 64
    teams: int = 2
    x_width: int = 64
    x_ring: int = 2
    w_stages: int = 4
    flight: int = 1
    sums: int = 1
    share: int = 0
    programs: int = 0

    def tiles(self, tokens: int, rows: int) -> int:
        """Tiles of a product."""
        return -(-tokens // self.tokens) * -(-rows // self.rows)

    def grid(self, tokens: int, rows: int) -> int:
        """Programs of a product."""
        return self.programs if self.share else min(self.tiles(tokens, rows), _UNITS)

    @property
    def parts(self) -> int:
        """Sums that programs leave for others: of two tiles each."""
        return 2 * self.programs * self.tokens * self.rows


def scales_of(form: Form) -> int:
    """Scales, words of folded scales, or zero points that a row has in a step."""
    if form.scaling == "fold":
        return _AT_ONCE // (4 * form.tile)
    return _AT_ONCE // (form.run * form.tile) if form.scaling == "group" or form.has_zeros else 0


def roles_bytes(form: Form, config: RolesConfig) -> int:
    """Shared memory of the stages."""
    width = 0 if form.scaling == "row" else 4  # at most
    words = config.rows * (_AT_ONCE // 2 + scales_of(form) * (width + form.has_zeros))
    return config.x_ring * config.tokens * 2 * _AT_ONCE + config.w_stages * words


def x_layout(config: RolesConfig) -> tuple[int, int, int]:
    """Of x in shared memory: swizzled as wide as what is multiplied at once, bits of an element, dimensions."""
    return 2 * config.unit, 16, 2


def word_layout(form: Form) -> tuple[int, int, int]:
    """Of words: swizzled as wide as what is read at once."""
    return 4 * form.tile, 32, 2


def scale_layout(size: int) -> tuple[int, int, int]:
    """Of scales and zero points of so many bytes: in a row."""
    return 0, 8 * size, 1


def roles_constants(form: Form, config: RolesConfig, *, has_factors: bool, has_bias: bool) -> dict[str, Any]:
    """The kernel's compile-time constants."""
    shared = constants(form)
    return {name: shared[name] for name in ("P", "G", "SCALING", "SKIND", "ZERO", "ZEROS")} | {
        "R": form.run, "U": config.unit, "TEAMS": config.teams, "BM": config.tokens, "BN": config.rows,
        "XW": config.x_width, "X_RING": config.x_ring, "W_STAGES": config.w_stages, "FLIGHT": config.flight,
        "SUMS": config.sums, "STREAM": config.share > 0, "TOKENS": has_factors, "BIAS": has_bias, "WAITS": False,
    }  # fmt: skip
