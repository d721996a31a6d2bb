"""Batch invariance: what would let a row's result depend on the rows beside it. Torch-free.

Two things can: a kernel that sums in another order for another M, and a declared activation quantization whose scale is
taken over all rows of a call. The first is a fact of the kernel, the second of the checkpoint: no kernel can mend it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from anybit.kernels.request import KernelSpec, Reason
from anybit.schemes import ActivationSpec, Scheme

# recipes that look at all rows of a call whatever their granularity says (numerics/activations.py, by_row=False)
WHOLE_CALL_RECIPES: Final = frozenset({"llm_int8", "fp8_tensor", "torchao_nvfp4"})


def looks_at_all_rows(spec: ActivationSpec | None) -> bool:
    """True if quantizing one row depends on the other rows of the call."""
    if spec is None:
        return False
    return spec.recipe in WHOLE_CALL_RECIPES or (spec.dynamic and spec.granularity == "tensor")


def reason_against_invariance(spec: KernelSpec, scheme: Scheme) -> Iterator[Reason]:
    """Why rows of a layer of `scheme` on this kernel could depend on their batch."""
    if not spec.is_batch_invariant:
        yield Reason("batch-invariant", "sums in another order for another number of tokens", {})
    for quantization in (scheme.activation, scheme.output):
        if looks_at_all_rows(quantization):
            yield Reason("batch-scale", f"the checkpoint quantizes all rows of a call together ({quantization})",
                         {"activation": str(quantization), "recipe": quantization.recipe if quantization else ""})
