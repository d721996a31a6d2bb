"""The compiled CPU family: see `planes.py` for its specs and `native/` for the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from anybit.errors import DeviceProblem
from anybit.kernels.catalogue import Stored
from anybit.kernels.linear import planes as specs
from anybit.kernels.linear.planes import in_order
from anybit.kernels.linear.tiled_torch import Tiled, as_bits
from anybit.kernels.native.planes import Planes as NativePlanes
from anybit.kernels.native.planes import from_weight
from anybit.kernels.request import Kernels, Regime
from anybit.weights import Dense, QuantizedWeight, Weight

MATVEC, GEMM, EXPAND = specs.MATVEC.name, specs.GEMM.name, specs.EXPAND.name
TILE_BYTES = 4 * 2**20  # of decoded float32 for the prefill product: small enough to stay in the last-level cache


class StoredPlanes:
    """A weight [N, K] as the compiled library reads it, its bias included."""

    quantizes_input = False

    def __init__(
        self, planes: NativePlanes, kernels: Mapping[Regime, str], permutation: Tensor | None = None,
        *, pinned: bool = False,
    ) -> None:
        """`kernels` by number of tokens; what it leaves out has `native-matvec`.

        permutation  [K] int64: column j of the planes is input permutation[j] (act-order); None: the same order
        pinned       a row's result does not depend on M
        """
        self.shape = planes.shape
        self._permutation = permutation
        self._planes = planes
        self._kernels = Kernels.of(kernels)
        self._tile = max(64, TILE_BYTES // (4 * max(planes.cols, 1)))
        self._pinned = pinned
        if self._kernel(1) != MATVEC or pinned:  # the plan wants another even for few tokens, or pairs of rows
            self.step = None  # type: ignore[assignment, method-assign]

    def _kernel(self, tokens: int) -> str:
        return self._kernels.at(tokens) if self._kernels.steps else MATVEC

    def tensors(self) -> dict[str, Tensor]:
        """The buffers, numbered; the library holds their addresses."""
        held = {str(i): as_bits(tensor) for i, tensor in enumerate(self._planes.buffers)}
        return held if self._permutation is None else {**held, "permutation": self._permutation}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Refuse a move: the layout is the CPU library's own."""
        for i, held in enumerate(self._planes.buffers):
            if tensors[str(i)].data_ptr() != held.data_ptr():
                raise DeviceProblem(
                    "the packed weights are laid out for the CPU library and cannot move",
                    found=f"a move to {tensors[str(i)].device}",
                    wanted="the device that the model was loaded for",
                    remedy="anybit.load(..., device='cuda')",
                )

    @property
    def packed(self) -> list[NativePlanes] | None:
        """The library's own weight, for a call that does more than this product; None where x must be permuted."""
        return None if self._permutation is not None or self.step is None else [self._planes]

    def step(self, x: Tensor) -> Tensor:
        """As `linear` for few tokens, x [.., K] -> [.., N] of x's dtype, bias included: nothing between host and C."""
        if x.dtype == torch.float64:  # the library has no such type, and sums are float32 in any case
            return self._planes.linear(self._in_order(x).float()).double()
        return self._planes.linear(self._in_order(x))

    def _in_order(self, x: Tensor) -> Tensor:
        if self._permutation is None:
            return x
        if x.shape[-1] != len(self._permutation):  # picking columns would hide it
            raise ValueError(f"x {tuple(x.shape)} for a weight {tuple(self.shape)}")
        return x.index_select(-1, self._permutation)

    def _as_given(self, weight: Tensor) -> Tensor:
        """Columns of decoded rows back in the checkpoint's order."""
        if self._permutation is None:
            return weight
        return torch.empty_like(weight).index_copy_(-1, self._permutation, weight)

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] times W^T plus the weight's own bias: [M, N] in `out_dtype`."""
        kernel = self._kernel(x.shape[0])
        # a lone row is summed in two chains, rows in pairs and fours in one
        if self._pinned and kernel == MATVEC and x.shape[0] % 2:
            return self.linear(torch.cat([x, x[-1:]]), regime, bias, out_dtype)[:-1]
        x = self._in_order(x)
        wanted = out_dtype
        if torch.float64 in (x.dtype, out_dtype):
            x, out_dtype = x.float(), torch.float32
        if kernel == MATVEC:
            return self._planes.linear(x, torch.empty((x.shape[0], self.shape[0]), dtype=out_dtype)).to(wanted)
        return self.some_rows(x, regime, bias, wanted, 0, self.shape[0])

    def some_rows(
        self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype, first: int, count: int
    ) -> Tensor:
        """x [M, K] (in the planes' order) times the rows [first, first + count) alone: [M, count] in `out_dtype`.

        bias  [count] of these rows; the compiled product takes them from the planes' own
        """
        if self._kernel(x.shape[0]) == GEMM:
            x = x.float() if x.dtype == torch.float64 else x
            made = torch.float32 if out_dtype == torch.float64 else out_dtype
            return self._planes.gemm(x, first, count, torch.empty((x.shape[0], count), dtype=made)).to(out_dtype)
        rows = x.float()
        y = torch.empty((x.shape[0], count), dtype=torch.float32)
        tile = torch.empty((min(self._tile, count), self.shape[1]), dtype=torch.float32)
        for start in range(0, count, self._tile):
            part = tile[: min(self._tile, count - start)]
            self._planes.decode_into(part, first + start)
            torch.mm(rows, part.T, out=y[:, start : start + len(part)])
        if bias is not None:
            y += bias.float()
        return y.to(out_dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Decoded rows [.., K] for integer `index` [..]."""
        return self._as_given(self._planes.gather(index, dtype))

    def dequantize(self) -> Tensor:
        """The float32 weight."""
        return self._as_given(self._planes.decode())

    def decode(self, start: int, count: int) -> Tensor:
        """The float32 rows [start, start + count), columns in the planes' order."""
        return self._planes.decode(start, count)


class Planes:
    """Implementation of `native-matvec`, `native-gemm` and `native-expand`."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> Stored:
        """Code planes; scales as stored; columns sorted by group where act-order scatters them."""
        if isinstance(weight, Dense) or not weight.scheme.act_order:
            return StoredPlanes(from_weight(weight), kernels, pinned=pinned)
        found = _sorted_by_group(weight)
        if found is None:
            return Tiled().prepare(weight, dtype, kernels, pinned=pinned)
        return StoredPlanes(from_weight(found[0]), kernels, found[1], pinned=pinned)


def _sorted_by_group(weight: QuantizedWeight) -> tuple[QuantizedWeight, Tensor] | None:
    """The weight with the columns of each group together, and their order; None if groups differ in size."""
    assert weight.group_map is not None
    permutation = torch.argsort(weight.group_map, stable=True)
    level = weight.scheme.scales[0]
    positions = torch.arange(len(permutation), device=permutation.device)
    if not torch.equal(weight.group_map[permutation], positions // level.block[1]):
        return None
    codes = weight.codes.index_select(-1, permutation)
    return replace(weight, scheme=in_order(weight.scheme), stored_codes=codes, group_map=None), permutation
