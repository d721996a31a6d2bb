"""The unquantized product for few rows against float64.

The bound: float32 sums of exact products, each addition rounding or truncating (2^-23 of the magnitudes, K of them),
the bias, and half an ulp of the output's dtype.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anybit.kernels.catalogue import KERNELS, Stored, implementation
from anybit.kernels.linear.triton_skinny import LARGEST_M, SPEC, configure
from anybit.kernels.linear.triton_w8a8_tiles import UNITS
from anybit.kernels.request import REGIMES, Request, regime_of
from anybit.platforms import named
from anybit.platforms.archs import ARCHS
from anybit.schemes import dense
from anybit.weights import Dense

HERE = Path(__file__).resolve().parent
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
REQUEST = Request("linear", dense("bfloat16"), (4096, 4096), "bfloat16")
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def prepared(weight: torch.Tensor) -> Stored:
    made = Dense(dense(str(weight.dtype).removeprefix("torch.")), weight)
    return implementation(SPEC).prepare(made, weight.dtype, dict.fromkeys(REGIMES, SPEC.name))


def complaint(n: int, k: int, m: int, device: str, dtype: torch.dtype, *, with_bias: bool,
              out_dtype: torch.dtype = torch.float32) -> str:
    """Where the product leaves the bound, in words; "" where it does not."""
    torch.manual_seed(n + k + m)
    weight, x = torch.randn(n, k).to(device, dtype), torch.randn(m, k).to(device, dtype)
    if m > 2:
        x[2, k // 2] = float("nan")
    bias = torch.randn(n).to(device, dtype) if with_bias else None
    poison = torch.full((max(m, 1), n), float("nan"), device=device)
    del poison
    y = prepared(weight).linear(x, regime_of(m), bias, out_dtype)
    assert y.shape == (m, n) and y.dtype == out_dtype
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T
    bound = (k + 4) * 2.0**-23 * size + HALF_ULP[out_dtype] * wanted.abs() + 1e-37
    far = ((y.double() - wanted).abs() > bound) | (y.isnan() != wanted.isnan())
    if not bool(far.any()):
        return ""
    at = tuple(far.nonzero()[0].tolist())
    return f"[{n}, {k}] M {m} {dtype}: {int(far.sum())} wrong, at {at}: {y[at].item()}, wanted {wanted[at].item()}"


@pytest.mark.slow
def test_device_code_multiplies_rightly_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    script = ("import torch, test_triton_skinny as t; print('\\n'.join(c for c in (t.complaint(n, k, m, 'cpu', "
              "torch.float16, with_bias=b) for n, k, m, b in ((70, 200, 1, True), (33, 2048, 3, False), "
              "(64, 256, 20, True))) if c))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE, timeout=280,
                          env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                               "PYTHONPATH": os.pathsep.join(["../../src", *sys.path])})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(("platform", "asked", "code"), [
    ("cpu", REQUEST, "vendor"), ("t4", REQUEST, "arch"), ("h200", replace(REQUEST, dtype="float32"), "dtype"),
    ("h200", replace(REQUEST, kind="embedding"), "kind"), ("h200", replace(REQUEST, regime="prefill"), "regime"),
])
def test_it_is_refused_with_the_reason(platform: str, asked: Request, code: str) -> None:
    assert code in {reason.code for reason in SPEC.can_implement(asked, named(platform)).reasons}


def test_it_is_offered_for_decode_and_small() -> None:
    for regime in ("decode", "small"):
        assert SPEC.can_implement(replace(REQUEST, regime=regime), named("mi300x")).ok
    assert SPEC in KERNELS


@pytest.mark.parametrize("arch", UNITS)
def test_tiles_fit_and_leave_no_program_idle(arch: str) -> None:
    for n, k in ((70, 200), (4096, 14336), (128_256, 4096)):
        for m in (1, 16, 17, LARGEST_M):
            c = configure(n, k, m, arch)
            blocks = -(-k // c.bk)
            assert -(-blocks // c.split) * (c.split - 1) < blocks
            assert c.bm >= m and (c.bm + c.bn) * c.bk * 2 * (c.stages - 1) <= ARCHS[arch].shared_bytes
    assert SPEC.cases(arch)


def test_a_stored_weight_is_the_weight() -> None:
    pytest.importorskip("triton")
    weight = torch.randn(33, 70, dtype=torch.bfloat16)
    stored = prepared(weight)
    stored.bind({name: t.clone() for name, t in stored.tensors().items()})
    assert torch.equal(stored.dequantize(), weight.float())
    x = torch.randn(100, 70, dtype=torch.bfloat16)
    assert torch.equal(stored.linear(x, "prefill", None, torch.bfloat16), torch.nn.functional.linear(x, weight))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "with_bias"), [(328, 1000, True), (272, 4096, False)])
def test_products_are_within_the_bound(dtype: torch.dtype, n: int, k: int, with_bias: bool) -> None:
    found = [complaint(n, k, m, "cuda", dtype, with_bias=with_bias) for m in (0, 1, 2, 7, 8, 9, 16, 17, 64)]
    found += [complaint(n, k, 9, "cuda", dtype, with_bias=with_bias, out_dtype=dtype)]
    assert [line for line in found if line] == []


@gpu
@needs_gpu
def test_more_rows_and_other_dtypes_go_to_torch() -> None:
    assert complaint(328, 1000, 65, "cuda", torch.bfloat16, with_bias=False, out_dtype=torch.bfloat16) == ""


@gpu
@needs_gpu
def test_a_captured_graph_gives_the_eager_result_again() -> None:
    stored = prepared(torch.randn(272, 4096, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    stored.linear(x, "decode", None, torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = stored.linear(x, "decode", None, torch.bfloat16)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, stored.linear(x, "decode", None, torch.bfloat16))


@gpu
@needs_gpu
def test_a_compiled_call_is_one_graph() -> None:
    stored = prepared(torch.randn(272, 1000, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(3, 1000, device="cuda", dtype=torch.bfloat16)

    def double(x: torch.Tensor) -> torch.Tensor:
        return stored.linear(x * 2, "decode", None, torch.bfloat16)

    assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(x), double(x))
