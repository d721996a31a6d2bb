"""compressed-tensors: every public folder bit for bit, the traps and the refusals of docs/formats/compressed_tensors.md."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_checks import assert_reads_bit_for_bit
from safetensors import safe_open
from small_checkpoints import contents_of, fp8_bytes, tensors_of, words, write

from anybit.checkpoints.dialects import compressed_tensors as dialect
from anybit.checkpoints.dialects import modelopt
from anybit.errors import AnybitError, Damaged, Inconsistent, LimitExceeded, Unsupported
from anybit.numerics.activations import quantize_dequantize
from anybit.weights import Dense, QuantizedWeight
from conftest import CHECKPOINTS, EXPECTED, genuine, needs_shared

FOLDERS = genuine("ct-*")
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
MX = {"type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
M = "model.layers.0.mlp.up_proj"


def config(weights: dict[str, Any] | None, inputs: dict[str, Any] | None = None, **other: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": {"g": group},
            "ignore": ["lm_head"], "version": "0.20.0", **other}


def module(name: str = M, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def packed(data: torch.Tensor, columns: int, scale: torch.Tensor, **other: torch.Tensor) -> dict[str, torch.Tensor]:
    return module(weight_packed=data, weight_scale=scale, weight_shape=torch.tensor([data.shape[0], columns]), **other)


def read(folder: Path, quantization: dict[str, Any], tensors: dict[str, torch.Tensor], name: str = M) -> QuantizedWeight:
    contents = write(folder, quantization, tensors)
    assert dialect.recognizes(contents)
    layer = dialect.declare(contents)[name]
    weight = dialect.canonicalize(layer, tensors_of(contents, layer))
    assert isinstance(weight, QuantizedWeight)
    return weight


def bf16(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bfloat16)


# --- the genuine folders ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    assert not modelopt.recognizes(contents_of(CHECKPOINTS / folder))
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
            got = product(weight, x.float())
            # float64 on both sides: what differs is the order of a float64 sum, and A11's float32 rounding
            assert (got - y).norm() / y.norm() < 1e-5, name


def product(weight: Any, x: torch.Tensor) -> torch.Tensor:
    scheme = weight.scheme
    if scheme.activation is not None:
        x = quantize_dequantize(x, scheme.activation, weight.activation)
    y = x.double() @ weight.dequantize().double().T
    y = y if weight.bias is None else y + weight.bias.double()
    return y if scheme.output is None else quantize_dequantize(y.float(), scheme.output, weight.activation).double()


@needs_shared
def test_every_public_folder_is_read() -> None:
    assert len(FOLDERS) == 27


# --- the traps, by their numbers in the document -----------------------------------------------------------------------

def test_trap_1_fields_are_offset_binary(tmp_path: Path) -> None:
    weight = read(tmp_path, config(W4), packed(words(0x77886777), 8, bf16([1.0])))
    assert weight.codes.tolist() == [[-1, -1, -1, -2, 0, 0, -1, -1]]


DENSE_3 = words(0xA6ACC715, 0xA895B328, 0x8B6AA9D8)
PADDED_6 = words(0x0B6DF6A7, 0x14722699)


def test_trap_2_dense_odd_widths_cross_words(tmp_path: Path) -> None:
    args = {**W4, "num_bits": 3, "group_size": 32}
    weight = read(tmp_path, config(args), packed(DENSE_3, 32, bf16([1.0])))
    assert weight.codes[0, :13].tolist() == [1, -2, 0, -1, 0, -3, -1, 1, 2, 0, -2, 0, -2]


def test_trap_2_padded_odd_widths_do_not(tmp_path: Path) -> None:
    args = {**W4, "num_bits": 6, "group_size": 5}  # K 10: dense has 2 words too, the old version tells
    weight = read(tmp_path, config(args, version="0.17.1"), packed(PADDED_6, 10, bf16([1.0, 1.0])))
    assert weight.codes.tolist() == [[7, -6, -1, -5, -21, -7, -6, 2, -4, -12]]


def test_trap_2_an_ambiguous_width_follows_the_other_modules(tmp_path: Path) -> None:
    args = {**W4, "num_bits": 6, "group_size": 5}
    ambiguous = packed(PADDED_6, 10, bf16([1.0, 1.0]))
    clear = module("other", weight_packed=words(*[0] * 16), weight_scale=torch.ones(1, 16, dtype=torch.bfloat16),
                   weight_shape=torch.tensor([1, 80]))  # K 80: 16 padded, 15 dense
    weight = read(tmp_path, config(args, version="0.18.0"), ambiguous | clear)
    assert weight.codes[0, :5].tolist() == [7, -6, -1, -5, -21]


def test_trap_2_a_width_of_no_packing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Inconsistent, match="fits no packing"):
        read(tmp_path, config(W4), packed(words(0, 0, 0), 8, bf16([1.0])))


def test_trap_3_zero_points_are_packed_along_the_outputs(tmp_path: Path) -> None:
    tensors = packed(torch.full((8, 1), 0x44444444, dtype=torch.int32), 8, torch.ones(8, 1, dtype=torch.bfloat16),
                     weight_zero_point=words(0x88A8988C))
    weight = read(tmp_path, config({**W4, "symmetric": False}), tensors)
    assert weight.offset is not None
    assert weight.offset.tolist() == [[4], [0], [0], [1], [0], [2], [0], [0]]
    assert weight.dequantize()[0, 0] == -4 - 4


def test_trap_3_the_height_of_zero_points_is_checked(tmp_path: Path) -> None:
    tensors = packed(torch.zeros(9, 1, dtype=torch.int32), 8, torch.ones(9, 1, dtype=torch.bfloat16),
                     weight_zero_point=words(0))
    with pytest.raises(Inconsistent, match="unexpected shape"):
        read(tmp_path, config({**W4, "symmetric": False}), tensors)


def act_order(*indices: int) -> dict[str, torch.Tensor]:
    return packed(words(0x99999999), 8, bf16([1.0, 4.0]), weight_g_idx=torch.tensor(indices, dtype=torch.int32))


W4_ORDER = {**W4, "group_size": 4, "actorder": "group"}


def test_trap_4_g_idx_names_the_scale_of_each_column(tmp_path: Path) -> None:
    weight = read(tmp_path, config(W4_ORDER), act_order(0, 1, 1, 0, 0, 1, 0, 1))
    assert weight.dequantize().tolist() == [[1, 4, 4, 1, 1, 4, 1, 4]]
    assert weight.scheme.act_order


def test_trap_4_g_idx_gathers_zero_points_too(tmp_path: Path) -> None:
    tensors = act_order(0, 1, 1, 0, 0, 1, 0, 1) | module(weight_zero_point=torch.tensor([[0x8, 0x9]], dtype=torch.int32))
    weight = read(tmp_path, config({**W4_ORDER, "symmetric": False}), tensors)
    assert weight.dequantize().tolist() == [[1, 0, 0, 1, 1, 0, 1, 0]]


def test_trap_4_a_g_idx_of_minus_one_was_never_written(tmp_path: Path) -> None:
    weight = read(tmp_path, config({**W4, "group_size": 4}), act_order(*[-1] * 8))
    assert weight.dequantize().tolist() == [[1, 1, 1, 1, 4, 4, 4, 4]]
    assert weight.group_map is None


def test_trap_4_a_g_idx_beyond_the_groups_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="index out of range") as refused:
        read(tmp_path, config(W4_ORDER), act_order(0, 0, 0, 2, 1, 1, 1, 1))
    assert refused.value.found == "2 at position 3"


NVFP4_BYTES = torch.tensor([[0x1D, 0x73, 0x87, 0x94, 0, 0, 0, 0]], dtype=torch.uint8)
NVFP4_MODULE = module(weight_packed=NVFP4_BYTES, weight_scale=fp8_bytes(0x5C), weight_global_scale=torch.tensor([1640.0]))


def test_trap_5_the_nvfp4_global_scale_divides(tmp_path: Path) -> None:
    weight = read(tmp_path, config(NVFP4), dict(NVFP4_MODULE))
    codes = torch.tensor([-3, 0.5, 1.5, 6, 6, -0.0, 2, -0.5])
    assert torch.equal(weight.dequantize()[0, :8], codes * (torch.tensor(24.0) / torch.tensor(1640.0)))


def test_autorounds_nvfp4_has_unsigned_e5m3_scales_and_no_global(tmp_path: Path) -> None:
    tensors = module(weight_packed=torch.full((1, 8), 0x72, dtype=torch.uint8),
                     weight_scale=torch.tensor([[0x70]], dtype=torch.uint8))
    inputs = {**NVFP4, "dynamic": "local"}
    weight = read(tmp_path, config(NVFP4, inputs, format="nvfp4-e5m3-pack-quantized"), tensors)
    assert weight.dequantize()[0, :2].tolist() == [0.5, 3.0]
    assert weight.scheme.activation.recipe == "fp4_ue5m3_autoround"


def test_trap_6_nvfp4_weights_are_float32_not_bfloat16(tmp_path: Path) -> None:
    value = read(tmp_path, config(NVFP4), dict(NVFP4_MODULE)).dequantize()
    assert value.dtype == torch.float32
    assert not torch.equal(value, value.bfloat16().float())


def test_trap_7_int_quantized_keeps_one_code_a_byte_whatever_its_bits(tmp_path: Path) -> None:
    tensors = module(weight=torch.tensor([[-8, 7, 0, 1, -1, 2, 3, -4]], dtype=torch.int8), weight_scale=bf16([0.5]))
    weight = read(tmp_path, config(W4, format="int-quantized"), tensors)
    assert weight.dequantize().tolist() == [[-4, 3.5, 0, 0.5, -0.5, 1, 1.5, -2]]
    assert weight.scheme.element == "int4"


def test_trap_7_a_code_beyond_its_bits_is_refused(tmp_path: Path) -> None:
    tensors = module(weight=torch.tensor([[0, 8, 0, 0, 0, 0, 0, 0]], dtype=torch.int8), weight_scale=bf16([0.5]))
    with pytest.raises(Damaged, match="codes outside int4"):
        read(tmp_path, config(W4, format="int-quantized"), tensors)


def test_trap_8_naive_quantized_may_hold_fp8(tmp_path: Path) -> None:
    tensors = module(weight=fp8_bytes(0x38, 0xC0), weight_scale=bf16([2.0]))
    assert read(tmp_path, config(FP8, format="naive-quantized"), tensors).dequantize().tolist() == [[2.0, -4.0]]


def test_trap_9_ragged_blocks_are_cut(tmp_path: Path) -> None:
    args = {**FP8, "strategy": "block", "block_structure": [2, 3]}
    one = torch.full((3, 4), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = read(tmp_path, config(args), module(weight=one, weight_scale=bf16([1.0, 2.0], [3.0, 4.0])))
    assert weight.dequantize().tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [3, 3, 3, 4]]


def test_trap_9_an_old_block_structure_is_a_string(tmp_path: Path) -> None:
    args = {**FP8, "strategy": "block", "block_structure": "128x128"}
    weight = read(tmp_path, config(args), module(weight=fp8_bytes(0x38, 0x38), weight_scale=bf16([2.0])))
    assert weight.scheme.scales[0].block == (128, 128)


INT8_MODULE = module(weight=torch.tensor([[1, -2, 3, 4]], dtype=torch.int8), weight_scale=bf16([1.0]))
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def activated(folder: Path, inputs: dict[str, Any], x: list[list[float]], **static: torch.Tensor) -> torch.Tensor:
    weights = FP8 if inputs["type"] == "float" else INT8
    stored = module(weight=fp8_bytes(0x38, 0x38, 0x38, 0x38), weight_scale=bf16([1.0])) if weights is FP8 else INT8_MODULE
    weight = read(folder, config(weights, inputs), dict(stored) | module(**static))
    assert weight.scheme.activation is not None
    return quantize_dequantize(torch.tensor(x), weight.scheme.activation, weight.activation)


def test_trap_10_dynamic_int8_scales_by_absmax_over_127(tmp_path: Path) -> None:
    assert activated(tmp_path, TOKEN, [[127.0, 1.0, -3.0, 0.0]]).tolist() == [[127.0, 1.0, -3.0, 0.0]]


def test_trap_11_static_int8_rounds_before_it_adds_an_odd_zero_point(tmp_path: Path) -> None:
    inputs = {**TOKEN, "symmetric": False, "strategy": "tensor", "dynamic": False}
    scale, zero_point = torch.tensor([1.0]), torch.tensor([1], dtype=torch.int8)
    got = activated(tmp_path, inputs, [[0.5, 1.5, 2.5, 0.0]], input_scale=scale, input_zero_point=zero_point)
    assert got.tolist() == [[0.0, 2.0, 2.0, 0.0]]  # adding 1 first would give 1, 1, 3


def test_trap_11_dynamic_int8_does_not_force_zero_into_the_range(tmp_path: Path) -> None:
    got = activated(tmp_path, {**TOKEN, "symmetric": False}, [[100.0, 355.0, 101.0, 200.0]])
    assert got.tolist() == [[100.0, 355.0, 101.0, 200.0]]  # scale 1 over 100 ... 355


def test_trap_12_zero_rows_stay_zero_under_fp8(tmp_path: Path) -> None:
    for number, inputs in enumerate((TOKEN, {**TOKEN, "strategy": "group", "group_size": 128})):
        got = activated(tmp_path / str(number), {**inputs, "type": "float"}, [[0.0, 0.0, 0.0, 0.0]])
        assert got.tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_trap_13_nvfp4_activations_multiply_by_the_global_scale_first(tmp_path: Path) -> None:
    inputs = {**NVFP4, "dynamic": "local"}
    tensors = dict(NVFP4_MODULE) | module(input_global_scale=torch.tensor([2.0]))
    weight = read(tmp_path, config(NVFP4, inputs), tensors)
    spec = weight.scheme.activation
    assert spec is not None
    x = torch.zeros(1, 16)
    x[0, :3] = torch.tensor([6.0, 3.0, -0.5])
    # s = e4m3(2 * 6/6) = 2, x * 1 = codes 6, 3, -0.5, each times 2 / 2
    assert quantize_dequantize(x, spec, weight.activation)[0, :4].tolist() == [6.0, 3.0, -0.5, 0.0]
    assert (spec.recipe, spec.group_size) == ("nvfp4", 16)


def mxfp4(exponent: int) -> dict[str, torch.Tensor]:
    codes = torch.tensor([[0x4A, 0x15, 0xD4, 0x99, *[0] * 12]], dtype=torch.uint8)
    return module(weight_packed=codes, weight_scale=torch.tensor([[exponent]], dtype=torch.uint8))


def test_trap_14_exponent_bytes_are_e_minus_127(tmp_path: Path) -> None:
    weight = read(tmp_path, config({**MX, "num_bits": 4}), mxfp4(122))
    assert weight.dequantize()[0, :8].tolist() == [v / 32 for v in (-1, 2, 3, 0.5, 2, -3, -0.5, -0.5)]


def test_trap_14_exponent_byte_0_is_a_subnormal_not_zero(tmp_path: Path) -> None:
    weight = read(tmp_path, config({**MX, "num_bits": 4}), mxfp4(0))
    assert weight.dequantize()[0, 0].item() == -(2.0**-127)


def test_trap_14_exponent_byte_255_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Damaged):
        read(tmp_path, config({**MX, "num_bits": 4}), mxfp4(255))


def test_fp6_codes_are_e2m3_four_in_three_bytes(tmp_path: Path) -> None:
    codes = torch.tensor([[0x0C, 0xCE, 0x4A, *[0] * 21]], dtype=torch.uint8)
    tensors = module(weight_packed=codes, weight_scale=torch.tensor([[122]], dtype=torch.uint8))
    weight = read(tmp_path, config({**MX, "num_bits": 6}), tensors)
    assert weight.dequantize()[0, :4].tolist() == [v / 32 for v in (1.5, -4, -1.5, 2.5)]


def test_trap_15_channel_scales_are_a_column(tmp_path: Path) -> None:
    codes = torch.ones(2, 2, dtype=torch.int8)
    weight = read(tmp_path / "a", config({**INT8, "group_size": None}), module(weight=codes, weight_scale=bf16([1.0], [2.0])))
    assert weight.dequantize().tolist() == [[1, 1], [2, 2]]
    with pytest.raises(AnybitError):
        read(tmp_path / "b", config(INT8), module(weight=codes, weight_scale=bf16([1.0, 2.0])))


def group(targets: list[str], bits: int) -> dict[str, Any]:
    return {"targets": targets, "weights": {**INT8, "num_bits": bits}}


@pytest.mark.parametrize(
    ("groups", "bits"),
    [
        ({"a": group(["Linear"], 2), "b": group(["re:.*up_proj"], 3), "c": group([M], 4)}, 4),
        ({"a": group(["Linear"], 2), "b": group(["re:.*up_proj"], 3)}, 3),
        ({"a": group(["re:up_proj"], 2), "b": group(["Linear"], 3)}, 3),  # anchored at the start
        ({"a": group(["re:.*up"], 2), "b": group(["re:.*mlp"], 3)}, 3),  # by text, not by order
        ({"a": group(["Embedding"], 2), "b": group(["Linear"], 3)}, 3),
        ({"a": {"targets": [M], "weights": None}, "b": group(["Linear"], 3)}, 3),
    ],
    ids=["name", "regex", "anchored", "by-text", "class", "no-weights"],
)
def test_trap_16_names_come_before_regexes_before_classes(tmp_path: Path, groups: dict[str, Any], bits: int) -> None:
    quantization = config(None) | {"config_groups": groups}
    weight = read(tmp_path, quantization, module(weight=torch.ones(1, 2, dtype=torch.int8), weight_scale=bf16([1.0])))
    assert weight.scheme.element == f"int{bits}"


@pytest.mark.parametrize("entry", [M, "re:.*up_proj", "Linear"])
def test_trap_16_ignore_beats_every_target_but_not_the_tensors(tmp_path: Path, entry: str) -> None:
    layer = dialect.declare(write(tmp_path, config(INT8, ignore=[entry]), dict(INT8_MODULE)))[M]
    assert layer.scheme.element == "int8"
    assert layer.notes == ("config.json ignores it, but it holds codes: the tensors decide",)


def test_a_module_without_codes_in_targets_and_ignore_is_unquantized_without_a_word(tmp_path: Path) -> None:
    tensors = dict(INT8_MODULE) | {"model.layers.0.mlp.gate.weight": bf16([1.0, 2.0])}
    contents = write(tmp_path, config(INT8, ignore=["model.layers.0.mlp.gate"]), tensors)
    layer = dialect.declare(contents)["model.layers.0.mlp.gate"]
    assert (layer.scheme.is_quantized, layer.notes, dialect.notes(contents)) == (False, (), ())


@pytest.mark.parametrize(
    ("groups", "bits", "remark"),
    [
        ({"a": group(["Linear"], 2), "b": group(["Linear"], 3)}, 3, "several config groups target Linear: the last, b"),
        ({"a": group(["re:.*up_proj"], 2), "b": group(["re:.*mlp.*"], 3)}, 3, "re:.*mlp.* of group b counts"),
    ],
    ids=["same-target", "two-regexes"],
)
def test_a_module_in_two_config_groups_is_remarked_on(
    tmp_path: Path, groups: dict[str, Any], bits: int, remark: str
) -> None:
    tensors = module(weight=torch.ones(1, 2, dtype=torch.int8), weight_scale=bf16([1.0]))
    layer = dialect.declare(write(tmp_path, config(None) | {"config_groups": groups}, tensors))[M]
    assert layer.scheme.element == f"int{bits}"
    assert len(layer.notes) == 1
    assert remark in layer.notes[0]


def test_targets_and_ignored_names_that_match_nothing_are_remarked_on(tmp_path: Path) -> None:
    groups = {"a": group(["Linear", "re:.*upp_proj", "model.layers.7.mlp.up_proj"], 8)}
    ignore = ["lm_head", "lm_haed", "re:.*vision.*", "LlamaAttention", "model.layers.0.mlp"]
    contents = write(tmp_path, config(None) | {"config_groups": groups, "ignore": ignore}, dict(INT8_MODULE))
    assert dialect.notes(contents) == (
        "targets that match no module: re:.*upp_proj and 1 more", "ignored modules that are not there: lm_haed and 1 more",
    )


@pytest.mark.parametrize(
    ("ignore", "ignored"),
    [
        (["re:a|b", "re:model.*(up|gate)_proj$"], True),
        (["re:.*down_proj", "re:x|y"], False),
        (["re:up_proj"], False),  # anchored at the start
        (["re:^(?!.*lm_head).*$", "re:z"], True),  # look-ahead, which RE2 lacks
        ([r"re:(.)\1", "re:(?i)MODEL.*UP_PROJ"], True),
        ([f"re:unlike.{i}" for i in range(9000)] + ["re:.*up_proj"], True),  # more than one alternation holds
    ],
    ids=["alternative", "others", "anchored", "look-ahead", "flag", "many"],
)
def test_trap_16_many_ignore_patterns_mean_what_each_means(tmp_path: Path, ignore: list[str], ignored: bool) -> None:
    contents = write(tmp_path, config(INT8, ignore=ignore), dict(INT8_MODULE))
    notes = dialect.declare(contents)[M].notes
    assert any("ignores it" in note for note in notes) == ignored


def test_a_broken_pattern_is_named_by_itself(tmp_path: Path) -> None:
    with pytest.raises(Damaged) as refused:
        dialect.declare(write(tmp_path, config(INT8, ignore=["re:a)|(b", "re:x"]), dict(INT8_MODULE)))
    assert "a)|(b" in refused.value.found


def test_trap_17_a_target_without_codes_is_not_quantized(tmp_path: Path) -> None:
    tensors = dict(INT8_MODULE) | {"lm_head.weight": bf16([1.0, 2.0]), "model.layers.0.mlp.gate.weight": bf16([1.0, 2.0])}
    layers = dialect.declare(write(tmp_path, config(INT8, ignore=None), tensors))
    assert [layers[n].scheme.is_quantized for n in (M, "lm_head", "model.layers.0.mlp.gate")] == [True, False, False]
    dense = dialect.canonicalize(layers["lm_head"], {"weight": bf16([1.0, 2.0])})
    assert isinstance(dense, Dense)


def test_trap_18_bfloat16_scales_are_cast_never_rounded(tmp_path: Path) -> None:
    scale = torch.tensor([[0.047119140625]], dtype=torch.bfloat16)
    weight = read(tmp_path, config(INT8), module(weight=torch.tensor([[127]], dtype=torch.int8), weight_scale=scale))
    assert weight.scales[0].dtype == torch.bfloat16
    assert weight.dequantize().item() == 127 * 0.047119140625


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_trap_19_weight_shape_tells_k_where_no_group_does(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = packed(words(0x77886777), 5, bf16([1.0]))  # K 5 in a word of 8
    tensors[f"{M}.weight_shape"] = torch.tensor([1, 5], dtype=dtype)
    weight = read(tmp_path, config({**W4, "strategy": "channel", "group_size": None}), tensors)
    assert weight.codes.tolist() == [[-1, -1, -1, -2, 0]]


@pytest.mark.parametrize(("shape", "kind"), [([1, 10**12], LimitExceeded), ([1, -8], LimitExceeded), ([2, 8], Inconsistent),
                                             ([1, 9], Inconsistent)])
def test_trap_19_a_weight_shape_that_cannot_be_is_refused(tmp_path: Path, shape: list[int], kind: type[Exception]) -> None:
    tensors = packed(words(0x77886777), 8, bf16([1.0]), ) | {f"{M}.weight_shape": torch.tensor(shape)}
    with pytest.raises(kind):
        read(tmp_path, config({**W4, "strategy": "channel", "group_size": None}), tensors)


def test_trap_19_tensors_of_one_module_may_lie_in_two_files(tmp_path: Path) -> None:
    whole = write(tmp_path, config(W4), packed(words(0x77886777), 8, bf16([1.0])))
    assert dialect.declare(whole)[M].shape == (1, 8)
    moved = {n: replace(i, file=tmp_path / "other") if n.endswith("scale") else i for n, i in whole.tensors.items()}
    assert dialect.declare(replace(whole, tensors=moved))[M].shape == (1, 8)


def test_trap_20_an_output_scale_of_0_means_no_output_quantization(tmp_path: Path) -> None:
    quantization = config(INT8, {**TOKEN, "strategy": "tensor", "dynamic": False})
    quantization["config_groups"]["g"]["output_activations"] = {**TOKEN, "strategy": "tensor", "dynamic": False}
    tensors = dict(INT8_MODULE) | module(input_scale=torch.tensor([1.0]), output_scale=torch.tensor([0.0]))
    weight = read(tmp_path, quantization, tensors)
    assert weight.scheme.output is not None
    y = torch.tensor([[0.3, 5.0]])
    assert torch.equal(quantize_dequantize(y, weight.scheme.output, weight.activation), y)


# --- recognition, presets, notes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["compressed-tensors", "Compressed_Tensors"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_the_method_is_recognized_in_any_case_and_under_its_old_key(tmp_path: Path, method: str, key: str) -> None:
    contents = write(tmp_path, {**config(INT8), "quant_method": method}, dict(INT8_MODULE), key=key)
    assert dialect.recognizes(contents)
    assert dialect.declare(contents)[M].scheme.is_quantized


def test_config_groups_alone_prove_nothing(tmp_path: Path) -> None:
    assert not dialect.recognizes(write(tmp_path, {**config(INT8), "quant_method": "modelopt"}, dict(INT8_MODULE)))


@pytest.mark.parametrize(("preset", "version", "granularity"), [("W8A16", "0.14.0", "g128"), ("W8A16", "0.12.0", "channel"),
                                                                ("W8A16", None, "channel")])
def test_a_group_that_is_a_list_of_targets_is_a_preset(tmp_path: Path, preset: str, version: str, granularity: str) -> None:
    quantization = config(None, version=version) | {"config_groups": {preset: ["Linear"]}}
    tensors = module(weight=torch.ones(1, 128, dtype=torch.int8), weight_scale=bf16([1.0]))
    assert read(tmp_path, quantization, tensors).scheme.granularity == granularity


def test_a_status_of_old_writers_is_noted_when_codes_are_there(tmp_path: Path) -> None:
    contents = write(tmp_path, config(INT8, quantization_status="frozen", format="int-quantized"), dict(INT8_MODULE))
    assert dialect.declare(contents)[M].notes == ("config.json says quantization_status frozen; the tensors decide",)


def test_null_and_missing_fields_are_alike(tmp_path: Path) -> None:
    bare = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"],
            "weights": {"num_bits": 8, "group_size": -1}}}}
    assert read(tmp_path, bare, dict(INT8_MODULE)).scheme.granularity == "channel"


def test_merged_transforms_and_empty_sparsity_are_accepted(tmp_path: Path) -> None:
    transform = {"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_input"}]}}}
    quantization = config(INT8, transform_config=transform, sparsity_config={"format": "dense"}, moe_sparsity_config={})
    assert read(tmp_path, quantization, dict(INT8_MODULE)).codes.tolist() == [[1, -2, 3, 4]]


def test_embeddings_are_quantized_as_embeddings(tmp_path: Path) -> None:
    name = "model.embed_tokens"
    tensors = module(name, weight=torch.ones(3, 2, dtype=torch.int8), weight_scale=bf16([1.0], [2.0], [3.0]))
    quantization = config(None) | {"config_groups": {"a": group(["Linear"], 4), "b": group(["Embedding"], 8)}}
    layer = dialect.declare(write(tmp_path, quantization, tensors))[name]
    assert (layer.kind, layer.scheme.element) == ("embedding", "int8")


KV = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(("key", "value"), [("k_scale", "v_scale"), ("k_proj.output_scale", "v_proj.output_scale"),
                                            ("k_proj.k_scale", "v_proj.v_scale"), ("kv_scale", "kv_scale"), ("k_scale", "")])
def test_scales_of_the_cache_are_found_where_any_version_put_them(tmp_path: Path, key: str, value: str) -> None:
    attention = "model.layers.0.self_attn"
    names = [f"{attention}.{leaf}" if leaf else "" for leaf in (key, value)]
    tensors = dict(INT8_MODULE) | {name: torch.ones(1) for name in names if name}
    cache = dialect.kv_cache(write(tmp_path, config(INT8, kv_cache_scheme=KV), tensors))
    assert cache is not None
    assert cache.scales == {attention: tuple(names)}


def test_a_cache_of_integers_is_refused_and_none_is_none(tmp_path: Path) -> None:
    assert dialect.kv_cache(write(tmp_path, config(INT8), dict(INT8_MODULE))) is None
    with pytest.raises(Unsupported):
        dialect.kv_cache(write(tmp_path, config(INT8, kv_cache_scheme={**KV, "type": "int"}), dict(INT8_MODULE)))


# --- refusals ------------------------------------------------------------------------------------------------------------

ONLINE = {"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}


@pytest.mark.parametrize(
    ("changes", "words_of_it"),
    [
        ({"transform_config": ONLINE}, "rotates activations"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ({"format": "marlin-24"}, "marlin-24"),
        ({"format": "sparse-bitmask"}, "sparse-bitmask"),
        ({"format": "brand-new"}, "no known compressed-tensors writes"),
        ({"moe_sparsity_config": {"num_experts": [3]}}, "experts"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {**INT8, "num_bits": 16}}}}, "wider than 8 bits"),
        ({"config_groups": {"W9A9": ["Linear"]}}, "preset"),
    ],
)
def test_what_the_document_refuses_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words_of_it: str) -> None:
    with pytest.raises(Unsupported, match=words_of_it):
        read(tmp_path, config(INT8) | changes, dict(INT8_MODULE))


@pytest.mark.parametrize(
    "changes",
    [{"num_bits": "8"}, {"num_bits": True}, {"num_bits": 0}, {"num_bits": 3.5}, {"strategy": "diagonal"}, {"type": "complex"},
     {"symmetric": 1}, {"strategy": "group", "group_size": 0}, {"group_size": -2}, {"strategy": "block"}],
    ids=str,
)
def test_an_unsound_value_is_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(Damaged) as refused:
        read(tmp_path, config({**INT8, **changes}), dict(INT8_MODULE))
    assert refused.value.where.startswith("config.json: quantization_config")


@pytest.mark.parametrize("status", [{"quantization_status": "frozen", "format": "dense"}, {"quantization_status": "compressed"}])
def test_float_weights_with_scales_are_refused_by_name(tmp_path: Path, status: dict[str, str]) -> None:
    tensors = module(weight=bf16([1.0, 2.0]), weight_scale=bf16([1.0]))
    with pytest.raises(Unsupported, match="quantized at run time only") as refused:
        read(tmp_path, config(INT8) | status, tensors)
    assert refused.value.where == f"{M}.weight"


def test_declared_but_stored_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="none is stored so"):
        dialect.declare(write(tmp_path, config(INT8, format="fakequant"), module(weight=bf16([1.0, 2.0]))))


def test_codes_that_no_group_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Inconsistent, match="no config group targets"):
        read(tmp_path, config(None) | {"config_groups": {"a": group(["Embedding"], 8)}}, dict(INT8_MODULE))


def test_a_group_that_does_not_divide_k_is_refused(tmp_path: Path) -> None:
    tensors = module(weight=torch.ones(1, 12, dtype=torch.int8), weight_scale=bf16([1.0, 1.0]))
    with pytest.raises(Unsupported, match="does not divide"):
        read(tmp_path, config(W4), tensors)


def test_mxfp4_of_version_0_13_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="2 too small"):
        read(tmp_path, config({**MX, "num_bits": 4}, version="0.13.0"), mxfp4(122))


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        (module(weight=torch.ones(1, 2, dtype=torch.int8)), Inconsistent),  # no scale
        (module(weight=torch.ones(1, 2, dtype=torch.int8), weight_scale=torch.ones(1, 1, dtype=torch.int32)), AnybitError),
        (module(weight=torch.ones(1, 2, dtype=torch.int8), weight_scale=bf16([float("nan")])), Damaged),
        (module(weight=torch.ones(1, 2, dtype=torch.int8), weight_scale=bf16([float("inf")])), Damaged),
        (module(weight=fp8_bytes(0x38, 0x38), weight_scale=bf16([1.0])), Inconsistent),  # config says int8
        (dict(INT8_MODULE) | module(weight_packed=words(0)), Inconsistent),  # stored twice
        (module(weight=torch.ones(1, 1, 2, dtype=torch.int8), weight_scale=bf16([1.0])), Unsupported),  # stacked codes
        (module(weight=torch.ones(1, 2, dtype=torch.uint8), weight_scale=bf16([1.0])), Unsupported),
        (dict(INT8_MODULE) | module(bias=bf16([1.0, 2.0]).flatten()), AnybitError),
    ],
    ids=["no-scale", "int-scale", "nan", "inf", "fp8", "twice", "3-d", "uint8", "bias"],
)
def test_tensors_that_disagree_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], kind: type[AnybitError]) -> None:
    with pytest.raises(kind):
        read(tmp_path, config(INT8), tensors)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_in_an_fp8_weight_are_refused(tmp_path: Path, code: int) -> None:
    with pytest.raises(Damaged, match="NaN codes"):
        read(tmp_path, config(FP8), module(weight=fp8_bytes(0x38, code), weight_scale=bf16([1.0])))


@pytest.mark.parametrize(
    "changed",
    [{"weight_scale": fp8_bytes(0x7F)}, {"weight_scale": fp8_bytes(0xB8)}, {"weight_global_scale": torch.tensor([0.0])},
     {"weight_global_scale": torch.tensor([-1.0])}, {"weight_global_scale": torch.tensor([float("inf")])}],
    ids=["nan", "sign", "zero-divisor", "negative", "inf"],
)
def test_nvfp4_scales_that_no_writer_means_are_refused(tmp_path: Path, changed: dict[str, torch.Tensor]) -> None:
    with pytest.raises(Damaged):
        read(tmp_path, config(NVFP4), dict(NVFP4_MODULE) | module(**changed))


def test_an_asymmetric_group_without_zero_points_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Inconsistent):
        read(tmp_path, config({**W4, "symmetric": False}), packed(words(0), 8, bf16([1.0])))


def test_static_activations_without_their_scale_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Inconsistent):
        read(tmp_path, config(INT8, {**TOKEN, "strategy": "tensor", "dynamic": False}), dict(INT8_MODULE))


@pytest.mark.parametrize("changes", [{"num_bits": 6}, {"strategy": "channel"}, {"type": "float", "symmetric": False}], ids=str)
def test_activations_that_no_runtime_computes_leave_the_layer_weight_only_and_say_so(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    layer = dialect.declare(write(tmp_path, config(INT8, {**TOKEN, **changes}), dict(INT8_MODULE)))[M]
    assert layer.scheme.activation is None
    assert any("no known runtime computes its input activations" in note for note in layer.notes)


def test_int4_activations_are_those_of_the_tools_own_forward(tmp_path: Path) -> None:
    scheme = read(tmp_path, config(INT8, {**TOKEN, "num_bits": 4}), dict(INT8_MODULE)).scheme
    x = torch.tensor([[7.5, -7.5, 0.5, 1.49], [0.0, 0.0, 0.0, 0.0]])  # scale 7.5 / 7.5: round half to even, clamp to 7
    assert quantize_dequantize(x, scheme.activation, {}).tolist() == [[7.0, -8.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]


def test_every_module_without_its_scale_is_named(tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(1, 2, dtype=torch.int8) for n in range(3)}
    with pytest.raises(Inconsistent) as refused:
        dialect.declare(write(tmp_path, config(INT8), tensors))
    assert [refused.value.where, *refused.value.more] == [
        "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj.weight_scale", "model.layers.2.mlp.up_proj.weight_scale"]


def test_declaring_imports_no_torch(tmp_path: Path) -> None:
    write(tmp_path, config(W4), packed(words(0x77886777), 8, bf16([1.0])))
    script = (
        "import json, sys\nfrom pathlib import Path\n"
        "from anybit.checkpoints.contents import Contents, TensorInfo\n"
        "from anybit.checkpoints.dialects import compressed_tensors as dialect\n"
        f"folder = Path({str(tmp_path)!r}); name = {M!r}\n"
        "infos = [('weight_packed', 'I32', (1, 1)), ('weight_scale', 'BF16', (1, 1)), ('weight_shape', 'I64', (2,))]\n"
        "tensors = {f'{name}.{l}': TensorInfo(f'{name}.{l}', d, s, folder, 0, 4) for l, d, s in infos}\n"
        "config = json.loads((folder / 'config.json').read_text())\n"
        "assert dialect.declare(Contents(folder, config, tensors))[name].shape == (1, 8)\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stderr == ""
