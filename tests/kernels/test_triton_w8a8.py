"""8 bit by 8 bit products against the float64 product of the quantized operands.

The bound. Codes and scales of x equal the recipe's bit for bit (test_triton_quantizers.py) and codes of W are W's, so
with q(x) and W the float32 reference values, what differs from the float64 product is: the order in which scales meet
(one rounding of each operand's value instead of one of the sum: 4 * 2^-24 of |q(x)| |W|), the float32 sums (each
addition rounds or truncates: 2^-23 of the magnitudes so far, K of them), bias and epilogue (4 more), and the rounding to
the output's dtype. int8 sums are exact; the same bound holds for them with room.
On chips whose fp8 adder is narrow the plan says so (`rounds`): each instruction adds 32 products to the sum and keeps 13
bits below the largest of these 33, so a block of 128 has lost at most 4 * 33 * 2^-13 of its own |q(x)| |W|.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anybit.kernels.catalogue import KERNELS, Stored, implementation, kernel
from anybit.kernels.linear.torch_low_precision import INT_MM, SCALED_MM
from anybit.kernels.linear.triton_w8a8 import FP8, FP8_EXACT, INT8
from anybit.kernels.linear.triton_w8a8_tiles import UNITS, Product8, configure, operands, product_of
from anybit.kernels.request import REGIMES, Request, regime_of
from anybit.numerics.activations import quantize_dequantize
from anybit.platforms import PLATFORMS, named
from anybit.schemes import CHANNEL, TENSOR, ActivationSpec, Offset, ScaleLevel, Scheme
from anybit.weights import QuantizedWeight

HERE = Path(__file__).resolve().parent
FN, NUZ, E5M2 = "fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2"
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def spec(element: str, recipe: str, granularity: str = "token", size: int = 0, *, dynamic: bool = True,
         symmetric: bool = True) -> ActivationSpec:
    return ActivationSpec(element, dynamic, granularity, recipe, size, symmetric)  # type: ignore[arg-type]


INT8_TOKEN = spec("int8", "int8_token")
INT8_ASYM = spec("int8", "int8_token_asym", symmetric=False)
INT8_STATIC = spec("int8", "int8_static", "tensor", dynamic=False, symmetric=False)
INT8_TENSOR = spec("int8", "torchao_int8_token", "tensor")
FP8_TOKEN = spec(FN, "fp8_token")
FP8_STATIC = spec(FN, "fp8_static", "tensor", dynamic=False)
FP8_GROUP = spec(FN, "fp8_group", "group", 128)
E5M2_TOKEN = spec(E5M2, "torchao_fp8_token")

# element, blocks of scales, activation
SCHEMES: dict[str, tuple[str, tuple[tuple[int, int], ...], ActivationSpec]] = {
    "int8-channel": ("int8", (CHANNEL,), INT8_TOKEN),
    "int8-tensor-asymmetric": ("int8", (TENSOR,), INT8_ASYM),
    "int8-channel-static-zero": ("int8", (CHANNEL,), INT8_STATIC),
    "int8-two-levels": ("int8", (CHANNEL, TENSOR), INT8_TENSOR),
    "int8-g64-asymmetric": ("int8", ((1, 64),), INT8_ASYM),
    "int8-zero-points": ("int8", (CHANNEL,), INT8_ASYM),
    "uint8-zero-point": ("uint8", (CHANNEL,), INT8_TOKEN),
    "fp8-channel": (FN, (CHANNEL,), FP8_TOKEN),
    "fp8-tensor-static": (FN, (TENSOR,), FP8_STATIC),
    "fp8-128x128": (FN, ((128, 128),), FP8_GROUP),
    "fp8-32x64": (FN, ((32, 64),), FP8_TOKEN),
    "e5m2-channel": (E5M2, (CHANNEL,), E5M2_TOKEN),
    "fnuz-channel": (NUZ, (CHANNEL,), FP8_TOKEN),
}


OFFSETS: dict[str, Offset] = {
    "int8-zero-points": Offset("zero_point", "int8", CHANNEL),
    "uint8-zero-point": Offset("zero_point", "uint8", TENSOR),
}


def codes_for(element: str, n: int, k: int) -> torch.Tensor:
    """Random codes, all that are finite numbers."""
    if element == "int8":
        return torch.randint(-128, 128, (n, k), dtype=torch.int8)
    codes = torch.randint(0, 256, (n, k), dtype=torch.int16).to(torch.uint8)
    if element == "uint8":
        return codes
    if element == NUZ:
        return codes.masked_fill(codes == 0x80, 0)
    last = 0x7E if element == FN else 0x7B
    return torch.where((codes & 0x7F) > last, codes & 0x87, codes)


def weight_for(name: str, n: int, k: int, device: str = "cpu") -> QuantizedWeight:
    element, blocks, activation = SCHEMES[name]
    torch.manual_seed(n + k)
    scales = []
    for down, across in blocks:
        rows = 1 if down == 0 else -(-n // down)
        columns = 1 if across == 0 else -(-k // across)
        # six decades: extreme scales beside each other; one block of zeros
        scales.append(10.0 ** (torch.rand(rows, columns) * 6 - 4))
    codes = codes_for(element, n, k)
    codes[: min(n, 3), : min(k, 128)] = 0
    static = {}
    if activation.recipe in ("int8_static", "fp8_static"):
        static["scale"] = torch.tensor([0.02])
    if activation is INT8_STATIC:
        static["zero_point"] = torch.tensor([17], dtype=torch.int8)
    offset = OFFSETS.get(name)
    zeros = None
    if offset is not None:
        zeros = codes_for(element, 1 if offset.block == TENSOR else n, 1)
    scheme = Scheme(element, tuple(ScaleLevel("float32", b) for b in blocks), offset=offset, activation=activation)
    weight = QuantizedWeight(scheme, (n, k), codes, tuple(scales), offset=zeros, activation=static)
    return weight.to(device)


def prepared(weight: QuantizedWeight, name: str, *, pinned: bool = False) -> Stored:
    kernels = dict.fromkeys(REGIMES, name)
    return implementation(kernel(name)).prepare(weight, torch.bfloat16, kernels, pinned=pinned)


def rows_for(m: int, k: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary rows; from the second on also zeros, a constant, a row far from 0, a row with NaN."""
    x = torch.randn(m, k) * 3
    for row, values in enumerate((torch.zeros(k), torch.full((k,), 7.25), 100 + torch.rand(k)), start=1):
        if row < m:
            x[row] = values
    if m > 4:
        x[4, k // 3] = float("nan")
    return x.to(device, dtype)


def complaint(stored: Stored, weight: QuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None, *,
              narrow: bool = False, out_dtype: torch.dtype = torch.float32) -> str:
    """Where the product leaves the bound, in words; "" where it does not."""
    poison = torch.full((max(x.shape[0], 1), weight.shape[0]), float("nan"), device=x.device)
    del poison  # the next allocation of that size starts as NaN
    y = stored.linear(x, regime_of(x.shape[0]), bias, out_dtype)
    assert y.shape == (x.shape[0], weight.shape[0]) and y.dtype == out_dtype
    assert weight.scheme.activation is not None
    xq = quantize_dequantize(x.float(), weight.scheme.activation, weight.activation).double()
    w = weight.dequantize().double()
    wanted = xq @ w.T + (0 if bias is None else bias.double())
    size = xq.abs() @ w.abs().T
    per_sum = (weight.shape[1] + 8) * 2.0**-23 + (4 * 33 * 2.0**-13 if narrow else 0.0)
    half_ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[out_dtype]
    bound = per_sum * size + half_ulp * wanted.abs() + 2.0**-24 * (wanted.abs() + size) + 1e-37
    far = ((y.double() - wanted).abs() > bound) | (y.isnan() != wanted.isnan())
    if not bool(far.any()):
        return ""
    at = tuple(far.nonzero()[0].tolist())
    return (f"{weight.scheme} M {x.shape[0]}: {int(far.sum())} of {far.numel()} wrong, at {at}: {y[at].item()}, "
            f"wanted {wanted[at].item()} within {bound[at].item()}; rows {sorted(set(far.nonzero()[:, 0].tolist()))[:8]}")


def interpreted(name: str) -> list[str]:
    """Complaints of one scheme in this process, which must run with TRITON_INTERPRET=1."""
    found = []
    weight = weight_for(name, 70, 200)
    twin = INT8.name if "int8" in weight.scheme.element else FP8.name
    for m in (1, 6):
        found.append(complaint(prepared(weight, twin), weight, rows_for(m, 200, "cpu", torch.float32), torch.randn(70)))
    # several programs share K: the last to arrive adds
    wide = weight_for(name, 16, 4096)
    found.append(complaint(prepared(wide, twin), wide, rows_for(2, 4096, "cpu", torch.float32), None))
    return [line for line in found if line]


@pytest.mark.slow
def test_device_code_multiplies_rightly_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    script = "import test_triton_w8a8 as t; print('\\n'.join(c for n in t.SCHEMES for c in t.interpreted(n)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE, timeout=280,
                          env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                               "PYTHONPATH": os.pathsep.join(["../../src", *sys.path])})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(70, 200), (1, 16), (256, 512)])
def test_a_stored_weight_decodes_to_the_reference_bit_for_bit(name: str, n: int, k: int) -> None:
    pytest.importorskip("triton")
    weight = weight_for(name, n, k)
    stored = prepared(weight, INT8.name if "int8" in weight.scheme.element else FP8.name)
    assert torch.equal(stored.dequantize(), weight.dequantize())
    index = torch.tensor([[0, n - 1], [n // 2, 0]])
    assert torch.equal(stored.rows(index, torch.float32), weight.dequantize()[index])
    stored.bind({name: t.clone() for name, t in stored.tensors().items()})
    assert torch.equal(stored.dequantize(), weight.dequantize())
    assert not any(t.is_floating_point() for t in stored.tensors().values())


@pytest.mark.parametrize("name", SCHEMES)
def test_stored_bytes_are_what_the_spec_says(name: str) -> None:
    pytest.importorskip("triton")
    weight = weight_for(name, 256, 500)
    spec_of = INT8 if "int8" in weight.scheme.element else FP8
    held = sum(t.nbytes for t in prepared(weight, spec_of.name).tensors().values())
    said = spec_of.stored_bytes(Request("linear", weight.scheme, weight.shape, "bfloat16"))
    assert abs(held - said) <= 64


def request(name: str, shape: tuple[int, ...] = (4096, 4096), **changes: object) -> Request:
    element, blocks, activation = SCHEMES[name]
    scheme = Scheme(element, tuple(ScaleLevel("float32", b) for b in blocks), offset=OFFSETS.get(name),
                    activation=activation)
    return replace(Request("linear", replace(scheme, **changes), shape, "bfloat16"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("platform", "name", "kind", "promote"), [
    ("h200", "fp8-channel", FN, True), ("h200", "int8-channel", "int8", False), ("a100", "fp8-channel", "float16", False),
    ("l40s", "fp8-channel", FN, True), ("b200", "fp8-channel", FN, False), ("mi300x", "fp8-channel", NUZ, False),
    ("mi300x", "e5m2-channel", "float16", False), ("mi355x", "fp8-channel", FN, False),
    ("mi210", "fp8-channel", "float16", False), ("rx7900xtx", "fp8-channel", "float16", False),
    ("rx9070xt", "fp8-channel", FN, False), ("mi300x", "fnuz-channel", NUZ, False), ("h200", "fnuz-channel", "float16", False),
])
def test_operands_are_native_where_the_chip_has_them(platform: str, name: str, kind: str, promote: bool) -> None:
    found = product_of(request(name).scheme)
    assert found is not None
    given = operands(found, named(platform).arch)
    assert given is not None and (given.kind, given.promote) == (kind, promote)
    spec_of = INT8 if kind == "int8" else FP8
    native = "exact emulation" if kind == "float16" else "native"
    assert spec_of.executes(request(name), named(platform)) == native
    assert (spec_of.rounds(request(name), named(platform)) is not None) == promote


@pytest.mark.parametrize(("platform", "asked", "code"), [
    ("cpu", request("int8-channel"), "vendor"),
    ("t4", request("int8-channel"), "arch"),
    ("h200", request("fp8-channel"), "element"),
    ("h200", replace(request("int8-channel"), kind="embedding"), "kind"),
    ("h200", replace(request("int8-channel"), dtype="float32"), "dtype"),
    ("h200", request("int8-channel", activation=None), "activation"),
    ("h200", request("int8-channel", activation=spec("int8", "llm_int8")), "recipe"),
    ("h200", request("int8-channel", activation=FP8_TOKEN), "activation"),
    ("h200", request("int8-channel", offset=Offset("zero_point", "int8", (1, 128))), "scheme"),
    ("h200", request("int8-channel", offset=Offset("minimum", "float16", CHANNEL)), "scheme"),
    ("h200", request("uint8-zero-point", offset=None), "offset"),
    ("h200", request("int8-zero-points", (4096, 40_000)), "shape"),
    ("h200", request("int8-g64-asymmetric", offset=Offset("zero_point", "int8", CHANNEL)), "group"),
    ("h200", request("int8-channel", scales=(ScaleLevel("float32", (1, 16)),)), "group"),
    ("h200", request("int8-channel", (4096, 70_000)), "shape"),
])
def test_int8_is_refused_with_the_reason(platform: str, asked: Request, code: str) -> None:
    assert code in {reason.code for reason in INT8.can_implement(asked, named(platform)).reasons}


def test_all_reasons_are_given_at_once() -> None:
    asked = replace(request("fp8-channel"), kind="embedding", dtype="float32")
    codes = {reason.code for reason in INT8.can_implement(asked, named("t4")).reasons}
    assert {"arch", "kind", "dtype", "element"} <= codes


def test_exact_fp8_is_offered_only_where_the_native_one_rounds() -> None:
    offered = {p for p in PLATFORMS if FP8_EXACT.can_implement(request("fp8-channel"), named(p)).ok}
    rounds = {p for p in PLATFORMS if FP8.can_implement(request("fp8-channel"), named(p)).ok
              and FP8.rounds(request("fp8-channel"), named(p)) is not None}
    assert offered == rounds and {"h200", "l4"} <= offered


@pytest.mark.parametrize(("asked", "code"), [
    (request("fp8-128x128"), "group"), (replace(request("fp8-channel"), dtype="float16"), "dtype"),
    (request("fp8-channel", (4100, 4096)), "shape"), (request("e5m2-channel"), "element"),
])
def test_scaled_mm_is_refused_with_the_reason(asked: Request, code: str) -> None:
    assert code in {reason.code for reason in SCALED_MM.can_implement(asked, named("h200")).reasons}


def test_int_mm_is_for_prefill() -> None:
    asked = request("int8-tensor-asymmetric")
    assert INT_MM.can_implement(replace(asked, regime="prefill"), named("h200")).ok
    assert {r.code for r in INT_MM.can_implement(asked, named("h200")).reasons} == {"regime"}


@pytest.mark.parametrize("arch", UNITS)
@pytest.mark.parametrize("name", SCHEMES)
def test_tiles_fit_and_leave_no_program_idle(arch: str, name: str) -> None:
    found = product_of(request(name).scheme)
    assert found is not None
    given = operands(found, arch)
    assert given is not None
    for n, k in ((70, 200), (4096, 14336), (28672, 4096), (128, 16384)):
        for m in (1, 7, 16, 17, 64, 65, 300, 4096):
            c = configure(n, k, m, arch, found, given)
            blocks = -(-k // c.bk)
            share = -(-blocks // c.split)
            assert share * (c.split - 1) < blocks, (n, k, m, c)
            for width in (found.x_group, found.w_group):
                assert width % c.bk == 0, (n, k, m, c)
        assert configure(n, k, None, arch, found, given).split == 1


def test_a_claimed_architecture_has_something_to_compile() -> None:
    for spec_of in (INT8, FP8):
        for arch in UNITS:
            assert spec_of.cases(arch), (spec_of.name, arch)
    assert not INT8.cases("sm_75") and not FP8_EXACT.cases("gfx942") and FP8_EXACT.cases("sm_90")


def test_specs_are_in_the_catalogue() -> None:
    assert {INT8.name, FP8.name, FP8_EXACT.name, SCALED_MM.name, INT_MM.name} <= {k.name for k in KERNELS}


# --- on a GPU ---------------------------------------------------------------------------------------------------------

MANY = (0, 1, 2, 7, 8, 9, 16, 17, 64, 65, 300)
FEW = (1, 17, 300)


def rounds_here(weight: QuantizedWeight, name: str) -> bool:
    from anybit.kernels.triton.devices import arch_of

    found = product_of(weight.scheme)
    assert isinstance(found, Product8)
    given = operands(found, arch_of(torch.device("cuda")), exact=name == FP8_EXACT.name)
    return given is not None and given.promote


@gpu
@needs_gpu
@pytest.mark.parametrize(("name", "with_bias", "rows"), [
    ("int8-tensor-asymmetric", True, MANY), ("fp8-channel", True, MANY), ("fp8-128x128", False, MANY),
    ("int8-channel", False, FEW), ("int8-channel-static-zero", False, FEW), ("int8-two-levels", False, FEW),
    ("int8-g64-asymmetric", False, FEW), ("fp8-tensor-static", False, FEW), ("fp8-32x64", False, FEW),
    ("e5m2-channel", False, FEW), ("fnuz-channel", False, FEW), ("int8-zero-points", True, MANY),
    ("uint8-zero-point", False, FEW),
])
@pytest.mark.parametrize(("n", "k"), [(328, 1000), (272, 4096)])
def test_products_are_within_the_bound(name: str, with_bias: bool, rows: tuple[int, ...], n: int, k: int) -> None:
    weight = weight_for(name, n, k, "cuda")
    twin = INT8.name if "int8" in weight.scheme.element else FP8.name
    stored = prepared(weight, twin)
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16) if with_bias else None
    found = [complaint(stored, weight, rows_for(m, k, "cuda", torch.bfloat16), bias, narrow=rounds_here(weight, twin))
             for m in rows]
    assert [line for line in found if line] == []


@gpu
@needs_gpu
@pytest.mark.parametrize("name", ["fp8-channel", "fp8-128x128"])
def test_the_exact_kernel_is_within_the_tight_bound(name: str) -> None:
    weight = weight_for(name, 328, 1000, "cuda")
    stored = prepared(weight, FP8_EXACT.name)
    found = [complaint(stored, weight, rows_for(m, 1000, "cuda", torch.bfloat16), None) for m in FEW]
    assert [line for line in found if line] == []


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    weight = weight_for("int8-channel", 328, 1000, "cuda")
    weight = replace(weight, scales=(torch.rand(328, 1, device="cuda") * 1e-3,))
    x = rows_for(17, 1000, "cuda", dtype)
    assert complaint(prepared(weight, INT8.name), weight, x, None, out_dtype=dtype) == ""


@gpu
@needs_gpu
@pytest.mark.parametrize(("name", "kernel_name"), [
    ("fp8-channel", SCALED_MM.name), ("int8-tensor-asymmetric", INT_MM.name), ("int8-channel", INT_MM.name),
    ("int8-zero-points", INT_MM.name),
])
def test_products_of_torch_are_within_the_bound(name: str, kernel_name: str) -> None:
    weight = weight_for(name, 336, 1008, "cuda")
    weight = replace(weight, scales=tuple(s * 1e-4 for s in weight.scales))
    stored = prepared(weight, kernel_name)
    bias = torch.randn(336, device="cuda", dtype=torch.bfloat16)
    out = torch.bfloat16 if kernel_name == SCALED_MM.name else torch.float32
    found = [complaint(stored, weight, rows_for(m, 1008, "cuda", torch.bfloat16), b, out_dtype=out,
                       narrow=rounds_here(weight, kernel_name)) for m in (16, 65, 300) for b in (None, bias)]
    assert [line for line in found if line] == []


@gpu
@needs_gpu
@pytest.mark.parametrize("name", ["int8-tensor-asymmetric", "fp8-128x128"])
def test_pinned_rows_are_the_same_bits_in_every_batch(name: str) -> None:
    weight = weight_for(name, 272, 4096, "cuda")
    stored = prepared(weight, INT8.name if "int8" in weight.scheme.element else FP8.name, pinned=True)
    x = torch.randn(300, 4096, device="cuda", dtype=torch.bfloat16)
    whole = stored.linear(x, "prefill", None, torch.float32)
    for first, count in ((0, 1), (3, 2), (17, 16), (100, 65)):
        part = stored.linear(x[first : first + count], regime_of(count), None, torch.float32)
        assert torch.equal(part, whole[first : first + count]), count


@gpu
@needs_gpu
@pytest.mark.parametrize(("name", "m"), [("int8-tensor-asymmetric", 1), ("fp8-channel", 7), ("fp8-128x128", 300)])
def test_a_captured_graph_gives_the_eager_result_again_and_again(name: str, m: int) -> None:
    weight = weight_for(name, 272, 4096, "cuda")
    stored = prepared(weight, INT8.name if "int8" in weight.scheme.element else FP8.name)
    x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
    stored.linear(x, regime_of(m), None, torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = stored.linear(x, regime_of(m), None, torch.bfloat16)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, stored.linear(x, regime_of(m), None, torch.bfloat16))


@gpu
@needs_gpu
def test_a_compiled_call_is_one_graph_and_gives_the_eager_result() -> None:
    weight = weight_for("int8-tensor-asymmetric", 272, 1000, "cuda")
    stored = prepared(weight, INT8.name)

    def double(x: torch.Tensor) -> torch.Tensor:
        return stored.linear(x * 2, "small", None, torch.bfloat16) + 1

    x = torch.randn(9, 1000, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), double(x))


@gpu
@needs_gpu
def test_strided_inputs_are_taken() -> None:
    weight = weight_for("int8-channel", 272, 512, "cuda")
    stored = prepared(weight, INT8.name)
    wide = torch.randn(9, 1024, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, 256:768], wide[:, ::2], wide.T[:512, :9].T):
        straight = stored.linear(x.contiguous(), "small", None, torch.float32)
        assert torch.equal(stored.linear(x, "small", None, torch.float32), straight)
