"""Quark: every public folder bit for bit, the traps and the refusals of docs/formats/quark.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from altering import altered
from dialect_checks import assert_computes_what_the_runtime_computes, assert_reads_bit_for_bit, genuine_weight
from small_checkpoints import contents_of, fp8_bytes, tensors_of, words, write

import anybit
from anybit.checkpoints.dialects import quark as dialect
from anybit.errors import AnybitError, Damaged, Inconsistent, Unsupported
from anybit.schemes import Layer
from anybit.weights import QuantizedWeight
from conftest import CHECKPOINTS, genuine, needs_shared

FOLDERS = [name for name in genuine("quark-*") if "awqmode" not in name]
M = "model.layers.1.mlp.up_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj"
REORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def spec(dtype: str, qscheme: str | None = "per_tensor", **other: Any) -> dict[str, Any]:
    return {"dtype": dtype, "qscheme": qscheme, "is_dynamic": False, "symmetric": None, **other}


def channel(dtype: str, **other: Any) -> dict[str, Any]:
    return spec(dtype, "per_channel", ch_axis=0, **other)


def groups(dtype: str, size: int, **other: Any) -> dict[str, Any]:
    return spec(dtype, "per_group", ch_axis=-1, group_size=size, **other)


def layer_config(weight: Any, inputs: Any = None, outputs: Any = None, bias: Any = None) -> dict[str, Any]:
    return {"weight": weight, "input_tensors": inputs, "output_tensors": outputs, "bias": bias, "target_device": None}


def config(weight: Any, inputs: Any = None, **other: Any) -> dict[str, Any]:
    export = {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"}
    return {"quant_method": "quark", "global_quant_config": layer_config(weight, inputs), "exclude": ["lm_head"],
            "version": "0.13", "export": export, **other}


def export(**other: Any) -> dict[str, Any]:
    return {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized", **other}


def module(name: str = M, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.{role}": tensor for role, tensor in tensors.items()}


def declared(folder: Path, quantization: dict[str, Any], tensors: dict[str, torch.Tensor], name: str = M) -> Layer:
    contents = write(folder, quantization, tensors)
    assert dialect.recognizes(contents)
    return dialect.declare(contents)[name]


def read(
    folder: Path, quantization: dict[str, Any], tensors: dict[str, torch.Tensor], name: str = M
) -> QuantizedWeight:
    layer = declared(folder, quantization, tensors, name)
    weight = dialect.canonicalize(layer, tensors_of(contents_of(folder), layer))
    assert isinstance(weight, QuantizedWeight)
    return weight


def packed(elements: list[int], order: tuple[int, ...] = tuple(range(8))) -> int:
    """A word of eight nibbles: nibble i is element order[i]."""
    return sum((elements[element] & 15) << (4 * i) for i, element in enumerate(order))


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def bytes_of(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


# --- genuine folders -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    assert_reads_bit_for_bit(dialect, folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_layer_computes_what_the_runtime_computes(folder: str) -> None:
    assert_computes_what_the_runtime_computes(dialect, folder)


@needs_shared
@pytest.mark.parametrize(
    ("folder", "wanted"),
    [
        ("quark-int4-pergroup-sym-order-llama", (0.08935546875, 0.0830078125, -0.059326171875)),
        ("quark-uint4-pergroup-asym-reorder-qwen2", (-0.08447265625, -0.09814453125, 0.2059326171875)),
    ],
)
def test_the_worked_examples_of_the_document(folder: str, wanted: tuple[float, ...]) -> None:
    weight = genuine_weight(dialect, folder, Q_PROJ).dequantize()
    assert tuple(weight[:3, 0].tolist()) == wanted


@needs_shared
@pytest.mark.parametrize("folder", ["quark-fp8-pertensor-kv-llama", "quark-v06-fp8kv-llama"])
def test_both_names_of_kv_scales_are_exposed(folder: str) -> None:
    """output_scale of k_proj and v_proj since 0.9, one kv_scale for both in 0.6."""
    cache = anybit.open(CHECKPOINTS / folder).kv_cache
    assert cache is not None and cache.element == "fp8_e4m3fn"
    names = cache.scales["model.layers.0.self_attn"]
    assert all(name.endswith((".output_scale", ".kv_scale")) for name in names)


# --- traps (§11) ---------------------------------------------------------------------------------------------------

def test_groups_are_stored_transposed_and_channels_are_not(tmp_path: Path) -> None:
    """Trap 1, N = K = 8: the same words under both schemes."""
    rows = [[(3 * n + k) % 8 - 4 for k in range(8)] for n in range(8)]
    stored = words(*(packed(row) for row in rows)).reshape(8, 1)
    order = {"export": export(pack_method="order")}
    zero = words(0)
    by_group = read(tmp_path / "g", config(groups("int4", 8, symmetric=True), **order),
                    module(weight=stored, weight_scale=torch.ones(1, 8), weight_zero_point=zero.reshape(1, 1)))
    by_row = read(tmp_path / "c", config(channel("int4", symmetric=True), **order),
                  module(weight=stored, weight_scale=torch.ones(8), weight_zero_point=zero.reshape(1)))
    assert by_row.dequantize().tolist() == rows
    assert by_group.dequantize().T.tolist() == rows


def test_the_pack_method_holds_for_weights_and_zero_points(tmp_path: Path) -> None:
    """Trap 2."""
    q, z = [1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]
    tensors = module(weight=words(packed(q, REORDER)), weight_scale=torch.ones(1, 8),
                     weight_zero_point=words(packed(z, REORDER)))
    weight = read(tmp_path, config(groups("uint4", 1, symmetric=False)), tensors)
    assert weight.dequantize().flatten().tolist() == [a - b for a, b in zip(q, z, strict=True)]


@pytest.mark.parametrize("scheme", ["group", "channel"])
def test_file_to_file_int4_is_in_order_whatever_it_declares(scheme: str, tmp_path: Path) -> None:
    """Trap 2, §5: no zero points, scales [N, K/g]."""
    q = [-8, -3, 0, 1, 2, 5, 6, 7]
    if scheme == "group":
        tensors = module(weight=words(packed(q)), weight_scale=torch.ones(8, 1))
        weight = read(tmp_path, config(groups("int4", 1, symmetric=True)), tensors)
        assert weight.shape == (8, 1)
    else:
        tensors = module(weight=words(packed(q)), weight_scale=torch.ones(1))
        weight = read(tmp_path, config(channel("int4", symmetric=True)), tensors)
        assert weight.shape == (1, 8)
    assert weight.dequantize().flatten().tolist() == q


def test_int4_without_zero_points_and_transposed_scales_is_refused(tmp_path: Path) -> None:
    tensors = module(weight=words(0, 0).reshape(2, 1), weight_scale=torch.ones(2, 8))
    with pytest.raises(Inconsistent, match="no layer config fits"):
        declared(tmp_path, config(groups("int4", 1, symmetric=True)), tensors)


@pytest.mark.parametrize(
    ("version", "data", "wanted"),
    [
        ("0.13", [0x32, 0xBF, 0x09], [-2.5, -6.0, 5.5, 0.25]),
        ("0.10", [0x32, 0xBF, 0x09], [-2.5, -6.0, 5.5, 0.25]),
        ("0.9", [0x53, 0x97, 0x46], [4.5, 3.75, 0.5, -3.5]),
        (None, [0x53, 0x97, 0x46], [4.5, 3.75, 0.5, -3.5]),
        ("0.13", [0x53, 0x97, 0x46], [2.75, 6.5, -1.125, 2.25]),
    ],
)
def test_the_version_alone_tells_the_layouts_of_six_bits_apart(
    version: str | None, data: list[int], wanted: list[float], tmp_path: Path
) -> None:
    """Trap 3."""
    raw = config(groups("fp6_e2m3", 32, scale_format="e8m0"), version=version)
    weight = read(tmp_path, raw, module(weight=bytes_of(data * 8), weight_scale=bytes_of([127])))
    assert weight.dequantize()[0, :4].tolist() == wanted


def test_scales_of_dtype_mx_are_signed_exponents_without_a_bias(tmp_path: Path) -> None:
    """Trap 4: 251 = -5; 233 = -23 stands beside a block of zeros."""
    raw = config(spec("mx", None, ch_axis=-1, group_size=32, mx_element_dtype="fp4"))
    weight = read(tmp_path, raw, module(weight=bytes_of([0x22] * 16 + [0] * 16), weight_scale=bytes_of([251, 233])))
    assert weight.dequantize()[0].tolist() == [2.0**-5] * 32 + [0.0] * 32


def test_six_bits_of_dtype_mx_keep_the_old_planes(tmp_path: Path) -> None:
    raw = config(spec("mx", None, ch_axis=-1, group_size=32, mx_element_dtype="fp6_e2m3"))
    weight = read(tmp_path, raw, module(weight=bytes_of([0x53, 0x97, 0x46] * 8), weight_scale=bytes_of([0])))
    assert weight.dequantize()[0, :4].tolist() == [4.5, 3.75, 0.5, -3.5]


def test_dtype_mx_without_an_element_is_four_bits_by_its_bytes_or_refused(tmp_path: Path) -> None:
    raw = config(spec("mx", None, ch_axis=-1, group_size=32), version=None)
    weight = read(tmp_path / "4", raw, module(weight=bytes_of([0x22] * 16), weight_scale=bytes_of([0])))
    assert weight.scheme.element == "fp4_e2m1"
    with pytest.raises(Unsupported, match="mx_element_dtype"):
        declared(tmp_path / "6", raw, module(weight=bytes_of([0] * 24), weight_scale=bytes_of([0])))


NVFP4 = [groups("fp4", 16, scale_format="float32"), spec("fp8_e4m3", is_scale_quant=True, symmetric=True)]
AMDFP4_GLOBAL = [groups("fp4", 16, scale_format="float32"), spec("fp8_e5m3", is_scale_quant=True, symmetric=True)]


def test_two_levels_of_scales_meet_before_the_code(tmp_path: Path) -> None:
    """Trap 5: 1.5 * (1.125 * s2) where (1.5 * 1.125) * s2 differs."""
    scale = next(s for s in (1 + i * 2.0**-23 for i in range(64))
                 if one_rounding(1.5, 1.125, s) != one_rounding(s, 1.125 * 1.5, 1.0))
    tensors = module(weight=bytes_of([0x33] * 8), weight_scale=fp8_bytes(0x39), weight_scale_2=torch.tensor(scale))
    weight = read(tmp_path, config(NVFP4), tensors)
    assert weight.dequantize()[0, 0].item() == one_rounding(1.5, 1.125, scale)


def one_rounding(code: float, block: float, above: float) -> float:
    """code * float32(block * above), rounded to float32."""
    product = torch.tensor(block, dtype=torch.float32) * torch.tensor(above, dtype=torch.float32)
    return float(torch.tensor(code, dtype=torch.float32) * product)


def test_global_amdfp4_scales_are_ue5m3(tmp_path: Path) -> None:
    """§4: bytes 78, 88, 82 are 0.02734375, 0.0625, 0.0390625."""
    tensors = module(weight=bytes_of([0x22] * 24), weight_scale=bytes_of([78, 88, 82]),
                     weight_scale_2=torch.tensor(2.0))
    weight = read(tmp_path, config(AMDFP4_GLOBAL), tensors)
    assert weight.dequantize()[0, ::16].tolist() == [0.0546875, 0.125, 0.078125]


def test_file_to_file_amdfp4_scales_are_values(tmp_path: Path) -> None:
    tensors = module(weight=bytes_of([0x22] * 8), weight_scale=torch.tensor([[0.75]], dtype=torch.bfloat16))
    weight = read(tmp_path, config(groups("fp4", 16, scale_format="e5m3")), tensors)
    assert weight.dequantize()[0, 0].item() == 0.75


TWO_STAGES = [spec("fp8_e4m3", symmetric=True), channel("int4", symmetric=True)]


@pytest.mark.parametrize("has_zeros", [True, False])
def test_two_stages_multiply_the_row_first_and_never_round_to_fp8(has_zeros: bool, tmp_path: Path) -> None:
    """Trap 7: ((q - z2) * s2[n]) * s1; a file-to-file export stores no zero points and still reorders."""
    q = [1, -2, 3, -4, 5, -6, 7, -8]
    s1, s2 = column(0.3), column(0.7)
    tensors = module(weight=words(packed(q, REORDER)), weight_scale=s1.reshape(()), weight_scale_2=s2)
    if has_zeros:
        tensors |= module(weight_zero_point_2=words(0).reshape(1))
    weight = read(tmp_path, config(TWO_STAGES), tensors)
    assert torch.equal(weight.dequantize()[0], (column(*q) * s2) * s1)


def test_bfloat16_scales_multiply_in_float32(tmp_path: Path) -> None:
    """Trap 8: 1.125 * 1.0078125 has more bits than bfloat16."""
    scale = torch.tensor(1.0078125, dtype=torch.bfloat16)
    weight = read(tmp_path, config(spec("fp8_e4m3")), module(weight=fp8_bytes(0x39), weight_scale=scale))
    assert weight.dequantize().item() == 1.125 * 1.0078125


def test_zero_points_of_symmetric_weights_make_no_offset(tmp_path: Path) -> None:
    """Trap 9."""
    tensors = module(weight=torch.tensor([[-128, 127]], dtype=torch.int8), weight_scale=torch.ones(1),
                     weight_zero_point=torch.zeros(1, dtype=torch.int8))
    weight = read(tmp_path, config(channel("int8", symmetric=True)), tensors)
    assert weight.scheme.offset is None
    assert weight.dequantize().tolist() == [[-128.0, 127.0]]


def test_zero_points_of_symmetric_weights_count_where_they_are_not_zero(tmp_path: Path) -> None:
    """As Quark's own importer counts them: (q - z) * s always."""
    tensors = module(weight=torch.tensor([[0, 5], [0, 5]], dtype=torch.int8), weight_scale=torch.ones(2),
                     weight_zero_point=torch.tensor([0, 1], dtype=torch.int8))
    weight = read(tmp_path, config(channel("int8", symmetric=True)), tensors)
    assert weight.dequantize().tolist() == [[0.0, 5.0], [-1.0, 4.0]]
    assert weight.scheme.offset is not None


def test_packed_zero_points_of_symmetric_groups_count_where_they_are_not_zero(tmp_path: Path) -> None:
    tensors = module(weight=torch.full((2, 1), 0x21, dtype=torch.int32), weight_scale=torch.ones(1, 8),
                     weight_zero_point=torch.tensor([[0xF]], dtype=torch.int32))
    weight = read(tmp_path, config(groups("int4", 2, symmetric=True), export=export(pack_method="order")), tensors)
    assert weight.dequantize()[:3].tolist() == [[2.0, 2.0], [2.0, 2.0], [0.0, 0.0]]  # row 0: 1 - (-1)


def test_the_second_scale_is_always_applied(tmp_path: Path) -> None:
    """Trap 6: transformers 5.16 drops weight_scale_2 of NVFP4 files."""
    stages = [groups("fp4", 16, scale_format="float32"), spec("fp8_e4m3", is_scale_quant=True)]
    tensors = module(weight=torch.full((1, 8), 0x22, dtype=torch.uint8), weight_scale=fp8_bytes(0x38),
                     weight_scale_2=torch.tensor(0.25))
    assert read(tmp_path, config(stages), tensors).dequantize().tolist() == [[0.25] * 16]


def test_the_canonical_form_is_that_of_e4m3fn_on_every_chip(tmp_path: Path) -> None:
    """Trap 18: neither code 80 nor the scale is changed for fnuz hardware."""
    weight = read(tmp_path, config(spec("fp8_e4m3")), module(weight=fp8_bytes(0x80, 0x38), weight_scale=torch.tensor(0.5)))
    assert weight.codes.tolist() == [[0x80, 0x38]]
    assert weight.scales[0].tolist() == [[0.5]]
    assert torch.signbit(weight.dequantize()).tolist() == [[True, False]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_weight_whose_dtype_is_a_wide_float_is_unquantized_and_its_scale_of_one_unused(
    tmp_path: Path, dtype: str
) -> None:
    tensors = module(weight=torch.ones(1, 2, dtype=torch.bfloat16), weight_scale=torch.ones(1))
    layer = dialect.declare(write(tmp_path, config(spec(dtype, qscheme=None)), tensors))[M]
    assert not layer.scheme.is_quantized
    assert layer.tensors["unused_scale"] == f"{M}.weight_scale"
    assert layer.notes == ("its dtype is a wide float: the scale beside it is not used",)


def test_every_module_without_its_scale_is_named(tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": fp8_bytes(0x38, 0x38) for n in range(3)}
    with pytest.raises(Inconsistent) as refused:
        dialect.declare(write(tmp_path, config(spec("fp8_e4m3")), tensors))
    assert [refused.value.where, *refused.value.more] == [
        "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj.weight_scale", "model.layers.2.mlp.up_proj.weight_scale"]


def test_asymmetric_int8_weights_subtract_their_zero_points(tmp_path: Path) -> None:
    """Trap 10."""
    tensors = module(weight=torch.tensor([[-128, 127]], dtype=torch.int8), weight_scale=torch.tensor([0.5]),
                     weight_zero_point=torch.tensor([-28], dtype=torch.int8))
    weight = read(tmp_path, config(channel("int8", symmetric=False)), tensors)
    assert weight.dequantize().tolist() == [[-50.0, 77.5]]


def test_each_projection_keeps_its_own_scale(tmp_path: Path) -> None:
    """Trap 11."""
    tensors = {}
    for name, scale in (("a.q_proj", 0.5), ("a.k_proj", 2.0)):
        tensors |= module(name, weight=fp8_bytes(0x38), weight_scale=torch.tensor(scale))
    assert read(tmp_path, config(spec("fp8_e4m3")), tensors, "a.q_proj").dequantize().item() == 0.5
    assert read(tmp_path, config(spec("fp8_e4m3")), tensors, "a.k_proj").dequantize().item() == 2.0


MXFP4 = groups("fp4", 32, scale_format="e8m0", scale_calculation_mode="even")
FP8_TENSORS = {"weight": fp8_bytes(0x38), "weight_scale": torch.tensor(0.5)}
MXFP4_TENSORS = {"weight": bytes_of([0x22] * 16), "weight_scale": bytes_of([127])}


@pytest.mark.parametrize("second", [Q_PROJ, "*layers.0.self_attn.*"])
def test_sorted_patterns_give_way_to_the_tensors(second: str, tmp_path: Path) -> None:
    """Trap 12: both files that Quark itself cannot load."""
    layers = {"*q_proj": layer_config(MXFP4), second: layer_config(spec("fp8_e4m3"))}
    weight = read(tmp_path, config(spec("int8"), layer_quant_config=dict(sorted(layers.items()))),
                  module(Q_PROJ, **FP8_TENSORS), Q_PROJ)
    assert weight.dequantize().item() == 0.5


def test_a_name_in_part_is_no_match(tmp_path: Path) -> None:
    """Trap 13: layers.1 is not layers.10; vLLM takes it for a substring."""
    name = "model.layers.10.mlp.up_proj"
    static = layer_config(spec("fp8_e4m3"), spec("fp8_e4m3"))
    raw = config(spec("fp8_e4m3"), layer_quant_config={"layers.1": static})
    assert declared(tmp_path, raw, module(name, **FP8_TENSORS), name).notes == ()


def test_a_layer_type_stands_between_patterns_and_the_global_config(tmp_path: Path) -> None:
    raw = config(MXFP4, layer_type_quant_config={"Linear": layer_config(spec("fp8_e4m3"))})
    assert read(tmp_path, raw, module(**FP8_TENSORS)).scheme.element == "fp8_e4m3fn"


@pytest.mark.parametrize(("axis", "recipe"), [(1, "fp8_token"), (-1, "fp8_token"), (0, None)])
def test_axis_1_of_inputs_means_per_token(axis: int, recipe: str | None, tmp_path: Path) -> None:
    """Trap 14."""
    inputs = spec("fp8_e4m3", "per_channel", ch_axis=axis, is_dynamic=True)
    layer = declared(tmp_path, config(spec("fp8_e4m3"), inputs), module(**FP8_TENSORS))
    assert (layer.scheme.activation.recipe if layer.scheme.activation else None) == recipe
    assert bool(layer.notes) == (recipe is None)


@pytest.mark.parametrize(("symmetric", "recipe"), [(True, "int8_token"), (False, "int8_token_asym")])
def test_dynamic_int8_inputs_are_per_token(symmetric: bool, recipe: str, tmp_path: Path) -> None:
    """Trap 15: 127, not 127.5, is in the recipe."""
    inputs = spec("int8", "per_channel", ch_axis=1, is_dynamic=True, symmetric=symmetric)
    layer = declared(tmp_path, config(spec("fp8_e4m3"), inputs), module(**FP8_TENSORS))
    assert layer.scheme.activation is not None and layer.scheme.activation.recipe == recipe


@pytest.mark.parametrize("mode", ["even", "floor", "ceil", None])
@pytest.mark.parametrize("dtype", ["fp4", "fp6_e2m3", "fp6_e3m2"])
def test_every_shared_exponent_has_its_recipe(dtype: str, mode: str | None, tmp_path: Path) -> None:
    """Traps 16, 17; null means even."""
    inputs = groups(dtype, 32, scale_format="e8m0", scale_calculation_mode=mode, is_dynamic=True)
    layer = declared(tmp_path, config(MXFP4, inputs), module(**MXFP4_TENSORS))
    assert layer.scheme.activation is not None
    assert layer.scheme.activation.recipe == f"mx_{mode or 'even'}"
    assert layer.scheme.activation.group_size == 32


def test_two_bits_begin_at_the_top(tmp_path: Path) -> None:
    """Trap 19: 0x56 is 1, 1, 1, 2."""
    tensors = module(weight=bytes_of([0x56]), weight_scale=torch.ones(1, 4), weight_zero_point=bytes_of([0x01]))
    weight = read(tmp_path, config(groups("uint2", 1, symmetric=False)), tensors)
    assert weight.dequantize().flatten().tolist() == [1.0, 1.0, 1.0, 1.0]


def test_float_zero_points_of_two_bits_lie_unpacked(tmp_path: Path) -> None:
    zeros = torch.tensor([[-3, 0, 5, 1]], dtype=torch.int32)
    tensors = module(weight=bytes_of([0x56]), weight_scale=torch.ones(1, 4), weight_zero_point=zeros)
    weight = read(tmp_path, config(groups("uint2", 1, symmetric=False, zero_point_type="float32")), tensors)
    assert weight.dequantize().flatten().tolist() == [4.0, 1.0, -4.0, 1.0]


def test_a_quantized_lm_head_is_read_where_embeddings_are_tied(tmp_path: Path) -> None:
    """Trap 20."""
    tensors = module("lm_head", **FP8_TENSORS) | {"model.embed_tokens.weight": torch.ones(1, 1)}
    assert read(tmp_path, config(spec("fp8_e4m3")), tensors, "lm_head").dequantize().item() == 0.5


@pytest.mark.parametrize("is_power", [False, True])
def test_the_last_block_may_be_short(is_power: bool, tmp_path: Path) -> None:
    """Trap 21: 3 x 5 in blocks of 2 x 4; scales multiply, as numbers or as powers of two."""
    scale = bytes_of([127, 128], [129, 130]) if is_power else torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    raw = config(spec("fp8_e4m3", "per_block", block_size=[2, 4]))
    weight = read(tmp_path, raw, module(weight=fp8_bytes(*[0x38] * 15).reshape(3, 5), weight_scale=scale))
    assert weight.dequantize().tolist() == [[1, 1, 1, 1, 2]] * 2 + [[4, 4, 4, 4, 8]]


# --- other layouts (§3) --------------------------------------------------------------------------------------------

def test_mxfp8_has_powers_of_two_for_groups(tmp_path: Path) -> None:
    tensors = module(weight=fp8_bytes(*[0x38] * 64), weight_scale=bytes_of([126, 128]))
    weight = read(tmp_path, config(groups("fp8_e4m3", 32, scale_format="e8m0")), tensors)
    assert weight.dequantize()[0, ::32].tolist() == [0.5, 2.0]


def test_e5m2_weights(tmp_path: Path) -> None:
    codes = torch.tensor([[0x3E]], dtype=torch.uint8).view(torch.float8_e5m2)
    weight = read(tmp_path, config(spec("fp8_e5m2")), module(weight=codes, weight_scale=torch.tensor(2.0)))
    assert weight.dequantize().item() == 3.0


def test_uint8_by_row_and_int8_scales_of_shape_1(tmp_path: Path) -> None:
    tensors = module(weight=bytes_of([0, 255]), weight_scale=torch.tensor([0.5]), weight_zero_point=bytes_of([28])[0])
    assert read(tmp_path / "u", config(channel("uint8", symmetric=False)), tensors).dequantize().tolist() == [
        [-14.0, 113.5]]
    tensors = module(weight=torch.tensor([[-3, 4]], dtype=torch.int8), weight_scale=torch.tensor([0.5]),
                     weight_zero_point=torch.zeros(1, dtype=torch.int8))
    weight = read(tmp_path / "i", config(spec("int8", symmetric=True), version=None), tensors)  # 0.6
    assert weight.dequantize().tolist() == [[-1.5, 2.0]]


def test_one_zero_point_for_a_tensor_of_four_bits_is_not_packed(tmp_path: Path) -> None:
    tensors = module(weight=words(packed(list(range(8)), REORDER)), weight_scale=torch.tensor(1.0),
                     weight_zero_point=torch.tensor(3, dtype=torch.int32))
    weight = read(tmp_path, config(spec("uint4", symmetric=False)), tensors)
    assert weight.dequantize().tolist() == [[-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]]


def test_two_signed_bits_take_a_word_each(tmp_path: Path) -> None:
    tensors = module(weight=words(1, 0xFFFFFFFE), weight_scale=torch.ones(1, 2),
                     weight_zero_point=torch.zeros(1, 2, dtype=torch.int32))
    weight = read(tmp_path, config(groups("int2", 1, symmetric=True)), tensors)
    assert weight.dequantize().tolist() == [[1.0], [-2.0]]


def test_three_bits_by_row_are_a_stream_in_twos_complement(tmp_path: Path) -> None:
    codes = [-4, -3, -2, -1, 0, 1, 2, 3]
    number = sum((code & 7) << (3 * i) for i, code in enumerate(codes))
    tensors = module(weight=bytes_of(list(number.to_bytes(3, "little"))), weight_scale=torch.ones(1),
                     weight_zero_point=bytes_of([0, 0, 0])[0])
    assert read(tmp_path, config(channel("int3", symmetric=True)), tensors).dequantize().tolist() == [codes]


def test_a_quantized_bias_is_decoded(tmp_path: Path) -> None:
    tensors = module(**FP8_TENSORS, bias=torch.tensor([10], dtype=torch.int8), bias_scale=torch.tensor(0.5),
                     bias_zero_point=torch.tensor(4, dtype=torch.int8))
    raw = config(None, global_quant_config=layer_config(spec("fp8_e4m3"), bias=spec("int8", symmetric=False)))
    weight = read(tmp_path, raw, tensors)
    assert weight.bias is not None and weight.bias.tolist() == [3.0]


def test_a_list_of_one_stage_is_that_stage_and_legacy_keys_are_read(tmp_path: Path) -> None:
    legacy = {"dtype": "fp8_e4m3", "dynamic": False, "qscheme": "per_channel", "axis": 0, "symmetric": None}
    raw = {"quant_method": "quark", "global_quant_config": layer_config([legacy]), "layer_quant_config": None,
           "layer_type_quant_config": None, "exclude": None, "algo_config": None}
    weight = read(tmp_path, raw, module(weight=fp8_bytes(0x38), weight_scale=torch.tensor([0.5])))
    assert weight.dequantize().item() == 0.5


@pytest.mark.parametrize(
    ("weight", "tensors", "inputs"),
    [
        (NVFP4, {"weight": bytes_of([0x22] * 8), "weight_scale": fp8_bytes(0x38), "weight_scale_2": torch.tensor(1.0)},
         [groups("fp4", 16, is_dynamic=True), spec("fp8_e4m3", is_scale_quant=True)]),
        (spec("fp8_e4m3"), FP8_TENSORS, spec("fp8_e4m3")),
    ],
    ids=["nvfp4", "fp8"],
)
def test_missing_input_scales_leave_the_layer_weight_only_and_say_so(
    weight: Any, tensors: dict[str, torch.Tensor], inputs: Any, tmp_path: Path
) -> None:
    """§5: file-to-file exports are not calibrated."""
    layer = declared(tmp_path, config(weight, inputs), module(**tensors))
    assert layer.scheme.activation is None
    assert "weight-only" in layer.notes[0]


def test_the_latent_cache_of_deepseek_has_one_scale_for_both(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.kv_b_proj"
    raw = config(spec("fp8_e4m3"), export=export(kv_cache_group=["*kv_b_proj"]))
    contents = write(tmp_path, raw, module(name, **FP8_TENSORS, output_scale=torch.tensor(1.0)))
    cache = dialect.kv_cache(contents)
    assert cache is not None
    assert cache.scales == {"model.layers.0.self_attn": (f"{name}.output_scale",) * 2}


def test_scales_of_quantized_attention_are_shown_and_no_part_of_the_model(tmp_path: Path) -> None:
    fp8 = spec("fp8_e4m3")
    tensors = module(Q_PROJ, **FP8_TENSORS, output_scale=torch.tensor(1.0))
    tensors["model.layers.0.self_attn.prob_output_scale"] = torch.tensor(1.0)
    raw = config(fp8, layer_quant_config={"*q_proj": layer_config(fp8, outputs=fp8)}, softmax_quant_spec=fp8)
    contents = write(tmp_path, raw, tensors)
    assert "not applied" in dialect.notes(contents)[0]
    assert dialect.plain(contents) == {}


# --- refusals (§10) ------------------------------------------------------------------------------------------------

UINT4 = groups("uint4", 1, symmetric=False)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "mx6": (config(spec("mx6", None)), FP8_TENSORS, "element format not storable: mx6"),
    "mx9": (config(spec("mx9", None)), FP8_TENSORS, "element format not storable: mx9"),
    "bfp16": (config(spec("bfp16", None)), FP8_TENSORS, "element format not storable: bfp16"),
    "mx of int8": (config(spec("mx", None, group_size=32, mx_element_dtype="int8")), MXFP4_TENSORS, "mx of int8"),
    "fake": (config(spec("fp8_e4m3"), export=export(weight_format="fake_quantized")), FP8_TENSORS, "masters"),
    "zeros": (config(UINT4), {"weight": words(0), "weight_scale": torch.ones(8, 1)}, "zero points are missing"),
    "int3": (config(groups("int3", 8)), {"weight": bytes_of([0] * 3), "weight_scale": torch.ones(1, 1)}, "int3 per_gr"),
    "r3": (config(spec("fp8_e4m3"), algo_config=[{"name": "rotation", "r3": True}]), FP8_TENSORS, "online rotations"),
    "quarot": (config(spec("fp8_e4m3"), algo_config={"name": "quarot", "r4": True}), FP8_TENSORS, "quarot"),
    "online": (config(spec("fp8_e4m3")), FP8_TENSORS | {"input_rotation": torch.ones(1)}, "input_rotation"),
    "prescale": (config(spec("fp8_e4m3")), FP8_TENSORS | {"input_prescale": torch.ones(1)}, "input_prescale"),
    "svdquant": (config(spec("fp8_e4m3"), algo_config=[{"name": "svdquant"}]), FP8_TENSORS, "svdquant"),
    "factor": (config(spec("fp8_e4m3")), FP8_TENSORS | {"smooth_factor": torch.ones(1)}, "svdquant"),
    "unknown": (config(spec("fp8_e4m3"), algo_config=[{"name": "novel"}]), FP8_TENSORS | {"x": torch.ones(1)}, "novel"),
    "outputs": (config(None, global_quant_config=layer_config(spec("fp8_e4m3"), outputs=spec("int8"))), FP8_TENSORS,
                "output_tensors int8"),
    "dtype": (config(spec("fp12")), FP8_TENSORS, "dtype fp12"),
    "qscheme": (config(spec("fp8_e4m3", "per_row")), FP8_TENSORS, "qscheme per_row"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_the_document_refuses_is_refused_by_name(case: str, tmp_path: Path) -> None:
    raw, tensors, said = REFUSED[case]
    with pytest.raises(Unsupported) as refused:
        declared(tmp_path, raw, module(**tensors))
    assert said in str(refused.value)


def test_shared_rotations_at_the_top_are_refused(tmp_path: Path) -> None:
    tensors = module(**FP8_TENSORS) | {"shared_input_rotation_8": torch.ones(8, dtype=torch.int8)}
    with pytest.raises(Unsupported, match="online rotations"):
        declared(tmp_path, config(spec("fp8_e4m3")), tensors)


@pytest.mark.parametrize("name", ["smooth", "autosmoothquant", "awq", "gptq", "gptaq", "autoround", "qronos"])
def test_folded_algorithms_leave_nothing_to_do(name: str, tmp_path: Path) -> None:
    raw = config(spec("fp8_e4m3"), algo_config=[{"name": name}])
    assert read(tmp_path, raw, module(**FP8_TENSORS)).dequantize().item() == 0.5


def test_offline_rotations_are_folded(tmp_path: Path) -> None:
    raw = config(spec("fp8_e4m3"), algo_config=[{"name": "rotation", "r1": True, "r2": True, "r3": False}])
    assert read(tmp_path, raw, module(**FP8_TENSORS)).dequantize().item() == 0.5


def test_no_fit_names_module_tensors_and_configs(tmp_path: Path) -> None:
    with pytest.raises(Inconsistent) as refused:
        declared(tmp_path, config(groups("int8", 2)), module(**FP8_TENSORS))
    for word in (M, "F8_E4M3 [1, 1]", "global_quant_config"):
        assert word in str(refused.value)


@needs_shared
@pytest.mark.parametrize(
    ("tensors", "quantization", "kind"),
    [
        ({f"{Q_PROJ}.weight_scale": None}, {}, Inconsistent),
        ({f"{Q_PROJ}.weight_scale": lambda t: t * float("nan")}, {}, Damaged),
        ({}, {"version": "new"}, Damaged),
        ({}, {"global_quant_config": [1]}, Damaged),
        ({}, {"exclude": "lm_head"}, Damaged),
    ],
    ids=["scale missing", "nan scale", "version", "config no object", "exclude no list"],
)
def test_damage_is_refused(tensors: dict[str, Any], quantization: dict[str, Any], kind: type, tmp_path: Path) -> None:
    folder = altered("quark-fp8-ptpc-qwen3", tmp_path, tensors=tensors, quantization=quantization)
    with pytest.raises(AnybitError) as refused:
        anybit.open(folder).read(Q_PROJ)
    assert isinstance(refused.value, kind)
    assert refused.value.where


# --- custom modes: the dialects fp8 and awq ------------------------------------------------------------------------

def test_custom_mode_fp8_is_the_dialect_fp8(tmp_path: Path) -> None:
    """§1, §8: k_scale and v_scale beside the attention."""
    from anybit.checkpoints.dialects import fp8

    raw = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"],
           "kv_cache_scheme": "static", "export": export()}
    attention = "model.layers.0.self_attn"
    tensors = module(Q_PROJ, **FP8_TENSORS, input_scale=torch.tensor(1.0))
    tensors |= {f"{attention}.{k}_scale": torch.tensor(1.0) for k in "kv"}
    contents = write(tmp_path, raw, tensors)
    assert not dialect.recognizes(contents) and fp8.recognizes(contents)
    cache = fp8.kv_cache(contents)
    assert cache is not None and cache.scales == {attention: (f"{attention}.k_scale", f"{attention}.v_scale")}
    assert fp8.declare(contents)[Q_PROJ].scheme.activation is not None
