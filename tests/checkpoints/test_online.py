"""--quantization: which layers it takes, what they become, that it plans without torch."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anybit.checkpoints.online import ALIASES, ONLINE, applies_to, quantize, quantizer, why_not
from anybit.errors import Damaged, Unsupported
from anybit.numerics.activations import RECIPES, quantize_dequantize
from anybit.numerics.packing import PackedCodes
from anybit.schemes import Layer, LayerKind, dense
from anybit.weights import Dense, QuantizedWeight


def layer(name: str, shape: tuple[int, ...] = (256, 384), kind: LayerKind = "linear") -> Layer:
    return Layer(name, kind, shape, dense("bfloat16"), {"weight": f"{name}.weight"})


def weight(shape: tuple[int, ...] = (256, 384)) -> Dense:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return Dense(dense("float32"), tensor)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


# on Gaussian weights, see numerics/quantize.py; tensor, channel and block scales of fp8 cost the same
ERRORS = {
    "nvfp4": 0.10, "mxfp4": 0.12, "mxfp6_e2m3": 0.03, "mxfp6_e3m2": 0.055, "mxfp8": 0.028, "fp8_per_tensor": 0.028,
    "fp8_per_channel": 0.028, "fp8_per_block": 0.028, "int8_per_channel": 0.009, "int8_per_channel_asym": 0.009,
    "int4_g128": 0.105, "int4_g64": 0.1, "int4_g32": 0.091, "int4_g128_asym": 0.103, "int4_g64_asym": 0.093,
    "int4_g32_asym": 0.082, "int8_per_channel_weight_only": 0.009, "nvfp4_per_token": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", ONLINE)
def test_a_quantized_weight_is_close_to_the_dense_one(name: str) -> None:
    original = weight()
    result = quantize(original, name)
    assert result.scheme == ONLINE[name].scheme
    assert 0 < relative_error(result.dequantize(), original.tensor) < ERRORS[ALIASES.get(name, name)]


@pytest.mark.parametrize("name", ONLINE)
def test_zero_rows_stay_exactly_zero(name: str) -> None:
    original = weight()
    original.tensor[5] = 0
    original.tensor[7:] = 0
    assert not bool(quantize(original, name).dequantize()[original.tensor == 0].any())
    nothing = Dense(dense("float32"), torch.zeros(128, 128))
    assert not bool(quantize(nothing, name).dequantize().any())


@pytest.mark.parametrize("name", ONLINE)
def test_stacked_experts_equal_their_parts(name: str) -> None:
    stack = weight((3, 256, 384))
    whole = quantize(stack, name)
    for index in range(3):
        alone = quantize(stack.expert(index), name)
        assert torch.equal(whole.expert(index).dequantize(), alone.dequantize())
    assert torch.equal(whole.narrow(0, 1, 2).dequantize(), whole.dequantize()[1:])


@pytest.mark.parametrize("name", ONLINE)
def test_cuts_for_tensor_parallelism_are_exact(name: str) -> None:
    result = quantize(weight(), name)
    reference = result.dequantize()
    assert torch.equal(result.narrow(0, 128, 128).dequantize(), reference[128:])
    assert torch.equal(result.narrow(1, 128, 256).dequantize(), reference[:, 128:])


@pytest.mark.parametrize("name", ONLINE)
def test_its_activations_are_a_recipe_that_works_by_row(name: str) -> None:
    spec = ONLINE[name].scheme.activation
    if spec is None:
        assert "int4" in name or "weight_only" in ALIASES.get(name, name)
        return
    assert spec.dynamic
    assert RECIPES[spec.recipe].by_row
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(1))
    assert relative_error(quantize_dequantize(x, spec), x) < 0.13


@pytest.mark.parametrize(("name", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25), ("mxfp6_e3m2", 6.25), ("int4_g128", 4.125),
                                            ("int4_g32_asym", 4.75), ("fp8_per_block", 8.002)])  # fmt: skip
def test_narrow_codes_are_kept_packed(name: str, bits: float) -> None:
    result = quantize(weight(), name)
    assert isinstance(result.stored_codes, PackedCodes) == (bits < 8)
    assert result.nbytes * 8 / (256 * 384) == pytest.approx(bits, abs=1e-3)


def test_the_bias_is_kept() -> None:
    bias = torch.randn(256)
    assert quantize(Dense(dense("float32"), weight().tensor, bias), "mxfp4").bias is bias


@pytest.mark.parametrize(("candidate", "reason"), [
    (layer("model.embed_tokens", kind="embedding"), "an embedding"),
    (layer("lm_head"), "the output head"),
    (layer("model.layers.0.mlp.gate"), "a router"),
    (layer("model.layers.0.block_sparse_moe.router.layer"), "a router"),
    (layer("model.layers.0.mlp.shared_expert_gate", (1, 384)), "a router"),
    (layer("model.layers.0.mlp.down_proj", (256, 200)), "K 200 is no multiple of the group size 32"),
])  # fmt: skip
def test_what_stays_as_it_is_says_why(candidate: Layer, reason: str) -> None:
    assert why_not(candidate, "mxfp4") == reason
    assert quantizer("mxfp4").scheme_of(candidate) is None
    original = weight(candidate.shape)
    assert quantizer("mxfp4")(candidate, original) is original


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj",
                                  "model.layers.0.mlp.experts.3.up_proj"])  # fmt: skip
def test_projections_are_quantized(name: str) -> None:
    assert applies_to(layer(name), "mxfp4")
    assert quantizer("mxfp4").scheme_of(layer(name)) == ONLINE["mxfp4"].scheme
    assert isinstance(quantizer("mxfp4")(layer(name), weight()), QuantizedWeight)


def test_what_is_quantized_already_is_quantized_again_from_its_reference_weight() -> None:
    stored = Layer("model.layers.0.mlp.up_proj", "linear", (256, 384), ONLINE["mxfp4"].scheme)
    assert why_not(stored, "nvfp4") is None
    first = quantize(weight(), "mxfp4")
    again = quantizer("int8_per_channel")(stored, first)
    wanted = quantize(Dense(dense("float32"), first.dequantize()), "int8_per_channel")
    assert torch.equal(again.dequantize(), wanted.dequantize())


def test_an_input_scale_goes_into_the_new_weight() -> None:
    awq = replace(quantize(weight(), "mxfp8_a16"), pre_scale=torch.rand(384, generator=torch.Generator().manual_seed(2)))
    stored = Layer("model.layers.0.mlp.up_proj", "linear", (256, 384), replace(awq.scheme, pre_scale=True))
    again = quantizer("int8_per_channel")(stored, awq)
    assert isinstance(again, QuantizedWeight) and again.pre_scale is None and awq.pre_scale is not None
    assert relative_error(again.dequantize(), awq.dequantize() * awq.pre_scale) < 0.01


def test_the_last_integer_group_of_a_row_may_be_short() -> None:
    narrow = Dense(dense("float32"), torch.randn(8, 200))
    made = quantize(narrow, "int4_g128")
    assert made.scales[0].shape == (8, 2)
    whole = quantize(Dense(dense("float32"), narrow.tensor[:, :128].contiguous()), "int4_g128")
    assert torch.equal(made.dequantize()[:, :128], whole.dequantize())
    assert (made.dequantize() - narrow.tensor).norm() < 0.2 * narrow.tensor.norm()


def test_channel_and_block_schemes_take_any_width() -> None:
    odd = layer("model.layers.0.mlp.up_proj", (100, 200))
    for name in ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8_per_channel"):
        assert applies_to(odd, name)
        assert relative_error(quantize(weight(odd.shape), name).dequantize(), weight(odd.shape).tensor) < 0.03


def test_names_of_vllm_mean_what_they_mean_there() -> None:
    assert ONLINE["online"] == ONLINE["fp8_per_tensor"]
    assert str(ONLINE["fp8_per_block"].scheme) == "fp8_e4m3fn·128x128·fp32 | a: fp8_e4m3fn dynamic g128"


@pytest.mark.parametrize(("name", "meant"), [
    ("online", "fp8_per_tensor"), ("fp8", "fp8_per_tensor"), ("ptpc_fp8", "fp8_per_channel"),
    ("experts_int8", "int8_per_channel_weight_only"), ("int8_asym", "int8_per_channel_asym"), ("mxfp6", "mxfp6_e2m3"),
])  # fmt: skip
def test_another_name_is_the_same_scheme(name: str, meant: str) -> None:
    assert ONLINE[name] is ONLINE[meant]


def test_a16_leaves_activations_alone() -> None:
    plain, weight_only = quantize(weight(), "nvfp4"), quantize(weight(), "nvfp4_a16")
    assert str(weight_only.scheme) == "nvfp4·g16·fp8_e4m3fn·fp32-global"
    assert torch.equal(plain.dequantize(), weight_only.dequantize())
    with pytest.raises(Unsupported):
        quantizer("int4_g128_a16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "fp8_per_block", "int8_per_channel_asym", "int4_g32_asym"])
def test_every_float_dtype_is_quantized_from_its_exact_values(name: str, dtype: torch.dtype) -> None:
    stored = (weight().tensor * 8).to(dtype)
    result = quantize(Dense(dense("float32"), stored), name)
    wanted = quantize(Dense(dense("float32"), stored.float()), name)
    assert torch.equal(result.dequantize(), wanted.dequantize())


def test_a_stack_of_experts_with_one_broken_expert_is_refused_by_name() -> None:
    stack = weight((3, 64, 128))
    stack.tensor[2, 5, 6] = math.inf
    named = layer("model.layers.0.mlp.experts.down_proj", (3, 64, 128), "experts")
    with pytest.raises(Damaged) as caught:
        quantizer("mxfp4")(named, stack)
    assert (caught.value.where, caught.value.found) == (named.name, "1 of 24576 elements")


MEASURE = """
import sys, torch
from anybit.checkpoints.online import quantize
from anybit.hosts.meter import Meter
from anybit.schemes import dense
from anybit.weights import Dense
torch.set_num_threads(1)
quantize(Dense(dense("bfloat16"), torch.randn(2, 128, 512).bfloat16()), sys.argv[1])  # what is loaded once
stack = torch.randn(48, 1024, 2048).bfloat16()
with Meter() as meter:
    made = quantize(Dense(dense("bfloat16"), stack), sys.argv[1])
print(meter.peak_bytes - made.nbytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nvfp4", "int4_g32_asym", "fp8_per_channel"])
def test_quantizing_a_stack_of_experts_holds_the_result_and_one_slab(name: str) -> None:
    """The stack has 2**26.6 weights; its codes alone, unpacked, would be 96 MiB, in float32 384."""
    done = subprocess.run([sys.executable, "-c", MEASURE, name], capture_output=True, text=True, check=True)
    slab = 2**21 * 4  # one expert in float32
    assert int(done.stdout) < 10 * slab


def test_an_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(Unsupported, match="no such quantization") as caught:
        quantizer("int3")
    assert "mxfp4" in caught.value.wanted


def test_damage_carries_the_layers_name() -> None:
    broken = weight()
    broken.tensor[0, 0] = math.nan
    with pytest.raises(Damaged) as caught:
        quantizer("nvfp4")(layer("model.layers.0.mlp.up_proj"), broken)
    assert caught.value.where == "model.layers.0.mlp.up_proj"


def test_schemes_are_told_without_torch() -> None:
    code = "import sys, anybit.checkpoints.online as o; o.quantizer('nvfp4'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
