"""Runs the kernels of "triton-planes" in Triton's interpreter on a CPU, a line of JSON a case: the errors that they make.

A script of its own, because the interpreter is chosen when kernels are imported: test_triton_planes.py starts it. The
interpreter keeps bfloat16 as integers and computes with those; its arithmetic is mended below (ml_dtypes).
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from anybit.kernels.linear.triton_planes import _SAMPLES
from anybit.kernels.trials import sample_weight
from anybit.kernels.triton import planes
from anybit.kernels.triton.planes import TritonPlanes
from anybit.schemes import CHANNEL, TENSOR, Offset, ScaleLevel, Scheme, group

MORE = {
    "nf4 g64 to fp16": Scheme("nf4", (ScaleLevel("float32", group(64)),), round_to="float16"),
    "iq4_nl": Scheme("iq4_nl", (ScaleLevel("float16", group(32)),)),
    "iq4_xs": Scheme("iq4_nl", (ScaleLevel("int6", group(32)), ScaleLevel("float16", group(256)))),
    "q2_k": Scheme("uint2", (ScaleLevel("uint4", group(16)), ScaleLevel("float16", group(256))), offset=Offset(
        "minimum", "uint4", group(16), (ScaleLevel("float16", group(256)),), subtract=True)),
    "fp8_e5m2 channel": Scheme("fp8_e5m2", (ScaleLevel("float32", CHANNEL),)),
    "fp8_e4m3fnuz tensor": Scheme("fp8_e4m3fnuz", (ScaleLevel("float32", TENSOR),)),
    "uint8 g32 zp": Scheme("uint8", (ScaleLevel("float16", group(32)),),
                           offset=Offset("zero_point", "uint8", group(32))),
    "int8 g32 zp": Scheme("int8", (ScaleLevel("float16", group(32)),),
                          offset=Offset("zero_point", "int8", group(32))),
    "uint7 g32 zp": Scheme("uint7", (ScaleLevel("float16", group(32)),),
                           offset=Offset("zero_point", "uint7", group(32))),
    "uint5 g64 zp": Scheme("uint5", (ScaleLevel("float16", group(64)),),
                           offset=Offset("zero_point", "uint5", group(64))),
    "uint8 channel float zp": Scheme("uint8", (ScaleLevel("float32", CHANNEL),),
                                     offset=Offset("zero_point", "float32", CHANNEL)),
    "amdfp4": Scheme("fp4_e2m1", (ScaleLevel("ue5m3", group(16)),)),
    "int4 g96": Scheme("int4", (ScaleLevel("float16", group(96)),)),
    "uint4 channel zp": Scheme("uint4", (ScaleLevel("bfloat16", CHANNEL),),
                               offset=Offset("zero_point", "uint4", CHANNEL)),
    "int4 g64 minimum": Scheme("int4", (ScaleLevel("bfloat16", group(64)),),
                               offset=Offset("minimum", "bfloat16", group(64))),
    "mxint4": Scheme("mxint4", (ScaleLevel("e8m0", group(32)),)),
    "ggml mxfp4": Scheme("fp4_doubled", (ScaleLevel("e8m0", group(32)),)),
    "mxfp6_e3m2": Scheme("fp6_e3m2", (ScaleLevel("e8m0", group(32)),)),
    "fp4 channel": Scheme("fp4_e2m1", (ScaleLevel("float32", CHANNEL),)),
}
DTYPES = {"bf16": (torch.bfloat16, torch.bfloat16), "fp16": (torch.float16, torch.float16),
          "fp32": (torch.bfloat16, torch.float32)}


def _wide(handle: TensorHandle) -> np.ndarray:
    is_brain = handle.dtype.scalar == tl.bfloat16
    return handle.data.view(ml_dtypes.bfloat16).astype(np.float32) if is_brain else handle.data


def mend_bfloat16() -> None:
    """bfloat16 arithmetic in the interpreter: operands widened, results rounded once."""
    binary, dot, cast = InterpreterBuilder.binary_op, InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def binary_op(self: object, lhs: TensorHandle, rhs: TensorHandle, op: object) -> TensorHandle:
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        value = np.asarray(op(_wide(lhs), _wide(rhs)), np.float32).astype(ml_dtypes.bfloat16)
        return TensorHandle(value.view(np.uint16), tl.bfloat16)

    def create_dot(self: object, a: TensorHandle, b: TensorHandle, d: TensorHandle, *more: object) -> TensorHandle:
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *more)
        return TensorHandle(np.matmul(_wide(a), _wide(b)) + d.data, tl.float32)

    def cast_impl(self: object, src: TensorHandle, to: object) -> TensorHandle:
        if to.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return TensorHandle(src.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        return cast(self, src, to)

    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_trunc = cast_impl


def torch_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, factors: object, bias: torch.Tensor | None,
                  alpha: float) -> None:
    """What planes._product_into does with the expanded rows, in float64: the expansion alone is judged."""
    y = x.double() @ weight.double().T * alpha
    out.copy_(y if bias is None else y + bias.double())


def shape_of(scheme: Scheme) -> tuple[int, int]:
    """N and K, both ragged where the scheme's groups allow."""
    if len(scheme.scales) > 1 and scheme.scales[1].block[1]:
        return 37, 512
    finest = scheme.scales[0].block[1]
    return 37, {96: 288, 0: 200}.get(finest, 320 if finest < 128 else 384)


def errors(scheme: Scheme, name: str, regime: str) -> dict[str, object]:
    """Largest error of a product, in 2^-24 |x| |W|, and whether the stored weight is the checkpoint's."""
    dtype, x_dtype = DTYPES[name]
    n, k = shape_of(scheme)
    weight = sample_weight(scheme, (n, k), seed=3)
    stored = TritonPlanes().prepare(weight, dtype, {"decode": "triton-matvec", "prefill": "triton-expand"})
    made = torch.Generator().manual_seed(5)
    x = torch.randn(3, k, generator=made).to(x_dtype)
    bias = torch.randn(n, generator=made).to(dtype)
    y = stored.linear(x, regime, bias, torch.float32)
    reference = weight.dequantize().double()
    exact = x.double() @ reference.T + bias.double()
    magnitude = x.double().abs() @ reference.abs().T + bias.double().abs()
    worst = float(((y.double() - exact).abs() / magnitude).max()) * 2**24
    return {"error": worst, "same": torch.equal(stored.dequantize(), weight.dequantize())}


def main() -> None:
    """Every scheme, in the dtypes and regimes of the arguments."""
    planes._product_into = torch_product
    planes.arch_of = lambda device: "gfx942"  # the portable twin
    torch.set_num_threads(1)
    mend_bfloat16()
    wanted = sys.argv[1:]
    for name, scheme in (_SAMPLES | MORE).items():
        for case in wanted:
            dtype, regime = case.split(":")
            row = {"name": name, "case": case, **errors(scheme, dtype, regime)}
            print("ROW " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
