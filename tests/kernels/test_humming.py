"""humming, the package: planned where it is installed and fits, given weights in its order, asked in its words.

On a CPU a stand-in plays the package; its order of bits is another one, so nothing of humming's order can be assumed.
With a GPU and the package, results are held to the float64 product (kernels/trials.py).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import humming_stand_in as package
import pytest
import torch

from anybit.errors import DeviceProblem, Unsupported
from anybit.kernels.catalogue import implementation
from anybit.kernels.linear import humming, humming_library
from anybit.kernels.linear.humming import SPEC, input_factor, settings_of
from anybit.kernels.linear.humming_run import StoredHumming
from anybit.kernels.product import product_of
from anybit.kernels.request import REGIMES, Request, regime_of
from anybit.kernels.trials import compare, probes, sample_weight
from anybit.numerics.formats import number_format
from anybit.planning.choose import Choice, choose
from anybit.platforms import Platform, detection, named
from anybit.schemes import CHANNEL, TENSOR, ActivationSpec, Offset, ScaleLevel, Scheme, group
from anybit.weights import QuantizedWeight

BF16, F16, F32, E4M3 = "bfloat16", "float16", "float32", "fp8_e4m3fn"


def grouped(element: str, size: int = 128, format: str = BF16) -> Scheme:
    return Scheme(element, (ScaleLevel(format, group(size)),))


def with_zeros(element: str, size: int = 128, format: str = BF16) -> Scheme:
    return replace(grouped(element, size, format), offset=Offset("zero_point", f"u{element.lstrip('u')}", group(size)))


def nvfp4(activation: ActivationSpec | None = None, *, divide: bool = False) -> Scheme:
    return Scheme("fp4_e2m1", (ScaleLevel(E4M3, group(16)), ScaleLevel(F32, TENSOR, divide=divide)),
                  activation=activation)


def fp4_groups(recipe: str, size: int = 16) -> ActivationSpec:
    return ActivationSpec("fp4_e2m1", True, "group", recipe, size)


SCHEMES = {
    **{f"int{bits} g128": grouped(f"int{bits}") for bits in (2, 3, 4, 5, 6, 8)},
    "int4 g16": grouped("int4", 16),
    "int4 g32": grouped("int4", 32),
    "uint4 zp g128": with_zeros("uint4"),
    "uint4 zp g32": with_zeros("uint4", 32),
    "uint3 zp g64": with_zeros("uint3", 64),
    "int8 channel": Scheme("int8", (ScaleLevel(F32, CHANNEL),)),
    "fp8 channel": Scheme(E4M3, (ScaleLevel(F32, CHANNEL),)),
    "fp8 e5m2 channel": Scheme("fp8_e5m2", (ScaleLevel(BF16, CHANNEL),)),
    "fp8 tensor": Scheme(E4M3, (ScaleLevel(F32, TENSOR),)),
    "fp8 block": Scheme(E4M3, (ScaleLevel(F32, (128, 128)),)),
    "mxfp4": grouped("fp4_e2m1", 32, "e8m0"),
    "mxfp6": grouped("fp6_e3m2", 32, "e8m0"),
    "mxfp6 e2m3": grouped("fp6_e2m3", 32, "e8m0"),
    "mxfp8": grouped(E4M3, 32, "e8m0"),
    "nvfp4": nvfp4(),
    "nvfp4 divided": nvfp4(divide=True),
}
ACTIVE = {
    "nvfp4 w4a4": nvfp4(fp4_groups("nvfp4")),
    "nvfp4 w4a4 by token": nvfp4(fp4_groups("nvfp4_token")),
    "mxfp4 w4a4": replace(SCHEMES["mxfp4"], activation=fp4_groups("mx_even", 32)),
}


CODED = {  # activations are multiplied as codes
    f"int4 g{size} fp8": replace(grouped("int4", size), activation=ActivationSpec(E4M3, True, "token", "fp8_token"))
    for size in (32, 64, 128)
}


def h200(*providers: str) -> Platform:
    return replace(named("h200"), providers=frozenset({"torch", "triton", *providers}))


def request(scheme: Scheme, shape: tuple[int, int] = (28672, 4096), dtype: str = BF16, tokens: int = 1) -> Request:
    return Request("linear", scheme, shape, dtype, regime_of(tokens))


def codes_against(scheme: Scheme, platform: Platform | None = None, **facts: object) -> set[str]:
    asked = replace(request(scheme), **facts)  # type: ignore[arg-type]
    return {reason.code for reason in humming.can_implement(asked, platform or h200("humming")).reasons}


# --- what is planned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), *ACTIVE.values(), *CODED.values()], ids=str)
def test_schemes_in_its_words_are_taken(scheme: Scheme) -> None:
    assert not codes_against(scheme)


def test_it_is_planned_where_it_is_installed_and_not_where_it_is_not() -> None:
    found = [choose(request(nvfp4()), h200(*names)) for names in (("humming",), ())]
    assert [choice.layout for choice in found if isinstance(choice, Choice)] == ["humming", "triton-planes"]


def test_without_the_package_the_plan_names_it() -> None:
    choice = choose(request(nvfp4()), h200())
    assert isinstance(choice, Choice)
    assert {better.kernel for better in choice.better} >= {"humming"}


@pytest.mark.parametrize(("platform", "codes"), [
    ("mi300x", {"vendor"}), ("cpu", {"vendor"}), ("h100", {"provider"}),
])
def test_other_chips_are_refused_with_every_reason(platform: str, codes: set[str]) -> None:
    assert codes_against(nvfp4(), replace(named(platform), providers=frozenset({"torch"}))) == codes


@pytest.mark.parametrize(("scheme", "words"), [
    (Scheme("nf4", (ScaleLevel(F32, group(64)),)), "nf4"),
    (Scheme("uint4", (ScaleLevel(BF16, group(128)),)), "without zero points"),
    (replace(grouped("int4"), act_order=True), "act-order"),
    (replace(grouped("int4"), pre_scale=True), "scaled first"),
    (replace(grouped("int4"), round_to=BF16), "rounded to bfloat16"),
    (Scheme("int4"), "without a scale"),
    (grouped("int4", 48), "by (1, 48) has not been tried"),
    (grouped("int4", 128, E4M3), "scales of fp8_e4m3fn by (1, 128) has not been tried"),
    (replace(grouped("int4"), offset=Offset("zero_point", BF16, group(128))), "integer zero point"),
    (with_zeros("uint8"), "no codes of uint8"),
    (with_zeros("int4"), "of unsigned codes"),
    (Scheme("uint4", (ScaleLevel(BF16, CHANNEL),), offset=Offset("zero_point", "uint4", CHANNEL)), "by (1, 0) has not been tried"),
    (Scheme("int4", (ScaleLevel(BF16, group(128), divide=True),)), "divide"),
    (Scheme("int4", (ScaleLevel(BF16, group(128)), ScaleLevel(F32, CHANNEL))), "second level"),
    (replace(with_zeros("uint4"), offset=Offset("zero_point", "uint4", group(32))), "beside scales by (1, 128)"),
    (Scheme(E4M3, (ScaleLevel(F32, (64, 128)),)), "by (64, 128) has not been tried"),
    (Scheme(E4M3, (ScaleLevel(BF16, (128, 128)),)), "keeps these in float32"),
    (grouped(E4M3), "by (1, 128) has not been tried"),
    (replace(SCHEMES["mxfp4"], activation=fp4_groups("nvfp4")), "weights without one"),
    (replace(SCHEMES["fp8 channel"], activation=ActivationSpec(E4M3, True, "token", "fp8_token")), "kernels of 8 bits"),
    (replace(with_zeros("uint4"), activation=ActivationSpec(E4M3, True, "token", "fp8_token")), "kernels of 8 bits"),
])
def test_what_it_has_no_words_for_is_refused_with_the_reason(scheme: Scheme, words: str) -> None:
    reasons = settings_of(scheme)
    assert isinstance(reasons, tuple) and any(words in reason for reason in reasons), reasons
    assert codes_against(scheme) == {"scheme"}


def test_shapes_and_dtypes_that_its_tiles_do_not_hold_are_refused() -> None:
    assert codes_against(nvfp4(), shape=(28672 + 64, 4096)) == {"shape"}
    assert codes_against(nvfp4(), shape=(28672, 4096 + 64)) == {"shape"}
    assert codes_against(grouped("int4", 256), shape=(28672, 4096 + 128)) == {"shape"}
    assert codes_against(nvfp4(), dtype=F32) == {"dtype"}
    assert codes_against(ACTIVE["nvfp4 w4a4"], dtype=F16) == {"dtype"}
    assert codes_against(SCHEMES["int8 channel"], dtype=F16) == {"dtype"}
    assert codes_against(grouped("int4", 32), dtype=F16) == {"dtype"}
    assert not codes_against(nvfp4(), dtype=F16)
    assert codes_against(nvfp4(), kind="embedding") == codes_against(nvfp4(), kind="experts", shape=(8, 1024, 512)) == {
        "kind"}


@pytest.mark.parametrize(("scheme", "dtype", "words"), [
    (nvfp4(), BF16, "partial sums and their sums to bfloat16"),
    (SCHEMES["mxfp4"], F16, "partial sums and their sums to float16"),
    (SCHEMES["fp8 tensor"], BF16, "partial sums and their sums to bfloat16"),
    (grouped("int4"), BF16, "weights, partial sums and their sums to bfloat16"),
    (grouped("int4", format=F16), BF16, "scales, weights, partial sums and their sums to bfloat16"),
    (SCHEMES["fp8 channel"], BF16, "row scales, partial sums, their products and sums of these to bfloat16"),
    (CODED["int4 g128 fp8"], BF16,
     "sums of a group in the matrix unit's own adder (about 13 bits), partial sums and their sums to bfloat16"),
    (ACTIVE["nvfp4 w4a4"], BF16, "partial sums and their sums to bfloat16"),
    (ACTIVE["nvfp4 w4a4 by token"], BF16, "partial sums, their sums and sums before the factor of a row to bfloat16"),
])
def test_it_says_what_it_rounds(scheme: Scheme, dtype: str, words: str) -> None:
    assert humming.rounds(request(scheme, dtype=dtype), h200("humming")) == words


def test_architectures_that_were_not_tried_are_refused() -> None:
    for name in ("a100", "b200", "rtx4090"):
        platform = replace(named(name), providers=frozenset({"torch", "triton", "humming"}))
        assert codes_against(grouped("int4"), platform) == {"arch"}


@pytest.mark.parametrize("scheme", CODED.values(), ids=CODED.keys())
def test_codes_beside_codes_are_stored_as_the_weight_and_given_with_their_scales(
    seen: package.Seen, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(scheme)
    stored = prepared(weight)
    assert torch.equal(stored.dequantize(), weight.dequantize())
    assert all(asked["a"].dtype == torch.float8_e4m3fn and asked["as_"].shape == (1, 1) for asked in seen.launches)
    seen.launches.clear()
    codes, scale = torch.randint(0, 120, (3, 512), dtype=torch.uint8), torch.rand(3)
    monkeypatch.setattr(stored, "_quantizer", lambda x: SimpleNamespace(codes=codes, scale=scale))
    stored.linear(torch.randn(3, 512).bfloat16(), "decode", None, torch.bfloat16)
    (asked,) = seen.launches
    assert torch.equal(asked["a"].view(torch.uint8), codes) and torch.equal(asked["as_"], scale[:, None])


def test_only_what_varies_by_row_is_left_to_an_epilogue() -> None:
    assert [input_factor(s.activation) for s in ACTIVE.values()] == ["matrix", "rows", ""]
    assert input_factor(None) == ""


def test_another_version_of_the_package_or_another_package_of_its_name_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[]))
    for version, known in (("0.1.19", True), ("0.1.20rc1", True), ("0.1.9", False), ("0.2.0", False), (None, False)):
        monkeypatch.setattr(importlib.metadata, "version", version_of(version))
        assert ("humming" in detection._providers()) is known


def version_of(version: str | None):  # type: ignore[no-untyped-def]
    def found(distribution: str) -> str:
        assert distribution == "humming-kernels"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return version

    return found


# --- what the package is given ----------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[package.Seen]:
    asked = package.Seen()
    for name, module in package.modules(asked).items():
        monkeypatch.setitem(sys.modules, name, module)
    operator = package.operator(asked)
    humming_library._loaded.cache_clear()
    yield asked
    humming_library._loaded.cache_clear()
    operator._destroy()


def prepared(weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16) -> StoredHumming:
    stored = implementation(SPEC).prepare(weight, dtype, dict.fromkeys(REGIMES, "humming"))
    assert isinstance(stored, StoredHumming)
    return stored


def weight_of(scheme: Scheme, shape: tuple[int, int] = (256, 512)) -> QuantizedWeight:
    weight = sample_weight(scheme, shape, seed=5)
    assert isinstance(weight, QuantizedWeight)
    return weight


def reference(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight with 16 bit scales as the layout keeps them."""
    level = weight.scheme.scales[0]
    if number_format(level.format).bits == 8 or (level.block != CHANNEL and level.block[0] != 1):
        return weight.dequantize()
    return replace(weight, scales=(weight.scales[0].to(dtype).to(weight.scales[0].dtype), *weight.scales[1:])).dequantize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_what_is_stored_is_the_weight(seen: package.Seen, scheme: Scheme, dtype: torch.dtype) -> None:
    weight = weight_of(scheme)
    found, wanted = prepared(weight, dtype).dequantize(), reference(weight, dtype)
    # a divided factor is kept as its reciprocal: two roundings of float32
    assert torch.allclose(found, wanted, rtol=2**-22, atol=0)
    if not any(level.divide for level in scheme.scales):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("scheme", [*SCHEMES.values()], ids=str)
def test_stored_bytes_are_those_of_the_plan(seen: package.Seen, scheme: Scheme) -> None:
    stored = prepared(weight_of(scheme))
    assert sum(t.nbytes for t in stored.tensors().values()) == humming.stored_bytes(request(scheme, (256, 512)))


def test_a_launch_names_every_part_in_its_place(seen: package.Seen) -> None:
    weight = weight_of(with_zeros("uint4"))
    stored = prepared(weight)
    seen.launches.clear()
    seen.answer = weight.dequantize()
    x = torch.randn(3, 512).bfloat16()
    y = stored.linear(x, "decode", None, torch.bfloat16)
    assert torch.equal(y, (x.double() @ seen.answer.double().T).bfloat16())
    (asked,) = seen.launches
    held = stored._tensors
    for name, part in {"a": x, "b": held["weight"], "bs": held["weight_scale"], "bzp": held["zero_point"],
                       "locks": held["locks"]}.items():
        assert torch.equal(asked[name], part), name
    assert asked["bs2"] is None and asked["as_"] is None and asked["bias"] is None
    assert asked["top_k"] == 1 and asked["valid_shape_m"] == 0


def test_every_kernel_is_loaded_before_the_first_call(seen: package.Seen) -> None:
    prepared(weight_of(nvfp4()))
    assert [asked["valid_shape_m"] for asked in seen.launches] == list(humming_library.RUNGS)
    assert all(len(asked["a"]) == 1 for asked in seen.launches)


def test_kernels_cover_every_m_once(seen: package.Seen) -> None:
    prepared(weight_of(nvfp4()))
    edges = [(low, high) for low, high, _ in seen.steps]
    assert edges[0][0] == 0 and edges[-1][1] == 2**30
    assert all(before[1] == after[0] for before, after in pairwise(edges))
    assert seen.tuned == [min(high, 4096) for _, high in edges]


def test_a_bias_is_added_and_no_rows_ask_nothing(seen: package.Seen) -> None:
    weight = weight_of(nvfp4())
    stored = prepared(weight)
    seen.answer = weight.dequantize()
    x, bias = torch.randn(3, 512).bfloat16(), torch.randn(256)
    wanted = (x.double() @ seen.answer.double().T).bfloat16()
    assert torch.equal(stored.linear(x, "decode", bias, torch.bfloat16), (wanted.float() + bias).bfloat16())
    assert torch.equal(stored.linear(x, "decode", bias, torch.float32), wanted.float() + bias)
    seen.launches.clear()
    assert stored.linear(x[:0], "decode", bias, torch.bfloat16).shape == (0, 256)
    assert not seen.launches


def test_moved_buffers_are_taken_as_they_are(seen: package.Seen) -> None:
    weight = weight_of(nvfp4())
    stored = prepared(weight)
    stored.bind({name: t.clone() for name, t in stored.tensors().items()})
    assert torch.equal(stored.dequantize(), weight.dequantize())
    assert all(not t.is_floating_point() for t in stored.tensors().values())


@pytest.mark.parametrize(("scheme", "change", "words"), [
    (SCHEMES["mxfp4"], lambda w: replace(w, scales=(torch.full_like(w.scales[0], 255),)), "powers of two"),
    (nvfp4(), lambda w: replace(w, scales=(torch.full_like(w.scales[0], 0x7F), w.scales[1])), "not finite"),
    (SCHEMES["fp8 channel"], lambda w: replace(w, stored_codes=torch.full_like(w.codes, 0x7F)), "NaN"),
    (with_zeros("uint4"), lambda w: replace(w, offset=torch.full_like(w.offset, 16)), "zero points outside"),
    (grouped("int4", format=F32), lambda w: replace(w, scales=(w.scales[0] * 1e38 * 1e5,)), "leave"),
    (grouped("int4", format=F32), lambda w: replace(w, scales=(w.scales[0] * 1e-38,)), "normal range"),
    (SCHEMES["fp8 block"], lambda w: replace(w, scales=(w.scales[0] * 1e-38,)), "normal range"),
])  # fmt: skip
def test_values_that_its_arithmetic_does_not_hold_are_refused_when_they_are_read(
    seen: package.Seen, scheme: Scheme, change, words: str  # type: ignore[no-untyped-def]
) -> None:
    with pytest.raises(Unsupported, match="does not hold") as refused:
        prepared(change(weight_of(scheme)))
    assert words in refused.value.found


def test_a_package_that_does_not_load_is_a_refusal_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "humming.ops", None)
    humming_library._loaded.cache_clear()
    with pytest.raises(DeviceProblem, match="does not load") as refused:
        prepared(weight_of(nvfp4()))
    assert "pip" in refused.value.remedy


def test_a_compiler_that_fails_is_a_refusal_with_a_way_out(seen: package.Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("NVRTCCompiler failed with exit code 1")

    monkeypatch.setattr(sys.modules["humming.kernel.humming"].HummingKernel, "prepare_kernels", fail)
    with pytest.raises(DeviceProblem, match="do not build") as refused:
        prepared(weight_of(nvfp4()))
    assert "NVRTCCompiler" in refused.value.found and "triton-fused" in refused.value.remedy


def test_loading_it_starts_nothing_in_the_background(seen: package.Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.delenv("HUMMING_DISABLE_PARALLEL_BUILD", raising=False)
    monkeypatch.setattr(humming_library, "import_module", lambda name: (asked.append(
        os.environ.get("HUMMING_DISABLE_PARALLEL_BUILD")), sys.modules[name])[1])
    humming_library.library()
    assert set(asked) == {"1"} and "HUMMING_DISABLE_PARALLEL_BUILD" not in os.environ


# --- on a GPU, with the package ---------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
needs_both = pytest.mark.skipif(
    not torch.cuda.is_available() or "humming" not in detection._providers(), reason="no GPU, or no humming-kernels")


def on_gpu(scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> tuple[QuantizedWeight, StoredHumming]:
    weight = weight_of(scheme, GPU_SHAPE).to("cuda")
    return weight, prepared(weight, dtype)


def faults_of(weight: QuantizedWeight, stored: StoredHumming, dtype: torch.dtype) -> dict[str, str]:
    name = str(dtype).removeprefix("torch.")
    rounds = humming.rounds(request(weight.scheme, dtype=name), h200("humming"))
    tried = {label: compare(weight, product_of(weight, stored), x, rounds).fault
             for label, x in probes(weight.shape[1], dtype, "cuda")}
    return {label: fault for label, fault in tried.items() if fault}


GPU_SHAPE = (256, 1024)  # every scheme is compiled for it, eight kernels each
HALVES = ("int4 g128", "uint4 zp g128", "nvfp4", "mxfp4", "fp8 block")


@gpu
@needs_both
@pytest.mark.parametrize("scheme", [*SCHEMES.values(), *ACTIVE.values(), *CODED.values()], ids=str)
def test_results_are_within_the_bound_for_every_range_of_m(scheme: Scheme) -> None:
    weight, stored = on_gpu(scheme)
    assert torch.allclose(stored.dequantize(), reference(weight, torch.bfloat16), rtol=2**-22, atol=0)
    assert not faults_of(weight, stored, torch.bfloat16)


@gpu
@needs_both
@pytest.mark.parametrize("name", HALVES)
def test_float16_activations_too(name: str) -> None:
    weight, stored = on_gpu(SCHEMES[name], torch.float16)
    assert torch.allclose(stored.dequantize(), reference(weight, torch.float16), rtol=2**-22, atol=0)
    assert not faults_of(weight, stored, torch.float16)


@gpu
@needs_both
@pytest.mark.parametrize(("name", "low", "high"), [("nvfp4", 0, 0x7F), ("mxfp4", 127 - 100, 127 + 101)])
def test_every_scale_that_is_not_refused_is_exact(name: str, low: int, high: int) -> None:
    weight = weight_of(SCHEMES[name], GPU_SHAPE).to("cuda")
    made = torch.Generator().manual_seed(3)
    scale = torch.randint(low, high, weight.scales[0].shape, generator=made, dtype=torch.int16).to(torch.uint8)
    changed = replace(weight, scales=(scale.cuda(), *weight.scales[1:]))
    # one group at a time, so that no large one hides what a small one is rounded to
    stored, exact, size = prepared(changed), changed.dequantize(), weight.scheme.scales[0].block[1]
    x = torch.zeros(GPU_SHAPE[1] // size, GPU_SHAPE[1], device="cuda", dtype=torch.bfloat16)
    for row in range(len(x)):
        x[row, row * size] = 1.0
    y = stored.linear(x, "prefill", None, torch.bfloat16)
    assert torch.equal(y, exact[:, ::size].T.to(torch.bfloat16))


@gpu
@needs_both
def test_blocks_of_zeros_stay_zero() -> None:
    weight = weight_of(nvfp4(), GPU_SHAPE).to("cuda")
    scale = weight.scales[0].clone()
    scale[:128] = 0
    stored = prepared(replace(weight, scales=(scale, weight.scales[1])))
    y = stored.linear(torch.randn(33, GPU_SHAPE[1], device="cuda").bfloat16(), "small", None, torch.bfloat16)
    assert not y[:, :128].any() and y[:, 128:].any()


@gpu
@needs_both
@pytest.mark.parametrize("m", [1, 9, 40, 300])
def test_a_captured_call_takes_new_inputs(m: int) -> None:
    _, stored = on_gpu(ACTIVE["nvfp4 w4a4"])
    x = torch.randn(m, GPU_SHAPE[1], device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = stored.linear(x, regime_of(m), None, torch.bfloat16)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        wanted = stored.linear(x, regime_of(m), None, torch.bfloat16)
        # parts of a sum meet in an order that may differ from call to call, and each is rounded
        assert (y.float() - wanted.float()).norm() <= 4 * 2**-8 * wanted.float().norm()
    assert not stored._tensors["locks"].any()


@gpu
@needs_both
def test_compilers_see_one_operator() -> None:
    _, stored = on_gpu(ACTIVE["nvfp4 w4a4"])

    def double(x: torch.Tensor) -> torch.Tensor:
        return stored.linear(x * 2, "small", None, torch.bfloat16) + 1

    x = torch.randn(9, 1024, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), double(x))


@gpu
@needs_both
def test_strided_and_misaligned_inputs_are_taken_and_nan_stays_in_its_row() -> None:
    _, stored = on_gpu(nvfp4())
    wide = torch.randn(5, 2048, device="cuda", dtype=torch.bfloat16)
    flat = torch.randn(5 * 1024 + 3, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, ::2], flat[3:].view(5, 1024)):
        assert torch.equal(stored.linear(x, "decode", None, x.dtype), stored.linear(x.clone(), "decode", None, x.dtype))
    x = wide[:, :1024].clone()
    whole = stored.linear(x, "decode", None, x.dtype)
    x[2, 7] = float("nan")
    y = stored.linear(x, "decode", None, x.dtype)
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])
