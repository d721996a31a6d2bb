"""Canonical weights to the layout "triton-planes" and back, in plain torch on any device.

`pack` cuts a QuantizedWeight into planes, group scales and row factors; `unpacked` puts the canonical weight together
again, bit for bit in its values. What decides about a form beyond headers (whether scales fit a folded byte, whether
NaN codes occur) is read here, once. Layout: `planes_form.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from anybit.kernels.linear.planes import in_order
from anybit.kernels.triton.planes_form import ALIASES, ROWS, SMALL_FLOATS, Form, form_of
from anybit.numerics.codec import code_values
from anybit.numerics.formats import WIDE_FLOATS, number_format
from anybit.numerics.packing import PackedCodes
from anybit.schemes import Offset, ScaleLevel, Scheme
from anybit.weights import QuantizedWeight, scale_values

__all__ = ["Packed", "pack", "unpacked"]

_CHUNK: Final = 1 << 22  # codes packed at once: bounds the temporaries
_E8_WINDOW: Final = 120  # binades below the largest scale in which fp4 products stay normal in bfloat16
_E53_TOP: Final = 30  # exponent field of the largest folded scale
_E53_HALF: Final = 9  # smallest one whose products are exact in float16
_PLANE_DTYPES: Final = {8: torch.uint8, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass
class Packed:
    """A weight [N, K] in the layout.

    tensors   planes "plane_0".. [Np, Kp / 8] (8 bits: [Np, Kp]); "scale", "addend" [groups, Np] or int32 words
              [blocks, 2, Np]; "scale_super", "addend_super" [super groups, Np]; "zeros" uint8 [groups or 1, Np];
              "row" float32 [Np], the product of all row scales; "level_i" float32 [N or 1], row scales as stored;
              "table" float32 [16]; "permutation" [K] int64 (act-order)
    top       exponent that folded scales are relative to
    is_half   products may be computed in float16
    factor    value of "row" where it is one number
    lowest, highest   exponents of the e8m0 scales of blocks that are not zero
    """

    form: Form
    scheme: Scheme
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]
    top: int = 0
    is_half: bool = True
    factor: float | None = None
    lowest: int = 0
    highest: int = 0


def pack(weight: QuantizedWeight, dtype: torch.dtype) -> Packed | None:
    """The weight in the layout, for activations of `dtype`; None if it does not fit.

    That is where act-order groups differ in size, or zero points go beyond 127 (255 for codes of 8 bits).

    The scheme has passed `planes_form.reasons_against`.
    """
    permutation = None
    if weight.scheme.act_order:
        found = _sorted_by_group(weight)
        if found is None:
            return None
        weight, permutation = found
    scheme = weight.scheme
    n, k = weight.shape[-2:]
    packed = Packed(form_of(scheme, k), scheme, (n, k), {})
    if permutation is not None:
        packed.tensors["permutation"] = permutation
    if packed.form.has_zeros and not _zeros_fit(packed.form, weight):
        return None
    dead = _store_scales(packed, weight, dtype)
    _store_offset(packed, weight)
    _store_rows(packed, weight)
    _store_codes(packed, weight, dead)
    device = packed.tensors["row"].device
    if packed.form.kind == "table":
        packed.tensors["table"] = code_values(scheme.element, str(device)).clone()
    packed.is_half = packed.is_half and _is_half(packed.form, scheme)
    return packed


def _is_half(form: Form, scheme: Scheme) -> bool:
    """True if operands are exact in float16 too: not the wide range of e5m2fnuz or bfloat16, not float32 tables."""
    if form.scaling == "decode":
        return form.round_to == "float16"
    return form.terms == 1 and scheme.element != "fp8_e5m2fnuz" and form.scale_kind != "e8"


def _sorted_by_group(weight: QuantizedWeight) -> tuple[QuantizedWeight, Tensor] | None:
    """The weight with the columns of each group together, and their order; None if groups differ in size."""
    assert weight.group_map is not None
    permutation = torch.argsort(weight.group_map, stable=True)
    positions = torch.arange(len(permutation), device=permutation.device)
    if not torch.equal(weight.group_map[permutation], positions // weight.scheme.scales[0].block[1]):
        return None
    codes = weight.codes.index_select(-1, permutation)
    return replace(weight, scheme=in_order(weight.scheme), stored_codes=codes, group_map=None), permutation


def _padded(size: int, step: int) -> int:
    return -(-size // step) * step


# --- scales -----------------------------------------------------------------------------------------------------------


def _store_scales(packed: Packed, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor | None:
    """Group scales; returns where a folded scale is 0, [N, groups], since a folded byte has no zero."""
    form, scheme = packed.form, packed.scheme
    if form.scaling == "row":
        return None
    level, stored = scheme.scales[0], weight.scales[0]
    if level.format == "e8m0":
        _note_range(packed, weight, level)
    if form.scaling == "fold":
        bytes_ = _folded(packed, weight, dtype)
        if bytes_ is not None:
            packed.tensors["scale"] = _as_words(bytes_) if form.words else bytes_
            zero = scale_values(level.format, stored) == 0
            return _spread(zero, level, packed).T[: packed.shape[0]] if bool(zero.any()) else None
        # as they are: the float32 partial sums take any scale
        kind = "e8m0" if level.format == "e8m0" else "float"
        form = replace(form, scaling="group", scale_kind=kind, words=form.words and kind != "float")
        packed.form = form
    values = _spread(_as_stored(level.format, stored, form.scale_kind), level, packed)
    packed.tensors["scale"] = _as_words(values) if form.words else values
    if form.super_groups:
        packed.tensors["scale_super"] = _spread_super(scheme.scales, weight.scales, packed, form.super_groups)
    return None


def _note_range(packed: Packed, weight: QuantizedWeight, level: ScaleLevel) -> None:
    """Smallest and largest exponent of scales whose weights are not all zero."""
    alive = weight.scales[0].flatten()
    low, high = (int(v) for v in alive.aminmax())
    if high - low > _E8_WINDOW and packed.form.group:
        used = _used(weight, packed)
        alive = _spread(weight.scales[0], level, packed).T[: packed.shape[0]][used]
        low, high = (int(v) for v in alive.aminmax()) if len(alive) else (127, 127)
    packed.lowest, packed.highest = low - 127, high - 127


def _used(weight: QuantizedWeight, packed: Packed) -> Tensor:
    """Which groups hold a weight other than 0: [N, groups] bool."""
    form = packed.form
    used = []
    for codes in _chunks(weight, packed):
        lit = (codes & (2 ** (form.bits - 1) - 1)) != 0 if form.kind == "float" else codes != form.zero
        lit = pad(lit, (0, -lit.shape[1] % form.group))
        used.append(lit.view(len(codes), -1, form.group).any(-1))
    return torch.cat(used)


def _folded(packed: Packed, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor | None:
    """Scales as bytes relative to the largest, [groups, Np] uint8; None if their range is too wide or one is NaN."""
    level, stored = packed.scheme.scales[0], weight.scales[0]
    if level.format == "e8m0" and dtype != torch.float16:
        if packed.highest == 128 or packed.highest - packed.lowest > _E8_WINDOW:
            return None
        packed.top = packed.highest
        bytes_ = (stored.to(torch.int16) - (packed.top + 127) + 253).clamp(1, 253).to(torch.uint8)
        return _spread(bytes_, level, packed)
    values = scale_values(level.format, stored)
    positive = values[values > 0]
    if bool(values.isnan().any()) or not len(positive):
        return None
    fraction, exponent = torch.frexp(values)  # fraction in [0.5, 1), or 0
    exponent -= 1
    low, high = (int(v) for v in torch.frexp(positive)[1].aminmax())
    top = high - 1
    if level.format == "e8m0":
        low, top = packed.lowest + 1, packed.highest
    smallest = low - 1 - top + _E53_TOP
    if smallest < 1 or top > 120:
        return None
    packed.form = replace(packed.form, scale_kind="e53")
    packed.top, packed.is_half = top, smallest >= _E53_HALF
    field = (exponent - top + _E53_TOP).clamp(1, 31)
    mantissa = (fraction * 16 - 8).to(torch.int32).clamp(min=0)
    return _spread((field * 8 + mantissa).to(torch.uint8), level, packed)


def _as_stored(format: str, stored: Tensor, kind: str) -> Tensor:
    """Values as the kernels read them: integers and e8m0 as bytes, wide floats as they are, others as bfloat16."""
    if kind in ("integer", "e8m0") or format in WIDE_FLOATS:
        return stored
    values = scale_values(format, stored)
    return values.to(torch.bfloat16) if format in SMALL_FLOATS and format != "e8m0" else values


def _spread(values: Tensor, level: ScaleLevel | Offset, packed: Packed) -> Tensor:
    """Block values [R, C] for each row and group of the form, transposed: [groups, Np]."""
    form = packed.form
    n, k = packed.shape
    groups = -(-form.padded(k) // form.group)
    values = _by_row(values, level.block[0], n)
    if level.block[1] and level.block[1] != form.group:
        values = values.repeat_interleave(level.block[1] // form.group, dim=-1)
    if level.block[1] == 0:
        values = values.expand(n, groups)
    values = values[:, :groups]
    room = torch.zeros(groups, _padded(n, ROWS), dtype=values.dtype, device=values.device)
    room[: values.shape[1], :n] = values.T
    return room


def _spread_super(
    levels: tuple[ScaleLevel | Offset, ...], stored: tuple[Tensor, ...], packed: Packed, size: int
) -> Tensor:
    """The second level by group, [super groups, Np]; `size` groups under each."""
    level, values = next((lv, t) for lv, t in zip(levels[1:], stored[1:], strict=True) if lv.block[1])
    n, k = packed.shape
    values = _by_row(_as_stored(level.format, values, "float"), level.block[0], n)
    groups = -(-packed.form.padded(k) // packed.form.group)
    room = torch.zeros(-(-groups // size), _padded(n, ROWS), dtype=values.dtype, device=values.device)
    room[: values.shape[1], :n] = values.T
    return room


def _by_row(values: Tensor, block: int, rows: int) -> Tensor:
    if values.shape[-2] == 1:
        return values.expand(rows, -1)
    return values.repeat_interleave(block, dim=-2)[:rows] if block > 1 else values


def _as_words(values: Tensor) -> Tensor:
    """Bytes [groups, Np] four to an int32 word: [groups / 8, 2, Np]."""
    bytes_ = values.view(torch.uint8).view(-1, 2, 4, values.shape[-1]).to(torch.int32)
    return bytes_[:, :, 0] | bytes_[:, :, 1] << 8 | bytes_[:, :, 2] << 16 | bytes_[:, :, 3] << 24


def _from_words(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `_as_words`."""
    bytes_ = torch.stack([(words >> shift & 0xFF).to(torch.uint8) for shift in (0, 8, 16, 24)], dim=2)
    return bytes_.reshape(-1, words.shape[-1]).view(dtype)


def _store_offset(packed: Packed, weight: QuantizedWeight) -> None:
    offset, form = packed.scheme.offset, packed.form
    if offset is None:
        return
    assert weight.offset is not None
    if form.has_zeros:
        # as unsigned as the codes are
        values = (weight.offset.to(torch.int16) + form.zero).to(torch.uint8)
        if offset.block[1]:
            packed.tensors["zeros"] = _spread(values, offset, packed)
        else:
            packed.tensors["zeros"] = _row_values(values, offset, packed)[None]
        return
    stored = _spread(_as_stored(offset.format, weight.offset, form.addend_kind), offset, packed)
    packed.tensors["addend"] = _as_words(stored) if form.addend_words else stored
    if form.addend_super:
        packed.tensors["addend_super"] = _spread_super(
            (offset, *offset.levels), (weight.offset, *weight.offset_scales), packed, form.addend_super
        )


def _zeros_fit(form: Form, weight: QuantizedWeight) -> bool:
    """True if all zero points, as unsigned as the codes are, are what kernels read: mantissas of 7 bits, or bytes."""
    if weight.offset is None or not weight.offset.numel():
        return True
    low, high = (int(v) + form.zero for v in weight.offset.to(torch.int16).aminmax())
    return low >= 0 and high <= (255 if form.bits == 8 else 127)


def _row_values(values: Tensor, level: ScaleLevel | Offset, packed: Packed) -> Tensor:
    """Values [R, 1] for each row: [Np]."""
    n = packed.shape[0]
    return pad(_by_row(values, level.block[0], n)[:, 0], (0, _padded(n, ROWS) - n))


def _row_levels(packed: Packed) -> list[int]:
    """Numbers of the levels that act by row alone."""
    consumed = packed.form.scaling != "row"
    return [i for i, lv in enumerate(packed.scheme.scales) if not lv.block[1] and not (i == 0 and consumed)]


def _store_rows(packed: Packed, weight: QuantizedWeight) -> None:
    scheme, n = packed.scheme, packed.shape[0]
    device = weight.stored_codes.device if isinstance(weight.stored_codes, Tensor) else weight.stored_codes.data.device
    unit = ALIASES.get(scheme.element, ("", 1.0))[1] * 2.0**packed.top
    row = torch.full((_padded(n, ROWS),), unit, dtype=torch.float32, device=device)
    for i in _row_levels(packed):
        level = scheme.scales[i]
        values = scale_values(level.format, weight.scales[i])
        packed.tensors[f"level_{i}"] = _by_row(values, level.block[0], n)[:, 0].contiguous() \
            if values.shape[-2] > 1 else values.reshape(1)
        whole = _row_values(values, level, packed)
        row[:n] = row[:n] / whole[:n] if level.divide else row[:n] * whole[:n]
    packed.tensors["row"] = row
    first = row[:1]
    packed.factor = float(first) if n and bool((row[:n] == first).all()) else None


# --- codes ------------------------------------------------------------------------------------------------------------


def _chunks(weight: QuantizedWeight, packed: Packed) -> Iterator[Tensor]:
    """The codes as the kernels read them, unsigned, K padded: a few rows at a time, [rows, Kp] uint8."""
    n, k = packed.shape
    stored = weight.stored_codes
    step = max(1, _CHUNK // max(k, 1))
    for start in range(0, n, step):
        count = min(step, n - start)
        part = stored.rows(start, count).unpack() if isinstance(stored, PackedCodes) else stored[start : start + count]
        yield pad(_unsigned(part, packed), (0, packed.form.padded(k) - k))


def _unsigned(codes: Tensor, packed: Packed) -> Tensor:
    element = packed.scheme.element
    if element == "mxint4":
        magnitude = codes & 7
        return torch.where(codes >= 8, 8 - magnitude, 8 + magnitude).to(torch.uint8)
    if element == "fp4_doubled":
        return codes.masked_fill(codes == 8, 0)
    if codes.dtype == torch.int8:
        return (codes.to(torch.int16) + packed.form.zero).to(torch.uint8)
    return codes.view(torch.uint8)


def _store_codes(packed: Packed, weight: QuantizedWeight, dead: Tensor | None) -> None:
    form = packed.form
    n, k = packed.shape
    rows, device = _padded(n, ROWS), packed.tensors["row"].device
    elements = form.padded(k) // form.fields
    planes = [torch.zeros(rows, elements, dtype=_PLANE_DTYPES[w], device=device) for w in form.widths]
    start, special = 0, False
    check = number_format(packed.scheme.element)
    odd = torch.tensor([*check.nan_codes, *check.inf_codes], dtype=torch.uint8, device=device)
    for codes in _chunks(weight, packed):
        count = len(codes)
        if dead is not None:
            codes = codes.masked_fill(dead[start : start + count].repeat_interleave(form.group, dim=1), 0)
        if len(odd):
            special = special or bool(torch.isin(codes, odd).any())
        shift = 0
        for width, plane in zip(form.widths, planes, strict=True):
            plane[start : start + count] = _plane(codes, width, shift, form)
            shift += width
        start += count
    packed.tensors |= {f"plane_{i}": plane for i, plane in enumerate(planes)}
    if special:
        packed.form = replace(form, special={1: 2, 2: 1}.get(len(check.nan_codes), 3))


def _plane(codes: Tensor, width: int, shift: int, form: Form) -> Tensor:
    """Bits [shift, shift + width) of codes [rows, Kp] as the plane's elements [rows, Kp / fields]."""
    if width == 8:
        return codes
    fields = codes.view(len(codes), -1, form.fields, form.tile)
    elements = torch.zeros(*fields.shape[:2], form.tile, dtype=torch.int32, device=codes.device)
    for i in range(form.fields):
        elements |= (fields[:, :, i].to(torch.int32) >> shift & (2**width - 1)) << (width * i)
    return elements.view(len(codes), -1).to(_PLANE_DTYPES[width])


def _codes(packed: Packed, tensors: dict[str, Tensor]) -> Tensor:
    """Unsigned codes [rows, K] uint8 of the planes."""
    form, k = packed.form, packed.shape[1]
    codes = torch.zeros_like(tensors["plane_0"], dtype=torch.uint8) if form.bits != 8 else tensors["plane_0"]
    if form.bits != 8:
        rows = codes.shape[0]
        codes = torch.zeros(rows, form.padded(k) // form.block, form.fields, form.tile, dtype=torch.uint8,
                            device=codes.device)  # fmt: skip
        shift = 0
        for number, width in enumerate(form.widths):
            elements = tensors[f"plane_{number}"].to(torch.int32).view(rows, -1, form.tile)
            for i in range(form.fields):
                codes[:, :, i] |= ((elements >> (width * i) & (2**width - 1)) << shift).to(torch.uint8)
            shift += width
        codes = codes.view(rows, -1)
    return codes[:, :k]


# --- and back ---------------------------------------------------------------------------------------------------------


def unpacked(packed: Packed, index: Tensor | None = None) -> Tensor:
    """The float32 reference weight [N, K], or its rows `index` [R] in their order; columns as in the checkpoint."""
    tensors = packed.tensors
    n, k = packed.shape
    if index is None:
        index = torch.arange(n, device=tensors["row"].device)
    taken = {name: t[index] if name.startswith("plane") else t for name, t in tensors.items()}
    codes = _codes(packed, taken)
    scheme, form = packed.scheme, packed.form
    scales, levels = _levels_back(packed, index)
    offset, offsets, offset_scales = _offset_back(packed, index)
    element = scheme.element
    if form.kind == "int" and not form.has_zeros and form.zero:
        codes = (codes.to(torch.int16) - form.zero).to(torch.int8)
    elif form.kind == "int":
        element = f"uint{form.bits}"
    if scheme.element == "mxint4":
        codes = torch.where(codes < 0, 8 - codes, codes).to(torch.uint8)
    weight = QuantizedWeight(
        replace(scheme, element=element, scales=levels, offset=offset, act_order=False, pre_scale=False),
        (len(index), k), codes.contiguous(), scales, offsets, offset_scales,
    ).dequantize()  # fmt: skip
    if "permutation" in tensors:
        return torch.empty_like(weight).index_copy_(-1, tensors["permutation"], weight)
    return weight


def _levels_back(packed: Packed, index: Tensor) -> tuple[tuple[Tensor, ...], tuple[ScaleLevel, ...]]:
    """Every level as float32 values for the rows `index`, in their order."""
    form, tensors = packed.form, packed.tensors
    values, levels = [], []
    rows = _row_levels(packed)
    for i, level in enumerate(packed.scheme.scales):
        if i in rows:
            stored = tensors[f"level_{i}"]
            values.append((stored.expand(len(index)) if len(stored) == 1 else stored[index])[:, None])
            levels.append(replace(level, format="float32", block=(1, 0)))
        elif i == 0:
            stored = tensors["scale"]
            if form.words:
                signed = number_format(level.format).kind == "int"
                stored = _from_words(stored, torch.int8 if signed else torch.uint8)
            values.append(_group_back(packed, stored[:, index], form.scale_kind))
            levels.append(ScaleLevel("float32", (1, form.group)))
        else:
            values.append(tensors["scale_super"][:, index].T.float())
            levels.append(ScaleLevel("float32", (1, form.group * form.super_groups)))
    return tuple(_cut(v, lv, packed) for v, lv in zip(values, levels, strict=True)), tuple(levels)


def _group_back(packed: Packed, stored: Tensor, kind: str) -> Tensor:
    """Stored scales [groups, R] as float32 values [R, groups]."""
    stored = stored.T
    if kind == "e8":
        return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() + packed.top - 253)
    if kind == "e53":
        fraction = 1 + (stored & 7).float() / 8
        return torch.ldexp(fraction, (stored >> 3).int() + packed.top - _E53_TOP)
    return scale_values("e8m0", stored) if kind == "e8m0" else stored.float()


def _cut(values: Tensor, level: ScaleLevel, packed: Packed) -> Tensor:
    """Without the groups of the padding."""
    return values if not level.block[1] else values[:, : -(-packed.shape[1] // level.block[1])].contiguous()


def _offset_back(packed: Packed, index: Tensor) -> tuple[Offset | None, Tensor | None, tuple[Tensor, ...]]:
    offset, form, tensors = packed.scheme.offset, packed.form, packed.tensors
    if offset is None:
        return None, None, ()
    if form.has_zeros:
        stored = tensors["zeros"][:, index].T.float()
        block = (1, form.group if offset.block[1] else 0)
        whole = replace(offset, format="float32", block=block, placement="grid")
        return whole, _cut(stored, ScaleLevel("float32", block), packed), ()
    stored = tensors["addend"]
    if form.addend_words:
        signed = number_format(offset.format).kind == "int"
        stored = _from_words(stored, torch.int8 if signed else torch.uint8)
    level = ScaleLevel("float32", (1, form.group))
    values = _cut(_group_back(packed, stored[:, index], form.addend_kind), level, packed)
    above: tuple[Tensor, ...] = ()
    levels: tuple[ScaleLevel, ...] = ()
    if form.addend_super:
        levels = (ScaleLevel("float32", (1, form.group * form.addend_super)),)
        above = (_cut(tensors["addend_super"][:, index].T.float(), levels[0], packed),)
    return replace(offset, format="float32", block=level.block, levels=levels, placement="grid"), values, above
