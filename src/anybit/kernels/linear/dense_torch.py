"""The unquantized family: see `dense.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from anybit.kernels.catalogue import implementation, kernel
from anybit.kernels.linear.dense import SPEC
from anybit.kernels.request import Kernels, Regime
from anybit.weights import Dense, Weight


def row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] times W^T (+ bias) as M products of one row: libraries sum in another order for another M.

    Each row is copied, so that every product has operands of the same shape, strides and alignment.
    """
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    for i in range(x.shape[0]):
        y[i] = torch.mv(weight, x[i].clone())
    return y if bias is None else y.add_(bias.to(y.dtype))


class StoredDense:
    """A weight in the dtype of the activations."""

    quantizes_input = False

    def __init__(self, tensor: Tensor, *, pinned: bool = False) -> None:
        """`tensor` [N, K]; `pinned` multiplies row by row."""
        self.shape = tuple(tensor.shape)
        self._tensor = tensor
        self._pinned = pinned

    def tensors(self) -> dict[str, Tensor]:
        """The weight; a float buffer, since here `Module.to(dtype)` means what it says."""
        return {"weight": self._tensor}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""
        self._tensor = tensors["weight"]

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] times W^T (+ bias)."""
        weight = self._tensor.to(x.dtype)
        if self._pinned:
            return row_by_row(x, weight, bias).to(out_dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(out_dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows by index."""
        return torch.nn.functional.embedding(index, self._tensor).to(dtype)

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        return self._tensor.float()


class DenseProduct:
    """Implementation of `torch-dense`."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> StoredDense:
        """The tensor in `dtype`; where another kernel of the layout runs some M, its own code stores it."""
        others = sorted(Kernels.of(kernels).used - {SPEC.name})
        if others and not pinned:
            return cast("StoredDense", implementation(kernel(others[0])).prepare(weight, dtype, kernels))
        tensor = weight.tensor if isinstance(weight, Dense) else weight.dequantize()
        return StoredDense(tensor.to(dtype), pinned=pinned)
