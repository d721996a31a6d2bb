"""How the kernel of `planes_hopper_roles` is launched, torch-free: tiles by shape, constants, layouts of its copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from typing import Any, Final, NamedTuple

from anybit.kernels.triton.planes_form import ROWS, Form
from anybit.kernels.triton.planes_launch import MULTIPROCESSORS, constants

__all__ = ["X_COLUMNS", "RolesConfig", "Tile", "divided", "roles_bytes", "roles_constants", "roles_parts",
           "roles_planned", "scale_layout", "scales_of", "tiles", "word_layout", "x_layout"]

X_COLUMNS: Final = 64  # inputs of a box of x: 128 bytes
_AT_ONCE: Final = 256  # inputs of a step
_STAGE_BYTES: Final = 222_000  # of shared memory: results pass through the rest, and barriers lie there
_LEAST: Final = 4  # steps that a program has of a part of a tile, at least
_MOST_PARTS: Final = 8
_LONGEST: Final = 8192  # tokens beyond which no launch leaves more: there are tiles for every program
_DIVIDED: Final = 1.02  # less than is gained so is lost as often
_ASTRAY: Final = 1.06  # times a step, where programs are long at different blocks of K: fewer read the same x at a time


@dataclass(frozen=True)
class RolesConfig:
    """One launch: tile of tokens and rows, and what the kernel's docstring says of the rest.

    unit      inputs that are multiplied at once
    teams     of four warps, which share the tile's rows
    x_width, x_ring   inputs of x that arrive at once, and steps of x in shared memory
    turns     teams begin groups in turn
    waits     launched while the kernel before it ends
    blocks    steps of a tile
    waves     with shares: whole tiles that each program takes first
    share     steps that a program multiplies of the tiles that are left; 0: programs take whole tiles in turn
    programs  with shares
    """

    tokens: int
    rows: int
    teams: int = 2
    unit: int = 64
    x_width: int = 128
    x_ring: int = 2
    w_stages: int = 4
    flight: int = 1
    sums: int = 1
    turns: bool = False
    waits: bool = True
    blocks: int = 0
    waves: int = 0
    share: int = 0
    programs: int = 0

    def tiles(self, tokens: int, rows: int) -> int:
        """Tiles of a product."""
        return -(-tokens // self.tokens) * -(-rows // self.rows)

    def grid(self, tokens: int, rows: int) -> int:
        """Programs of a product."""
        return self.programs if self.share else min(self.tiles(tokens, rows), MULTIPROCESSORS)

    @property
    def parts(self) -> int:
        """Sums that programs leave for others: of two tiles each."""
        return 2 * self.programs * self.tokens * self.rows


class Tile(NamedTuple):
    """A tile, and how long it takes (seconds): a step, and once a call; more where tiles are divided.

    shared, part  then also once a call, and for each part of a tile; infinity: never
    """

    config: RolesConfig
    step: float
    start: float
    shared: float
    part: float

    @property
    def is_divisible(self) -> bool:
        """True where programs may share a tile."""
        return self.shared < inf


def _tile(config: RolesConfig, *times: float) -> Tile:
    return Tile(config, *(1e-6 * time for time in times))


# As measured on an H200 (a product alone, weights cold, M 48 to 1024), by what an accumulator sums: groups, groups of
# fewer than 64 inputs, or whole rows. Groups: 85 cells, the model is 4 % off (root mean square), most where the chip's
# power limits its clock. What dividing costs depends on the tile alone.
_TILES: Final[Mapping[str, tuple[Tile, ...]]] = {
    "groups": (
        _tile(RolesConfig(64, 128, x_ring=3, w_stages=6), 0.97, 4.4, 0.5, 2.2),
        _tile(RolesConfig(64, 256, 4, x_ring=3, w_stages=3, flight=0), 1.71, 4.4, 5.8, 1.3),
        _tile(RolesConfig(128, 128, x_ring=2, w_stages=4, turns=True), 1.45, 2.8, 4.6, 2.1),
    ),
    "small groups": (
        _tile(RolesConfig(64, 128, x_ring=3, w_stages=5, sums=2), 1.36, 4.2, 0.5, 2.2),
        _tile(RolesConfig(128, 128, x_ring=2, w_stages=4), 2.15, 4.6, 4.6, 2.1),
    ),
    "rows": (
        _tile(RolesConfig(64, 128, x_ring=3, w_stages=6, waits=False), 1.2, 4.9, 0.5, 2.2),
        _tile(RolesConfig(64, 256, x_ring=2, w_stages=4, flight=0, waits=False), 2.2, 4.0, 5.8, 1.3),
        _tile(RolesConfig(128, 128, x_ring=2, w_stages=4, waits=False), 1.6, 4.4, 4.6, 2.1),
        _tile(RolesConfig(256, 128, x_ring=1, w_stages=4, x_width=64, waits=False), 2.7, 3.4, inf, inf),
    ),
}


def roles_planned(form: Form, rows: int, columns: int, tokens: int) -> tuple[float, RolesConfig]:
    """Seconds and the launch of a product of `tokens` with a weight of `rows`, padded, that is taken on sm_90; pure."""
    found = [made for tile in tiles(form) for made in divided(tile, rows, columns, tokens)]
    return min(found, key=lambda pair: pair[0])


@lru_cache(maxsize=4096)
def roles_parts(form: Form, rows: int, columns: int, tokens: int) -> int:
    """Bytes of the sums that programs leave for others in calls of up to so many tokens; pure."""
    step = min(tile.config.tokens for tile in tiles(form))  # no launch changes within it
    padded, calls = -(-rows // ROWS) * ROWS, range(step, min(tokens, _LONGEST) + step, step)
    return 4 * max((roles_planned(form, padded, columns, m)[1].parts for m in calls), default=0)


def _kind(form: Form) -> str:
    if form.scaling == "group":
        return "groups" if form.run * form.tile >= X_COLUMNS else "small groups"
    return "rows"


def tiles(form: Form) -> list[Tile]:
    """The tiles that serve a form, with units inside its groups and as many stages as fit."""
    return [_fitting(form, tile) for tile in _TILES[_kind(form)]]


def _fitting(form: Form, tile: Tile) -> Tile:
    config = tile.config
    if form.scaling == "group":
        config = replace(config, unit=min(X_COLUMNS, form.run * form.tile))
    while roles_bytes(form, config) > _STAGE_BYTES:
        config = replace(config, w_stages=config.w_stages - 1)
    return tile._replace(config=config)


def divided(tile: Tile, rows: int, columns: int, tokens: int) -> Iterator[tuple[float, RolesConfig]]:
    """Ways to divide the work among programs, and modelled seconds.

    Whole tiles; or, of all of them or of what is left when all programs have had as many, parts or even shares.
    """
    blocks = -(-columns // _AT_ONCE)
    config = replace(tile.config, blocks=blocks)
    count = config.tiles(tokens, rows)
    yield tile.start + -(-count // MULTIPROCESSORS) * blocks * tile.step, config
    most = count // MULTIPROCESSORS
    if not tile.is_divisible or count == most * MULTIPROCESSORS:
        return
    for waves in sorted({most, max(most - 1, 0), 0}, reverse=True):
        rest = count - waves * MULTIPROCESSORS
        before = tile.start + waves * blocks * tile.step + tile.shared
        for parts in range(2, min(MULTIPROCESSORS // rest, blocks // _LEAST, _MOST_PARTS) + 1):
            share = -(-blocks // parts)
            whole = -(-blocks // share) * share  # beyond the last block is nothing: zeros
            if not waves or whole == blocks:
                yield (_DIVIDED * (before + whole / share * tile.part + share * tile.step),
                       replace(config, blocks=whole, waves=waves, share=share,
                               programs=MULTIPROCESSORS if waves else rest * whole // share))
        share = max(-(-rest * blocks // MULTIPROCESSORS), _LEAST)
        if share < -(-rest // MULTIPROCESSORS) * blocks:
            step = tile.step * (_ASTRAY if share > blocks else 1)
            yield (_DIVIDED * (before + blocks / share * tile.part + share * step),
                   replace(config, waves=waves, share=share,
                           programs=MULTIPROCESSORS if waves else -(-rest * blocks // share)))


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
        "R": form.run, "U": config.unit, "TEAMS": config.teams, "BM": config.tokens,
        "BN": config.rows, "XW": config.x_width, "X_RING": config.x_ring, "W_STAGES": config.w_stages,
        "FLIGHT": config.flight, "SUMS": config.sums, "TURNS": config.turns, "STREAM": config.share > 0,
        "TOKENS": has_factors, "BIAS": has_bias, "WAITS": config.waits,
    }  # fmt: skip
