"""Runs the experts' kernel in Triton's interpreter on a CPU, a line of JSON a case; test_triton_experts.py starts it."""

from __future__ import annotations

import json

import planes_interpreted  # chooses the interpreter before kernels are imported
import torch

from anybit.checkpoints.online import quantizer
from anybit.kernels.linear.triton_planes import _SAMPLES
from anybit.kernels.trials import compare, sample_weight
from anybit.kernels.triton import experts_planes, planes
from anybit.kernels.triton.experts import stack_of
from anybit.kernels.triton.planes import TritonPlanes
from anybit.kernels.triton.segments import Segments
from anybit.kernels.triton.w8a8 import Rows8
from anybit.schemes import Layer, dense

EXPERTS = 3
# by pair, 3 standing for an expert elsewhere; the last has more rows of one expert than a segment holds
ROUTES = {"few": [2, 0, 2, 3, 1], "none here": [3, 3], "sorted": [0] * 20 + [2, 3, 2, 1] * 5, "no rows": []}


def errors(name: str, route: str) -> dict[str, object]:
    """Largest error in 2^-24 |x| |W|, and whether rows of experts elsewhere are 0."""
    index = torch.tensor(ROUTES[route], dtype=torch.int64)
    scheme = _SAMPLES[name]
    columns = 512 if len(scheme.scales) > 1 and scheme.scales[1].block[1] else 320 if name == "mxfp4" else 384
    weights = [sample_weight(scheme, (72, columns), seed=seed) for seed in range(EXPERTS)]
    plan = {"decode": "triton-matvec", "prefill": "triton-fused"}
    stored = [TritonPlanes().prepare(w, torch.bfloat16, plan) for w in weights]
    made = torch.Generator().manual_seed(11)
    biases = [torch.randn(72, generator=made).to(torch.bfloat16) for _ in range(EXPERTS)]
    found = stack_of(stored, biases)
    assert found is not None
    stack, _ = found
    x = torch.randn(len(index), columns, generator=made).to(torch.bfloat16)
    segments = Segments.of(index, EXPERTS)
    rows = x if segments.order is None else x[segments.order]
    y = segments.back(stack._multiply(rows, segments, None, torch.float32)).double()
    worst, zero = 0.0, True
    for i, expert in enumerate(index.tolist()):
        if expert == EXPERTS:
            zero &= not bool(y[i].any())
            continue
        reference, bias = weights[expert].dequantize().double(), biases[expert].double()
        bound = (x[i].double().abs() @ reference.abs().T + bias.abs()) * 2**-24
        worst = max(worst, float(((y[i] - x[i].double() @ reference.T - bias).abs() / bound).max()))
    same = all(torch.equal(s.dequantize(), w.dequantize()) for s, w in zip(stored, weights, strict=True))
    return {"error": worst, "columns": columns, "zero": zero, "same": same}


def eight_bit(name: str, route: str) -> dict[str, object]:
    """The same of 8 bit codes and quantized rows; the error in the bound of trials.py."""
    index = torch.tensor(ROUTES[route], dtype=torch.int64)
    scheme = quantizer(name).scheme_of(Layer("l", "linear", (72, 256), dense("bfloat16")))
    weights = [sample_weight(scheme, (72, 256), seed=seed) for seed in range(EXPERTS)]
    plan = {"decode": "triton-w8a8-fp8", "prefill": "triton-w8a8-fp8"}
    stored = [Rows8().prepare(w, torch.float32, plan) for w in weights]
    found = stack_of(stored, [None] * EXPERTS)
    assert found is not None
    x = torch.randn(len(index), 256, generator=torch.Generator().manual_seed(11))
    segments = Segments.of(index, EXPERTS)
    y = segments.back(found[0](x if segments.order is None else x[segments.order], segments))
    shares = [compare(weights[e], lambda _, e=e: y[index == e], x[index == e]).worst for e in set(index.tolist()) - {3}]
    same = all(torch.equal(s.dequantize(), w.dequantize()) for s, w in zip(stored, weights, strict=True))
    return {"share": max(shares, default=0.0), "zero": not bool(y[index == EXPERTS].any()), "same": same}


def main() -> None:
    """Some forms, all routes."""
    planes.arch_of = experts_planes.arch_of = lambda device: "gfx942"  # the portable twin
    torch.set_num_threads(1)
    planes_interpreted.mend_bfloat16()
    for name in ("int4 g128", "uint4 g128 zp", "mxfp4", "q4_k", "int3 g128"):
        for route in ROUTES:
            print("ROW " + json.dumps({"name": name, "route": route, **errors(name, route)}), flush=True)
    for name in ("fp8_per_channel", "fp8_per_block", "int8_per_channel", "int8_asym"):
        for route in ROUTES:
            print("EIGHT " + json.dumps({"name": name, "route": route, **eight_bit(name, route)}), flush=True)


if __name__ == "__main__":
    main()
