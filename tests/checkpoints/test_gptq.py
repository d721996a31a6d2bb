"""GPTQ: every public folder bit for bit, the traps and the refusals of docs/formats/gptq.md."""

from __future__ import annotations

import subprocess
import sys
import warnings
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
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import contents_of, tensors_of, words, write

from anybit.checkpoints.dialects import awq, plain
from anybit.checkpoints.dialects import gptq as dialect
from anybit.checkpoints.dialects._shared.gptq_tensors import Facts, zero_points
from anybit.errors import AnybitError, Damaged, Inconsistent, Unsupported
from anybit.schemes import CHANNEL
from anybit.weights import QuantizedWeight
from conftest import CHECKPOINTS, genuine, needs_shared

FOLDERS = genuine("gptq-*", "autoround-asgptq-*")
M = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def config(**other: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": False, **other}


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator)


def module(
    codes: torch.Tensor, zeros: torch.Tensor, bits: int = 4, name: str = M, word_bits: int = 32, **other: torch.Tensor
) -> Tensors:
    """A module of codes [N, K] and *stored* zero points [G, N], scales 1, 2, 4 ... by group."""
    rows = codes.shape[0]
    scales = (2.0 ** torch.arange(len(zeros)))[:, None].expand(-1, rows).half()
    tensors = {"qweight": codes_down_k(codes, bits, word_bits), "qzeros": stream(zeros, bits, word_bits),
               "scales": scales, **other}
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def weight(folder: Path, quantization: dict[str, Any], tensors: Tensors, name: str = M) -> QuantizedWeight:
    return read(dialect, write(folder, quantization, tensors), name)


def zeros_of(groups: int, rows: int, value: int = 3) -> torch.Tensor:
    return torch.full((groups, rows), value)


# --- the genuine folders -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    assert_reads_bit_for_bit(dialect, folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_layer_computes_what_the_genuine_runtime_computes(folder: str) -> None:
    assert_computes_what_the_runtime_computes(dialect, folder)


@needs_shared
def test_every_public_folder_is_read() -> None:
    assert len(FOLDERS) == 13
    assert assert_computes_what_the_runtime_computes(dialect, "gptq-w4-g64-asym-descact-qwen2") == 2


@needs_shared
def test_the_documents_4_bit_words_are_read_as_written_there() -> None:
    got = genuine_weight(dialect, "gptq-w4-g64-asym-descact-qwen2", M)
    assert got.codes[0, :8].tolist() == [8, 8, 7, 10, 0, 9, 8, 4]
    assert got.group_map is not None
    assert got.group_map[:16].tolist() == [3, 3, 3, 3, 2, 3, 1, 2, 2, 3, 1, 1, 2, 2, 1, 0]


@needs_shared
def test_the_documents_3_bit_words_are_read_as_written_there() -> None:
    got = genuine_weight(dialect, "gptq-w3-g128-llama", M)
    assert "".join(map(str, got.codes[0, :32].tolist())) == "55443464535556623355442444243415"


@needs_shared
def test_the_documents_planar_words_are_read_as_written_there() -> None:
    got = genuine_weight(dialect, "gptq-p-w5-llama", "model.layers.0.self_attn.o_proj")
    assert got.codes[0, :10].tolist() == [31, 22, 25, 11, 11, 26, 22, 14, 14, 13]


# --- the traps, by their numbers in the document -----------------------------------------------------------------------

def test_trap_1_minus_one_is_undone_on_the_word_not_on_each_field(tmp_path: Path) -> None:
    stored = {"qweight": codes_down_k(random_codes(8, 8, 4), 4), "qzeros": words(0x764F787A),
              "scales": torch.ones(1, 8).half()}
    got = weight(tmp_path, config(), {f"{M}.{leaf}": t for leaf, t in stored.items()})
    assert got.offset is not None
    assert got.offset[:, 0].tolist() == [11, 8, 9, 8, 0, 6, 7, 8]


@given(st.sampled_from([2, 4, 8]), st.sampled_from([8, 16, 32]), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_trap_1_any_zero_points_survive_the_writers_subtraction(bits: int, word_bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.randint(0, 2**bits, (3, 32), generator=generator) * torch.randint(0, 2, (3, 32), generator=generator)
    ones = sum(1 << at for at in range(0, word_bits, bits))
    words_of = stream(zeros, bits, word_bits)
    stored = words_of - torch.tensor(ones).to(words_of.dtype)  # gptqmodel's v2 -> v1, wrapping as its words do
    facts = Facts(bits, 8, is_planar=False, is_minus_one=True, is_symmetric=False, may_be_lossy=False)
    assert zero_points(stored, 32, facts, "qzeros").tolist() == zeros.tolist()


def test_trap_1_a_word_of_ones_is_a_word_of_zeros(tmp_path: Path) -> None:
    # true zero points 0 in all fields, minus 0x11111111: 0xEEEEEEEF
    got = weight(tmp_path, config(meta={"quantizer": ["gptqmodel:7.7.0"]}),
                 module(random_codes(8, 8, 4), torch.tensor([[15, 14, 14, 14, 14, 14, 14, 14]])))
    assert got.offset is not None
    assert not got.offset.any()


@pytest.mark.parametrize(("form", "wanted"), [("gptq", 4), ("gptq_v2", 3), (None, 4)])
def test_trap_2_version_2_stores_zero_points_as_they_are(tmp_path: Path, form: str | None, wanted: int) -> None:
    keys = {} if form is None else {"checkpoint_format": form}
    got = weight(tmp_path, config(**keys), module(random_codes(8, 8, 4), zeros_of(1, 8)))
    assert got.offset is not None
    assert got.offset.unique().tolist() == [wanted]


def test_trap_3_zero_points_of_a_symmetric_file_are_read_all_the_same(tmp_path: Path) -> None:
    zeros = zeros_of(1, 8, 7)
    zeros[0, 5] = 2
    with pytest.warns(UserWarning, match="declared symmetric"):
        got = weight(tmp_path, config(sym=True), module(random_codes(8, 8, 4), zeros))
    assert got.offset is not None
    assert got.offset[:, 0].tolist() == [8, 8, 8, 8, 8, 3, 8, 8]


def test_trap_4_3_bit_zero_points_wrap_in_their_own_field(tmp_path: Path) -> None:
    stored = [3, 3, 7, 3, 3, 0, 1, 2, 7, 7, 7, 7] + [6] * 20
    got = weight(tmp_path, config(bits=3, group_size=32), module(random_codes(32, 32, 3), torch.tensor([stored]), 3))
    assert got.offset is not None
    assert got.offset[:, 0].tolist() == [4, 4, 0, 4, 4, 1, 2, 3, 0, 0, 0, 0] + [7] * 20


PLANES = {  # codes 0 … 31 mod 2^bits, from the document
    5: (0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98, 0xFFFF0000),
    6: (0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98, 0x00000000, 0x55555555),
    3: (0xE4E4E4E4, 0xE4E4E4E4, 0xF0F0F0F0),
}


@pytest.mark.parametrize(("bits", "form"), [(3, "gptq_p"), (5, "gptq_p"), (6, "gptq_p"), (5, "gptq"), (6, "gptq")])
def test_traps_5_and_6_planes_are_read_as_planes(tmp_path: Path, bits: int, form: str) -> None:
    column = words(*PLANES[bits]).t()
    tensors = {f"{M}.qweight": column.repeat(1, 32), f"{M}.qzeros": words(*PLANES[bits]),
               f"{M}.scales": torch.ones(1, 32).half()}
    got = weight(tmp_path, config(bits=bits, group_size=32, format=form), tensors)
    wanted = [code % 2**bits for code in range(32)]
    assert got.codes[7].tolist() == wanted
    assert got.offset is not None
    assert got.offset[:, 0].tolist() == wanted  # as stored, whatever the label says


def test_trap_7_the_product_is_rounded_once_and_in_float32(tmp_path: Path) -> None:
    tensors = module(torch.full((8, 8), 15), zeros_of(1, 8, 1))  # zero point 2
    tensors[f"{M}.scales"] = torch.full((1, 8), 0.0999755859375).half()
    assert weight(tmp_path, config(), tensors).dequantize().unique().tolist() == [13 * 0.0999755859375]


def test_trap_8_groups_are_gathered_and_codes_stay_in_place(tmp_path: Path) -> None:
    codes = random_codes(8, 16, 4)
    order = torch.tensor([1, 0] * 8, dtype=torch.int32)
    got = weight(tmp_path, config(desc_act=True), module(codes, zeros_of(2, 8, 7), g_idx=order))
    assert got.scheme.act_order
    assert got.group_map is not None
    assert got.group_map.tolist() == [1, 0] * 8
    scales = torch.tensor([2.0, 1.0] * 8)
    assert torch.equal(got.dequantize(), (codes.float() - 8) * scales)


def test_trap_9_the_weight_is_outputs_by_inputs(tmp_path: Path) -> None:
    codes = random_codes(8, 24, 4)
    got = weight(tmp_path, config(), module(codes, zeros_of(3, 8)))
    assert got.shape == (8, 24)
    assert torch.equal(got.codes, codes.to(torch.uint8))


def test_trap_10_an_all_zero_bias_is_dropped_and_another_kept(tmp_path: Path) -> None:
    codes, zeros = random_codes(8, 8, 4), zeros_of(1, 8)
    nothing = weight(tmp_path, config(), module(codes, zeros, bias=torch.zeros(8).half()))
    assert nothing.bias is None
    some = weight(tmp_path, config(), module(codes, zeros, bias=torch.ones(8).half()))
    assert some.bias is not None


def two_widths(folder: Path, dynamic: dict[str, Any], name: str = M) -> tuple[QuantizedWeight, str]:
    tensors = module(random_codes(8, 8, 8), zeros_of(1, 8), 8, name)
    contents = write(folder, config(dynamic=dynamic), tensors)
    return read(dialect, contents, name), str(dialect.declare(contents)[name].notes)


def test_trap_11_dynamic_matches_from_the_start_of_the_name(tmp_path: Path) -> None:
    got, _ = two_widths(tmp_path, {"self_attn": {"bits": 2}, r"model\.layers\.0": {"bits": 8}})
    assert got.scheme.element == "uint8"


def test_trap_11_a_match_needs_no_end(tmp_path: Path) -> None:
    name = "model.layers.10.self_attn.q_proj"
    got, _ = two_widths(tmp_path, {r"+:model\.layers\.1": {"bits": 8}}, name)
    assert got.scheme.element == "uint8"


def test_trap_11_the_first_rule_wins_and_none_is_merged(tmp_path: Path) -> None:
    got, _ = two_widths(tmp_path, {r".*q_proj": {"bits": 8}, r".*self_attn.*": {"bits": 2, "group_size": 4}})
    assert (got.scheme.element, got.scheme.scales[0].block) == ("uint8", (1, 8))


def test_trap_11_the_side_file_keeps_the_order_that_a_sorted_config_lost(tmp_path: Path) -> None:
    tensors = module(random_codes(8, 8, 8), zeros_of(1, 8), 8)
    contents = write(tmp_path, config(dynamic={"a|.*": {"bits": 2}, "b|.*": {"bits": 8}}), tensors)
    with pytest.raises(Inconsistent):
        dialect.declare(contents)
    ordered = with_side(contents, quantize_config={"dynamic": {"b|.*": {"bits": 8}, "a|.*": {"bits": 2}}})
    assert dialect.declare(ordered)[M].scheme.element == "uint8"


def test_a_skipped_module_with_packed_tensors_is_read_and_remarked(tmp_path: Path) -> None:
    contents = write(tmp_path, config(dynamic={"-:.*q_proj": {}}), module(random_codes(8, 8, 4), zeros_of(1, 8)))
    assert "tensors" in dialect.declare(contents)[M].notes[0]


def test_a_module_without_packed_tensors_is_plain_whatever_the_rules_say(tmp_path: Path) -> None:
    tensors = {**module(random_codes(8, 8, 4), zeros_of(1, 8)), "a.weight": torch.ones(8, 8)}
    assert not dialect.declare(write(tmp_path, config(), tensors))["a"].scheme.is_quantized


@pytest.mark.parametrize("word_bits", [32, 16, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_trap_12_fields_below_a_sign_bit_are_unsigned(tmp_path: Path, bits: int, word_bits: int) -> None:
    codes = torch.full((16, 16), 2**bits - 1)
    zeros = torch.full((2, 16), 2**bits - 2)  # plus one in every field: all ones, no carry
    got = weight(tmp_path, config(bits=bits, pack_dtype=f"int{word_bits}"),
                 module(codes, zeros, bits, word_bits=word_bits))
    assert got.codes.unique().tolist() == [2**bits - 1]
    assert got.offset is not None
    assert got.offset.unique().tolist() == [2**bits - 1]


def test_borrows_stop_at_the_end_of_a_16_bit_word(tmp_path: Path) -> None:
    zeros = torch.tensor([[15, 14, 14, 14, 3, 3, 3, 3]])  # 0 0 0 0 | 4 4 4 4
    got = weight(tmp_path, config(pack_dtype="int16", meta={"quantizer": ["gptqmodel:7.7.0"]}),
                 module(random_codes(8, 8, 4), zeros, word_bits=16))
    assert got.offset is not None
    assert got.offset[:, 0].tolist() == [0, 0, 0, 0, 4, 4, 4, 4]


def test_trap_13_negative_scales_keep_their_sign(tmp_path: Path) -> None:
    tensors = module(torch.full((8, 8), 9), zeros_of(1, 8, 7))
    tensors[f"{M}.scales"] = torch.full((1, 8), -0.5).half()
    assert weight(tmp_path, config(), tensors).dequantize().unique().tolist() == [-0.5]


def test_trap_14_a_partial_last_group_and_no_g_idx_are_sound(tmp_path: Path) -> None:
    codes = random_codes(8, 24, 4)
    got = weight(tmp_path, config(group_size=16), module(codes, zeros_of(2, 8, 7)))
    assert not got.scheme.act_order
    assert torch.equal(got.dequantize(), (codes.float() - 8) * torch.tensor([1.0] * 16 + [2.0] * 8))


# --- groups ----------------------------------------------------------------------------------------------------------------

def test_group_size_minus_one_is_a_channel(tmp_path: Path) -> None:
    got = weight(tmp_path, config(group_size=-1), module(random_codes(8, 32, 4), zeros_of(1, 8)))
    assert got.scheme.scales[0].block == CHANNEL


def test_a_contiguous_g_idx_is_no_act_order_even_where_desc_act_says_so(tmp_path: Path) -> None:
    index = torch.arange(16, dtype=torch.int32) // 8
    got = weight(tmp_path, config(desc_act=True), module(random_codes(8, 16, 4), zeros_of(2, 8), g_idx=index))
    assert not got.scheme.act_order
    assert got.group_map is None


def test_static_groups_declare_no_act_order(tmp_path: Path) -> None:
    index = torch.arange(16, dtype=torch.int32) // 8
    contents = write(tmp_path, config(desc_act=True, static_groups=True),
                     module(random_codes(8, 16, 4), zeros_of(2, 8), g_idx=index))
    assert not dialect.declare(contents)[M].scheme.act_order


def test_negative_group_indices_count_from_the_end(tmp_path: Path) -> None:
    index = torch.tensor([-1, -2] * 8, dtype=torch.int32)
    got = weight(tmp_path, config(desc_act=True), module(random_codes(8, 16, 4), zeros_of(2, 8), g_idx=index))
    assert got.group_map is not None
    assert got.group_map.tolist() == [1, 0] * 8


def test_an_all_zero_g_idx_of_several_groups_was_never_written(tmp_path: Path) -> None:
    index = torch.zeros(16, dtype=torch.int32)
    with pytest.warns(UserWarning, match="never written"):
        got = weight(tmp_path, config(desc_act=True), module(random_codes(8, 16, 4), zeros_of(2, 8), g_idx=index))
    assert got.group_map is None


@pytest.mark.parametrize("value", [2, -3, 2**31 - 1])
def test_a_group_index_out_of_range_is_damage(tmp_path: Path, value: int) -> None:
    index = torch.zeros(16, dtype=torch.int32)
    index[11] = value
    with pytest.raises(Damaged, match="out of range") as caught:
        weight(tmp_path, config(desc_act=True), module(random_codes(8, 16, 4), zeros_of(2, 8), g_idx=index))
    assert caught.value.found == f"{value} at position 11"
    assert caught.value.where == f"{M}.g_idx"


def test_unequal_groups_are_gathered_exactly(tmp_path: Path) -> None:
    index = torch.tensor([0] * 12 + [1] * 4, dtype=torch.int32)
    codes = random_codes(8, 16, 4)
    got = weight(tmp_path, config(desc_act=True), module(codes, zeros_of(2, 8, 7), g_idx=index))
    assert torch.equal(got.dequantize(), (codes.float() - 8) * torch.tensor([1.0] * 12 + [2.0] * 4))


def test_a_ragged_tail_of_pack_original_is_cut(tmp_path: Path) -> None:
    codes = random_codes(10, 12, 4)  # K 12: one word and a half; N 10: zeros 1.25 words
    index = torch.arange(12, dtype=torch.int32) // 8
    got = weight(tmp_path, config(), module(codes, zeros_of(2, 10), g_idx=index))
    assert torch.equal(got.codes, codes.to(torch.uint8))
    assert got.offset is not None
    assert got.offset.shape == (10, 2)


def test_a_quantized_embedding_is_read_untransposed(tmp_path: Path) -> None:
    rows = random_codes(8, 16, 4)  # [H, V] as a linear layer would have it; the table is [V, H]
    got = weight(tmp_path, config(), module(rows, zeros_of(2, 8, 7), name="model.embed_tokens"), "model.embed_tokens")
    assert got.shape == (16, 8)
    scales = torch.tensor([1.0] * 8 + [2.0] * 8)[:, None]
    assert torch.equal(got.dequantize(), (rows.t().float() - 8) * scales)


# --- Marlin ----------------------------------------------------------------------------------------------------------------

@needs_shared
def test_marlin_tiles_have_no_zero_points_and_signed_codes() -> None:
    got = genuine_weight(dialect, "gptq-marlin-w4-llama", M)
    assert got.scheme.element == "int4"
    assert got.offset is None
    assert (int(got.codes.min()), int(got.codes.max())) == (-8, 7)


def test_marlin_with_one_group_orders_scales_in_runs_of_32(tmp_path: Path) -> None:
    stored = torch.empty(1, 64)
    for run in range(2):  # stored[8 i + j] = original[2 i + (0, 1, 8, 9, 16, 17, 24, 25)[j]]
        for i in range(4):
            for j, step in enumerate((0, 1, 8, 9, 16, 17, 24, 25)):
                stored[0, 32 * run + 8 * i + j] = 32 * run + 2 * i + step
    tensors = {f"{M}.B": torch.zeros(2, 128, dtype=torch.int32), f"{M}.s": stored.half()}
    got = weight(tmp_path, config(group_size=-1, is_marlin_format=True), tensors)
    assert got.scales[0][:, 0].tolist() == list(range(64))


# --- recognition and refusals --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("raw", [
    {"quant_method": "gptq"}, {"method": "gptq", "format": "gptq"}, {"quant_method": "marlin"},
    {"quant_method": "GPTQ", "checkpoint_format": "gptq_v2"},
])
def test_recognized_by_method(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert dialect.recognizes(write(tmp_path, raw, {"a.weight": torch.ones(2, 2)}))


def test_a_gptq_method_over_awq_layouts_is_awqs(tmp_path: Path) -> None:
    contents = write(tmp_path, config(checkpoint_format="gemm"), {"a.weight": torch.ones(2, 2)})
    assert not dialect.recognizes(contents)
    assert awq.recognizes(contents)


def test_other_methods_are_passed_by_whatever_their_keys_say(tmp_path: Path) -> None:
    foreign = {"format": "pack-quantized", "version": "0.17.1"}
    for raw in (foreign, {"quant_method": "compressed-tensors", **foreign}):
        contents = write(tmp_path, raw, {"a.weight": torch.ones(2, 2)})
        assert not dialect.recognizes(contents)
        assert not awq.recognizes(contents)


def test_an_old_repository_has_only_the_side_file(tmp_path: Path) -> None:
    contents = write(tmp_path, None, module(random_codes(8, 16, 4), zeros_of(2, 8)))
    assert not dialect.recognizes(contents)
    old = with_side(contents, quantize_config={"wbits": 4, "group_size": 8, "sym": True})
    assert dialect.recognizes(old)
    assert not awq.recognizes(old)
    assert plain.recognizes(old)  # why gptq stands before plain in the table
    assert dialect.declare(old)[M].scheme.element == "uint4"


@pytest.mark.parametrize("key", ["w_bit", "wbits", "bits"])
def test_aliases_of_bits_and_group_size_are_read(tmp_path: Path, key: str) -> None:
    raw = {"quant_method": "gptq", key: 8, "q_group_size": 16}
    contents = write(tmp_path, raw, module(random_codes(8, 16, 8), zeros_of(1, 8), 8))
    assert str(dialect.declare(contents)[M].scheme) == "uint8·g16·fp16·zp"


def refusal(folder: Path, quantization: dict[str, Any], tensors: Tensors | None = None) -> AnybitError:
    tensors = tensors or module(random_codes(8, 16, 4), zeros_of(2, 8))
    contents = write(folder, quantization, tensors)
    with pytest.raises(AnybitError) as caught:
        layer = dialect.declare(contents)[M]
        dialect.canonicalize(layer, tensors_of(contents, layer))
    return caught.value


@pytest.mark.parametrize("form", ["marlin_24", "bitblas", "exl3", "fp8", "gguf", "qqq", "vptq", "paroquant"])
def test_formats_that_are_not_read_are_refused_by_name(tmp_path: Path, form: str) -> None:
    error = refusal(tmp_path, config(format=form))
    assert isinstance(error, Unsupported)
    assert form in error.problem


@pytest.mark.parametrize("extra", [{"rotation": "hadamard"}, {"adapter": {"name": "lora"}}])
def test_weights_that_need_more_at_run_time_are_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    assert isinstance(refusal(tmp_path, config(**extra)), Unsupported)


def test_an_adapter_in_the_file_is_refused(tmp_path: Path) -> None:
    tensors = module(random_codes(8, 16, 4), zeros_of(2, 8), lora_A=torch.ones(2, 2))
    assert isinstance(refusal(tmp_path, config(), tensors), Unsupported)


def test_two_formats_that_differ_are_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, config(format="gptq", checkpoint_format="gptq_v2"))
    assert isinstance(error, Inconsistent)
    assert "gptq_v2" in error.found


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_of_the_other_version_are_refused(tmp_path: Path, form: str) -> None:
    wrong = 8 if form == "gptq" else 7
    error = refusal(tmp_path, config(sym=True, format=form), module(random_codes(8, 16, 4), zeros_of(2, 8, wrong)))
    assert isinstance(error, Inconsistent)
    assert error.where == f"{M}.qzeros"


def test_lost_zero_points_are_remarked_where_gptqmodel_did_not_write(tmp_path: Path) -> None:
    tensors = module(random_codes(8, 8, 4), torch.tensor([[3, 3, 3, 3, 3, 15, 15, 15]]))
    with pytest.warns(UserWarning, match="may have lost"):
        weight(tmp_path, config(), tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight(tmp_path, config(meta={"quantizer": ["gptqmodel:7.7.0"]}), tensors)


def test_a_width_that_fits_no_shape_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    error = refusal(tmp_path, config(bits=8))
    assert isinstance(error, Inconsistent)
    assert "4 bits" in error.wanted


def test_a_group_size_that_fits_no_scales_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, config(group_size=4))
    assert isinstance(error, Inconsistent)
    assert error.wanted == "[4, 8] (K 16, group size 4)"


def test_every_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = module(random_codes(8, 16, 4), zeros_of(2, 8)) | module(random_codes(8, 16, 4), zeros_of(2, 8), name="b")
    del tensors[f"{M}.qzeros"], tensors["b.scales"]
    error = refusal(tmp_path, config(), tensors)
    assert isinstance(error, Inconsistent)
    assert {error.where, *error.more} == {f"{M}.qzeros", "b.scales"}


def test_a_module_stored_twice_is_refused(tmp_path: Path) -> None:
    tensors = module(random_codes(8, 16, 4), zeros_of(2, 8), weight=torch.ones(8, 16))
    assert refusal(tmp_path, config(), tensors).problem == "a module stored twice"


def test_3_bits_in_narrow_words_are_refused(tmp_path: Path) -> None:
    tensors = module(random_codes(32, 32, 3), zeros_of(1, 32), 3, word_bits=16)
    assert isinstance(refusal(tmp_path, config(bits=3, group_size=32, pack_dtype="int16"), tensors), Unsupported)


def test_words_of_64_bits_are_refused(tmp_path: Path) -> None:
    tensors = module(random_codes(8, 16, 4), zeros_of(2, 8))
    tensors[f"{M}.qweight"] = torch.zeros(1, 8, dtype=torch.int64)
    assert isinstance(refusal(tmp_path, config(pack_dtype="int64"), tensors), Unsupported)


def test_a_float_g_idx_is_damage(tmp_path: Path) -> None:
    tensors = module(random_codes(8, 16, 4), zeros_of(2, 8), g_idx=torch.zeros(16))
    assert isinstance(refusal(tmp_path, config(), tensors), Damaged)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_damage(tmp_path: Path, value: float) -> None:
    tensors = module(random_codes(8, 16, 4), zeros_of(2, 8))
    tensors[f"{M}.scales"][1, 3] = value
    assert isinstance(refusal(tmp_path, config(), {k: t.clone() for k, t in tensors.items()}), Damaged)


@pytest.mark.parametrize("raw", [
    {"bits": "4"}, {"bits": True}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}, {"dynamic": []},
    {"dynamic": {"a": 4}}, {"format": 4}, {"desc_act": 1},
])
def test_unsound_values_of_the_configuration_are_damage(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert isinstance(refusal(tmp_path, config(**raw)), Damaged)


def test_declaring_imports_no_torch() -> None:
    modules = ("gptq", "awq", "auto_round", "fp8", "fbgemm_fp8", "gpt_oss_mxfp4")
    named = ", ".join(f"anybit.checkpoints.dialects.{module}" for module in modules)
    code = f"import sys, {named}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_declared_storage_counts_every_tensor(tmp_path: Path) -> None:
    contents = write(tmp_path, config(), module(random_codes(8, 16, 4), zeros_of(2, 8)))
    layer = dialect.declare(contents)[M]
    assert layer.stored_bytes == 8 * 16 // 2 + 2 * 8 // 2 + 2 * 8 * 2


@needs_shared
def test_experts_of_one_layer_may_differ() -> None:
    contents = contents_of(CHECKPOINTS / "gptq-w4-qwen3moe")
    layers = dialect.declare(contents)
    stem = "model.layers.0.mlp.experts"
    assert layers[f"{stem}.2.gate_proj"].scheme.element == "uint8"
    assert layers[f"{stem}.1.gate_proj"].scheme.element == "uint4"
    assert not layers[f"{stem}.3.down_proj"].scheme.is_quantized
