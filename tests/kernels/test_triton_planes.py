"""The family "triton-planes": layout, specs, device code in Triton's interpreter, and the products on a GPU.

Bound of the products. Operands are exact in 16 bits, each product of two of them is exact in float32, and so are the
values that scales and offsets stand for but for one rounding each. What remains is a float32 sum of K terms in some
order, of parts of it in others, and at most one rounding a group for its scale and addend. A sum of n terms is wrong by at
most n u sum|terms|, u = 2^-24 rounded or 2^-23 truncated as matrix units may, so |y - x W^T| <= 2 (K + 2) 2^-24 |x||W'|,
where W' counts the magnitudes of code * scale and of offset apart. `expand` adds r |x||W|, r = 2^-8 (bf16) or 2^-11, where
it says that it rounds weights, and a result in 16 bits half a unit in its last place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import anybit
from anybit.kernels.linear import triton_planes
from anybit.kernels.linear.triton_planes import _SAMPLES, EXPAND, FUSED, MATVEC
from anybit.kernels.request import Request
from anybit.kernels.trials import sample_weight
from anybit.kernels.triton import planes, planes_form
from anybit.kernels.triton.planes import TritonPlanes, split
from anybit.kernels.triton.planes_launch import configure
from anybit.kernels.triton.planes_prepare import pack, unpacked
from anybit.numerics.activations import quantize_dequantize
from anybit.platforms import named
from anybit.schemes import CHANNEL, TENSOR, ActivationSpec, Offset, ScaleLevel, Scheme, dense, group
from anybit.weights import QuantizedWeight
from conftest import CHECKPOINTS, genuine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PLAN = {"decode": "triton-matvec", "small": "triton-fused", "prefill": "triton-expand"}
SMALL = {"decode": "triton-matvec", "small": "triton-fused", "prefill": "triton-fused"}


def prepared(weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16, plan: dict = PLAN) -> planes.StoredPlanes:
    stored = TritonPlanes().prepare(weight, dtype, plan)
    assert isinstance(stored, planes.StoredPlanes)
    return stored


# --- the layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", genuine("*"))
def test_preparing_loses_no_bit_of_a_genuine_layer(folder: str) -> None:
    checkpoint = anybit.open(CHECKPOINTS / folder)
    seen = set()
    for layer in checkpoint.layers.values():
        key = (layer.scheme.weight_only(), layer.shape[-1])
        if key in seen or planes_form.reasons_against(layer.scheme):
            continue
        seen.add(key)
        weight = checkpoint.read(layer.name)
        weight = weight.expert(0) if len(weight.shape) == 3 else weight
        for dtype in (torch.bfloat16, torch.float16):
            packed = pack(weight, dtype)
            if packed is not None:  # act-order groups of unlike sizes stay with torch-tiled
                assert torch.equal(unpacked(packed), weight.dequantize()), str(layer.scheme)


@pytest.mark.parametrize("name", ["int4 g128", "uint4 g128 zp", "nf4 g64"])
@pytest.mark.parametrize("times, fits", [(1.0, True), (2.0**24, False), (2.0**-12, False)], ids=["usual", "large", "tiny"])
def test_rows_are_written_out_as_float16_only_where_they_fit_it(name: str, times: float, fits: bool) -> None:
    weight = sample_weight(_SAMPLES[name], (70, 512))
    scales = weight.scales[0].clone()
    scales[33] = scales[33] * times  # one row is enough: of the largest weights of float16, or lost below its smallest
    weight = replace(weight, scales=(scales, *weight.scales[1:]))
    for dtype, wanted in ((torch.float16, fits), (torch.bfloat16, True)):
        packed = pack(weight, dtype)
        assert packed is not None
        assert planes.is_expandable(packed, dtype) is wanted


@pytest.mark.parametrize("name", _SAMPLES)
def test_the_bytes_of_the_layout_are_those_that_the_spec_says(name: str) -> None:
    for n, k in ((200, 512), (64, 1024)):
        weight = sample_weight(_SAMPLES[name], (n, k))
        held = sum(t.nbytes for t in prepared(weight).tensors().values())
        assert held == MATVEC.stored_bytes(Request("linear", _SAMPLES[name], (n, k), "bfloat16"))


@pytest.mark.parametrize("name", _SAMPLES)
def test_the_layout_of_a_large_layer_is_at_most_a_tenth_larger_than_the_canonical_form(name: str) -> None:
    request = Request("linear", _SAMPLES[name], (4096, 4096), "bfloat16")
    weight = sample_weight(_SAMPLES[name], (64, 4096))
    bits = weight.scheme.weight_bits
    canonical = 64 * 4096 * bits // 8 + weight.nbytes - weight.stored_codes.nbytes
    assert MATVEC.stored_bytes(request) <= 1.1 * 64 * canonical


@pytest.mark.parametrize("name", ["int4 g128", "nvfp4", "q4_k", "uint4 g128 zp", "nf4 g64"])
def test_rows_are_the_rows_of_the_weight(name: str) -> None:
    weight = sample_weight(_SAMPLES[name], (70, 512))
    index = torch.tensor([[69, 0], [3, 3]])
    assert torch.equal(prepared(weight).rows(index, torch.float32), weight.dequantize()[index])


def test_a_move_of_the_buffers_keeps_the_weight() -> None:
    weight = sample_weight(_SAMPLES["nvfp4"], (70, 512))
    stored = prepared(weight)
    stored.bind({name: t.clone() for name, t in stored.tensors().items()})
    assert torch.equal(stored.dequantize(), weight.dequantize())


def mxfp4(exponents: torch.Tensor, codes: torch.Tensor) -> QuantizedWeight:
    return QuantizedWeight(_SAMPLES["mxfp4"], tuple(codes.shape), codes, (exponents,))


def test_scales_of_every_power_of_two_are_kept_and_leave_the_operand() -> None:
    codes = torch.randint(0, 16, (64, 256), dtype=torch.uint8)
    exponents = torch.arange(0, 255, dtype=torch.uint8)[:64, None].repeat(1, 8) * 3  # wraps: 2^-127 to 2^127
    weight = mxfp4(exponents, codes)
    stored = prepared(weight)
    assert stored._packed.form.scaling == "group"
    assert torch.equal(stored.dequantize(), weight.dequantize())


def test_a_scale_far_below_the_others_is_folded_where_its_block_is_zero() -> None:
    codes = torch.randint(1, 8, (64, 256), dtype=torch.uint8)
    exponents = torch.full((64, 8), 200, dtype=torch.uint8)
    codes[5, 32:64] = 8  # minus zero
    exponents[5, 1] = 0
    stored = prepared(mxfp4(exponents, codes))
    assert stored._packed.form.scaling == "fold"
    assert torch.equal(stored.dequantize(), mxfp4(exponents, codes).dequantize())


def test_a_zero_scale_makes_a_zero_block_although_folded_scales_have_no_zero() -> None:
    weight = sample_weight(_SAMPLES["nvfp4"], (64, 256), seed=1)
    weight.scales[0][3] = 0
    stored = prepared(weight)
    assert stored._packed.form.scaling == "fold"
    assert not stored.dequantize()[3].any()
    assert torch.equal(stored.dequantize(), weight.dequantize())


def test_nan_scales_and_nan_codes_stay_nan() -> None:
    weight = sample_weight(_SAMPLES["nvfp4"], (64, 256), seed=1)
    weight.scales[0][3, 2] = 0x7F
    assert torch.equal(prepared(weight).dequantize().isnan(), weight.dequantize().isnan())
    block = sample_weight(_SAMPLES["fp8 block128"], (64, 256), seed=1)
    block.codes[5, 7] = 0x7F
    stored = prepared(block)
    assert stored._packed.form.special == 1
    assert torch.equal(stored.dequantize().isnan(), block.dequantize().isnan())


def test_three_bfloat16_pieces_are_every_float32() -> None:
    x = torch.randn(1000) * torch.exp2(torch.randint(-60, 60, (1000,)).float())
    assert torch.equal(sum(piece.double() for piece in split(x, 3)), x.double())
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.3e38])
    pieces = split(special, 3)
    assert torch.equal(pieces[0], special.bfloat16()) or pieces[0].isnan()[2]
    assert [p[0].item() for p in pieces] == [float("inf"), 0.0, 0.0]


# --- the specs --------------------------------------------------------------------------------------------------------


def request(scheme: Scheme, regime: str = "decode", dtype: str = "bfloat16", kind: str = "linear") -> Request:
    return Request(kind, scheme, (4096, 4096), dtype, regime)  # type: ignore[arg-type]


def codes_of(spec, asked: Request, platform: str) -> list[str]:
    return [reason.code for reason in spec.can_implement(asked, named(platform)).reasons]


def test_refusals_name_every_reason() -> None:
    scheme = Scheme("uint4", (ScaleLevel("float16", group(24), placement="strided"),))
    asked = request(scheme, "prefill", "float32", "embedding")
    assert codes_of(MATVEC, asked, "cpu") == ["vendor", "kind", "dtype", "scheme", "scheme", "regime"]


@pytest.mark.parametrize(("platform", "ok"), [("h200", True), ("a100", True), ("mi300x", True), ("rx7900xtx", True),
                                              ("t4", False), ("cpu", False)])
def test_the_chips_that_it_runs_on(platform: str, ok: bool) -> None:
    assert FUSED.can_implement(request(_SAMPLES["int4 g128"]), named(platform)).ok is ok


def test_an_unquantized_weight_is_refused() -> None:
    assert codes_of(FUSED, request(dense("bfloat16")), "h200") == ["scheme"]


@pytest.mark.parametrize(("scheme", "dtype", "wanted"), [
    (_SAMPLES["int4 g128"], "bfloat16", "weights to bfloat16"),
    (_SAMPLES["int4 g128"], "float16", "weights to float16"),
    (_SAMPLES["q4_k"], "bfloat16", "weights to bfloat16"),
    (_SAMPLES["fp8 block128"], "bfloat16", "weights to bfloat16"),
    (_SAMPLES["int8 channel"], "bfloat16", "weights to bfloat16"),
    (_SAMPLES["mxfp4"], "bfloat16", None),
    (_SAMPLES["nvfp4"], "float16", None),
    (_SAMPLES["mxfp6_e2m3"], "bfloat16", None),
    (_SAMPLES["nf4 g64 to bf16"], "bfloat16", None),
    (_SAMPLES["nf4 g64 to bf16"], "float16", "weights to float16"),
    (_SAMPLES["nf4 g64"], "bfloat16", "weights to bfloat16"),
    (Scheme("fp8_e4m3fn", (ScaleLevel("float32", TENSOR),)), "bfloat16", None),
    (Scheme("int8", (ScaleLevel("float32", TENSOR),), offset=Offset("zero_point", "int8", TENSOR)), "bfloat16", None),
])  # fmt: skip
def test_expansion_says_what_it_rounds(scheme: Scheme, dtype: str, wanted: str | None) -> None:
    assert EXPAND.rounds(request(scheme, "prefill", dtype), named("h200")) == wanted
    assert MATVEC.rounds(request(scheme, "decode", dtype), named("h200")) is None
    assert FUSED.rounds(request(scheme, "prefill", dtype), named("h200")) is None


@pytest.mark.parametrize(("zero", "fits"), [(0, True), (127, True), (128, False), (255, False)])
def test_zero_points_that_no_kernel_could_read_leave_the_layout_to_the_reference(zero: int, fits: bool) -> None:
    """A bfloat16 has room for 7 bits beside the bit that marks them: 128 would be read as another number."""
    weight = sample_weight(_SAMPLES["uint4 g128 zp"], (64, 256))
    assert weight.offset is not None
    offset = weight.offset.clone()
    offset[3, 1] = zero
    strange = replace(weight, offset=offset)
    assert (pack(strange, torch.bfloat16) is not None) is fits
    stored = TritonPlanes().prepare(strange, torch.bfloat16, PLAN)
    assert torch.equal(stored.dequantize(), strange.dequantize())


def test_weights_are_not_expanded_to_bfloat16_where_x_is_finer() -> None:
    """Kernels hand quantized activations on in bfloat16; its rounding of a weight is eight times that of float16."""
    eight = ActivationSpec("fp8_e4m3fn", True, "token", "fp8_token")
    grouped = replace(_SAMPLES["int4 g128"], activation=eight)
    assert codes_of(EXPAND, request(grouped, "prefill", "float16"), "h200") == ["dtype"]
    assert codes_of(FUSED, request(grouped, "prefill", "float16"), "h200") == []
    assert codes_of(EXPAND, request(grouped, "prefill"), "h200") == []
    assert EXPAND.rounds(request(grouped, "prefill"), named("h200")) == "weights to bfloat16"
    exact = request(replace(_SAMPLES["nvfp4"], activation=eight), "prefill", "float16")
    assert codes_of(EXPAND, exact, "h200") == []
    assert EXPAND.rounds(exact, named("h200")) is None


@pytest.mark.parametrize("arch", ["sm_75", "gfx90a", "sm_90", "gfx1201"])
def test_cases_to_compile_have_names_of_their_own(arch: str) -> None:
    cases = [(c.kernel, c.label) for spec in triton_planes.SPECS for c in spec.cases(arch)]
    assert len(set(cases)) == len(cases)
    assert bool(cases) is (arch != "sm_75")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942", "gfx1100"])
@pytest.mark.parametrize("name", _SAMPLES)
def test_launches_cover_the_rows(arch: str, name: str) -> None:
    for n, k in ((64, 512), (192, 4096), (6144, 4096), (4096, 14336), (28672, 4096), (57344, 8192)):
        form = planes_form.form_of(_SAMPLES[name], k)
        for m in (1, 8, 9, 16, 17, 32, 33, 64, 65, 300, 4096):
            launch = configure(form, n, k, m, arch)
            assert n % launch.rows == 0, (n, k, m, launch)


def test_on_hopper_no_part_of_k_is_without_work() -> None:
    for name in ("int4 g128", "uint4 g128 zp", "mxfp4", "nvfp4"):
        for n, k in ((64, 512), (4096, 4096), (6144, 4096), (4096, 14336), (5120, 17408)):
            form = planes_form.form_of(_SAMPLES[name], k)
            for m in (1, 16, 32, 64, 256):
                launch = configure(form, n, k, m, "sm_90")
                blocks = k // form.block
                assert -(-blocks // launch.split) * (launch.split - 1) < blocks, (name, n, k, m, launch)


# --- device code without a GPU ----------------------------------------------------------------------------------------


def interpreted(*cases: str) -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                   "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / "planes_interpreted.py", *cases], capture_output=True, text=True,
                          env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]


@pytest.mark.slow
def test_kernels_in_the_interpreter_compute_the_exact_product() -> None:
    """Portable decoding of every form, bf16 and fp16, and float32 activations in pieces; K <= 512.

    The bound of the module's docstring, in units of 2^-24 |x||W|: numpy rounds each of at most 512 additions, and where an
    offset is counted apart from the code |x||W'| is at most 16 |x||W| for these weights. The errors are about 1; an operand
    rounded to bf16 would make 5,000.
    """
    pytest.importorskip("triton")
    rows = interpreted("bf16:decode", "fp16:decode", "fp32:decode")
    assert len(rows) > 90
    assert [row for row in rows if not row["same"] or not row["error"] < 40] == []


@pytest.mark.slow
def test_expansion_in_the_interpreter_rounds_what_the_spec_says() -> None:
    pytest.importorskip("triton")
    exact = ("mxfp4", "nvfp4", "mxfp6_e2m3", "nf4 g64 to bf16", "fp8_e4m3fnuz tensor", "ggml mxfp4", "amdfp4")
    for row in interpreted("bf16:prefill"):
        limit = 40 if row["name"] in exact else 2**16  # 2^-8: half a unit in the last place of bf16, relative
        assert row["error"] < limit, row


def single(word: int) -> torch.Tensor:
    return torch.tensor([word - (word >> 31 << 32)], dtype=torch.int32).view(torch.float32)


def word_of(value: torch.Tensor) -> int:
    return int(value.view(torch.int32)) & 0xFFFFFFFF


_WORDS = {"shl.b32": lambda a: a[0] << a[1], "shr.u32": lambda a: a[0] >> a[1], "and.b32": lambda a: a[0] & a[1],
          "or.b32": lambda a: a[0] | a[1], "mov.b32": lambda a: a[0], "mad.lo.u32": lambda a: a[0] * a[1] + a[2],
          "shf.r.wrap.b32": lambda a: (a[1] << 32 | a[0]) >> a[2] % 32,
          "add.f32": lambda a: word_of(single(a[0]) + single(a[1])),
          "sub.f32": lambda a: word_of(single(a[0]) - single(a[1]))}


def run_ptx(text: str, inputs: list[int], outputs: int = 1) -> int:
    """A few PTX instructions on 32-bit words; 16-bit float pairs by exact float64 arithmetic and one rounding.

    The first output is the result, or of several all, the first lowest.
    """
    words = {f"${i + outputs}": value & 0xFFFFFFFF for i, value in enumerate(inputs)}

    def value(name: str) -> int:
        return words[name] if name in words else int(name, 0) & 0xFFFFFFFF

    def pair(word: int, dtype: torch.dtype) -> torch.Tensor:
        halves = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16)
        return halves.view(dtype).double()

    for statement in text.replace("{", "").replace("}", "").split(";"):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        operation, _, rest = statement.strip().partition(" ")
        target, *names = [part.strip() for part in rest.split(",")]
        a = [value(name) for name in names]
        if operation == "prmt.b32":
            source = (a[1] << 32 | a[0]).to_bytes(8, "little")
            chosen = [(source[a[2] >> 4 * i & 7], a[2] >> 4 * i & 8) for i in range(4)]
            # a selector of eight and more: the sign of the byte, eight times
            result = sum((byte if not of_sign else byte // 128 * 255) << 8 * i
                         for i, (byte, of_sign) in enumerate(chosen))
        elif operation == "lop3.b32":
            assert a[3] == 0xEA  # (a & b) | c
            result = a[0] & a[1] | a[2]
        elif operation.startswith("cvt.rn"):
            dtype = torch.bfloat16 if "bf16" in operation else torch.float16
            result = pair_bits(torch.cat([single(a[1]), single(a[0])]).to(dtype))
        elif operation.endswith("16x2"):
            dtype = torch.bfloat16 if "bf16" in operation else torch.float16
            x = [pair(word, dtype) for word in a]
            done = x[0] + x[1] if operation.startswith("add") else x[0] * x[1]
            if operation.startswith("fma"):
                done = done + x[2]
            result = pair_bits(done.to(dtype))
        else:
            result = _WORDS[operation](a)
        words[target] = result & 0xFFFFFFFF
    return sum(words[f"${i}"] << 32 * i for i in range(outputs))


def pair_bits(pair: torch.Tensor) -> int:
    bits = pair.view(torch.int16).to(torch.int32) & 0xFFFF
    return int(bits[0]) | int(bits[1]) << 16


def pair_of(value: float, dtype: torch.dtype) -> int:
    bits = int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF
    return bits << 16 | bits


@pytest.mark.parametrize("field", range(8))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inline_assembly_decodes_every_nibble(field: int, dtype: torch.dtype) -> None:
    kernels = pytest.importorskip("anybit.kernels.triton.planes_kernels")
    is_half = dtype == torch.float16
    integers = getattr(kernels, f"_I{'H' if is_half else 'B'}{field}").value
    floats = getattr(kernels, f"_F{'H' if is_half else 'B'}{field}").value
    e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for low in range(16):
        high = (low * 7 + 3) % 16
        noise = 0x5A96C3E1 & ~(0xF << 4 * field)
        words = [noise | low << 4 * field, ~noise & 0xFFFFFFFF & ~(0xF << 4 * field) | high << 4 * field]
        for zero in (0, 8, 15):
            got = run_ptx(integers, [*words, pair_of(-(1024.0 if is_half else 128.0) - zero, dtype)])
            pairs = torch.tensor([got & 0xFFFF, got >> 16], dtype=torch.int32).to(torch.int16).view(dtype)
            assert pairs.tolist() == [low - zero, high - zero]
        # a scale of 24 on the base of `_factor`: 2^126 (bf16, kept within range) or 2^14 below the value
        scale = 24.0
        factor = pair_of(scale * 2.0**100 if not is_half else scale * 2.0**6, dtype)
        got = run_ptx(floats, [*words, factor])
        pairs = torch.tensor([got & 0xFFFF, got >> 16], dtype=torch.int32).to(torch.int16).view(dtype).double()
        wanted = [(-1.0 if code & 8 else 1.0) * e2m1[code & 7] * scale for code in (low, high)]
        assert (pairs * (2.0**8 if is_half else 2.0**26)).tolist() == wanted


@pytest.mark.parametrize("field", range(8))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inline_assembly_makes_multiples_of_a_power_of_two_of_every_nibble(field: int, dtype: torch.dtype) -> None:
    kernels = pytest.importorskip("anybit.kernels.triton.planes_kernels")
    lacking = 64.0 if dtype == torch.bfloat16 else 512.0
    text = kernels._nibbles(field, "bf16" if dtype == torch.bfloat16 else "f16")
    for low in range(16):
        high = (low * 7 + 3) % 16
        noise = 0x5A96C3E1 & ~(0xF << 4 * field)
        words = [noise | low << 4 * field, ~noise & 0xFFFFFFFF & ~(0xF << 4 * field) | high << 4 * field]
        for zero in (0, 8, 15):
            got = run_ptx(text, [*words, pair_of(-zero / lacking, dtype)])
            pairs = torch.tensor([got & 0xFFFF, got >> 16], dtype=torch.int32).to(torch.int16).view(dtype)
            assert (pairs.double() * lacking).tolist() == [low - zero, high - zero]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zero_points_are_minus_themselves_over_what_nibbles_lack(dtype: torch.dtype) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from anybit.kernels.triton import planes_hopper, planes_registers

    is_half, lacking = dtype == torch.float16, 64.0 if dtype == torch.bfloat16 else 512.0
    constants = (planes_registers._MINUS_FP16 if is_half else planes_registers._MINUS_BF16).value
    text = (planes_hopper._ZEROS_FP16 if is_half else planes_hopper._ZEROS_BF16).value
    for zero in range(128):
        got = run_ptx(text, [zero | zero << 16])
        assert got == pair_of(-zero / lacking, dtype)
        assert zero >= 16 or constants[zero] & 0xFFFFFFFF == got


@pytest.mark.parametrize("byte", range(4))
def test_inline_assembly_makes_a_pair_of_every_folded_scale(byte: int) -> None:
    """e8: the byte is bf16's exponent; e53: five bits of exponent and three of mantissa, on either dtype's bias."""
    kernels = pytest.importorskip("anybit.kernels.triton.planes_kernels")
    for code in range(256):
        word = 0x5A96C3E1 & ~(0xFF << 8 * byte) | code << 8 * byte
        shifted = run_ptx(getattr(kernels, f"_S8{byte}").value, [word])
        assert shifted == code << 7 | code << 23
        biased = run_ptx(getattr(kernels, f"_S53{byte}").value, [word])
        value = torch.tensor([biased & 0xFFFF], dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
        assert biased >> 16 == biased & 0xFFFF
        if code >= 8:  # the smallest exponent field is 1
            assert float(value) == (1 + code % 8 / 8) * 2.0 ** ((code >> 3) - 31 + 127)


def test_a_zero_point_s_pair_is_minus_its_base_and_it() -> None:
    kernels = pytest.importorskip("anybit.kernels.triton.planes_kernels")
    for zero in (0, 8, 15, 16):
        for dtype, base, negative in ((torch.bfloat16, 128.0, kernels._NEGATIVE_BF16),
                                      (torch.float16, 1024.0, kernels._NEGATIVE_FP16)):
            assert (zero | zero << 16) + negative.value & 0xFFFFFFFF == pair_of(-base - zero, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_80", "gfx942", "gfx1100"])
def test_a_plan_s_kernel_compiles(arch: str) -> None:
    pytest.importorskip("triton")
    sys.path.insert(0, str(ROOT / "tools"))
    import gate

    cases = [c for c in MATVEC.cases(arch) if c.label == "nvfp4 bfloat16 M=1"]
    assert [(gate.name_of(case), gate.faults(case, row)) for case, row in gate.compile_all(cases) if
            gate.faults(case, row)] == []


# --- on a GPU ---------------------------------------------------------------------------------------------------------

def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


ALL_TOKENS = (0, 1, 2, 7, 8, 9, 16, 17, 64, 65, 300)
FEW_TOKENS = (1, 9, 300)
GPU_SCHEMES = {
    **_SAMPLES,
    "iq4_nl": Scheme("iq4_nl", (ScaleLevel("float16", group(32)),)),
    "fp8_e5m2 channel": Scheme("fp8_e5m2", (ScaleLevel("float32", CHANNEL),)),
    "uint4 channel zp": Scheme("uint4", (ScaleLevel("bfloat16", CHANNEL),),
                               offset=Offset("zero_point", "uint4", CHANNEL)),
}


def poison(device: str) -> None:
    """Leave NaN in the memory that the next allocations get."""
    kept = [torch.full((size,), float("nan"), device=device) for size in (1 << 12, 1 << 16, 1 << 20, 1 << 22)]
    del kept


def weight_on_gpu(scheme: Scheme, n: int, k: int, seed: int = 0) -> QuantizedWeight:
    weight = sample_weight(scheme, (n, k), seed, "cuda")
    assert isinstance(weight, QuantizedWeight)
    return weight


def parts_of(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 weight, and the magnitudes of code * scale and offset counted apart."""
    reference = weight.dequantize().double()
    if weight.scheme.offset is None or weight.offset is None:
        return reference, reference.abs()
    plain = replace(weight, scheme=replace(weight.scheme, offset=None), offset=None, offset_scales=())
    scaled = plain.dequantize().double().abs()
    return reference, scaled + (reference - plain.dequantize().double()).abs()


def demand_close(y: torch.Tensor, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None,
                 rounding: float, what: str) -> None:
    """The bound of the module's docstring; `rounding` is that of the weights, relative."""
    reference, magnitudes = parts_of(weight)
    k = x.shape[1]
    exact = x.double() @ reference.T
    size = x.double().abs() @ magnitudes.T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    half_unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[y.dtype]
    smallest = {torch.float16: 2.0**-25}.get(y.dtype, 0.0)
    bound = (2 * (k + 2) * 2.0**-24 + rounding) * size
    bound = bound + half_unit * (exact.abs() + bound) + smallest
    wrong = ~((y.double() - exact).abs() <= bound)  # NaN is wrong
    if y.dtype == torch.float16:  # beyond its range infinity is the rounding
        wrong &= ~(y.isinf() & (y * exact > 0) & (exact.abs() + bound >= 65520))
    if bool(wrong.any()):
        m, n = (int(i) for i in wrong.nonzero()[0])
        raise AssertionError(f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, first at [{m}, {n}]: "
                             f"{float(y[m, n])!r}, wanted {float(exact[m, n])!r} within {float(bound[m, n]):.3g}")


def regime(tokens: int) -> str:
    return "decode" if tokens <= 8 else "small" if tokens <= 64 else "prefill"


@on_gpu
@pytest.mark.parametrize("name", GPU_SCHEMES)
def test_products_are_within_the_bound(name: str) -> None:
    """Ragged N and K where groups allow; the main schemes at every M and in both dtypes, and aligned."""
    scheme = GPU_SCHEMES[name]
    is_main = name in ("int4 g128", "nvfp4")
    has_super = len(scheme.scales) > 1 and scheme.scales[1].block[1] > 0
    shapes = [(200, 768 if has_super else 640 + (scheme.scales[0].block[1] or 8) % 128)]
    if is_main:
        shapes.append((256, 1024))
    for dtype in (torch.bfloat16, torch.float16) if is_main else (torch.bfloat16,):
        for n, k in shapes:
            weight = weight_on_gpu(scheme, n, k)
            stored = prepared(weight, dtype, SMALL)
            assert torch.equal(stored.dequantize(), weight.dequantize())
            bias = torch.randn(n, device="cuda", dtype=dtype)
            for m in ALL_TOKENS if is_main else FEW_TOKENS:
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                poison("cuda")
                y = stored.linear(x, regime(m), bias, torch.float32)
                assert y.shape == (m, n)
                demand_close(y, x, weight, bias, 0.0, f"{name} {dtype} M={m} N={n} K={k}")


@on_gpu
@pytest.mark.parametrize("name", GPU_SCHEMES)
def test_expanded_products_round_only_what_the_spec_says(name: str) -> None:
    scheme = GPU_SCHEMES[name]
    n, k, m = 200, 768, 300
    for dtype, word in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        weight = weight_on_gpu(scheme, n, k)
        if dtype == torch.float16 and float(weight.dequantize().abs().max()) > 6e4:
            continue
        stored = prepared(weight, dtype)
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        poison("cuda")
        rounds = EXPAND.rounds(Request("linear", scheme, (n, k), word, "prefill"), named("h200"))
        unit = 0.0 if rounds is None else 2.0**-8 if word == "bfloat16" else 2.0**-11
        for bias in (None, torch.randn(n, device="cuda", dtype=dtype), torch.randn(n, device="cuda")):
            y = stored.linear(x, "prefill", bias, dtype)
            demand_close(y, x, weight, bias, unit, f"{name} {dtype} expanded, bias {bias is not None}")


@on_gpu
@pytest.mark.parametrize("name", ["int4 g128", "nvfp4", "q4_k"])
def test_float32_activations_lose_nothing(name: str) -> None:
    weight = weight_on_gpu(GPU_SCHEMES[name], 200, 768)
    for plan in (SMALL, PLAN):
        stored = prepared(weight, torch.bfloat16, plan)
        for m in (1, 300):
            x = torch.randn(m, 768, device="cuda") * torch.exp2(torch.randint(-20, 20, (m, 1), device="cuda").float())
            unit = 2.0**-8 if plan is PLAN and m == 300 and name != "nvfp4" else 0.0
            # three products are added
            demand_close(stored.linear(x, regime(m), None, torch.float32), x, weight, None, unit + 4 * 2.0**-24, name)


@on_gpu
def test_strides_of_x_do_not_matter() -> None:
    weight = weight_on_gpu(GPU_SCHEMES["int4 g128"], 200, 512)
    stored = prepared(weight)
    x = torch.randn(9, 1024, device="cuda", dtype=torch.bfloat16)
    for view in (x[:, ::2], x[:, 256:768], torch.randn(512, 9, device="cuda", dtype=torch.bfloat16).T):
        wanted = stored.linear(view.contiguous(), "small", None, torch.bfloat16)
        assert torch.equal(stored.linear(view, "small", None, torch.bfloat16), wanted)


@on_gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["int4 g128", "nvfp4", "uint4 g64 float zp"])
def test_nan_and_infinity_stay_in_their_row(name: str, bad: float) -> None:
    weight = weight_on_gpu(GPU_SCHEMES[name], 200, 512)
    stored = prepared(weight)
    for m in (7, 300):
        x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
        clean = stored.linear(x, regime(m), None, torch.bfloat16)
        x[3, 5] = bad
        y = stored.linear(x, regime(m), None, torch.bfloat16)
        others = torch.arange(m, device="cuda") != 3
        assert torch.equal(y[others], clean[others])
        assert not bool(y[3].isfinite().all())


@on_gpu
def test_scales_of_every_power_of_two_multiply_right() -> None:
    codes = torch.randint(0, 16, (128, 512), dtype=torch.uint8)
    exponents = torch.randint(20, 230, (128, 16), dtype=torch.uint8)
    weight = mxfp4(exponents, codes).to("cuda")
    x = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)
    demand_close(prepared(weight).linear(x, "decode", None, torch.float32), x, weight, None, 0.0, "wide e8m0")


@on_gpu
def test_the_same_call_gives_the_same_bits() -> None:
    stored = prepared(weight_on_gpu(GPU_SCHEMES["int4 g128"], 512, 4096))
    for m in (1, 16, 64):
        x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
        first = stored.linear(x, regime(m), None, torch.bfloat16)
        assert all(torch.equal(stored.linear(x, regime(m), None, torch.bfloat16), first) for _ in range(20))


@on_gpu
def test_a_pinned_row_does_not_depend_on_its_batch() -> None:
    weight = weight_on_gpu(GPU_SCHEMES["nvfp4"], 512, 2048)
    plan = dict.fromkeys(PLAN, "triton-fused")
    stored = TritonPlanes().prepare(weight, torch.bfloat16, plan, pinned=True)
    x = torch.randn(300, 2048, device="cuda", dtype=torch.bfloat16)
    whole = stored.linear(x, "prefill", None, torch.bfloat16)
    for rows in (1, 7, 64, 65):
        assert torch.equal(stored.linear(x[:rows], regime(rows), None, torch.bfloat16), whole[:rows])


@on_gpu
@pytest.mark.parametrize("power", [20, -30])
def test_float16_rows_meet_weights_beyond_the_range_of_float16(power: int) -> None:
    weight = weight_on_gpu(GPU_SCHEMES["int4 g128"], 200, 512)
    weight = replace(weight, scales=(weight.scales[0] * 2.0**power,))
    x = (torch.randn(130, 512, device="cuda") * 2.0**-10).half()
    x[3] = 0.0  # times infinity would be NaN
    y = prepared(weight, torch.float16).linear(x, "prefill", None, torch.float32)
    demand_close(y, x, weight, None, 0.0, f"scales of 2^{power}")


@on_gpu
@pytest.mark.parametrize("m", [66, 200, 300])
def test_a_bias_costs_no_rounding_where_rows_are_not_aligned(m: int) -> None:
    weight = weight_on_gpu(GPU_SCHEMES["nvfp4"], 176, 2960)
    wide = torch.randn(m, 2963, device="cuda", dtype=torch.bfloat16)
    x, bias = wide[:, 1:2961], torch.randn(176, device="cuda", dtype=torch.bfloat16)
    demand_close(prepared(weight).linear(x, "prefill", bias, torch.bfloat16), x, weight, bias, 0.0, f"M = {m}")


@on_gpu
@pytest.mark.parametrize("m", [1, 300])
def test_products_are_captured_by_a_graph(m: int) -> None:
    weight = weight_on_gpu(GPU_SCHEMES["int4 g128"], 256, 4096)
    stored = prepared(weight)
    x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
    stored.linear(x, regime(m), None, torch.bfloat16)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = stored.linear(x, regime(m), None, torch.bfloat16)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, stored.linear(x, regime(m), None, torch.bfloat16))


@on_gpu
def test_products_compile_as_one_graph() -> None:
    stored = prepared(weight_on_gpu(GPU_SCHEMES["int4 g128"], 256, 512))
    x = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)

    def product(x: torch.Tensor) -> torch.Tensor:
        return stored.linear(x, "decode", None, torch.bfloat16)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), product(x))


QUANTIZED = {
    "nvfp4 static": (GPU_SCHEMES["nvfp4"], ActivationSpec("fp4_e2m1", False, "group", "nvfp4", 16)),
    "nvfp4 token": (GPU_SCHEMES["nvfp4"], ActivationSpec("fp4_e2m1", True, "group", "nvfp4_token", 16)),
    "mxfp4 pair": (GPU_SCHEMES["mxfp4"], ActivationSpec("fp4_e2m1", True, "group", "mx_even", 32)),
    "mxfp6 pair": (GPU_SCHEMES["mxfp6_e2m3"], ActivationSpec("fp6_e2m3", True, "group", "mx_even", 32)),
    "int4 a8 token": (GPU_SCHEMES["int4 g128"], ActivationSpec("int8", True, "token", "int8_token")),
    "int4 fp8 token": (GPU_SCHEMES["int4 g128"], ActivationSpec("fp8_e4m3fn", True, "token", "fp8_token")),
    "int4 fp8 group": (GPU_SCHEMES["int4 g128"], ActivationSpec("fp8_e4m3fn", True, "group", "fp8_group", 128)),
}


@on_gpu
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("plan", [SMALL, PLAN], ids=["fused", "expanded"])
def test_quantized_activations_are_carried_out_exactly(name: str, plan: dict) -> None:
    """Against float64 with the recipe's own float32 values; its factor of a row is one more rounding."""
    scheme, spec = QUANTIZED[name]
    weight = weight_on_gpu(replace(scheme, activation=spec), 200, 768)
    tensors = {"global_scale": torch.tensor([37.3], device="cuda")} if spec.recipe == "nvfp4" else {}
    weight = replace(weight, activation=tensors)
    stored = prepared(weight, torch.bfloat16, plan)
    rounds = name.startswith("int4") and plan is PLAN
    for m in (1, 17, 300):
        x = torch.randn(m, 768, device="cuda", dtype=torch.bfloat16)
        x[0] = 0
        values = quantize_dequantize(x.float(), spec, tensors)
        given = x if stored.quantizes_input else values
        y = stored.linear(given, regime(m), None, torch.float32)
        unit = 2.0**-8 if rounds and m == 300 else 0.0
        demand_close(y, values, replace(weight, scheme=scheme), None, unit + 4 * 2.0**-24, f"{name} M={m}")
