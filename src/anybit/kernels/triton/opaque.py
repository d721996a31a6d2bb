"""One operator for the products of stored weights: what a compiler sees where `linear` launches kernels."""

from __future__ import annotations

from typing import Any, Final, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from anybit.kernels.request import Regime

__all__ = ["Opaque"]

_STORED: Final[WeakValueDictionary[int, Any]] = WeakValueDictionary()


class Opaque:
    """A stored weight that a compiled graph knows by a number."""

    def __init__(self) -> None:
        self._number = id(self)
        _STORED[self._number] = self

    def _as_operator(
        self, x: Tensor, regime: Regime, bias: Tensor | None, rows: int, out_dtype: torch.dtype
    ) -> Tensor:
        """`linear` as one operator, for a compiler."""
        return cast("Tensor", torch.ops.anybit.linear(x, bias, self._number, regime, rows, out_dtype))


def _linear(x: Tensor, bias: Tensor | None, weight: int, regime: str, rows: int, out_dtype: torch.dtype) -> Tensor:
    return cast("Tensor", _STORED[weight].linear(x, regime, bias, out_dtype))


def _shape_only(x: Tensor, bias: Tensor | None, weight: int, regime: str, rows: int, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], rows), dtype=out_dtype)


_LIBRARY: Final = torch.library.Library("anybit", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor? bias, int weight, str regime, int rows, ScalarType out_dtype) -> Tensor"
)
_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("anybit::linear", _shape_only, lib=_LIBRARY)
