"""What GPTQ's tensors say beside their headers: codes, zero points of both versions, groups of columns, real biases.

Pure functions on tensors, shared by the GPTQ and the AutoRound dialect. Rules: docs/formats/gptq.md §3, §4, §5.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.errors import Damaged, Inconsistent
from anybit.numerics.packing import unpack_planar, unpack_stream
from anybit.schemes import Layer


@dataclass(frozen=True)
class Facts:
    """How a module's codes and zero points are stored.

    group          inputs that share a scale
    is_planar      planes of 32 codes instead of a bit stream
    is_minus_one   version 1: zero points are stored minus one
    is_symmetric   the configuration says that every zero point is 2^(bits-1)
    may_be_lossy   the writer may have lost zero points 0
    """

    bits: int
    group: int
    is_planar: bool
    is_minus_one: bool
    is_symmetric: bool
    may_be_lossy: bool

    @staticmethod
    def of(layer: Layer) -> Facts:
        """The facts that `gptq.packed_layer` put into a layer's storage."""
        storage = layer.storage
        bits, group = storage["bits"], storage["group"]
        assert isinstance(bits, int) and isinstance(group, int)
        return Facts(bits, group, bool(storage["planar"]), storage["zeros"] == "minus_one", bool(storage["symmetric"]),
                     bool(storage["lossy_zeros"]))


def unpack(words: Tensor, count: int, facts: Facts) -> Tensor:
    """Codes [.., count] uint8 of words [.., W], a stream or planes."""
    if facts.is_planar:
        return unpack_planar(words, facts.bits)[..., :count]
    return unpack_stream(words, facts.bits, count)


def zero_points(stored: Tensor, count: int, facts: Facts, where: str) -> Tensor:
    """Zero points [G, count] uint8 of words packed along the outputs.

    Raises Inconsistent where a symmetric module's zero points are those of the other version. Warns where zero points
    may have been lost by their writer, and where a symmetric module has others than 2^(bits-1).
    """
    raw = unpack(stored, count, facts)
    if facts.is_symmetric:
        _refuse_wrong_version(raw, facts, where)
    zeros = _plus_one(stored, raw, facts, where) if facts.is_minus_one else raw
    middle = 2 ** (facts.bits - 1)
    if facts.is_symmetric and bool((zeros != middle).any()):
        _remark(f"{where}: declared symmetric, but zero points differ from {middle}: used as stored")
    return zeros


def _plus_one(stored: Tensor, raw: Tensor, facts: Facts, where: str) -> Tensor:
    """Undo the writer's subtraction: from whole words, with borrows, where no field crosses one, else from a field."""
    bits, count = facts.bits, raw.shape[-1]
    if 8 % bits:
        wrapped: Tensor = (raw + 1) & (2**bits - 1)
        return wrapped
    width = 8 * stored.element_size()
    if facts.may_be_lossy:
        _remark_lost_zeros(stored, bits, width, where)
    ones = sum(1 << position for position in range(0, width, bits))
    return unpack(stored + ones, count, facts)  # add to the word, not to each field; the sum wraps as words do


def _refuse_wrong_version(raw: Tensor, facts: Facts, where: str) -> None:
    middle = 2 ** (facts.bits - 1)
    wanted, other = (middle - 1, middle) if facts.is_minus_one else (middle, middle - 1)
    if raw.numel() and bool((raw == other).all()):
        raise Inconsistent("zero points and configuration disagree about the version", where=where,
                           found=f"stored zero points all {other}", wanted=f"{wanted}, as the configuration says",
                           remedy="set checkpoint_format as the writer meant it: gptq stores zero points minus one")


def _remark_lost_zeros(stored: Tensor, bits: int, width: int, where: str) -> None:
    """AutoGPTQ stored a zero point 0 as ones from its field to the top of the word; what lay above it is lost."""
    top = (stored >> (width - bits)) & (2**bits - 1)
    lost = int((top == 2**bits - 1).sum())
    if lost:
        _remark(f"{where}: {lost} words end in all-ones fields; their writer may have lost zero points")


def group_map(stored: Tensor | None, groups: int, facts: Facts, where: str) -> Tensor | None:
    """The group of each column [K] int64 from g_idx, None where groups are contiguous.

    Negative indices count from the end; all zeros with several groups mean that g_idx was never written.
    Raises Damaged for indices outside the groups.
    """
    if stored is None:
        return None
    index = stored.long()
    bad = (index >= groups) | (index < -groups)
    if bool(bad.any()):
        first = int(bad.byte().argmax())
        raise Damaged("index out of range", where=where, found=f"{int(index[first])} at position {first}",
                      wanted=f"0 … {groups - 1} ({groups} groups: K {len(index)}, group size {facts.group})",
                      remedy="the file is damaged: download it again, or get it from its writer")
    index = torch.where(index < 0, index + groups, index)
    if groups == 1 or bool((index == torch.arange(len(index)) // facts.group).all()):
        return None
    if not bool(stored.any()):
        _remark(f"{where}: all zero with {groups} groups: never written, taken as contiguous groups")
        return None
    return index


def real_bias(bias: Tensor | None) -> Tensor | None:
    """The bias, None if all of it is zero: AutoGPTQ gives every module one, also where the architecture has none."""
    return bias if bias is not None and bool(bias.any()) else None


def _remark(text: str) -> None:
    warnings.warn(text, stacklevel=3)
