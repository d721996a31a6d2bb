"""The unquantized product for few rows, on the stored tensor of `torch-dense`. Device code: `skinny_jit.py`."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Final

import torch
from torch import Tensor

from anybit.kernels.compiling import OVERLAPPING, overlap
from anybit.kernels.linear.dense_torch import StoredDense
from anybit.kernels.linear.triton_skinny import LARGEST_M, SPEC, configure
from anybit.kernels.request import Kernels, Regime
from anybit.kernels.triton import skinny_jit as jit
from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.launching import Argument, Call, Launch, Piece, Zeros
from anybit.kernels.triton.opaque import Launched
from anybit.platforms.archs import ARCHS
from anybit.weights import Dense, Weight

__all__ = ["Skinny", "StoredSkinny"]

_ADD_COLUMNS: Final = 1024


class StoredSkinny(Launched, StoredDense):
    """A weight in the dtype of the activations, multiplied by our kernel where the plan says so."""

    def __init__(self, tensor: Tensor, kernels: Mapping[Regime, str]) -> None:
        """`tensor` [N, K]."""
        StoredDense.__init__(self, tensor.contiguous())
        Launched.__init__(self)
        self._kernels = Kernels.of(kernels)
        self._captured: list[Tensor] = []  # zeros that graphs count in

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""
        super().bind(tensors)
        self._calls = {}

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] or [.., K] times W^T, plus bias in float32 where the kernel is ours."""
        tokens = prod(x.shape[:-1])
        if self._kernels.at(tokens) != SPEC.name or x.dtype != self._tensor.dtype or tokens > LARGEST_M or 0 in x.shape:
            return StoredDense.linear(self, x, regime, bias, out_dtype)  # torch's own, which a compiler knows
        return Launched.linear(self, x, regime, bias, out_dtype)

    def _prepared(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Call:
        """The launches for calls like this one, of up to 64 rows."""
        (m, k), weight, device, arch = x.shape, self._tensor, x.device, arch_of(x.device)
        n = weight.shape[0]
        config = configure(n, k, m, "sm_80" if arch == "cpu" else arch)
        tiles, is_split = -(-n // config.bn), config.split > 1
        fused = is_split and (arch == "cpu" or ARCHS[arch].vendor == "nvidia")
        parts: Argument = Piece(0, torch.float32) if is_split else weight  # where it is not read, the weight stands in
        bias_dtype: Argument = weight if bias is None else bias.dtype
        waits = arch in OVERLAPPING
        made = Launch(
            jit.skinny_matmul,
            [x.dtype, weight, bias_dtype, out_dtype, parts, Zeros(tiles, self._captured) if fused else weight,
             int, n, k, x.stride(0) if m > 1 else k],
            {"HAS_BIAS": bias is not None, "BM": config.bm, "BN": config.bn, "BK": config.bk, "SPLIT": config.split,
             "FUSED": fused, "EVEN_K": k % config.bk == 0, "WAITS": waits},
            device, num_warps=config.warps, num_stages=config.stages, **overlap(waits),
        )  # fmt: skip
        finish = None
        if is_split and not fused:
            finish = Launch(jit.add_parts, [parts, bias_dtype, out_dtype, int, n],
                            {"PARTS": config.split, "HAS_BIAS": bias is not None, "BN": _ADD_COLUMNS}, device,
                            num_warps=4)
        scratch_bytes = 4 * config.split * m * n if is_split else 0
        return Call((m, n), out_dtype, device, m, scratch_bytes, None, made, (tiles, config.split), finish,
                    (m, -(-n // _ADD_COLUMNS)))


class Skinny:
    """Implementation of `triton-skinny`."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> StoredSkinny:
        """The tensor in `dtype`; `pinned` is never asked of this kernel."""
        found = weight.tensor if isinstance(weight, Dense) else weight.dequantize()
        return StoredSkinny(found.to(dtype), kernels)
