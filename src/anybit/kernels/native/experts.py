"""Products with several weights in one call of the compiled library: the experts of a layer, for a few tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from anybit.kernels.native import library
from anybit.kernels.native.planes import FORMATS, Planes, threads

__all__ = ["Experts"]


class Experts:
    """The weights [N, K] of one projection of all experts, each with its bias.

    A step with a few tokens calls some of them with a row or two each: a call for all of them costs the host what one
    of them does, and their rows are shared among the threads together.
    """

    def __init__(self, weights: Sequence[Planes]) -> None:
        """`weights` for which `are_alike`."""
        native = library()
        assert native is not None  # it made the weights
        self._call = native.linear_each
        self._weights = tuple(weights)  # the addresses are theirs
        self._addresses = [weight.address for weight in weights]
        self._biases = [None if weight.bias is None else weight.bias.data_ptr() for weight in weights]
        first = weights[0]
        self._rows, self._columns, self._bias_type = first.rows, first.cols, first.bias_type

    @staticmethod
    def are_alike(weights: Sequence[Planes]) -> bool:
        """True where one call can take any of them."""
        return len({weight.kind for weight in weights}) == 1

    def __call__(
        self, x: Tensor, experts: Sequence[int], first: Sequence[int], token_ids: Tensor | None = None
    ) -> Tensor:
        """The rows of x [M, K] that pairs name, each times its expert's weight: [P, N] in x's dtype.

        experts    of each run of pairs
        first      the first pair of each run, and P
        token_ids  int32 [P], the row of x of each pair; None: its own number
        """
        flat = x if x.stride(-1) == 1 else x.contiguous()
        runs, pairs = len(experts), first[-1]
        is_one_each = token_ids is None and pairs <= x.shape[0]
        if x.dim() != 2 or x.shape[1] != self._columns or len(first) != runs + 1 or not (
                is_one_each or (token_ids is not None and token_ids.numel() == pairs)):
            raise ValueError(f"x {tuple(x.shape)} for {pairs} pairs of {runs} experts of {self._columns} inputs")
        out = torch.empty((pairs, self._rows), dtype=x.dtype)
        addresses = (ctypes.c_void_p * runs)(*[self._addresses[e] for e in experts])
        biases = (ctypes.c_void_p * runs)(*[self._biases[e] for e in experts])
        wrong = self._call(
            addresses, biases, (ctypes.c_int64 * (runs + 1))(*first), runs, flat.data_ptr(), flat.shape[0],
            flat.stride(0), None if token_ids is None else token_ids.data_ptr(), out.data_ptr(), self._rows,
            FORMATS[x.dtype] | FORMATS[out.dtype] << 4 | self._bias_type, threads(),
        )  # fmt: skip
        if wrong == 2:
            raise IndexError("a token id out of range")
        if wrong:
            raise MemoryError("no memory for a float32 copy of x")
        return out
