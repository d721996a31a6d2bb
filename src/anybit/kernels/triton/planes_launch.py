"""How the kernels of "triton-planes" are launched, torch-free: tiles by shape and chip, compile-time constants.

The same functions serve the launcher (`planes.py`) and the gate's compile cases (`linear/triton_planes.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from anybit.kernels.compiling import OVERLAPPING
from anybit.kernels.triton.planes_form import ROWS, Form
from anybit.platforms import Platform
from anybit.platforms.archs import ARCHS

__all__ = ["MULTIPROCESSORS", "PINNED_CALL", "PINNED_TOKENS", "Config", "configure", "constants", "decodes_in_pairs",
           "expansion", "half_factor", "parts_of", "product_constants", "refused_arch", "scratch_rows",
           "terms_of", "waits"]

PINNED_TOKENS: Final = 16  # the configuration of every M where a row's result must not depend on M
PINNED_CALL: Final = 256  # tokens of one launch there: each has parts of split-K
_DECODE: Final = {"int": 0, "float": 1, "table": 2}
_SCALING: Final = {"row": 0, "group": 1, "fold": 2, "decode": 3}
_KINDS: Final = {"float": 0, "integer": 1, "e8m0": 2, "e8": 1, "e53": 2}
_ADDENDS: Final = {"none": 0, "zero": 1, "minimum": 2, "subtracted": 3}
_ROUNDS: Final = {None: 0, "float16": 1, "bfloat16": 2}


@dataclass(frozen=True)
class Config:
    """One launch: tile of tokens and rows, parts of K, warps, stages; CUDA inline assembly or the portable twin."""

    tokens: int
    rows: int
    split: int = 1
    warps: int = 4
    stages: int = 3
    assembly: bool = False


def waits(form: Form, tokens: int, arch: str, *, is_quantized: bool) -> bool:
    """True where the product is launched while the kernel before it ends, and waits for that itself.

    On an H200 a gain of 3 to 15 % for few tokens; a loss of as much for folded scales without a quantizer in front,
    whose programs have the least to do.
    """
    return tokens <= 64 and arch in OVERLAPPING and (is_quantized or form.scaling != "fold")


# how many thread blocks keep the memory busy, by architecture: four on each multiprocessor of the largest chip
_BLOCKS: Final = {"sm_80": 432, "sm_86": 336, "sm_89": 512, "sm_90": 528, "sm_100": 592, "sm_103": 592, "sm_120": 680,
                  "sm_121": 192, "gfx90a": 416, "gfx942": 608, "gfx950": 512, "gfx1100": 192, "gfx1151": 80,
                  "gfx1200": 64, "gfx1201": 128}
# with more tokens Triton 3.9 makes an empty kernel of eight sums of groups in a block: found by the gate
_FIFTH: Final = ("sm_100", "sm_103")
_LARGE_TILES: Final = ("sm_90", "sm_100", "sm_103")  # accumulators of a warp group, or beside the registers
MULTIPROCESSORS: Final = 132  # of an H200, on which the launches of `_hopper` were measured
_SPLIT_TOKENS: Final = 64  # more tokens fill the chip without splitting K


@lru_cache(maxsize=4096)
def configure(form: Form, rows: int, columns: int, tokens: int, arch: str) -> Config:
    """The launch for a product of `tokens` with a weight [rows, columns]; pure."""
    if arch == "sm_90" and _is_measured(form):
        return _hopper(form, -(-rows // ROWS) * ROWS, columns, tokens)
    if arch == "sm_90" and tokens <= 16 and decodes_in_pairs(form):
        return _hopper_pairs(form, -(-rows // ROWS) * ROWS, columns, tokens)
    is_amd = ARCHS[arch].vendor == "amd"
    is_wide = ARCHS[arch].wave == 64
    padded = -(-rows // ROWS) * ROWS
    if tokens <= 32:
        bm = 16 if is_amd or tokens > 8 else 8
        bm = 32 if tokens > 16 else bm
        bn, warps, stages = 64, 4, 3
        if form.group == 16 and form.scaling == "fold" and bm <= 16:
            warps = 2
    elif tokens <= 64:
        bm, bn, warps, stages = 64, 64, 4, 3
        if padded % 128 == 0 and padded * columns >= 2**26 and (form.group != 16 or arch in _LARGE_TILES):
            bn, stages = 128, 2
    else:
        # the float32 partial sums of groups take as many registers as the accumulator
        bm, stages = (64, 2) if form.scaling == "group" else (128, 3)
        bn, warps = 128 if padded % 128 == 0 else 64, 8
    if form.scaling == "group" and arch not in _LARGE_TILES:
        bn = 64
    if is_amd:
        bn, bm, warps, stages = min(bn, 64), min(bm, 64), min(warps, 4), 2
    if is_amd and not is_wide:  # half as many threads to hold a tile: 32 rows, and nothing loaded ahead
        bn, bm, warps, stages = 32, min(bm, 32), 4, 1
    if form.bits == 8 or form.terms > 1 or form.addend != "none":
        bm, bn = min(bm, 64), min(bn, 64)
        warps, stages = min(warps, 4), min(stages, 3)
    if form.addend_super and bm == 64 and not is_amd and arch not in _LARGE_TILES:
        warps = 8  # sums of x and of groups beside the accumulator: half as many registers a thread
    if arch in _FIFTH and form.scaling == "group" and form.fields // form.run >= 8:
        bm = min(bm, 32)
    if form.terms > 1 or arch == "sm_86" or arch == "sm_89" or arch.startswith("sm_12"):
        stages = 2  # 99 KiB of shared memory
    assembly = ARCHS[arch].vendor == "nvidia" and decodes_in_pairs(form)
    if form.kind == "table" and (not assembly or bm > 64):
        stages = 1  # the pipeline would send the look-ups through shared memory too, or hold all x of a block
    tiles = padded // bn * -(-tokens // bm)
    split = 1
    if tokens <= _SPLIT_TOKENS:
        blocks = columns // (steps(form, columns, arch)[0] * form.tile)
        split = max(1, min(16, _BLOCKS[arch] // tiles, blocks // 4))
        if arch == "sm_90" and split == 1 and tokens <= 8 and tiles <= _BLOCKS[arch] and blocks >= 8:
            split = 2  # 5 to 25 % faster than programs of one round that are not all done at once
    return Config(bm, bn, split, warps, stages, assembly)


def decodes_in_pairs(form: Form) -> bool:
    """True if `planes_pairs` decodes the form: no codes of NaN, no rounding of the format itself but of tables."""
    if form.kind == "table":
        return form.widths == (4,)
    return form.scaling != "decode" and form.special == 0 and (form.kind == "int" or len(form.widths) <= 2)


def _is_measured(form: Form) -> bool:
    """Codes of 4 bits whose groups have a scale and nothing beside it, or integer zero points."""
    return form.widths == (4,) and form.terms == 1 and form.addend == "none" and (
        (form.kind == "int" and form.scaling == "group") or form.scaling == "fold")


def _hopper(form: Form, rows: int, columns: int, tokens: int) -> Config:
    """As measured on an H200 for 1024 to 57344 rows, where the kernels in Gluon do not take the product.

    Programs of two warps where scales are part of the operand: more of them hide the decoding. Many rows: wide tiles,
    which read x less often. Sums of groups beside the accumulator leave room for 64 tokens only.
    """
    is_sum = form.scaling == "group"
    is_fine = form.group == 16
    wide = rows >= 128 * MULTIPROCESSORS and rows % 128 == 0
    if tokens <= 32 and not is_sum:
        return _hopper_few(form, rows, columns, tokens)
    if tokens <= 32:
        bm = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
        tile, wanted, most = (Config(8, 32, warps=2), 1056, 8) if bm == 8 else (Config(bm, 64), 528, 8)
    elif tokens <= 64:
        tile, wanted, most = _hopper_64(is_sum=is_sum, is_fine=is_fine, wide=wide, even=rows % 128 == 0), 264, 8
        if tile.rows == 128 and (wide or is_sum):
            wanted = MULTIPROCESSORS
    else:
        tile = Config(64, 64) if is_sum or rows % 128 else Config(128, 128, warps=8, stages=2)
        if is_sum and tokens > 256 and rows % 128 == 0:
            tile = Config(64, 128, stages=2)
        wanted, most = (MULTIPROCESSORS if tokens <= 256 else 1), 4
    tiles = rows // tile.rows * -(-tokens // tile.tokens)
    split = parts_of(columns // form.block, wanted // tiles, most)
    return replace(tile, split=split, assembly=True)


def _hopper_few(form: Form, rows: int, columns: int, tokens: int) -> Config:
    """fp4 with folded scales for at most 32 tokens."""
    is_fine, is_small = form.group == 16, rows <= 2048
    wide = rows >= 128 * MULTIPROCESSORS and rows % 128 == 0
    is_huge = wide and rows >= 3 * 128 * MULTIPROCESSORS
    bm, blocks = 8 if tokens <= 8 else 16 if tokens <= 16 else 32, columns // form.block
    least = 4 if is_fine else 2
    if tokens <= 8:
        if wide and is_fine:
            return replace(Config(8, 128, 1, 2), split=parts_of(blocks, 528 // (rows // 128), 8, least), assembly=True)
        tile = Config(8, 32 if is_small and is_fine else 128 if is_huge else 64, warps=4 if is_huge else 2)
        wanted = 1056 if is_huge else 792
    elif rows % 128 == 0 and not is_small and (is_fine or is_huge or columns >= 8192 or (wide and bm == 32)):
        split = _even_parts(rows // 128)
        return replace(Config(bm, 128), split=parts_of(blocks, split, 8, least), assembly=True)
    else:
        tile, wanted = Config(bm, 64, warps=4 if bm == 32 or is_small else 2), 528
    return replace(tile, split=parts_of(blocks, wanted // (rows // tile.rows), 8, least), assembly=True)


def _hopper_pairs(form: Form, rows: int, columns: int, tokens: int) -> Config:
    """As measured on an H200 for 4096 x 4096, 14336 x 4096 and 4096 x 28672: forms that `_is_measured` leaves out.

    Programs of two warps: x of 16 inputs is then copied four bytes at a time, and so are scales that the operand takes.
    """
    bm = 8 if tokens <= 8 else 16
    is_wide = rows >= 128 * MULTIPROCESSORS
    if form.scaling == "decode":
        tile, wanted = Config(bm, 64, warps=2), 792
    elif form.bits == 8:
        is_fine = form.tile < 128
        tile = Config(bm, 64, warps=2) if is_wide and (bm == 16 or is_fine) else Config(bm, 32, warps=2)
        wanted = 1584 if is_fine else 792 if bm == 8 else 528
    elif bm == 8:
        tile, wanted = Config(bm, 32, warps=2), 792
    else:
        tile, wanted = Config(bm, 64), 528 if form.group <= 32 else 900
    blocks = columns // (steps(form, columns, "sm_90")[0] * form.tile)
    return replace(tile, split=parts_of(blocks, wanted // (rows // tile.rows), 16), assembly=True)


def _even_parts(tiles: int) -> int:
    """Parts of K, two at least, with which programs, two on a multiprocessor, keep four fifths of them to the end."""
    at_once = 2 * MULTIPROCESSORS
    for split in range(2, 9):
        programs = tiles * split
        if programs >= 0.8 * at_once * -(-programs // at_once):
            return split
    return 8 if 8 * tiles < at_once else 2


def _hopper_64(*, is_sum: bool, is_fine: bool, wide: bool, even: bool) -> Config:
    if not even:
        return Config(64, 64)
    if is_sum:
        return Config(64, 128, stages=2) if wide else Config(64, 128, warps=8)
    if is_fine:
        return Config(64, 128, warps=8 if wide else 4)
    return Config(64, 128, warps=8, stages=2) if wide else Config(64, 64)


def parts_of(blocks: int, wanted: int, most: int, least: int = 2) -> int:
    """Parts of K: at most `most`, each with at least `least` blocks, none without work."""
    split = max(1, min(wanted, most, blocks // least))
    while split > 1 and -(-blocks // split) * (split - 1) >= blocks:
        split -= 1
    return split


def refused_arch(platform: Platform) -> str | None:
    """Why no kernel of the layout compiles for a chip; None if it does."""
    facts = ARCHS.get(platform.arch)
    if facts is None or platform.arch not in _BLOCKS:
        if facts is not None and "bfloat16" not in facts.matrix:
            return f"Triton emits no matrix instruction for {platform.arch}"
        return f"no kernel was compiled for {platform.arch}"
    return None


def expansion(form: Form) -> tuple[int, int]:
    """Rows and blocks of K that a program of `expand_kernel` decodes: about 4096 weights.

    With look-ups eight rows, whose scales lie together: a quarter faster on an H200, where other codes are a little
    faster in runs of one row.
    """
    if form.kind == "table" and form.fields == 8:
        return 8, max(1, 512 // form.block)
    return (1, max(1, 4096 // form.block)) if form.fields == 8 else (4, max(1, 1024 // form.block))


SCRATCH_BYTES: Final = 256 * 2**20  # of expanded rows at a time: each piece is a product of its own, and ends in a ramp


def scratch_rows(rows: int, columns: int) -> int:
    """Rows that are expanded at a time: equal pieces, in multiples of what a product's tile takes."""
    pieces = max(1, -(-2 * rows * columns // SCRATCH_BYTES))
    return min(rows, -(-rows // (pieces * 256)) * 256)


@lru_cache(maxsize=1024)
def constants(form: Form) -> dict[str, Any]:
    """The compile-time constants that all kernels of the layout share; the same mapping at every call."""
    widths = (*form.widths, 0, 0)
    return {
        "DECODE": _DECODE[form.kind], "BITS": form.bits, "W0": widths[0], "W1": widths[1], "W2": widths[2],
        "P": form.tile, "F": form.fields, "G": form.group, "SCALING": _SCALING[form.scaling],
        "SKIND": _KINDS[form.scale_kind], "SSUPER": form.super_groups, "SWORDS": form.words,
        "SSIGNED": form.signed_scales, "ZERO": float(form.zero), "ZEROS": form.has_zeros,
        "ADD": _ADDENDS[form.addend], "AKIND": _KINDS[form.addend_kind], "ASUPER": form.addend_super,
        "AWORDS": form.addend_words, "ASIGNED": form.signed_addends, "MANTISSA": form.mantissa, "BIAS_E": form.bias,
        "SPECIAL": form.special, "ROUND": _ROUNDS[form.round_to],
    }  # fmt: skip


def steps(form: Form, columns: int, arch: str) -> tuple[int, int]:
    """Fields that a step of the product's loop takes, and how many of them share a scale.

    A block of the layout; of bytes, whose blocks are one tile, two tiles of 128 inputs where registers hold them.
    """
    tiles = form.padded(columns) // form.tile
    if form.bits == 8 and form.tile == 128 and tiles % 2 == 0 and ARCHS[arch].vendor == "nvidia":
        return 2, math.gcd(form.group // form.tile, 2)
    return form.fields, form.run


@lru_cache(maxsize=1024)
def product_constants(form: Form, columns: int, arch: str) -> dict[str, Any]:
    """Those of the product of a weight with K = `columns`; the same mapping at every call."""
    fields, run = steps(form, columns, arch)
    return constants(form) | {"F": fields, "R": run}


def terms_of(form: Form, *, is_half: bool) -> int:
    """Pieces of an operand; float16 holds in one what the format itself rounded to float16."""
    return 1 if is_half and form.round_to == "float16" else form.terms


def half_factor(form: Form, *, is_half: bool) -> float:
    """float16 operands of folded scales are twice those of bfloat16 (`planes_kernels._factor`)."""
    return 0.5 if is_half and form.scale_kind == "e53" else 1.0
