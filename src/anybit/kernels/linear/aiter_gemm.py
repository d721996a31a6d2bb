"""AITER's tuned product: see `aiter.py`. Not run on AMD by us: the interface is that of ROCm/aiter, tuned_gemm.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import cast

import torch
from torch import Tensor

from anybit.errors import DeviceProblem
from anybit.kernels.linear.dense_torch import StoredDense
from anybit.kernels.request import Regime
from anybit.kernels.triton.devices import on_device
from anybit.weights import Dense, Weight

_Product = Callable[..., Tensor]


def _library() -> _Product:
    """`tgemm.mm(x, weight, bias=, otype=)`; DeviceProblem where the library is there and does not load."""
    try:
        return cast("_Product", import_module("aiter.tuned_gemm").tgemm.mm)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise DeviceProblem(
            "AITER is installed and does not load", found=f"{type(error).__name__}: {error}",
            wanted="aiter.tuned_gemm.tgemm", remedy="--kernel linear=torch-dense, or install AITER again",
        ) from error


class StoredAiter(StoredDense):
    """A weight in the dtype of the activations, multiplied by AITER."""

    def __init__(self, tensor: Tensor, product: _Product) -> None:
        super().__init__(tensor)
        self._product = product

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] times W^T (+ bias); torch takes what AITER is not made for: no rows, another dtype."""
        if x.shape[0] == 0 or x.dtype != self._tensor.dtype or out_dtype != x.dtype:
            return super().linear(x, regime, bias, out_dtype)
        with on_device(x.device):
            return self._product(x, self._tensor, bias=None if bias is None else bias.to(x.dtype), otype=out_dtype)


class AiterProduct:
    """Implementation of `aiter-gemm`."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> StoredAiter:
        """The tensor in `dtype`; `pinned` is never asked of this kernel."""
        tensor = weight.tensor if isinstance(weight, Dense) else weight.dequantize()
        return StoredAiter(tensor.to(dtype).contiguous(), _library())
