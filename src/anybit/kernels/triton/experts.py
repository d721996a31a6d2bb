"""The experts of a layer as one launch: their weights behind each other, rows of x in segments by expert.

Nothing is read back to the host, so a step with experts records into a CUDA graph and follows the router when it is
replayed. Same layout and device code as a single weight ("triton-planes").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.planes import PARTS, StoredPlanes
from anybit.kernels.triton.planes_form import Form
from anybit.kernels.triton.planes_launch import Config, configure, constants, half_factor, terms_of
from anybit.kernels.triton.recipes import ARITHMETIC

if TYPE_CHECKING:
    from anybit.kernels.triton.quantizers import Quantizer

__all__ = ["ExpertStack", "Segments", "stack_of"]

_SINGLE_ROWS: Final = 32  # rows up to here, and no more than experts, are a segment each: faster than sorting them
_UNSTACKED: Final = ("table",)  # the same for every expert
_LONGEST: Final = 64  # rows of a segment


@dataclass(frozen=True)
class Segments:
    """Rows of x by expert.

    order    [P] int64: which (token, place) pair stands in row i, None where rows are in order
    expert, first, length   int32 [S]: a segment's expert (negative: none), first row, rows
    row_experts   int64 [P]: the expert of each row, 0 for one elsewhere
    longest  most rows of a segment
    """

    order: Tensor | None
    expert: Tensor
    first: Tensor
    length: Tensor
    row_experts: Tensor
    longest: int

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Segments:
        """Segments for the experts `index` [P] of pairs; numbers from `experts` on stand for experts elsewhere."""
        pairs = index.numel()
        flat = index.reshape(-1)
        here = torch.where(flat < experts, flat, -1).int()
        if pairs <= min(_SINGLE_ROWS, experts):
            first = torch.arange(pairs, dtype=torch.int32, device=flat.device)
            return cls(None, here, first, torch.ones_like(first), here.clamp(min=0).long(), 1)
        longest = min(_LONGEST, max(8, 1 << (pairs // experts - 1).bit_length()))
        known = torch.where(here < 0, experts, here).long()
        order = torch.argsort(known, stable=True)
        counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
        counts.scatter_add_(0, known, torch.ones_like(known))
        counts = counts[:experts]
        begins = counts.cumsum(0) - counts
        ends = ((counts + longest - 1) // longest).cumsum(0)
        number = torch.arange(min(pairs, experts + pairs // longest), device=flat.device)
        expert = torch.searchsorted(ends, number, right=True)
        inside = expert < experts
        at = torch.where(inside, expert, 0)
        before = torch.where(at > 0, ends[at - 1], 0)
        skipped = (number - before) * longest
        length = torch.where(inside, (counts[at] - skipped).clamp(0, longest), 0)
        first = torch.where(inside, begins[at] + skipped, 0)
        rows = here.clamp(min=0).long()[order]
        return cls(order, torch.where(inside, at, -1).int(), first.int(), length.int(), rows, longest)

    def back(self, y: Tensor) -> Tensor:
        """Rows [P, ..] in the order of the pairs again."""
        if self.order is None:
            return y
        placed = torch.empty_like(y)
        placed[self.order] = y
        return placed


class ExpertStack:
    """The weights [N, K] of all experts, their tensors behind each other in memory.

    shape            (N, K)
    quantizes_input  the scheme's activation quantization is carried out here
    """

    def __init__(self, planes: Sequence[StoredPlanes], steps: tuple[int, ...], biases: Tensor | None) -> None:
        """`planes` hold views of the stacked tensors; `steps` are elements from one expert's to the next one's."""
        first = planes[0]
        self.shape = first.shape
        self.quantizes_input = first.quantizes_input
        self._packed, self._parts = first.packed, first.parts
        self._steps, self._biases = steps, biases
        self._quantizer: Quantizer | None = None
        self._given: Tensor | None = None
        if first.spec is not None:
            from anybit.kernels.triton.quantizers import Quantizer

            name = ARITHMETIC[first.spec.recipe].given
            if name:
                self._given = torch.stack([one.activation[name].reshape(()).float() for one in planes])
            self._quantizer = Quantizer(first.spec, {}, self.shape[1], values=torch.bfloat16, own=True,
                                        by_row=self._given is not None)

    def takes(self, dtype: torch.dtype) -> bool:
        """True for activations whose products are exact in their own dtype, or in that of the quantized ones."""
        return self.quantizes_input or dtype == torch.bfloat16 or (dtype == torch.float16 and self._packed.is_half)

    def __call__(self, x: Tensor, segments: Segments) -> Tensor:
        """Rows x [P, K] in the segments' order, each times its expert's weight: [P, N] in x's dtype.

        Rows of experts elsewhere are 0.
        """
        if self._quantizer is None:
            return self._multiply(x, segments, None, x.dtype)
        found = self._quantizer(x, None if self._given is None else self._given[segments.row_experts])
        return self._multiply(found.codes, segments, found.factor, x.dtype)

    def _multiply(self, x: Tensor, segments: Segments, factors: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        from anybit.kernels.triton.experts_jit import experts_kernel

        rows, columns = self.shape
        form = self._packed.form
        x = x if x.stride(1) == 1 else x.contiguous()
        out = torch.zeros((x.shape[0], rows), dtype=out_dtype, device=x.device)
        count = segments.expert.numel()
        if count == 0 or rows == 0:
            return out
        config = _configured(form, rows, columns, segments, arch_of(x.device))
        row, zeros = self._parts[PARTS.index("row")], self._parts[PARTS.index("zeros")]
        padded_rows, padded = row.shape[0], form.padded(columns)
        tiles, split = padded_rows // config.rows, config.split
        parts, counters = out, segments.first
        if split > 1:
            parts = torch.empty(split * x.shape[0] * rows, dtype=torch.float32, device=x.device)
            counters = torch.zeros(count * tiles, dtype=torch.int32, device=x.device)
        is_half = x.dtype == torch.float16
        experts_kernel[(tiles, split, count)](
            x, *self._parts, row if factors is None else factors, out if self._biases is None else self._biases,
            out, parts, counters, segments.expert, segments.first, segments.length, rows, padded_rows, columns, padded,
            x.stride(0), padded_rows if zeros.shape[0] > 1 else 0, half_factor(form, is_half=is_half), *self._steps,
            **constants(form), R=form.run, TERMS=terms_of(form, is_half=is_half), BM=config.tokens, BN=config.rows,
            SPLIT=split > 1, TOKENS=factors is not None, BIAS=self._biases is not None, EVEN=columns == padded,
            ASM=config.assembly, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return out


def _configured(form: Form, rows: int, columns: int, segments: Segments, arch: str) -> Config:
    """The launch of a single weight for as many tokens, with K split only as far as segments leave the chip idle."""
    config = configure(form, rows, columns, segments.longest, arch)
    split = max(1, config.split // segments.expert.numel())
    return replace(config, tokens=max(config.tokens, segments.longest), split=split)


def stack_of(
    stored: Sequence[object], biases: Sequence[Tensor | None]
) -> tuple[ExpertStack, list[dict[str, Tensor]]] | None:
    """The weights of all experts as one stack, and each one's buffers by name, which are parts of it now.

    None where they are no alike weights of this layout: forms or sizes differ, or columns are sorted one by one.
    """
    planes = [one for one in stored if isinstance(one, StoredPlanes)]
    if not planes or len(planes) < len(stored) or not all(_is_alike(one, planes[0]) for one in planes):
        return None
    if len({bias is None for bias in biases}) > 1:
        return None
    named = [one.tensors() for one in planes]
    whole = {name: torch.stack([tensors[name] for tensors in named]) for name in named[0] if name not in _UNSTACKED}
    each = [{name: whole[name][i] if name in whole else tensor for name, tensor in tensors.items()}
            for i, tensors in enumerate(named)]
    for one, tensors in zip(planes, each, strict=True):
        one.bind(tensors)
    steps = tuple(whole[name][0].numel() if name in whole else 0 for name in PARTS[:8])
    given = [bias for bias in biases if bias is not None]
    return ExpertStack(planes, steps, torch.stack(given) if given else None), each


def _is_by_row(one: StoredPlanes) -> bool:
    """True where no static number is read, or the quantizer takes another one for each row."""
    if one.spec is None:
        return True
    arithmetic = ARITHMETIC[one.spec.recipe]
    return arithmetic.optional not in one.activation and (not arithmetic.given or one.spec.granularity == "group")


def _is_alike(one: StoredPlanes, other: StoredPlanes) -> bool:
    tensors, others = one.tensors(), other.tensors()
    return (
        one.packed.form == other.packed.form and one.shape == other.shape and one.packed.is_half == other.packed.is_half
        and one.spec == other.spec and "permutation" not in tensors and not one.is_pinned
        and _is_by_row(one)
        and {n: (t.shape, t.dtype) for n, t in tensors.items()} == {n: (t.shape, t.dtype) for n, t in others.items()}
    )
