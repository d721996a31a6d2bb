"""How the kernel of `planes_hopper_roles` is launched, torch-free: tiles by shape, constants, layouts of its copies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from anybit.kernels.triton.planes_form import Form
from anybit.kernels.triton.planes_launch import constants

__all__ = [
    "X_COLUMNS",
    "RolesConfig",
    "roles_bytes",
    "roles_constants",
    "roles_planned",
    "scale_layout",
    "scales_of",
    "word_layout",
    "x_layout",
]

X_COLUMNS: Final = 64  # inputs of a stage of x: 128 bytes
_AT_ONCE: Final = 256  # inputs of a step
_UNITS: Final = 132
_STAGE_BYTES: Final = 225_000  # of shared memory; results pass through the rest, and barriers lie there
_MOST_STAGES: Final = 12


@dataclass(frozen=True)
class RolesConfig:
    """One launch: tile of tokens and rows, and what the kernel's docstring says of the rest.

    unit      inputs that are multiplied at once
    share     steps that a program multiplies, of all tiles in a row; 0: programs take whole tiles in turn
    programs  with shares
    """

    tokens: int
    rows: int
    unit: int
    x_stages: int
    w_stages: int
    flight: int = 1
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


def roles_planned(form: Form, rows: int, columns: int, tokens: int) -> RolesConfig | None:
    """The launch for `tokens` with a weight of `rows` (padded) that `planes_hopper_launch.takes`; pure."""
    return None


def _config(form: Form, tile: tuple[int, int], flight: int, shape: tuple[int, int, int], *, shares: bool,
            unit: int = 64) -> RolesConfig:
    """A tile with as many stages as fit, three times 256 inputs of W at least."""
    (bm, bn), (rows, columns, tokens) = tile, shape
    unit = min(unit, form.run * form.tile) if form.scaling == "group" else unit
    made = RolesConfig(bm, bn, unit, 1, 6 if bm * bn <= 64 * 128 else 4 if bm * bn <= 128 * 128 else 3, flight)
    room = _STAGE_BYTES - roles_bytes(form, made)
    made = replace(made, x_stages=min(_MOST_STAGES, 1 + room // (bm * 2 * X_COLUMNS)))
    if not shares:
        return made
    steps = made.tiles(tokens, rows) * -(-columns // _AT_ONCE)
    share = max(-(-steps // _UNITS), 4)
    return replace(made, share=share, programs=-(-steps // share))


def scales_of(form: Form) -> int:
    """Scales, words of folded scales, or zero points that a row has in 256 inputs."""
    if form.scaling == "fold":
        return _AT_ONCE // (4 * form.tile)
    return _AT_ONCE // (form.run * form.tile) if form.scaling == "group" or form.has_zeros else 0


def roles_bytes(form: Form, config: RolesConfig) -> int:
    """Shared memory of the stages."""
    width = 0 if form.scaling == "row" else 4  # at most
    words = config.rows * (_AT_ONCE // 2 + scales_of(form) * (width + form.has_zeros))
    return config.x_stages * config.tokens * 2 * X_COLUMNS + config.w_stages * words


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
        "R": form.run, "U": config.unit, "BM": config.tokens, "BN": config.rows, "X_STAGES": config.x_stages,
        "W_STAGES": config.w_stages, "FLIGHT": config.flight, "STREAM": config.share > 0, "TOKENS": has_factors,
        "BIAS": has_bias, "WAITS": False,
    }  # fmt: skip
