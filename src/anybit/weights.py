"""Canonical data: the tensors of a Scheme, bit for bit what the genuine tool stored.

`QuantizedWeight.dequantize()` is *the* reference weight: float32, evaluated in the order that `schemes.py` states.
Kernels take the parts (`codes`, `scales`, ...) and store them their way; nothing here is fast on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from anybit.errors import Unsupported
from anybit.numerics.codec import decode
from anybit.numerics.packing import PackedCodes
from anybit.schemes import Block, Offset, Placement, ScaleLevel, Scheme

__all__ = ["Dense", "PackedCodes", "QuantizedWeight", "Weight"]


@dataclass(frozen=True)
class QuantizedWeight:
    """The tensors of one quantized layer [N, K], or of stacked experts [E, N, K]; a leading E stands before each.

    stored_codes  [.., N, K] uint8 (unsigned, float and codebook codes) or int8 (signed integers), or PackedCodes
    scales        a tensor a level: [.., blocks of rows, blocks of columns]; formats of 8 bits or less as uint8 codes
                  (int8 for signed integer scales), wide floats as stored; flat and strided levels are [.., count]
    offset        zero points or minima [.., blocks of rows, blocks of columns]; integers as uint8 / int8
    offset_scales scales of a minimum that is itself quantized
    group_map     [K] int64, the group of each input column (act-order)
    pre_scale     [K], multiplies the input
    activation    tensors of static activation quantization: "scale", "zero_point", "global_scale", "output_scale"
    bias          [N] or [E, N]
    """

    scheme: Scheme
    shape: tuple[int, ...]
    stored_codes: Tensor | PackedCodes
    scales: tuple[Tensor, ...] = ()
    offset: Tensor | None = None
    offset_scales: tuple[Tensor, ...] = ()
    group_map: Tensor | None = None
    pre_scale: Tensor | None = None
    activation: Mapping[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        """Codes one a byte, [.., N, K] uint8 or int8; unpacked on each access where the file packs them."""
        stored = self.stored_codes
        return stored.unpack() if isinstance(stored, PackedCodes) else stored

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = [*self.scales, *self.offset_scales, *self.activation.values()]
        tensors += [t for t in (self.offset, self.group_map, self.pre_scale, self.bias) if t is not None]
        return self.stored_codes.nbytes + sum(t.nbytes for t in tensors)

    def dequantize(self) -> Tensor:
        """The float32 reference weight [.., N, K], equal bit for bit to the genuine tool's value."""
        scheme, shape = self.scheme, self.shape
        value = decode(scheme.element, self.codes)
        if scheme.offset is not None and scheme.offset.kind == "zero_point":
            value = value - self._spread_offset(scheme.offset)
        if scheme.scales:
            if scheme.order == "scales_first":
                value = value * self._combined_scale()
            else:
                for level, stored in zip(scheme.scales, self.scales, strict=True):
                    factor = spread(scale_values(level.format, stored), level.block, shape, level.placement,
                                    self.group_map)
                    value = value / factor if level.divide else value * factor
        if scheme.offset is not None and scheme.offset.kind == "minimum":
            minimum = self._spread_offset(scheme.offset)
            value = value - minimum if scheme.offset.subtract else value + minimum
        if scheme.round_to is not None:
            value = value.to(getattr(torch, scheme.round_to)).float()
        return value

    def _combined_scale(self) -> Tensor:
        """All levels combined in float32, finest first, spread to [.., N, K]."""
        return _combine(self.scheme.scales, self.scales, self.shape, self.group_map)

    def _spread_offset(self, offset: Offset) -> Tensor:
        assert self.offset is not None
        if not offset.levels:
            values = scale_values(offset.format, self.offset)
            return spread(values, offset.block, self.shape, offset.placement, self.group_map)
        own = ScaleLevel(offset.format, offset.block, placement=offset.placement)
        return _combine((own, *offset.levels), (self.offset, *self.offset_scales), self.shape, self.group_map)

    def expert(self, index: int) -> QuantizedWeight:
        """The weight [N, K] of one expert of a stack."""

        def pick(t: Tensor) -> Tensor:
            return t[index]

        return replace(
            self,
            shape=self.shape[1:],
            stored_codes=self.stored_codes[index],
            scales=tuple(pick(t) for t in self.scales),
            offset=None if self.offset is None else pick(self.offset),
            offset_scales=tuple(pick(t) for t in self.offset_scales),
            # in a stack a tensor of two dimensions belongs to the experts one by one, a smaller one to all of them
            activation={name: pick(t) if t.dim() > 1 else t for name, t in self.activation.items()},
            bias=None if self.bias is None else pick(self.bias),
        )

    def narrow(self, dim: int, start: int, length: int) -> QuantizedWeight:
        """The part [start, start + length) of dimension `dim` (as of `shape`), exact; views where possible.

        A cut along K keeps the bias on the first part only, so that the parts' products sum to the whole.
        Raises Unsupported with the reason where the cut would split something that shares a scale by position.
        """
        dim = dim % len(self.shape)
        if start < 0 or length < 0 or start + length > self.shape[dim]:
            raise ValueError(f"narrow({dim}, {start}, {length}) outside {self.shape}")
        axis = dim - len(self.shape)  # -3 experts, -2 rows, -1 columns
        if axis == -3:
            return self._narrow_experts(start, length)
        return self._narrow_rows(start, length) if axis == -2 else self._narrow_columns(start, length)

    def _narrow_experts(self, start: int, length: int) -> QuantizedWeight:
        def cut(t: Tensor) -> Tensor:
            return t.narrow(0, start, length)

        return replace(
            self,
            shape=(length, *self.shape[1:]),
            stored_codes=self.stored_codes[start : start + length],
            scales=tuple(cut(t) for t in self.scales),
            offset=None if self.offset is None else cut(self.offset),
            offset_scales=tuple(cut(t) for t in self.offset_scales),
            activation={name: cut(t) if t.dim() > 1 else t for name, t in self.activation.items()},  # as in `expert`
            bias=None if self.bias is None else cut(self.bias),
        )

    def _narrow_rows(self, start: int, length: int) -> QuantizedWeight:
        rows, columns = self.shape[-2:]

        def cut(t: Tensor, block: Block, placement: Placement) -> Tensor:
            if placement == "flat":  # the rows lie one after another, and so do their blocks
                return _cut_blocks(t, -1, block[1], start * columns, length * columns, rows * columns, "grid")
            return _cut_blocks(t, -2, block[0], start, length, rows, placement)

        shape = (*self.shape[:-2], length, self.shape[-1])
        codes = self.stored_codes
        return replace(
            self._with_cut_scales(cut),
            shape=shape,
            stored_codes=codes.narrow(-2, start, length) if isinstance(codes, Tensor) else codes.rows(start, length),
            bias=None if self.bias is None else self.bias.narrow(-1, start, length),
        )

    def _narrow_columns(self, start: int, length: int) -> QuantizedWeight:
        columns = self.shape[-1]

        def cut(t: Tensor, block: Block, placement: Placement) -> Tensor:
            if placement == "gathered":
                return t  # the map is cut instead, the table of groups stays whole
            return _cut_blocks(t, -1, block[1], start, length, columns, placement)

        codes = self.codes  # a packed row is cut after unpacking: a cut may fall inside a word
        return replace(
            self._with_cut_scales(cut),
            shape=(*self.shape[:-1], length),
            stored_codes=codes.narrow(-1, start, length),
            group_map=None if self.group_map is None else self.group_map.narrow(-1, start, length),
            pre_scale=None if self.pre_scale is None else self.pre_scale.narrow(-1, start, length),
            bias=self.bias if start == 0 else None,
        )

    def _with_cut_scales(self, cut: _Cut) -> QuantizedWeight:
        scheme = self.scheme
        offset, offset_scales = self.offset, self.offset_scales
        if scheme.offset is not None and offset is not None:
            offset = cut(offset, scheme.offset.block, scheme.offset.placement)
            levels = scheme.offset.levels
            offset_scales = tuple(
                cut(t, lv.block, lv.placement) for t, lv in zip(offset_scales, levels, strict=True)
            )
        scales = tuple(cut(t, lv.block, lv.placement) for t, lv in zip(self.scales, scheme.scales, strict=True))
        return replace(self, scales=scales, offset=offset, offset_scales=offset_scales)

    def take_rows(self, index: Tensor) -> QuantizedWeight:
        """The rows [R] of a weight [N, K] called by integer `index` [R], any order, repeats allowed: [R, K].

        Row blocks become single rows: each row keeps the scale of its block. Raises Unsupported for scales that are
        laid out over the flattened matrix.
        """

        def cut(t: Tensor, block: Block, placement: Placement) -> Tensor:
            if placement in ("flat", "strided"):
                return _cut_blocks(t, -2, block[0], 0, 0, self.shape[-2], placement)  # refuses
            return t if t.shape[-2] == 1 else t.index_select(-2, index // max(block[0], 1))

        codes = self.stored_codes
        return replace(
            self._with_cut_scales(cut),
            scheme=_single_rows(self.scheme),
            shape=(len(index), self.shape[-1]),
            stored_codes=replace(codes, data=codes.data[index]) if isinstance(codes, PackedCodes) else codes[index],
            bias=None if self.bias is None else self.bias[index],
        )

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight with every tensor on `device`."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            stored_codes=self.stored_codes.to(device),
            scales=tuple(t.to(device) for t in self.scales),
            offset=move(self.offset),
            offset_scales=tuple(t.to(device) for t in self.offset_scales),
            group_map=move(self.group_map),
            pre_scale=move(self.pre_scale),
            activation={k: v.to(device) for k, v in self.activation.items()},
            bias=move(self.bias),
        )


@dataclass(frozen=True)
class Dense:
    """The face of QuantizedWeight over an unquantized tensor [.., N, K] in a wide float."""

    scheme: Scheme
    tensor: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) or (E, N, K)."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tensor.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        return self.tensor.float()

    def expert(self, index: int) -> Dense:
        """The weight [N, K] of one expert of a stack."""
        return replace(self, tensor=self.tensor[index], bias=None if self.bias is None else self.bias[index])

    def narrow(self, dim: int, start: int, length: int) -> Dense:
        """The part [start, start + length) of dimension `dim`; the bias as in QuantizedWeight.narrow."""
        dim = dim % self.tensor.dim()
        axis = dim - self.tensor.dim()
        bias = self.bias
        if bias is not None and axis == -2:
            bias = bias.narrow(-1, start, length)
        elif bias is not None and axis == -3:
            bias = bias.narrow(0, start, length)
        elif axis == -1 and start > 0:
            bias = None
        return replace(self, tensor=self.tensor.narrow(dim, start, length), bias=bias)

    def to(self, device: torch.device | str) -> Dense:
        """The same weight on `device`."""
        return replace(self, tensor=self.tensor.to(device), bias=None if self.bias is None else self.bias.to(device))


Weight = QuantizedWeight | Dense
_Cut = Callable[[Tensor, Block, Placement], Tensor]


def scale_values(format: str, stored: Tensor) -> Tensor:
    """Stored scales, zero points or minima as float32, any shape; exact for every format."""
    return stored.float() if stored.is_floating_point() and stored.element_size() > 1 else decode(format, stored)


def block_count(size: int, block: int) -> int:
    """Number of blocks along a dimension of `size`; block 0 is the whole dimension."""
    return 1 if block == 0 else -(-size // block)


def spread(
    values: Tensor, block: Block, shape: tuple[int, ...], placement: Placement = "grid", group_map: Tensor | None = None
) -> Tensor:
    """Block values [.., blocks of rows, blocks of columns] broadcast or repeated to [.., N, K].

    A dimension that one block covers stays of size 1 and broadcasts.
    """
    rows, columns = shape[-2:]
    if placement in ("flat", "strided"):
        element = torch.arange(rows * columns, device=values.device)
        index = element // block[1] if placement == "flat" else element % values.shape[-1]
        return values[..., index].reshape(*values.shape[:-1], rows, columns)
    if block[0] != 1 and values.shape[-2] != 1:
        values = values.repeat_interleave(block[0], dim=-2)[..., :rows, :]
    if placement == "gathered":
        assert group_map is not None
        return values.index_select(-1, group_map)
    if values.shape[-1] != 1 and block[1] != 1:
        values = values.repeat_interleave(block[1], dim=-1)[..., :columns]
    return values


def _combine(
    levels: tuple[ScaleLevel, ...], stored: tuple[Tensor, ...], shape: tuple[int, ...], group_map: Tensor | None
) -> Tensor:
    """Scale levels combined in float32 on the grid of the finest, then spread to the weight."""
    finest = levels[0]
    scale = scale_values(finest.format, stored[0])
    for level, tensor in zip(levels[1:], stored[1:], strict=True):
        factor = scale_values(level.format, tensor)
        if finest.placement == "grid" and level.placement == "grid":
            factor = _coarse_on_fine(factor, level.block, finest.block, scale)
        else:  # rare: act-order or flat levels above a coarser one
            scale = spread(scale, finest.block, shape, finest.placement, group_map)
            factor = spread(factor, level.block, shape, level.placement, group_map)
            finest = ScaleLevel(finest.format, (1, 1))
        scale = scale / factor if level.divide else scale * factor
    return spread(scale, finest.block, shape, finest.placement, group_map)


def _coarse_on_fine(coarse: Tensor, coarse_block: Block, fine_block: Block, fine: Tensor) -> Tensor:
    """Values of coarse blocks repeated onto the grid of finer blocks (size 1 broadcasts)."""
    for dim, axis in ((0, -2), (1, -1)):
        if coarse.shape[axis] != 1 and coarse_block[dim] != fine_block[dim]:
            step = coarse_block[dim] // fine_block[dim]
            coarse = coarse.repeat_interleave(step, dim=axis).narrow(axis, 0, fine.shape[axis])
    return coarse


def _single_rows(scheme: Scheme, *, always: bool = False) -> Scheme:
    """The scheme with row blocks of one row; a block over all rows stays, unless `always`."""

    def rows(size: int) -> int:
        return 1 if always else min(size, 1)

    def level(lv: ScaleLevel) -> ScaleLevel:
        return replace(lv, block=(rows(lv.block[0]), lv.block[1]))

    offset = scheme.offset
    if offset is not None:
        block = (rows(offset.block[0]), offset.block[1])
        offset = replace(offset, block=block, levels=tuple(level(lv) for lv in offset.levels))
    return replace(scheme, scales=tuple(level(lv) for lv in scheme.scales), offset=offset)


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Weights [N_i, K] of one scheme, one below the other: [sum N_i, K]; None where that is no exact weight.

    A scale of the whole matrix becomes one for each row, so that each part keeps its own. Blocks of several rows,
    input transforms and activation tensors that differ stay with their matrices.
    """
    first = weights[0]
    offset = first.scheme.offset
    levels = [*first.scheme.scales, *(offset.levels if offset else ())]
    blocks = [lv.block[0] for lv in levels] + ([offset.block[0]] if offset else [])
    alike = all(w.scheme == first.scheme and w.shape[1:] == first.shape[1:] and len(w.shape) == 2 for w in weights)
    with_bias = sum(w.bias is not None for w in weights)
    if not alike or max(blocks, default=1) > 1 or with_bias not in (0, len(weights)):
        return None
    if any(lv.placement != "grid" for lv in levels) or first.pre_scale is not None or first.activation:
        return None

    def below(tensors: list[Tensor]) -> Tensor:
        rows = [t.expand(w.shape[0], -1) if t.shape[-2] == 1 else t for t, w in zip(tensors, weights, strict=True)]
        return torch.cat(rows, dim=-2)

    codes = [w.stored_codes for w in weights]
    packed = [c for c in codes if isinstance(c, PackedCodes)]
    if packed and (len(packed) < len(codes) or len({(c.bits, c.count, c.order, c.sign) for c in packed}) > 1):
        return None
    together = replace(packed[0], data=torch.cat([c.data for c in packed], dim=-2)) if packed else None
    offsets = [w.offset for w in weights if w.offset is not None]
    return replace(
        first,
        scheme=_single_rows(first.scheme, always=True),
        shape=(sum(w.shape[0] for w in weights), first.shape[1]),
        stored_codes=together if together is not None else torch.cat([w.codes for w in weights], dim=-2),
        scales=tuple(below([w.scales[i] for w in weights]) for i in range(len(first.scales))),
        offset=below(offsets) if offsets else None,
        offset_scales=tuple(below([w.offset_scales[i] for w in weights]) for i in range(len(first.offset_scales))),
        bias=torch.cat([w.bias for w in weights if w.bias is not None]) if with_bias else None,
    )


def _cut_blocks(
    t: Tensor, axis: int, block: int, start: int, length: int, size: int, placement: Placement
) -> Tensor:
    """The blocks of positions [start, start + length) along `axis`, refusing a cut inside a block."""
    if placement in ("flat", "strided"):
        raise Unsupported(
            "this weight cannot be cut",
            found=f"scales laid out over the flattened matrix ({placement})",
            wanted="blocks that end with a row",
            remedy="run it whole, or convert it to groups along K",
        )
    if block == 0 or t.shape[axis] == 1:
        return t
    if start % block or (length % block and start + length != size):
        raise Unsupported(
            "a cut would split a block that shares a scale",
            found=f"[{start}, {start + length}) of {size}",
            wanted=f"multiples of {block}",
            remedy="choose another tensor-parallel size",
        )
    return t.narrow(axis, start // block, -(-length // block))
