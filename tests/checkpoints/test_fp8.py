"""fp8: every public folder bit for bit, the traps and the refusals of docs/formats/fp8.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_checks import (
    assert_computes_what_the_runtime_computes,
    assert_reads_bit_for_bit,
    genuine_weight,
    product,
    read,
)
from small_checkpoints import fp8_bytes, tensors_of, write

from anybit.checkpoints.dialects import fp8 as dialect
from anybit.errors import AnybitError, Damaged, Inconsistent, Unsupported
from anybit.numerics.activations import quantize_dequantize
from anybit.schemes import TENSOR
from anybit.weights import QuantizedWeight
from conftest import genuine, needs_shared

FOLDERS = genuine("fp8-*")
M = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts"
ONE, TWO, NAN = 0x38, 0x40, 0x7F
Tensors = dict[str, torch.Tensor]


def config(**other: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **other}


def ones(rows: int, columns: int) -> torch.Tensor:
    """A weight of e4m3 ones."""
    return torch.full((rows, columns), ONE, dtype=torch.uint8).view(torch.float8_e4m3fn)


def named(name: str = M, **tensors: torch.Tensor) -> Tensors:
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def e8m0(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def weight(folder: Path, quantization: dict[str, Any], tensors: Tensors, name: str = M) -> QuantizedWeight:
    return read(dialect, write(folder, quantization, tensors), name)


# --- the genuine folders -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    assert_reads_bit_for_bit(dialect, folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_layer_computes_what_the_genuine_runtime_computes(folder: str) -> None:
    assert assert_computes_what_the_runtime_computes(dialect, folder) >= 2


@needs_shared
def test_every_public_folder_is_read() -> None:
    assert len(FOLDERS) == 8


@needs_shared
def test_the_documents_values_are_read_as_written_there() -> None:
    got = genuine_weight(dialect, "fp8-block-e8m0-qwen3", M)
    assert got.scales[0].tolist() == [[0x77, 0x75], [0x77, 0x76]]
    assert got.dequantize()[0, :4].tolist() == [0.0087890625, -0.021484375, 0.00244140625, 0.0087890625]


# --- the traps, by their numbers in the document -----------------------------------------------------------------------

@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_trap_1_every_scale_multiplies_whatever_its_name(tmp_path: Path, leaf: str) -> None:
    got = weight(tmp_path, config(), named(weight=ones(2, 2), **{leaf: torch.tensor(0.25)}))
    assert got.dequantize().unique().tolist() == [0.25]


def test_trap_2_u8_scales_are_exponents(tmp_path: Path) -> None:
    raw = config(quant_method="mxfp8", weight_block_size=[1, 32], scale_fmt="ue8m0")
    got = weight(tmp_path, raw, named(weight=ones(1, 64), weight_scale_inv=e8m0([128, 120])))
    assert got.dequantize().tolist() == [[2.0] * 32 + [2.0**-7] * 32]
    assert got.scheme.activation is not None
    assert (got.scheme.activation.recipe, got.scheme.activation.group_size) == ("mxfp8_log2", 32)


def test_mxfp8_without_a_block_size_means_32(tmp_path: Path) -> None:
    got = weight(tmp_path, config(quant_method="mxfp8"), named(weight=ones(1, 64), weight_scale_inv=e8m0([127, 127])))
    assert got.scheme.scales[0].block == (1, 32)


def test_traps_3_and_12_blocks_are_rows_first_and_the_last_is_short(tmp_path: Path) -> None:
    grid = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])  # N 5 in blocks of 4, K 5 in blocks of 2
    got = weight(tmp_path, config(weight_block_size=[4, 2]), named(weight=ones(5, 5), weight_scale_inv=grid))
    wanted = [[1.0, 1.0, 2.0, 2.0, 4.0]] * 4 + [[8.0, 8.0, 16.0, 16.0, 32.0]]
    assert got.dequantize().tolist() == wanted


def test_trap_4_a_bfloat16_scale_meets_the_code_in_float32(tmp_path: Path) -> None:
    scale = torch.tensor([[1.0078125]]).bfloat16()  # 8 bits of mantissa, the code 1.875 has 4: 12 in all
    codes = torch.tensor([[0x3F]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    got = weight(tmp_path, config(weight_block_size=[128, 128]), named(weight=codes, weight_scale_inv=scale))
    assert got.dequantize().tolist() == [[1.875 * 1.0078125]]


def test_trap_5_fused_layers_keep_their_own_scales(tmp_path: Path) -> None:
    tensors = named(weight=ones(2, 2), weight_scale=torch.tensor(2.0))
    tensors |= named("model.layers.0.self_attn.k_proj", weight=ones(2, 2), weight_scale=torch.tensor(0.5))
    contents = write(tmp_path, config(), tensors)
    assert read(dialect, contents, M).dequantize().unique().tolist() == [2.0]
    assert read(dialect, contents, "model.layers.0.self_attn.k_proj").dequantize().unique().tolist() == [0.5]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trap_6_a_scale_for_all_has_any_shape_and_float_dtype(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    got = weight(tmp_path, config(), named(weight=ones(2, 3), weight_scale=torch.full(shape, 0.5, dtype=dtype)))
    assert got.scheme.scales[0].block == TENSOR
    assert got.dequantize().unique().tolist() == [0.5]


@pytest.mark.parametrize("leaf", ["input_scale", "activation_scale"])
def test_trap_7_static_scales_have_two_names(tmp_path: Path, leaf: str) -> None:
    tensors = named(weight=ones(2, 2), weight_scale_inv=torch.tensor(1.0), **{leaf: torch.tensor(0.5).bfloat16()})
    got = weight(tmp_path, config(activation_scheme="static", weight_block_size=None), tensors)
    assert got.scheme.activation is not None
    assert got.scheme.activation.recipe == "fp8_static"
    assert got.activation["scale"].tolist() == [0.5]
    assert product(got, torch.tensor([[1000.0, 0.0]])).tolist() == [[224.0, 224.0]]  # saturates at 448 * 0.5


def fused(block: list[int] | None, gate_up: torch.Tensor, down: torch.Tensor, inner: int = 6) -> Tensors:
    """Two experts of hidden size 4 with their scales as transformers 5 writes them."""
    tensors = {f"{EXPERTS}.gate_up_proj_scale_inv": gate_up, f"{EXPERTS}.down_proj_scale_inv": down}
    for e in range(2):
        for part, shape in (("gate_proj", (inner, 4)), ("up_proj", (inner, 4)), ("down_proj", (4, inner))):
            tensors[f"{EXPERTS}.{e}.{part}.weight"] = ones(*shape)
    return tensors


def test_trap_8_rows_of_up_follow_those_of_gate_in_a_fused_grid(tmp_path: Path) -> None:
    # 2 I = 12 rows in blocks of 4: the middle scale covers gate rows 4, 5 and up rows 0, 1
    gate_up = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).reshape(2, 3, 1)
    down = torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(2, 1, 2)
    contents = write(tmp_path, config(weight_block_size=[4, 4]), fused([4, 4], gate_up, down))
    column = {part: read(dialect, contents, f"{EXPERTS}.1.{part}").dequantize()[:, 0].tolist()
              for part in ("gate_proj", "up_proj")}
    assert column == {"gate_proj": [8.0] * 4 + [16.0] * 2, "up_proj": [16.0] * 2 + [32.0] * 4}
    assert read(dialect, contents, f"{EXPERTS}.1.down_proj").dequantize()[0].tolist() == [4.0] * 4 + [8.0] * 2


def test_an_aligned_fused_grid_stays_a_grid(tmp_path: Path) -> None:
    gate_up = torch.arange(1.0, 9.0).reshape(2, 4, 1)
    contents = write(tmp_path, config(weight_block_size=[2, 4]), fused([2, 4], gate_up, torch.ones(2, 2, 1), inner=4))
    up = read(dialect, contents, f"{EXPERTS}.1.up_proj")
    assert up.scheme.scales[0].block == (2, 4)
    assert up.scales[0].tolist() == [[7.0], [8.0]]


def test_fused_scales_without_blocks_are_one_for_gate_and_one_for_up(tmp_path: Path) -> None:
    gate_up, down = torch.arange(1.0, 5.0).reshape(2, 2, 1), torch.tensor([5.0, 6.0]).reshape(2, 1, 1)
    contents = write(tmp_path, config(), fused(None, gate_up, down))
    got = [read(dialect, contents, f"{EXPERTS}.1.{part}").dequantize()[0, 0].item()
           for part in ("gate_proj", "up_proj", "down_proj")]
    assert got == [3.0, 4.0, 6.0]


def test_a_scale_of_an_experts_own_wins_over_the_fused_one(tmp_path: Path) -> None:
    tensors = fused([4, 4], torch.ones(2, 3, 1), torch.ones(2, 1, 2))
    tensors[f"{EXPERTS}.0.gate_proj.weight_scale_inv"] = torch.tensor([[7.0], [9.0]])
    got = weight(tmp_path, config(weight_block_size=[4, 4]), tensors, f"{EXPERTS}.0.gate_proj")
    assert got.dequantize()[:, 0].tolist() == [7.0] * 4 + [9.0] * 2


def test_fused_scales_that_fit_no_grid_are_refused(tmp_path: Path) -> None:
    tensors = fused([4, 4], torch.ones(2, 4, 1), torch.ones(2, 1, 2))
    with pytest.raises(Inconsistent, match="fused scales"):
        dialect.declare(write(tmp_path, config(weight_block_size=[4, 4]), tensors))


def test_trap_9_a_scale_beside_an_unquantized_weight_is_no_scale(tmp_path: Path) -> None:
    tensors = named(weight=torch.ones(2, 2).bfloat16(), weight_scale_inv=torch.full((1, 1), float("nan")))
    contents = write(tmp_path, config(weight_block_size=[128, 128]), tensors)
    layer = dialect.declare(contents)[M]
    assert not layer.scheme.is_quantized
    assert "unused scale" in layer.notes[0]
    assert dialect.canonicalize(layer, tensors_of(contents, layer)).dequantize().tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_trap_10_e8m0_0_is_small_and_255_is_refused(tmp_path: Path) -> None:
    raw = config(weight_block_size=[1, 2], scale_fmt="ue8m0")
    got = weight(tmp_path, raw, named(weight=ones(1, 2), weight_scale_inv=e8m0([0])))
    assert got.dequantize().unique().tolist() == [2.0**-127]
    assert isinstance(refusal(tmp_path, raw, named(weight=ones(1, 2), weight_scale_inv=e8m0([255]))), Damaged)


def test_trap_11_activations_beyond_the_largest_code_saturate(tmp_path: Path) -> None:
    """Some releases of torch turn what is above 464 into NaN when they cast."""
    tensors = named(weight=ones(1, 4), weight_scale=torch.tensor(1.0), input_scale=torch.tensor(1.0))
    got = weight(tmp_path, config(activation_scheme="static"), tensors)
    x = torch.tensor([[500.0, -500.0, float("inf"), 463.0]])
    assert got.scheme.activation is not None
    assert quantize_dequantize(x, got.scheme.activation, got.activation).tolist() == [[448.0, -448.0, 448.0, 448.0]]


def test_every_module_without_its_scale_is_named(tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": ones(4, 4) for n in range(3)}
    with pytest.raises(Inconsistent) as refused:
        dialect.declare(write(tmp_path, config(), tensors))
    assert [refused.value.where, *refused.value.more] == ["model.layers.0.mlp.up_proj", *(
        f"model.layers.{n}.mlp.up_proj.weight_scale_inv" for n in (1, 2))]


def recipe(folder: Path, scale: torch.Tensor, **other: Any) -> tuple[str, int]:
    got = weight(folder, config(**other), named(weight=ones(4, 4), weight_scale_inv=scale)).scheme.activation
    assert got is not None
    return got.recipe, got.group_size


def test_trap_13_dynamic_is_per_token_without_blocks_and_by_columns_of_a_block_with_them(tmp_path: Path) -> None:
    assert recipe(tmp_path, torch.tensor(1.0)) == ("fp8_token", 0)
    assert recipe(tmp_path, torch.ones(1, 2), weight_block_size=[4, 2]) == ("fp8_group_divide", 2)


def test_powers_of_two_hold_for_activations_where_config_or_scales_say_so(tmp_path: Path) -> None:
    block = {"weight_block_size": [4, 4]}
    assert recipe(tmp_path, torch.ones(1, 1), scale_fmt="ue8m0", **block) == ("fp8_group_ue8m0", 4)
    assert recipe(tmp_path, e8m0([127]), **block) == ("fp8_group_ue8m0", 4)
    assert recipe(tmp_path, torch.ones(1, 1), scale_fmt="float", **block) == ("fp8_group_divide", 4)


# --- more layouts ----------------------------------------------------------------------------------------------------------

def test_a_float_scale_under_ue8m0_keeps_its_mantissa(tmp_path: Path) -> None:
    got = weight(tmp_path, config(weight_block_size=[4, 4], scale_fmt="ue8m0"),
                 named(weight=ones(4, 4), weight_scale_inv=torch.full((1, 1), 1.25)))
    assert got.dequantize().unique().tolist() == [1.25]


def test_fp4_experts_are_two_codes_a_byte_low_nibble_first(tmp_path: Path) -> None:
    codes = torch.full((1, 16), 0x72, dtype=torch.uint8).view(torch.int8)
    got = weight(tmp_path, config(weight_block_size=[128, 128], expert_dtype="fp4"),
                 named(weight=codes, scale=e8m0([128])))
    assert got.dequantize()[0, :2].tolist() == [2.0, 12.0]


def test_an_embedding_with_one_scale_has_no_activation(tmp_path: Path) -> None:
    tensors = named("model.embed_tokens", weight=ones(4, 2), weight_scale=torch.tensor([0.5]))
    layer = dialect.declare(write(tmp_path, config(weight_block_size=[2, 2]), tensors))["model.embed_tokens"]
    assert (layer.kind, layer.scheme.activation) == ("embedding", None)


def test_a_listed_module_with_fp8_tensors_is_read_and_remarked(tmp_path: Path) -> None:
    tensors = named(weight=ones(2, 2), weight_scale=torch.tensor(1.0))
    layer = dialect.declare(write(tmp_path, config(ignored_layers=[M]), tensors))[M]
    assert layer.scheme.is_quantized
    assert "tensors decide" in layer.notes[0]


def test_cache_scales_are_found_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    tensors = named(weight=ones(2, 2), weight_scale=torch.tensor(1.0))
    assert dialect.kv_cache(write(tmp_path / "without", config(), tensors)) is None
    attention = "model.layers.0.self_attn"
    tensors |= {f"{attention}.k_scale": torch.tensor(1.0)}
    cache = dialect.kv_cache(write(tmp_path / "with", config(kv_cache_scheme="static"), tensors))
    assert cache is not None
    assert cache.scales == {attention: (f"{attention}.k_scale", "")}


# --- refusals --------------------------------------------------------------------------------------------------------------

def refusal(folder: Path, quantization: dict[str, Any], tensors: Tensors) -> AnybitError:
    contents = write(folder, quantization, tensors)
    with pytest.raises(AnybitError) as caught:
        layer = dialect.declare(contents)[M]
        dialect.canonicalize(layer, tensors_of(contents, layer))
    return caught.value


@pytest.mark.parametrize("raw", [
    {"activation_scheme": "sometimes"}, {"weight_block_size": [128]}, {"weight_block_size": [128, 0]},
    {"weight_block_size": "128"}, {"weight_block_size": [128, 128.0]}, {"weight_block_size": [True, True]},
])
def test_unsound_values_of_the_configuration_are_damage(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert isinstance(refusal(tmp_path, config(**raw), named(weight=ones(2, 2), weight_scale=torch.ones(()))), Damaged)


@pytest.mark.parametrize("raw", [{"fmt": "e5m2"}, {"weight_block_size": [2, 2], "activation_scheme": "static"}])
def test_combinations_that_nobody_writes_are_refused(tmp_path: Path, raw: dict[str, Any]) -> None:
    tensors = named(weight=ones(2, 2), weight_scale_inv=torch.ones(1, 1))
    assert isinstance(refusal(tmp_path, config(**raw), tensors), Unsupported)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (3, 2), (2,)])
def test_a_scale_off_the_grid_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = named(weight=ones(4, 4), weight_scale_inv=torch.ones(shape))
    assert isinstance(refusal(tmp_path, config(weight_block_size=[2, 2]), tensors), Inconsistent)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2)])
def test_several_scales_without_a_block_size_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert isinstance(refusal(tmp_path, config(), named(weight=ones(4, 4), weight_scale=torch.ones(shape))), Inconsistent)


def test_a_weight_without_any_scale_is_refused_by_name(tmp_path: Path) -> None:
    error = refusal(tmp_path, config(), named(weight=ones(2, 2)))
    assert isinstance(error, Inconsistent)
    assert M in error.where


def test_a_static_weight_without_input_scale_is_refused(tmp_path: Path) -> None:
    tensors = named(weight=ones(2, 2), weight_scale=torch.ones(()))
    assert isinstance(refusal(tmp_path, config(activation_scheme="static"), tensors), Inconsistent)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_codes_are_damage(tmp_path: Path, byte: int) -> None:
    assert isinstance(refusal(tmp_path, config(), named(weight=fp8_bytes(ONE, byte), weight_scale=torch.ones(()))), Damaged)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_no_writer_means_are_damage(tmp_path: Path, value: float) -> None:
    tensors = named(weight=ones(2, 2), weight_scale=torch.tensor(value))
    assert isinstance(refusal(tmp_path, config(), tensors), Damaged)


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0])
def test_static_scales_that_no_writer_means_are_damage(tmp_path: Path, value: float) -> None:
    tensors = named(weight=ones(2, 2), weight_scale=torch.ones(()), input_scale=torch.tensor(value))
    assert isinstance(refusal(tmp_path, config(activation_scheme="static"), tensors), Damaged)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_other_8_bit_floats_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = named(weight=ones(2, 2).view(torch.uint8).view(dtype), weight_scale=torch.ones(()))
    assert isinstance(refusal(tmp_path, config(), tensors), Inconsistent)


def test_stacked_fp8_codes_are_refused(tmp_path: Path) -> None:
    tensors = {f"{EXPERTS}.gate_up_proj": torch.zeros(2, 4, 4).to(torch.float8_e4m3fn)}
    with pytest.raises(Unsupported, match="outside a module"):
        dialect.declare(write(tmp_path, config(), tensors))
