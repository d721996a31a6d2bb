"""The unquantized product for few rows, on the stored tensor of `torch-dense`. Device code: `skinny_jit.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

import torch
from torch import Tensor

from anybit.kernels.linear.dense_torch import StoredDense
from anybit.kernels.linear.triton_skinny import LARGEST_M, SPEC, configure
from anybit.kernels.request import Kernels, Regime
from anybit.kernels.triton import skinny_jit as jit
from anybit.kernels.triton.devices import arch_of
from anybit.platforms.archs import ARCHS
from anybit.weights import Dense, Weight

__all__ = ["Skinny", "StoredSkinny", "multiply"]

TILE_COUNTERS: Final = 4096
_ADD_COLUMNS: Final = 1024


class StoredSkinny(StoredDense):
    """A weight in the dtype of the activations, multiplied by our kernel where the plan says so."""

    def __init__(self, tensor: Tensor, kernels: Mapping[Regime, str]) -> None:
        """`tensor` [N, K]."""
        super().__init__(tensor.contiguous())
        self._kernels = Kernels.of(kernels)
        self._counters = torch.zeros(TILE_COUNTERS, dtype=torch.int32, device=tensor.device)

    def tensors(self) -> dict[str, Tensor]:
        """The weight, and counters of split tiles."""
        return {**super().tensors(), "counters": self._counters}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""
        super().bind(tensors)
        self._counters = tensors["counters"]

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] times W^T, plus bias in float32 where the kernel is ours."""
        tokens = x.shape[0]
        if self._kernels.at(tokens) != SPEC.name or x.dtype != self._tensor.dtype or tokens > LARGEST_M:
            return super().linear(x, regime, bias, out_dtype)
        run = torch.ops.anybit.skinny.default if torch.compiler.is_compiling() else multiply
        return cast("Tensor", run(x, self._tensor, self._counters, bias, out_dtype))


class Skinny:
    """Implementation of `triton-skinny`."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> StoredSkinny:
        """The tensor in `dtype`; `pinned` is never asked of this kernel."""
        found = weight.tensor if isinstance(weight, Dense) else weight.dequantize()
        return StoredSkinny(found.to(dtype), kernels)


def multiply(x: Tensor, weight: Tensor, counters: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x [M, K] times W^T [K, N] plus bias: [M, N], for M up to 64."""
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    arch = arch_of(x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    config = configure(n, k, m, "sm_80" if arch == "cpu" else arch)
    tiles = -(-n // config.bn)
    fused = (arch == "cpu" or ARCHS[arch].vendor == "nvidia") and tiles <= counters.numel()
    parts = out if config.split == 1 else torch.empty((config.split, m, n), dtype=torch.float32, device=x.device)
    jit.skinny_matmul[(tiles, config.split)](
        x, weight, out if bias is None else bias, out, parts, counters, m, n, k, x.stride(0),
        HAS_BIAS=bias is not None, BM=config.bm, BN=config.bn, BK=config.bk, SPLIT=config.split, FUSED=fused,
        EVEN_K=k % config.bk == 0, num_warps=config.warps, num_stages=config.stages,
    )
    if config.split > 1 and not fused:
        jit.add_parts[(m, -(-n // _ADD_COLUMNS))](parts, out if bias is None else bias, out, m, n, PARTS=config.split,
                                                  HAS_BIAS=bias is not None, BN=_ADD_COLUMNS, num_warps=4)
    return out


_LIBRARY: Final = torch.library.Library("anybit", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "skinny(Tensor x, Tensor weight, Tensor counters, Tensor? bias, ScalarType out_dtype) -> Tensor"
)
_LIBRARY.impl("skinny", multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _shape_only(x: Tensor, weight: Tensor, counters: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


torch.library.register_fake("anybit::skinny", _shape_only, lib=_LIBRARY)
