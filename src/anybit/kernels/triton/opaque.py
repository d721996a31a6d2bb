"""What stored weights of our kernels share: one operator for a compiler, and calls that are prepared once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Final, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from anybit.kernels.request import Regime
from anybit.kernels.triton.launching import Call, remember

__all__ = ["Launched", "Opaque", "Run"]

Run = Callable[[Tensor, Tensor | None], Tensor]  # (x, bias) -> result
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


class Launched(Opaque):
    """A stored weight [N, K] that prepares how calls of one kind are carried out, and keeps it for the next one.

    takes_any_shape  `linear` takes x [.., K] as well, and gives [.., N]
    """

    takes_any_shape = True
    shape: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[Any, Any] = {}

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] or [.., K] in a float dtype times W^T (+ bias): [M, N] or [.., N] in `out_dtype`."""
        if torch.compiler.is_compiling():
            return self._as_operator(x, regime, bias, self.shape[0], out_dtype)
        key = (x.shape, x.stride(), x.dtype, out_dtype, None if bias is None else bias.dtype)
        run = self._calls.get(key)
        if run is None:
            run = remember(self._calls, key, self._run_of(x, bias, out_dtype))
        return cast("Tensor", run(x, bias))

    def launches(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Call | None:
        """What `linear` launches for rows like x [M, K], where it is launches alone."""
        found = self._prepared(x, bias, out_dtype)
        return found if isinstance(found, Call) else None

    def _run_of(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Run:
        """How calls are carried out whose x has this shape, these strides and this dtype."""
        rows = _rows(x)
        run = self._prepared(rows, bias, out_dtype)
        if x.dim() == 2 and x.stride(1) == 1:
            return run
        if isinstance(run, Call) and x.is_contiguous():  # rows are where they are without being asked for
            return replace(run, shape=(*x.shape[:-1], self.shape[0]))
        return partial(_reshaped, run=run)

    def _prepared(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Run:
        """How calls are carried out whose x [M, K] has these strides (columns side by side) and this dtype."""
        raise NotImplementedError


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _reshaped(x: Tensor, bias: Tensor | None, *, run: Run) -> Tensor:
    y = run(_rows(x), bias)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _linear(x: Tensor, bias: Tensor | None, weight: int, regime: str, rows: int, out_dtype: torch.dtype) -> Tensor:
    return cast("Tensor", _STORED[weight].linear(x, regime, bias, out_dtype))


def _shape_only(x: Tensor, bias: Tensor | None, weight: int, regime: str, rows: int, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows), dtype=out_dtype)


_LIBRARY: Final = torch.library.Library("anybit", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor? bias, int weight, str regime, int rows, ScalarType out_dtype) -> Tensor"
)
_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("anybit::linear", _shape_only, lib=_LIBRARY)
