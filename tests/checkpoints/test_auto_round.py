"""AutoRound: every public folder bit for bit, the traps and the refusals of docs/formats/auto_round.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_checks import (
    assert_computes_what_the_runtime_computes,
    assert_reads_bit_for_bit,
    codes_down_k,
    genuine_weight,
    read,
    stream,
    with_side,
)
from small_checkpoints import fp8_bytes, tensors_of, words, write

from anybit.checkpoints.dialects import auto_round as dialect
from anybit.checkpoints.dialects import gptq
from anybit.errors import AnybitError, Inconsistent, Unsupported
from anybit.numerics.activations import quantize_dequantize
from anybit.weights import QuantizedWeight
from conftest import genuine, needs_shared

FOLDERS = [name for name in genuine("autoround-*") if "-asgptq-" not in name]
M = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def config(**other: Any) -> dict[str, Any]:
    return {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int",
            "packing_format": "auto_round:auto_gptq", **other}


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator)


def module(bits: int = 4, stored_zero: int = 3, name: str = M) -> Tensors:
    """A module [32, 64] of random codes in GPTQ's layout without g_idx, groups of 32."""
    codes = random_codes(32, 64, bits)
    zeros = torch.full((2, 32), stored_zero)
    return {f"{name}.qweight": codes_down_k(codes, bits), f"{name}.qzeros": stream(zeros, bits),
            f"{name}.scales": torch.ones(2, 32).half()}


def weight(folder: Path, quantization: dict[str, Any], tensors: Tensors, name: str = M) -> QuantizedWeight:
    return read(dialect, write(folder, quantization, tensors), name)


# --- the genuine folders -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    assert_reads_bit_for_bit(dialect, folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_layer_computes_what_the_genuine_runtime_computes(folder: str) -> None:
    assert_computes_what_the_runtime_computes(dialect, folder)


@needs_shared
def test_every_public_folder_is_read() -> None:
    assert len(FOLDERS) == 5
    assert assert_computes_what_the_runtime_computes(dialect, "autoround-mxfp4-llama") == 4


@needs_shared
def test_the_documents_values_are_read_as_written_there() -> None:
    got = genuine_weight(dialect, "autoround-w4-gptq-llama", M).dequantize()
    assert got[0, :3].tolist() == [-0.06787109375, 0.0509033203125, -0.0169677734375]
    mx = genuine_weight(dialect, "autoround-mxfp4-llama", M).dequantize()
    assert mx[0, :6].tolist() == [0.015625, 0.0, 0.09375, 0.09375, -0.03125, -0.046875]


# --- the traps, by their numbers in the document -----------------------------------------------------------------------

@pytest.mark.parametrize(("packing", "wanted"), [
    (None, 4), ("auto", 4), ("auto_round:auto_gptq", 4), ("auto_round:gptq", 4), ("auto_round:gptq:tritonv2", 4),
    ("auto_round", 3), ("auto_round:exllamav2", 3), ("auto_round:tritonv2", 3),
    ("auto_round:gptqmodel", 3), ("auto_round:gptqmodel:exllamav2", 3),
])
def test_traps_1_and_3_the_packing_format_says_how_zero_points_are_stored(
    tmp_path: Path, packing: str | None, wanted: int
) -> None:
    got = weight(tmp_path, config(packing_format=packing), module())
    assert got.offset is not None
    assert got.offset.unique().tolist() == [wanted]


STREAMS = {  # codes 0 … 31 by the genuine packers, from the document
    5: (0x8A418820, 0xC5A92839, 0xCA307B9A, 0x38BDAB49, 0xFFBBCDEB),
    6: (0x440C2040, 0xA2481C61, 0x3CE34C2C, 0x544D2450, 0xA6585D65, 0x7DE75C6D),
    7: (0x40608080, 0x880E1828, 0x68C16284, 0x88901E38, 0x58A94264, 0x668C982E, 0x3E78E9C3),
    3: (0x88FAC688, 0xC688FAC6, 0xFAC688FA),
}
AWQ_STREAMS = {
    5: (0x46131040, 0x97314839, 0x52507B56, 0x58BD671B, 0xFF779F73),
    6: (0xC1184080, 0xC2881C50, 0x3CD2C938, 0xD1594490, 0xC6985D54, 0x7DD6D979),
    7: (0x10C10100, 0x080E1418, 0x5891C305, 0x09101E34, 0x549912C5, 0xC70D182E, 0x3E74D993),
}


@pytest.mark.parametrize("bits", STREAMS)
def test_trap_2_odd_widths_are_a_stream_not_planes(tmp_path: Path, bits: int) -> None:
    row = words(*STREAMS[bits])
    tensors = {f"{M}.qweight": row.t().repeat(1, 32), f"{M}.qzeros": row, f"{M}.scales": torch.ones(1, 32).half()}
    wanted = torch.arange(32) % 2**bits
    raw = weight(tmp_path, config(bits=bits, packing_format="auto_round"), tensors)
    assert raw.codes[5].tolist() == wanted.tolist()
    assert raw.offset is not None
    assert raw.offset[:, 0].tolist() == wanted.tolist()
    shifted = weight(tmp_path, config(bits=bits), tensors)
    assert shifted.offset is not None
    assert shifted.offset[:, 0].tolist() == ((wanted + 1) % 2**bits).tolist()


@pytest.mark.parametrize("bits", AWQ_STREAMS)
def test_trap_2_awqs_odd_widths_are_ordered_before_the_stream(tmp_path: Path, bits: int) -> None:
    row = words(*AWQ_STREAMS[bits])
    tensors = {f"{M}.qweight": row.repeat(32, 1), f"{M}.qzeros": row, f"{M}.scales": torch.ones(1, 32).half()}
    got = weight(tmp_path, config(bits=bits, packing_format="auto_round:auto_awq"), tensors)
    assert got.codes[:, 3].tolist() == list(range(32))
    assert got.offset is not None
    assert got.offset[:, 0].tolist() == list(range(32))


def test_trap_4_group_indices_are_absent(tmp_path: Path) -> None:
    got = weight(tmp_path, config(), module())
    assert got.group_map is None
    assert got.scales[0].shape == (32, 2)


def element(folder: Path, entries: dict[str, Any], bits: int = 8, name: str = M) -> str:
    """The element that a module of `bits` gets where no note says that the tensors overruled the configuration."""
    layer = dialect.declare(write(folder, config(extra_config=entries), module(bits, name=name)))[name]
    return layer.scheme.element if not layer.notes else "overruled"


def test_trap_5_regular_expressions_search(tmp_path: Path) -> None:
    assert element(tmp_path, {"self_attn.q_[p]": {"bits": 8}}) == "uint8"


def test_trap_5_a_key_without_signs_is_no_expression(tmp_path: Path) -> None:
    assert element(tmp_path, {"self_attn": {"bits": 8}}, bits=4) == "uint4"


def test_trap_5_exact_names_win_over_expressions(tmp_path: Path) -> None:
    assert element(tmp_path, {".*q_proj.*": {"bits": 16}, M: {"bits": 8}}) == "uint8"


def test_trap_5_the_first_expression_wins(tmp_path: Path) -> None:
    assert element(tmp_path, {".*q_proj.*": {"bits": 8}, ".*self.*": {"bits": 2}}) == "uint8"


def test_a_key_may_be_the_last_names_of_a_module(tmp_path: Path) -> None:
    assert element(tmp_path, {"lm_head": {"bits": 8}}, name="model.language_model.lm_head") == "uint8"


def test_trap_6_an_entry_that_changes_the_group_keeps_the_bits(tmp_path: Path) -> None:
    got = weight(tmp_path, config(group_size=64, extra_config={M: {"group_size": 32}}), module())
    assert str(got.scheme) == "uint4·g32·fp16·zp"


def test_where_rule_and_tensors_disagree_the_tensors_decide(tmp_path: Path) -> None:
    contents = write(tmp_path, config(extra_config={".*q_proj": {"bits": 16}}), module(bits=2))
    layer = dialect.declare(contents)[M]
    assert layer.scheme.element == "uint2"
    assert "16 bits" in layer.notes[0]


@needs_shared
def test_trap_7_the_output_head_may_be_quantized() -> None:
    assert genuine_weight(dialect, "autoround-mixed-qwen3", "lm_head").scheme.element == "uint4"


def test_trap_7_an_entry_for_the_head_alone_proves_nothing(tmp_path: Path) -> None:
    tensors = {**module(), "lm_head.weight": torch.ones(32, 64).bfloat16()}
    layers = dialect.declare(write(tmp_path, config(extra_config={"lm_head": {"bits": 4}}), tensors))
    assert not layers["lm_head"].scheme.is_quantized


def test_trap_8_block_fp8_scales_are_bfloat16_and_multiply(tmp_path: Path) -> None:
    raw = config(bits=8, data_type="fp", group_size=[1, 2], packing_format="auto_round:fp8", weight_block_size=[1, 2],
                 act_bits=8, act_data_type="fp", act_group_size=128, act_dynamic=True)
    tensors = {f"{M}.weight": fp8_bytes(0x38, 0x40, 0x44, 0x48),
               f"{M}.weight_scale_inv": torch.tensor([[0.5, 4.0]]).bfloat16()}
    got = weight(tmp_path, raw, tensors)
    assert got.dequantize().tolist() == [[0.5, 1.0, 12.0, 16.0]]
    assert got.scheme.scales[0].format == "bfloat16"
    assert str(got.scheme.activation) == "fp8_e4m3fn dynamic g128"


def test_weight_only_fp8_has_one_scale(tmp_path: Path) -> None:
    raw = config(bits=8, data_type="fp", group_size=0, packing_format=None)
    tensors = {f"{M}.weight": fp8_bytes(0x38, 0x40), f"{M}.weight_scale": torch.tensor([2.0]).bfloat16()}
    got = weight(tmp_path, raw, tensors)
    assert got.dequantize().tolist() == [[2.0, 4.0]]
    assert got.scheme.activation is None


def test_static_fp8_activations_use_the_stored_scale(tmp_path: Path) -> None:
    raw = config(bits=8, data_type="fp", group_size=0, packing_format="auto_round:fp8_static", act_bits=8,
                 act_data_type="fp", act_dynamic=False)
    tensors = {f"{M}.weight": fp8_bytes(0x38, 0x40), f"{M}.weight_scale": torch.tensor([2.0]).bfloat16(),
               f"{M}.input_scale": torch.tensor([0.5]).bfloat16()}
    got = weight(tmp_path, raw, tensors)
    assert got.activation["scale"].tolist() == [0.5]
    assert str(got.scheme.activation) == "fp8_e4m3fn static tensor"


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_fp8_has_a_scale_a_row_where_the_group_is_the_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Scheme FP8_STATIC: the tool stores the scales of the rows in one dimension."""
    raw = config(bits=8, data_type="fp", group_size=-1, packing_format="auto_round:fp8_static", act_bits=8,
                 act_data_type="fp", act_dynamic=False)
    tensors = {f"{M}.weight": fp8_bytes(0x38, 0x40).repeat(2, 1), f"{M}.input_scale": torch.tensor([0.5]).bfloat16(),
               f"{M}.weight_scale": torch.tensor([2.0, 0.5]).bfloat16().reshape(shape)}
    got = weight(tmp_path, raw, tensors)
    assert got.dequantize().tolist() == [[2.0, 4.0], [0.5, 1.0]]
    assert str(got.scheme) == "fp8_e4m3fn·channel·bf16 | a: fp8_e4m3fn static tensor"


def test_fp8_scales_of_groups_lie_in_one_row_one_weight_row_after_another(tmp_path: Path) -> None:
    raw = config(bits=8, data_type="fp", group_size=2, packing_format=None)
    tensors = {f"{M}.weight": fp8_bytes(*[0x38] * 4).repeat(2, 1),
               f"{M}.weight_scale": torch.tensor([1.0, 2.0, 3.0, 4.0]).bfloat16()}
    assert weight(tmp_path, raw, tensors).dequantize().tolist() == [[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]]


@pytest.mark.parametrize("count", [3, 6])
def test_fp8_scales_that_serve_nobody_are_refused(tmp_path: Path, count: int) -> None:
    tensors = {f"{M}.weight": fp8_bytes(*[0x38] * 4).repeat(2, 1), f"{M}.weight_scale": torch.ones(count).bfloat16()}
    assert isinstance(refusal(tmp_path, config(bits=8, data_type="fp", packing_format=None), tensors), Inconsistent)


def test_fp8_in_another_format_than_e4m3_is_refused(tmp_path: Path) -> None:
    tensors = {f"{M}.weight": torch.ones(1, 2).to(torch.float8_e5m2), f"{M}.weight_scale": torch.ones(1).bfloat16()}
    error = refusal(tmp_path, config(bits=8, data_type="fp8_e5m2", packing_format=None), tensors)
    assert "F8_E5M2" in error.found


MX = {"group_size": 32, "packing_format": "auto_round:llm_compressor", "act_dynamic": True, "sym": True}


def four_bit(byte: int, scale: int = 127) -> Tensors:
    return {f"{M}.weight_packed": torch.full((1, 16), byte, dtype=torch.uint8),
            f"{M}.weight_scale": torch.tensor([[scale]], dtype=torch.uint8)}


def test_trap_9_the_low_nibble_is_first(tmp_path: Path) -> None:
    raw = config(**MX, data_type="mx_fp", act_bits=4, act_data_type="mx_fp")
    got = weight(tmp_path, raw, four_bit(0x72, 128))
    assert got.dequantize()[0, :2].tolist() == [2.0, 12.0]
    assert got.scheme.activation is not None
    assert got.scheme.activation.recipe == "mx_floor_autoround"


@pytest.mark.parametrize(("bits", "element"), [(4, "fp4_e2m1"), (8, "fp8_e4m3fn")])
def test_mx_fp_rceil_rounds_the_shared_exponent_of_activations_up(tmp_path: Path, bits: int, element: str) -> None:
    raw = config(**MX, bits=bits, data_type="mx_fp", act_bits=bits, act_data_type="mx_fp_rceil")
    codes = {f"{M}.weight": fp8_bytes(*[0x38] * 32), f"{M}.weight_scale": torch.tensor([[127]], dtype=torch.uint8)}
    spec = weight(tmp_path, raw, four_bit(0x22) if bits == 4 else codes).scheme.activation
    assert (spec.element, spec.recipe) == (element, "mx_rceil")
    x = torch.zeros(1, 32)
    x[0, 0] = 7.0 if bits == 4 else 449.0  # above the largest element: the next power of two, 3.5 and 224 are stored
    assert quantize_dequantize(x, spec)[0, 0].item() == (8.0 if bits == 4 else 448.0)


def test_nvfp4_v2_has_unsigned_e5m3_scales_and_no_other(tmp_path: Path) -> None:
    raw = config(data_type="nvfp4_v2", group_size=16, packing_format="auto_round:llm_compressor", act_bits=4,
                 act_data_type="nvfp4_v2")
    tensors = {f"{M}.weight_packed": torch.full((1, 16), 0x72, dtype=torch.uint8),
               f"{M}.weight_scale": torch.tensor([[0x78, 0x01]], dtype=torch.uint8)}  # 1.0 and 2^-17
    got = weight(tmp_path, raw, tensors)
    assert got.dequantize()[0, [0, 1, 16, 17]].tolist() == [1.0, 6.0, 2.0**-17, 6 * 2.0**-17]
    assert got.scheme.activation.recipe == "fp4_ue5m3_autoround"


def test_mxint4_is_a_sign_and_quarters(tmp_path: Path) -> None:
    raw = config(**{**MX, "packing_format": "auto_round"}, data_type="mx_int")
    got = weight(tmp_path, raw, four_bit(0xF3))
    assert got.dequantize()[0, :2].tolist() == [0.75, -1.75]


def test_mxfp8_has_e8m0_scales_of_32(tmp_path: Path) -> None:
    raw = config(**MX, bits=8, data_type="mx_fp", act_bits=8, act_data_type="mx_fp")
    tensors = {f"{M}.weight": fp8_bytes(*[0x38] * 64), f"{M}.weight_scale": torch.tensor([[128, 126]], dtype=torch.uint8)}
    got = weight(tmp_path, raw, tensors)
    assert got.dequantize().tolist() == [[2.0] * 32 + [0.5] * 32]
    assert str(got.scheme) == "mxfp8·g32·e8m0 | a: fp8_e4m3fn dynamic g32"


def test_nvfp4_divides_by_its_global_scale(tmp_path: Path) -> None:
    raw = config(data_type="nv_fp", group_size=16, packing_format="auto_round:llm_compressor", act_bits=4,
                 act_data_type="nv_fp4_with_static_gs")
    tensors = {f"{M}.weight_packed": torch.full((1, 8), 0x22, dtype=torch.uint8), f"{M}.weight_scale": fp8_bytes(0x40),
               f"{M}.weight_global_scale": torch.tensor([4.0]), f"{M}.input_global_scale": torch.tensor([8.0])}
    got = weight(tmp_path, raw, tensors)
    assert got.dequantize().unique().tolist() == [0.5]
    assert got.activation["global_scale"].tolist() == [8.0]


def test_trap_10_negative_scales_keep_their_sign(tmp_path: Path) -> None:
    tensors = module()
    tensors[f"{M}.scales"] = -tensors[f"{M}.scales"]
    got = weight(tmp_path, config(), tensors)
    assert torch.equal(got.dequantize(), -(got.codes.float() - 4))


# --- recognition and refusals --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
def test_recognized_by_method(tmp_path: Path, method: str) -> None:
    assert dialect.recognizes(write(tmp_path, {"quant_method": method}, module()))


def test_the_config_wins_over_the_side_file(tmp_path: Path) -> None:
    contents = write(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32}, module())
    both = with_side(contents, quantization_config={"quant_method": "intel/auto-round"})
    assert not dialect.recognizes(both)
    assert gptq.recognizes(both)


def test_the_side_file_alone_is_enough(tmp_path: Path) -> None:
    contents = with_side(write(tmp_path, None, module()), quantization_config=config())
    assert read(dialect, contents, M).shape == (32, 64)


def refusal(folder: Path, quantization: dict[str, Any], tensors: Tensors | None = None) -> AnybitError:
    contents = write(folder, quantization, tensors or module())
    with pytest.raises(AnybitError) as caught:
        layer = dialect.declare(contents)[M]
        dialect.canonicalize(layer, tensors_of(contents, layer))
    return caught.value


@pytest.mark.parametrize("packing", ["mlx", "auto_round:mlx", "auto_round:fake", "itrex"])
def test_unread_packings_are_refused_by_name(tmp_path: Path, packing: str) -> None:
    error = refusal(tmp_path, config(packing_format=packing))
    assert isinstance(error, Unsupported)
    assert packing in error.problem


@pytest.mark.parametrize("key", ["rotation_config", "spinquant_config"])
def test_rotated_inputs_are_refused(tmp_path: Path, key: str) -> None:
    assert isinstance(refusal(tmp_path, config(**{key: {"hadamard": True}})), Unsupported)
    assert isinstance(refusal(tmp_path, config(extra_config={M: {"rotation_config": {"a": 1}}})), Unsupported)


def test_symmetric_zero_points_of_the_other_packing_are_refused(tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path, config(sym=True), module(stored_zero=8)), Inconsistent)
    assert isinstance(refusal(tmp_path, config(sym=True, packing_format="auto_round"), module(stored_zero=7)), Inconsistent)


def test_integer_activations_are_remarked_not_run(tmp_path: Path) -> None:
    contents = write(tmp_path, config(act_bits=8, act_data_type="int"), module())
    layer = dialect.declare(contents)[M]
    assert layer.scheme.activation is None
    assert "not quantized" in layer.notes[0]
