"""Spec of the unquantized family: torch's own matrix product on the stored tensor."""

from __future__ import annotations

from anybit.kernels.request import KernelSpec, Reason, Request, Verdict, gather
from anybit.platforms import Platform

_CALL_SECONDS = 5e-6
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def can_implement(request: Request, platform: Platform) -> Verdict:
    """Layers in a wide float."""
    quantized = request.scheme.is_quantized
    return gather(
        Reason("quantized", f"the weight is quantized ({request.scheme.weight_name()})",
               {"element": request.scheme.element}) if quantized else None
    )


def seconds(request: Request, platform: Platform) -> float:
    """The larger of reading the weight and computing the product."""
    read = request.shape[-1] * request.shape[-2] * _BYTES.get(request.dtype, 4) / max(platform.bandwidth, 1e9)
    return _CALL_SECONDS + max(read, request.flops / max(platform.rates.get(request.dtype, 1e11), 1e9))


def stored_bytes(request: Request) -> int:
    """The tensor in the dtype of the activations."""
    return request.elements * _BYTES.get(request.dtype, 4)


def rounds(request: Request, platform: Platform) -> str | None:
    """A weight that is stored wider than the activations, or as another 16-bit float, is cast to their dtype."""
    stored = request.scheme.element
    exact = stored == request.dtype or request.dtype == "float32"
    return None if exact or request.kind == "embedding" else f"{stored} weights to {request.dtype}"


SPEC = KernelSpec(
    name="torch-dense",
    layout="dense",
    implementation="anybit.kernels.linear.dense_torch:DenseProduct",
    can_implement=can_implement,
    seconds=seconds,
    stored_bytes=stored_bytes,
    about="torch's matrix product on the unquantized weight",
    is_batch_invariant=True,
    rounds=rounds,
)
