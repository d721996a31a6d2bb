"""The unquantized family: see `dense.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anybit.kernels.request import Regime
from anybit.weights import Dense, Weight


class StoredDense:
    """A weight in the dtype of the activations."""

    def __init__(self, tensor: Tensor) -> None:
        """`tensor` [N, K]."""
        self.shape = tuple(tensor.shape)
        self._tensor = tensor

    def tensors(self) -> dict[str, Tensor]:
        """The weight; a float buffer, since here `Module.to(dtype)` means what it says."""
        return {"weight": self._tensor}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""
        self._tensor = tensors["weight"]

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] times W^T (+ bias)."""
        weight = self._tensor.to(x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(out_dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows by index."""
        return torch.nn.functional.embedding(index, self._tensor).to(dtype)

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        return self._tensor.float()


class DenseProduct:
    """Implementation of `torch-dense`."""

    def prepare(self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str]) -> StoredDense:
        """The tensor in `dtype`."""
        return StoredDense(weight.dequantize().to(dtype) if not isinstance(weight, Dense) else weight.tensor.to(dtype))
