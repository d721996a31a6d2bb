"""The reference family in plain torch: see `tiled.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from anybit.kernels.linear.dense_torch import row_by_row
from anybit.kernels.request import Regime
from anybit.numerics.packing import PackedCodes, Sign, pack_stream
from anybit.weights import Dense, QuantizedWeight, Weight

TILE_BYTES = 16 * 2**20  # of decoded float32: stays within a few caches, and within the memory contract
_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers, which `Module.to(dtype)` leaves alone (a rounded scale would be another weight)."""
    return tensor.view(_INTEGER_VIEW[tensor.element_size()]) if tensor.is_floating_point() else tensor


def compact(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight with its codes packed to their width along K, if a dialect left them one a byte."""
    codes = weight.stored_codes
    bits = weight.scheme.weight_bits
    if isinstance(codes, PackedCodes) or bits == 8:
        return replace(weight, stored_codes=codes.contiguous() if isinstance(codes, Tensor) else codes)
    signed = weight.scheme.element.startswith("int")
    packed = pack_stream(codes.view(torch.uint8) & (2**bits - 1) if signed else codes, bits, torch.uint8)
    sign: Sign = "twos_complement" if signed else "unsigned"
    return replace(weight, stored_codes=PackedCodes(packed, bits, codes.shape[-1], "stream", sign))


class StoredCanonical:
    """A QuantizedWeight taken apart into named buffers."""

    quantizes_input = False

    def __init__(self, weight: QuantizedWeight, *, pinned: bool = False) -> None:
        """`weight` with compact codes; `pinned` multiplies row by row."""
        self.shape = weight.shape
        self._pinned = pinned
        self._dtypes: dict[str, torch.dtype] = {}
        self._weight = weight
        self._dtypes = {name: t.dtype for name, t in self._parts().items()}
        self._tile = _tile_rows(weight)
        self._is_flat = any(level.placement in ("flat", "strided") for level in weight.scheme.scales)

    def _parts(self) -> dict[str, Tensor]:
        weight = self._weight
        codes = weight.stored_codes
        parts = {"codes": codes.data if isinstance(codes, PackedCodes) else codes}
        parts |= {f"scale_{i}": t for i, t in enumerate(weight.scales)}
        parts |= {f"offset_scale_{i}": t for i, t in enumerate(weight.offset_scales)}
        if weight.offset is not None:
            parts["offset"] = weight.offset
        if weight.group_map is not None:
            parts["group_map"] = weight.group_map
        return parts

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name, floats as bit patterns."""
        return {name: as_bits(t) for name, t in self._parts().items()}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""
        real = {name: tensors[name].view(dtype) for name, dtype in self._dtypes.items()}
        weight = self._weight
        codes = weight.stored_codes
        self._weight = replace(
            weight,
            stored_codes=replace(codes, data=real["codes"]) if isinstance(codes, PackedCodes) else real["codes"],
            scales=tuple(real[f"scale_{i}"] for i in range(len(weight.scales))),
            offset_scales=tuple(real[f"offset_scale_{i}"] for i in range(len(weight.offset_scales))),
            offset=real.get("offset"),
            group_map=real.get("group_map"),
        )

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] times W^T (+ bias) accumulated in float32: [M, N] in `out_dtype`."""
        rows = x.float()
        n = self.shape[-2]
        y = torch.empty((x.shape[0], n), dtype=out_dtype, device=x.device)
        for start in range(0, n, self._tile):
            count = min(self._tile, n - start)
            tile = self._rows(start, count)
            product = row_by_row(rows, tile, None) if self._pinned else rows @ tile.T
            if bias is not None:
                product += bias[start : start + count].float()
            y[:, start : start + count] = product
        return y

    def _rows(self, start: int, count: int) -> Tensor:
        whole = count == self.shape[-2]
        return (self._weight if whole else self._weight.narrow(-2, start, count)).dequantize()

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Decoded rows [.., K] for integer `index` [..], each distinct row decoded once."""
        flat, inverse = torch.unique(index.reshape(-1), return_inverse=True)
        table = self._weight.dequantize()[flat] if self._is_flat else self._weight.take_rows(flat).dequantize()
        return table.to(dtype)[inverse].reshape(*index.shape, self.shape[-1])

    def dequantize(self) -> Tensor:
        """The float32 weight."""
        return self._weight.dequantize()


def _tile_rows(weight: QuantizedWeight) -> int:
    """Rows decoded at a time: a multiple of every row block, or all where blocks do not end with a row."""
    n, k = weight.shape[-2:]
    levels = [*weight.scheme.scales, *(weight.scheme.offset.levels if weight.scheme.offset else ())]
    if any(level.placement in ("flat", "strided") for level in levels):
        return max(n, 1)
    block = max([level.block[0] for level in levels], default=1) or 1
    wanted = max(1, TILE_BYTES // (4 * max(k, 1)))
    return max(block, wanted // block * block)


class Tiled:
    """Implementation of `torch-tiled`."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> StoredCanonical:
        """Codes packed to their width, scales as stored."""
        if isinstance(weight, Dense):
            raise TypeError("a Dense weight belongs to torch-dense")
        return StoredCanonical(compact(weight), pinned=pinned)
