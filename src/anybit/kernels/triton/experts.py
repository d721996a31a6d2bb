"""The experts of a layer as one launch a projection: their weights behind each other, rows of x in segments by expert.

Nothing is read back to the host, so a step with experts records into a CUDA graph and follows the router when it is
replayed. Layouts that can: "triton-planes" (`experts_planes.py`), 8 bit codes (`experts_rows8.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from anybit.kernels.triton import experts_planes
from anybit.kernels.triton.planes import StoredPlanes
from anybit.kernels.triton.segments import Segments

__all__ = ["Stack", "stack_of"]


class Stack(Protocol):
    """The weights [N, K] of all experts of one projection."""

    def takes(self, dtype: torch.dtype) -> bool:
        """True for activations of a dtype that loses nothing here."""

    def __call__(self, x: Tensor, segments: Segments) -> Tensor:
        """Rows x [P, K] in the segments' order, each times its expert's weight: [P, N] in x's dtype.

        Rows of experts elsewhere are 0.
        """


def stack_of(
    stored: Sequence[Any], biases: Sequence[Tensor | None]
) -> tuple[Stack, list[dict[str, Tensor]]] | None:
    """The weights of all experts as one stack, and each one's buffers by name, which are parts of it now.

    None where they are not alike, or of a layout without such a kernel.
    """
    if not stored or len({type(one) for one in stored}) > 1 or len({bias is None for bias in biases}) > 1:
        return None
    found = _kind_of(stored[0])
    if found is None:
        return None
    is_alike, unstacked, make = found
    if not all(is_alike(one, stored[0]) and _sizes(one) == _sizes(stored[0]) for one in stored):
        return None
    each = _behind_each_other([one.tensors() for one in stored], unstacked)
    for one, tensors in zip(stored, each, strict=True):
        one.bind(tensors)
    given = [bias for bias in biases if bias is not None]
    return make(stored, torch.stack(given) if given else None), each


_Kind = tuple[Callable[[Any, Any], bool], tuple[str, ...], Callable[[Sequence[Any], Tensor | None], Stack]]


def _kind_of(stored: object) -> _Kind | None:
    """Which weights are alike, which of their tensors are not stacked, and the stack, for a layout; None for others."""
    if isinstance(stored, StoredPlanes):
        return experts_planes.is_alike, experts_planes.UNSTACKED, experts_planes.PlanesStack
    if type(stored).__name__ == "StoredRows8":  # its module needs Triton, which need not be there
        from anybit.kernels.triton import experts_rows8

        return experts_rows8.is_alike, (), experts_rows8.Rows8Stack
    return None


def _sizes(stored: Any) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in stored.tensors().items()}


def _behind_each_other(tensors: list[dict[str, Tensor]], unstacked: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """The same tensors, those of a name in one allocation; a name at a time, so that little is held twice."""
    each = [dict(one) for one in tensors]
    for name in set(tensors[0]) - set(unstacked):
        if _lie_together([one[name] for one in tensors]):  # captured graphs know where
            continue
        whole = torch.stack([one.pop(name) for one in tensors])
        for i, one in enumerate(each):
            one[name] = whole[i]
    return each


def _lie_together(tensors: Sequence[Tensor]) -> bool:
    """True for tensors that are a stack's already."""
    first, step = tensors[0], tensors[0].nbytes
    storage = first.untyped_storage().data_ptr()
    return all(t.is_contiguous() and t.untyped_storage().data_ptr() == storage
               and t.data_ptr() == first.data_ptr() + i * step for i, t in enumerate(tensors))
