"""ModelOpt: every public folder bit for bit, the traps and the refusals of docs/formats/modelopt.md."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_checks import assert_reads_bit_for_bit
from safetensors import safe_open
from small_checkpoints import contents_of, fp8_bytes, stored, tensors_of, write

from anybit.checkpoints.dialects import compressed_tensors
from anybit.checkpoints.dialects import modelopt as dialect
from anybit.errors import AnybitError, Damaged, Inconsistent, Unsupported
from anybit.numerics.activations import quantize_dequantize
from anybit.weights import QuantizedWeight
from conftest import CHECKPOINTS, EXPECTED, genuine, needs_shared

FOLDERS = genuine("modelopt-*")
M = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
ONE = 0x38  # 1.0 in e4m3


def config(algorithm: str | None, **other: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"],
            "producer": {"name": "modelopt", "version": "0.47.0"}, **other}


def side(algorithm: str | None, **other: Any) -> dict[str, Any]:
    return {"producer": {"name": "modelopt", "version": "0.47.0"},
            "quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": None, **other}}


def module(name: str = M, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.{role}": tensor for role, tensor in tensors.items()}


def stack(codes: torch.Tensor, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {EXPERTS: codes, **{f"{EXPERTS}_{role}": tensor for role, tensor in tensors.items()}}


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


def bytes_of(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def read(
    folder: Path, quantization: dict[str, Any] | None, tensors: dict[str, torch.Tensor], name: str = M,
    hf: dict[str, Any] | None = None,
) -> QuantizedWeight:
    contents = write(folder, quantization, tensors, hf)
    assert dialect.recognizes(contents)
    layer = dialect.declare(contents)[name]
    weight = dialect.canonicalize(layer, tensors_of(contents, layer))
    assert isinstance(weight, QuantizedWeight)
    assert weight.scheme == layer.scheme
    return weight


# --- the genuine folders ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    assert not compressed_tensors.recognizes(contents_of(CHECKPOINTS / folder))
    assert_reads_bit_for_bit(dialect, folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_layer_computes_what_the_genuine_runtime_computes(folder: str) -> None:
    contents = contents_of(CHECKPOINTS / folder)
    layers = dialect.declare(contents)
    with safe_open(EXPECTED / f"{folder}.safetensors", "pt") as recorded:
        names = {key.split("/")[1] for key in recorded.keys() if key.startswith("layer/")}  # noqa: SIM118
        for name in names:
            x, y = (recorded.get_tensor(f"layer/{name}/{part}") for part in "xy")
            weight = dialect.canonicalize(layers[name], tensors_of(contents, layers[name]))
            assert isinstance(weight, QuantizedWeight)
            x = x.float() if weight.pre_scale is None else x.float() * weight.pre_scale.float()
            if weight.scheme.activation is not None:
                x = quantize_dequantize(x, weight.scheme.activation, weight.activation)
            got = x.double() @ weight.dequantize().double().T
            got = got if weight.bias is None else got + weight.bias.double()
            # float64 on both sides: what differs is the order of a float64 sum
            assert (got - y).norm() / y.norm() < 1e-5, name


@needs_shared
def test_every_public_folder_is_read() -> None:
    assert len(FOLDERS) == 16


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kept", ["config.json", "hf_quant_config.json", "nested"])
def test_one_of_the_two_config_files_is_enough(folder: str, kept: str, tmp_path: Path) -> None:
    genuine_contents = contents_of(CHECKPOINTS / folder)
    shutil.copytree(CHECKPOINTS / folder, tmp_path / folder)
    both = dialect.declare(genuine_contents)
    configs = dict(genuine_contents.config)
    if kept != "config.json":
        del configs["quantization_config"]
    if kept == "nested":
        configs["quantization_config"] = {"quant_method": "modelopt", **genuine_contents.side["hf_quant_config.json"]}
    files = genuine_contents.side if kept == "hf_quant_config.json" else {}
    alone = type(genuine_contents)(tmp_path, configs, genuine_contents.tensors, files)
    assert dialect.recognizes(alone)
    assert dialect.declare(alone) == both


# --- the traps, by their numbers in the document -----------------------------------------------------------------------

NVFP4_CODES = bytes_of([0x1F, 0x94, 0x39, 0xFE, 0, 0, 0, 0])
NVFP4 = module(weight=NVFP4_CODES, weight_scale=fp8_bytes(0x65), weight_scale_2=number(0.00047665549209341407),
               input_scale=number(0.5))


def test_trap_1_the_second_scale_multiplies(tmp_path: Path) -> None:
    weight = read(tmp_path, config("NVFP4"), dict(NVFP4))
    wanted = [-0.14871654, 0.01239304, 0.04957217, -0.01239304, -0.01239304, 0.03717913, -0.09914436, -0.14871654]
    assert weight.dequantize()[0, :8].tolist() == pytest.approx(wanted, rel=1e-6)


def int4(**other: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = torch.tensor([[0.02985491], [0.02706473]])
    return module(weight=bytes_of([0xDD, 0x31, 0x03, 0x22]), weight_scale=scale, **other)


def test_trap_2_the_second_scale_of_w4a8_awq_is_no_part_of_the_weight(tmp_path: Path) -> None:
    weight = read(tmp_path, config("W4A8_AWQ"), int4(weight_scale_2=number(0.001), input_scale=number(1.0)))
    assert torch.equal(weight.dequantize()[0], torch.tensor([-3.0, 1, 3, 2]) * torch.tensor(0.02985491))


def test_trap_3_int4_rows_2i_and_2i_plus_1_share_a_byte(tmp_path: Path) -> None:
    weight = read(tmp_path, config("W4A16_AWQ"), int4())
    assert weight.codes.tolist() == [[-3, 1, 3, 2], [-3, 3, 0, 2]]
    assert weight.shape == (2, 4)


@pytest.mark.parametrize("shape", [(2, 1, 3, 1), (2, 3)])
def test_trap_4_block_scales_are_4d(tmp_path: Path, shape: tuple[int, ...]) -> None:
    codes = torch.full((130, 300), ONE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 7.0).reshape(shape)
    weight = read(tmp_path, config("fp8_pb_wo"), module(weight=codes, weight_scale=scale)).dequantize()
    assert [weight[n, k].item() for n in (0, 129) for k in (127, 255, 299)] == [1, 2, 3, 4, 5, 6]


def test_trap_4_the_scale_of_a_single_block_is_0d(tmp_path: Path) -> None:
    weight = read(tmp_path, config("fp8_pb_wo"), module(weight=fp8_bytes(ONE, ONE), weight_scale=number(3.0)))
    assert weight.dequantize().tolist() == [[3.0, 3.0]]
    assert weight.scheme.granularity == "128x128"


def test_trap_4_an_inverse_scale_of_composed_checkpoints_means_the_same(tmp_path: Path) -> None:
    tensors = module(weight=fp8_bytes(ONE, ONE), weight_scale_inv=torch.tensor([[3.0]]))
    assert read(tmp_path, config("FP8_PB_WO"), tensors).dequantize().tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("algorithm", ["mxfp4", "MXFP4"])
def test_trap_5_algorithms_are_read_in_any_case(tmp_path: Path, algorithm: str) -> None:
    tensors = module(weight=torch.full((1, 16), 0x22, dtype=torch.uint8), weight_scale=bytes_of([128]))
    assert read(tmp_path, config(algorithm), tensors).dequantize().tolist() == [[2.0] * 32]


def test_trap_6_the_group_size_comes_from_the_shapes(tmp_path: Path) -> None:
    tensors = module(weight=bytes_of([0x11] * 64), weight_scale=torch.ones(2, 1))
    assert read(tmp_path, config("W4A16_AWQ"), tensors, hf=side("W4A16_AWQ", group_size=64)).scheme.granularity == "g64"


def test_trap_6_a_group_size_that_contradicts_the_shapes_is_refused(tmp_path: Path) -> None:
    tensors = module(weight=bytes_of([0x11] * 64), weight_scale=torch.ones(2, 1))
    with pytest.raises(Inconsistent, match="group size") as refused:
        read(tmp_path, config("W4A16_AWQ"), tensors, hf=side("W4A16_AWQ", group_size=128))
    assert refused.value.where == M


def test_trap_7_nvfp4_scales_meet_before_the_code(tmp_path: Path) -> None:
    c, s, s2 = torch.tensor(3.0), torch.tensor(52.0), torch.tensor(0.00047665549209341407)
    codes = bytes_of([0x55] * 8)
    scales = [v for v in torch.arange(0x30, 0x70).tolist()
              if (c * decoded(v) * s2).item() != (c * (decoded(v) * s2)).item()]
    assert scales, "no scale tells the orders apart"
    weight = read(tmp_path, config("W4A16_NVFP4"), module(weight=codes, weight_scale=fp8_bytes(scales[0]), weight_scale_2=s2))
    assert weight.dequantize()[0, 0] == c * (decoded(scales[0]) * s2)
    assert s == decoded(0x65)


def decoded(byte: int) -> torch.Tensor:
    return torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def test_trap_8_w4a8_nvfp4_fp8_has_groups_of_32_and_static_fp8_inputs(tmp_path: Path) -> None:
    tensors = module(weight=bytes_of([0x22] * 16), weight_scale=fp8_bytes(ONE), weight_scale_2=number(0.5),
                     input_scale=number(2.0))
    weight = read(tmp_path, config("W4A8_NVFP4_FP8"), tensors)
    assert weight.dequantize().tolist() == [[0.5] * 32]
    assert weight.scheme.activation is not None
    assert (weight.scheme.granularity, weight.scheme.activation.recipe) == ("g32", "fp8_static_divide")


def test_trap_9_pre_quant_scale_multiplies_the_input_not_the_weight(tmp_path: Path) -> None:
    p = torch.tensor([2.0, 4.0, 8.0, 0.5], dtype=torch.bfloat16)
    weight = read(tmp_path, config("W4A16_AWQ"), int4(pre_quant_scale=p))
    assert weight.scheme.pre_scale
    assert weight.pre_scale is not None
    assert weight.pre_scale.tolist() == p.tolist()
    assert torch.equal(weight.dequantize()[0], torch.tensor([-3.0, 1, 3, 2]) * torch.tensor(0.02985491))


def test_trap_9_the_tensor_decides_whether_there_is_a_pre_quant_scale(tmp_path: Path) -> None:
    weight = read(tmp_path, config("W4A16_AWQ"), int4(), hf=side("W4A16_AWQ", pre_quant_scale=True, has_zero_point=False))
    assert not weight.scheme.pre_scale


def test_trap_10_other_tensors_stay_those_of_the_checkpoint(tmp_path: Path) -> None:
    norm = torch.tensor([1.5, 2.5], dtype=torch.bfloat16)
    contents = write(tmp_path, config("W4A16_AWQ"), int4() | {"model.norm.weight": norm})
    assert "model.norm" not in dialect.declare(contents)
    assert torch.equal(stored(contents.tensors["model.norm.weight"]), norm)


ATTENTION = "model.layers.0.self_attn"
KV = {f"{ATTENTION}.k_proj.weight": torch.ones(2, 2), f"{ATTENTION}.k_proj.k_scale": number(0.5),
      f"{ATTENTION}.v_proj.v_scale": number(0.25)}


def test_trap_11_scales_of_the_cache_lie_under_unquantized_projections(tmp_path: Path) -> None:
    contents = write(tmp_path, config(None, kv_cache_scheme={"dynamic": False, "num_bits": 8, "type": "float"}), dict(KV))
    assert not any(layer.scheme.is_quantized for layer in dialect.declare(contents).values())
    cache = dialect.kv_cache(contents)
    assert cache is not None
    assert cache.element == "fp8_e4m3fn"
    assert cache.scales == {ATTENTION: (f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale")}


@pytest.mark.parametrize(
    ("quantization", "hf", "element"),
    [(config("FP8", kv_cache_scheme="NVFP4"), None, "fp4_e2m1"), (None, side("FP8", kv_cache_quant_algo="FP8"), "fp8_e4m3fn"),
     (config("FP8"), side("FP8", kv_cache_quant_algo="FP8"), "fp8_e4m3fn")],
    ids=["bare-name", "hf-file", "one-file-silent"],
)
def test_a_cache_may_be_declared_in_either_file_without_scales(
    tmp_path: Path, quantization: Any, hf: Any, element: str
) -> None:
    cache = dialect.kv_cache(write(tmp_path, quantization, {"model.norm.weight": torch.ones(1)}, hf))
    assert cache is not None
    assert (cache.element, cache.scales) == (element, {})


def test_trap_12_stacked_nvfp4_experts_lie_in_first(tmp_path: Path) -> None:
    codes = torch.zeros(2, 8, 3, dtype=torch.uint8)
    codes[1, 0, 2] = 0x31  # expert 1, out 2: in 0 is 0.5, in 1 is 1.5
    scale = torch.full((2, 1, 3), ONE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = read(tmp_path, config("NVFP4"), stack(codes, weight_scale=scale, weight_scale_2=number(2.0),
                                                   input_scale=number(1.0), bias=torch.zeros(2, 3)), EXPERTS)
    value = weight.dequantize()
    assert weight.shape == (2, 3, 16)
    assert value.nonzero().tolist() == [[1, 2, 0], [1, 2, 1]]
    assert value[1, 2, :2].tolist() == [1.0, 3.0]
    assert torch.equal(weight.expert(1).dequantize(), value[1])


def test_trap_12_stacked_fp8_experts_share_one_scale(tmp_path: Path) -> None:
    codes = torch.zeros(2, 4, 3, dtype=torch.uint8)
    codes[1, 0, 2] = ONE
    tensors = stack(codes.view(torch.float8_e4m3fn), weight_scale=number(3.0), input_scale=number(1.0))
    value = read(tmp_path, config("FP8"), tensors, EXPERTS)
    assert value.dequantize()[1, 2, 0] == 3.0
    assert value.expert(1).dequantize()[2, 0] == 3.0


def test_a_stack_without_its_scale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Inconsistent, match="missing"):
        read(tmp_path, config("NVFP4"), stack(torch.zeros(2, 8, 3, dtype=torch.uint8)), EXPERTS)


def test_stacked_per_channel_experts_have_a_scale_an_expert(tmp_path: Path) -> None:
    codes = torch.full((2, 4, 3), ONE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors = stack(codes, weight_scale=torch.tensor([3.0, 5.0]))
    weight = read(tmp_path, config("FP8_PER_CHANNEL_PER_TOKEN"), tensors, EXPERTS)
    assert weight.dequantize()[:, 0, 0].tolist() == [3.0, 5.0]


@pytest.mark.parametrize("algorithm", ["MXFP8", "mxfp4"])
def test_stacked_mx_blocks_run_along_the_outputs(tmp_path: Path, algorithm: str) -> None:
    codes = torch.full((1, 2, 64), ONE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    if algorithm == "mxfp4":
        codes = torch.full((1, 2, 32), 0x22, dtype=torch.uint8)
    exponents = torch.tensor([[[127, 128], [129, 130]]], dtype=torch.uint8)  # [E, in, out / 32]
    weight = read(tmp_path, config(algorithm), stack(codes, weight_scale=exponents), EXPERTS)
    assert weight.shape == (1, 64, 2)
    assert weight.scheme.scales[0].block == (32, 1)
    assert weight.dequantize()[0, [0, 31, 32, 63]].tolist() == [[1, 4], [1, 4], [2, 8], [2, 8]]


def test_trap_13_exponent_byte_0_is_a_subnormal_not_zero(tmp_path: Path) -> None:
    codes = torch.full((1, 32), ONE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = read(tmp_path / "0", config("MXFP8"), module(weight=codes, weight_scale=bytes_of([0])))
    assert weight.dequantize()[0, 0].item() == 2.0**-127
    with pytest.raises(Damaged):
        read(tmp_path / "255", config("MXFP8"), module(weight=codes, weight_scale=bytes_of([255])))


def test_mxfp8_example_of_the_document(tmp_path: Path) -> None:
    codes = torch.tensor([[0x48, 0xEB, 0x72, 0x78, *[0] * 28]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = read(tmp_path, config("MXFP8"), module(weight=codes, weight_scale=bytes_of([117])))
    assert weight.dequantize()[0, :4].tolist() == [0.00390625, -0.0859375, 0.15625, 0.25]


@pytest.mark.parametrize(("algorithm", "dynamic"), [("MXFP8", True), ("FP8_PER_CHANNEL_PER_TOKEN", True), ("FP8", False)])
def test_trap_14_the_algorithm_not_config_groups_says_what_is_dynamic(tmp_path: Path, algorithm: str, dynamic: bool) -> None:
    groups = {"group_0": {"input_activations": {"dynamic": False, "num_bits": 8, "type": "float"}, "targets": ["Linear"]}}
    codes = torch.full((1, 32), ONE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = {"MXFP8": bytes_of([127]), "FP8": number(1.0)}.get(algorithm, torch.ones(1))
    tensors = module(weight=codes, weight_scale=scale, input_scale=number(1.0))
    weight = read(tmp_path, config(algorithm, config_groups=groups), tensors)
    assert weight.scheme.activation is not None
    assert weight.scheme.activation.dynamic == dynamic


# --- members of a fusion, activations, mixed precision --------------------------------------------------------------------

def test_unlike_scales_in_one_fusion_stay_each_its_own(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, scale in (("q_proj", 1.0), ("k_proj", 2.0)):
        tensors |= module(f"{ATTENTION}.{name}", weight=fp8_bytes(ONE), weight_scale=number(scale), input_scale=number(1.0))
    for name, scale in (("q_proj", 1.0), ("k_proj", 2.0)):
        assert read(tmp_path, config("FP8"), tensors, f"{ATTENTION}.{name}").dequantize().item() == scale


def test_nvfp4_whose_groups_leave_inputs_alone_is_weight_only(tmp_path: Path) -> None:
    groups = {"group_0": {"input_activations": None, "weights": {"num_bits": 4}, "targets": ["Linear"]}}
    assert read(tmp_path, config("NVFP4", config_groups=groups), dict(NVFP4)).scheme.activation is None


def mixed(**rules: Any) -> dict[str, Any]:
    return config("MIXED_PRECISION", ignore=[], quantized_layers={k.replace("__", "."): v for k, v in rules.items()})


def test_a_rule_of_mixed_precision_covers_the_experts_below_it(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.3.up_proj"
    rules = {"model__layers__0__mlp__experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16}}
    tensors = module(name, weight=NVFP4_CODES, weight_scale=fp8_bytes(ONE), weight_scale_2=number(1.0))
    assert read(tmp_path, mixed(**rules), tensors, name).codes[0, :2].tolist() == [0xF, 1]


@pytest.mark.parametrize(("algorithm", "kind", "words_of_it"), [
    ("IQ2_XS", Unsupported, "IQ2_XS"), ("Q8_0", Unsupported, "Q8_0"), (None, Inconsistent, "does not call quantized"),
])
def test_a_rule_that_is_not_read_is_refused_by_name(
    tmp_path: Path, algorithm: str | None, kind: type[AnybitError], words_of_it: str
) -> None:
    rules = {M: {"quant_algo": algorithm}} if algorithm else {}
    with pytest.raises(kind, match=words_of_it):
        read(tmp_path, config("MIXED_PRECISION", quantized_layers=rules), module(weight=bytes_of([0]), weight_scale=bytes_of([0])))


@pytest.mark.parametrize("pattern", ["model.layers.0*", "*up_proj", "model.layers.?.mlp.up_proj", "*[tuv]p_proj", M])
def test_an_excluded_module_with_codes_is_read_and_noted(tmp_path: Path, pattern: str) -> None:
    contents = write(tmp_path, config("W4A16_AWQ", ignore=["lm_head", pattern]), int4())
    layer = dialect.declare(contents)[M]
    assert layer.scheme.is_quantized
    assert layer.notes == ("the config lists it as unquantized; the tensors decide",)


# --- the two files, recognition, refusals ---------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("quantization", "hf", "recognized"),
    [
        ({"quant_method": "ModelOpt_FP4"}, None, True),
        ({"producer": {"name": "modelopt"}, "quant_algo": "FP8"}, None, True),
        ({"quantization": {"quant_algo": "FP8"}}, None, True),
        (None, side("FP8"), True),
        ({"quant_method": "compressed-tensors"}, side("FP8"), False),
        (None, None, False),
        ({"quant_method": "fp8"}, None, False),
    ],
)
def test_recognition(tmp_path: Path, quantization: Any, hf: Any, recognized: bool) -> None:
    assert dialect.recognizes(write(tmp_path, quantization, {"a": torch.ones(1)}, hf)) == recognized


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (config("FP8"), side("NVFP4")),
        (config("FP8", kv_cache_scheme="NVFP4"), side("FP8", kv_cache_quant_algo="FP8")),
        (config("FP8", ignore=["lm_head"]), side("FP8", exclude_modules=["model.embed_tokens"])),
        (config("NVFP4", group_size=16), side("NVFP4", group_size=32)),
    ],
    ids=["algorithm", "cache", "exclude", "group-size"],
)
def test_two_files_that_disagree_are_refused(tmp_path: Path, here: dict[str, Any], there: dict[str, Any]) -> None:
    with pytest.raises(Inconsistent, match="disagree"):
        dialect.declare(write(tmp_path, here, {"a": torch.ones(1)}, there))


def test_a_disagreement_about_unquantized_modules_shows_what_only_one_file_names(tmp_path: Path) -> None:
    here, there = config("FP8", ignore=["lm_head", "model.b", "model.a"]), side("FP8", exclude_modules=["lm_head"])
    with pytest.raises(Inconsistent) as refused:
        dialect.declare(write(tmp_path, here, {"a": torch.ones(1)}, there))
    assert refused.value.found == ("config.json: quantization_config: model.a, model.b · "
                                   "hf_quant_config.json: quantization: nothing more")


@pytest.mark.parametrize("size", [0, -2, "16", True])
def test_a_group_size_that_is_none_is_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(Damaged, match="group_size has no sound value"):
        dialect.declare(write(tmp_path, config("NVFP4"), {"a": torch.ones(1)}, side("NVFP4", group_size=size)))


def test_every_module_without_its_scale_is_named(tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": fp8_bytes(ONE, ONE) for n in range(3)}
    with pytest.raises(Inconsistent) as refused:
        dialect.declare(write(tmp_path, config("FP8"), tensors))
    assert [refused.value.where, *refused.value.more] == [
        "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj.weight_scale", "model.layers.2.mlp.up_proj.weight_scale"]


@pytest.mark.parametrize(
    ("quantization", "tensors", "words_of_it"),
    [
        (config("NVFP4_SVD"), {}, "NVFP4_SVD"),
        (config("NVFP4"), {f"{M}.weight_quantizer._svdquant_lora_a": torch.ones(1, 2)}, "SVDQuant"),
        (config("MXFP6"), int4(), "MXFP6"),
        (config("INT5"), int4(), "INT5"),
        (config("FP8", kv_cache_scheme="NVFP4_AFFINE"), {}, "cache"),
    ],
)
def test_what_the_document_refuses_is_refused_by_name(
    tmp_path: Path, quantization: dict[str, Any], tensors: dict[str, torch.Tensor], words_of_it: str
) -> None:
    with pytest.raises(Unsupported, match=words_of_it):
        dialect.declare(write(tmp_path, quantization, tensors | {"a": torch.ones(1)}))


def test_codes_without_an_algorithm_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Inconsistent, match="does not call quantized"):
        read(tmp_path, config(None, kv_cache_scheme="NVFP4"), int4())


@pytest.mark.parametrize(
    "changed",
    [
        {"weight_scale": fp8_bytes(0x7F)},
        {"weight_scale": fp8_bytes(0x80 | ONE)},
        {"weight_scale_2": number(0.0)},
        {"weight_scale_2": number(float("nan"))},
        {"input_scale": number(-1.0)},
        {"pre_quant_scale": torch.zeros(16)},
    ],
    ids=["nan", "negative", "zero", "nan-global", "negative-input", "zero-pre-scale"],
)
def test_scales_that_no_writer_means_are_refused(tmp_path: Path, changed: dict[str, torch.Tensor]) -> None:
    with pytest.raises(Damaged):
        read(tmp_path, config("NVFP4"), dict(NVFP4) | module(**changed))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_in_an_fp8_weight_are_refused(tmp_path: Path, code: int) -> None:
    with pytest.raises(Damaged, match="NaN codes"):
        read(tmp_path, config("FP8"), module(weight=fp8_bytes(code), weight_scale=number(1.0), input_scale=number(1.0)))


@pytest.mark.parametrize(
    "tensors",
    [
        module(weight=fp8_bytes(ONE)),
        module(weight=fp8_bytes(ONE), weight_scale=number(1.0)),
        module(weight=fp8_bytes(ONE, ONE), weight_scale=torch.ones(2), input_scale=number(1.0)),
        module(weight=torch.ones(1, 2, dtype=torch.int8), weight_scale=number(1.0), input_scale=number(1.0)),
        module(weight=fp8_bytes(ONE), weight_scale=number(1.0), input_scale=number(1.0), bias=torch.ones(2)),
        module(weight=fp8_bytes(ONE), weight_scale=number(1.0), input_scale=number(1.0), pre_quant_scale=torch.ones(2)),
    ],
    ids=["no-scale", "no-input-scale", "scale-shape", "int8", "bias", "pre-scale"],
)
def test_tensors_that_disagree_with_the_algorithm_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(Inconsistent):
        read(tmp_path, config("FP8"), tensors)


@pytest.mark.parametrize(
    ("algorithm", "recipe", "tensors"),
    [
        ("W8A8_SQ_PER_CHANNEL", "int8_static_divide", {"weight": torch.ones(2, 4, dtype=torch.int8), "weight_scale": torch.ones(2)}),
        ("W8A16", None, {"weight": torch.ones(2, 4, dtype=torch.int8), "weight_scale": torch.ones(2)}),
        ("W4A8_MXFP4_FP8", "fp8_tensor", {"weight": bytes_of([0x22] * 16), "weight_scale": bytes_of([127])}),
        ("fp8_pb_real", "fp8_group_divide", {"weight": fp8_bytes(ONE), "weight_scale": number(1.0)}),
        ("NVFP4_AWQ", "nvfp4_reciprocal", {"weight": NVFP4_CODES, "weight_scale": fp8_bytes(ONE), "weight_scale_2": number(1.0)}),
    ],
)
def test_each_algorithm_names_its_activation_recipe(
    tmp_path: Path, algorithm: str, recipe: str | None, tensors: dict[str, torch.Tensor]
) -> None:
    scheme = read(tmp_path, config(algorithm), module(**tensors, input_scale=number(1.0))).scheme
    assert (scheme.activation.recipe if scheme.activation else None) == recipe
