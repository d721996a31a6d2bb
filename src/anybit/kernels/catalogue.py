"""All kernels as one table, and what their implementations look like to a host."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol

from anybit.kernels.linear import (
    aiter,
    dense,
    humming,
    planes,
    tiled,
    torch_low_precision,
    triton_mx,
    triton_planes,
    triton_skinny,
    triton_w8a8,
)
from anybit.kernels.request import KernelSpec, Regime

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anybit.weights import Weight

KERNELS: Final[tuple[KernelSpec, ...]] = (
    dense.SPEC,
    triton_skinny.SPEC,
    aiter.SPEC,
    humming.SPEC,
    planes.MATVEC,
    planes.GEMM,
    planes.EXPAND,
    *triton_planes.SPECS,
    *triton_w8a8.SPECS,
    *torch_low_precision.SPECS,
    triton_mx.SPEC,
    tiled.SPEC,
)


def kernel(name: str) -> KernelSpec:
    """The kernel called `name`; KeyError if there is none."""
    return {k.name: k for k in KERNELS}[name]


class Stored(Protocol):
    """A weight in a kernel's layout, bound to its buffers: what `prepare` returns.

    `tensors` are the buffers by name; a module registers them and calls `bind` again after they have moved.
    quantizes_input  True where `linear` takes x as it is and carries out the scheme's activation quantization itself
    """

    shape: tuple[int, ...]
    quantizes_input: bool

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name."""

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Rows x [M, K] (any float dtype) times the weight, plus bias [N] added in float32: [M, N] in `out_dtype`."""

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight's rows [.., K] for integer `index` [..], in a float dtype."""

    def dequantize(self) -> Tensor:
        """The float32 weight [N, K]."""


class Implementation(Protocol):
    """The code of a kernel's layout."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> Stored:
        """The weight in this layout; `dtype` is that of the activations, `kernels` the plan's choice by regime.

        pinned  one kernel and one split for every M, so that a row's result is the same bits in every batch; asked
                only of kernels whose spec `is_batch_invariant`
        """


def implementation(spec: KernelSpec) -> Implementation:
    """Import and construct the implementation of a spec."""
    module, _, name = spec.implementation.partition(":")
    made: Implementation = getattr(import_module(module), name)()
    return made
