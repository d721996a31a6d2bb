"""torchao: the public folders bit for bit, the traps and the refusals of docs/formats/torchao.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import anybit
from anybit.checkpoints.dialects._shared.torchao_tensors import unswizzle, untile
from anybit.errors import AnybitError
from anybit.numerics.activations import quantize_dequantize
from anybit.weights import QuantizedWeight
from conftest import CHECKPOINTS, digest, expected, genuine, needs_shared

FOLDERS = genuine("torchao-*")
M = "model.layers.0.mlp.down_proj"
Tensors = dict[str, torch.Tensor]
GENERATOR = torch.Generator().manual_seed(5)
CODES = torch.randint(-8, 8, (4, 64), generator=GENERATOR, dtype=torch.int8)
ROW = {"_type": "PerRow", "_data": {"dim": -1}}


def enum(kind: str, value: str) -> dict[str, str]:
    return {"_type": kind, "_data": value}


def folder_of(folder: Path, kind: str, data: dict[str, Any], pieces: Tensors, name: str = f"{M}.weight") -> Path:
    """A checkpoint of one parameter, in two shards whose headers both describe it."""
    folder.mkdir(parents=True, exist_ok=True)
    module, _, leaf = name.rpartition(".")
    told = {"_type": kind, "_data": data, "_tensor_data_names": list(pieces)}
    metadata = {name: json.dumps(told), "tensor_names": json.dumps([name]), "format": "pt"}
    for number, (piece, tensor) in enumerate(pieces.items()):
        save_file({f"{module}._{leaf}_{piece}": tensor.contiguous()}, folder / f"m-{number}.safetensors", metadata)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weight_of(folder: Path, kind: str, data: dict[str, Any], pieces: Tensors, name: str = M) -> QuantizedWeight:
    parameter = f"{name}.weight" if name == M else name
    weight = anybit.open(folder_of(folder, kind, data, pieces, parameter)).read(name)
    assert isinstance(weight, QuantizedWeight)
    return weight


def refusal(folder: Path, kind: str, data: dict[str, Any], pieces: Tensors) -> AnybitError:
    with pytest.raises(AnybitError) as caught:
        weight_of(folder, kind, data, pieces)
    return caught.value


def int8(**other: Any) -> tuple[dict[str, Any], Tensors]:
    data = {"block_size": [1, 64], "dtype": enum("torch.dtype", "bfloat16"), "act_quant_kwargs": None, **other}
    zero = torch.zeros(4, 1, dtype=torch.int8)
    return data, {"qdata": CODES, "scale": torch.tensor([[0.1], [0.2], [0.3], [0.7]]), "zero_point": zero}


@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    checkpoint = anybit.open(CHECKPOINTS / folder)
    wanted = expected(folder)["weights"]
    assert {name for name, layer in checkpoint.layers.items() if layer.scheme.is_quantized} == set(wanted)
    for name, want in wanted.items():
        assert digest(checkpoint.read(name).dequantize()) == want["sha256"], name


@needs_shared
def test_every_public_folder_is_read() -> None:
    assert len(FOLDERS) == 6


# --- the traps, by their numbers in the document ---------------------------------------------------------------------

def test_traps_1_and_10_class_and_names_come_from_the_header(tmp_path: Path) -> None:
    data, pieces = int8()
    stack = {"qdata": CODES.view(2, 2, 64), "scale": pieces["scale"].view(2, 2, 1)}
    weight = weight_of(tmp_path, "Int8Tensor", {**data, "block_size": [1, 1, 64]}, stack,
                       "model.layers.0.mlp.experts.gate_up_proj")
    assert torch.equal(weight.dequantize(), CODES.view(2, 2, 64).float() * stack["scale"])


def test_trap_2_an_int4_zero_point_is_a_float_that_is_added_and_scales_are_transposed(tmp_path: Path) -> None:
    packed = CODES[:, ::2] & 15 | CODES[:, 1::2] << 4
    scale, zero = torch.rand(2, 4, generator=GENERATOR).bfloat16(), torch.randn(2, 4, generator=GENERATOR).bfloat16()
    data = {"block_size": [1, 32], "shape": [4, 64], "activation_dtype": enum("torch.dtype", "bfloat16")}
    weight = weight_of(tmp_path, "Int4Tensor", data, {"qdata": packed, "scale": scale, "zero_point": zero})
    s, z = (t.float().T.repeat_interleave(32, 1) for t in (scale, zero))
    assert torch.equal(weight.dequantize(), CODES.float() * s + z)


def test_trap_3_weights_are_not_rounded_to_their_dtype(tmp_path: Path) -> None:
    data, pieces = int8()
    assert torch.equal(weight_of(tmp_path, "Int8Tensor", data, pieces).dequantize(), CODES.float() * pieces["scale"])


def test_trap_4_zero_points_of_zero_are_no_zero_points_and_others_are_subtracted(tmp_path: Path) -> None:
    data, pieces = int8()
    assert weight_of(tmp_path / "0", "Int8Tensor", data, pieces).scheme.offset is None
    pieces["zero_point"] = torch.tensor([[1], [-2], [0], [100]], dtype=torch.int8)
    weight = weight_of(tmp_path / "1", "Int8Tensor", data, pieces)
    assert torch.equal(weight.dequantize(), (CODES.float() - pieces["zero_point"].float()) * pieces["scale"])


@pytest.mark.parametrize(("mapping", "recipe"), [
    ("SYMMETRIC", "torchao_int8_token"), ("ASYMMETRIC", "torchao_int8_token_asym"),
])
def test_trap_5_activations_have_torchaos_own_recipe(tmp_path: Path, mapping: str, recipe: str) -> None:
    arguments = {"granularity": ROW, "mapping_type": enum("MappingType", mapping), "reduce_range": False}
    data, pieces = int8(act_quant_kwargs={"_type": "QuantizeTensorToInt8Kwargs", "_data": arguments})
    activation = weight_of(tmp_path, "Int8Tensor", data, pieces).scheme.activation
    assert activation is not None
    assert (activation.recipe, activation.granularity) == (recipe, "token")


def test_trap_6_swizzled_scales_lie_where_the_document_says() -> None:
    rows, columns = 192, 26
    stored = torch.zeros(2 * 7 * 512, dtype=torch.uint8)
    logical = torch.randint(0, 120, (rows, columns), generator=GENERATOR, dtype=torch.uint8)
    for row in range(rows):
        for col in range(columns):
            tile, r, c = (row // 128) * 7 + col // 4, row % 128, col % 4
            stored[tile * 512 + (r % 32) * 16 + (r // 32) * 4 + c] = logical[row, col]
    assert torch.equal(unswizzle(stored.view(64, 112), rows, columns), logical)


@pytest.mark.parametrize("is_swizzled", [True, False])
def test_trap_7_nvfp4_scales_meet_each_other_first(tmp_path: Path, is_swizzled: bool) -> None:
    packed = torch.randint(0, 256, (4, 32), generator=GENERATOR, dtype=torch.uint8)
    scale = torch.randint(0x28, 0x48, (128, 4), generator=GENERATOR, dtype=torch.uint8)
    pieces = {"qdata": packed, "scale": (scale if is_swizzled else scale[:4]).view(torch.float8_e4m3fn),
              "per_tensor_scale": torch.tensor(0.0123)}
    data = {"block_size": 16, "is_swizzled_scales": is_swizzled, "act_quant_kwargs": None}
    weight = weight_of(tmp_path, "NVFP4Tensor", data, pieces)
    flat = scale.flatten()
    logical = torch.stack([flat[r * 16 : r * 16 + 4] for r in range(4)]) if is_swizzled else scale[:4]
    step = logical.view(torch.float8_e4m3fn).float() * torch.tensor(0.0123)
    book = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    values = torch.where(nibbles > 7, -1.0, 1.0) * book[(nibbles & 7).long()]
    assert torch.equal(weight.dequantize(), values * step.repeat_interleave(16, 1))


def test_trap_8_tiles_are_in_the_kernels_order() -> None:
    codes = torch.randint(0, 16, (16, 1024), generator=GENERATOR)
    words = torch.zeros(2, 8, 32, 4, dtype=torch.int64)
    for t in range(2):
        for u in range(8):
            for lane in range(32):
                for i in range(4):
                    for p, column in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
                        code = codes[8 * t + lane // 4, 128 * u + 32 * i + 2 * (lane % 4) + column]
                        words[t, u, lane, i] |= int(code) << (4 * p)
    assert torch.equal(untile(words.to(torch.int32)).long(), codes)


def test_trap_8_padding_of_tiles_is_cut_and_8_is_the_middle(tmp_path: Path) -> None:
    pieces = {"qdata": torch.full((1, 8, 32, 4), 0x77777777, dtype=torch.int32),
              "scale_and_zero": torch.tensor([0.5, 2.0]).bfloat16().expand(16, 8, 2)}
    weight = weight_of(tmp_path, "Int4TilePackedTo4dTensor", {"block_size": [1, 64], "shape": [5, 192]}, pieces)
    assert torch.equal(weight.dequantize(), torch.full((5, 192), 1.5))


@pytest.mark.parametrize("zero", [torch.zeros(4, 2, dtype=torch.int8), torch.full((4, 2), 0.25)])
def test_trap_9_intx_codes_are_bytes_of_a_narrower_range(tmp_path: Path, zero: torch.Tensor) -> None:
    data = {"target_dtype": enum("torch.dtype", "int4"), "block_size": [1, 32],
            "activation_quantization": "int8_asym_per_token"}
    scale = torch.rand(4, 2, generator=GENERATOR).bfloat16()
    weight = weight_of(tmp_path, "IntxUnpackedToInt8Tensor", data, {"qdata": CODES, "scale": scale, "zero_point": zero})
    assert weight.scheme.element == "int4"
    wanted = (CODES.float() - zero.float().repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1)
    assert torch.equal(weight.dequantize(), wanted)
    assert weight.scheme.activation is not None
    assert weight.scheme.activation.recipe == "torchao_8da4w"


def test_trap_11_a_quantized_embedding_has_no_activation(tmp_path: Path) -> None:
    arguments = {"granularity": ROW, "mapping_type": enum("MappingType", "SYMMETRIC"), "reduce_range": False}
    data, pieces = int8(act_quant_kwargs={"_type": "QuantizeTensorToInt8Kwargs", "_data": arguments})
    folder = folder_of(tmp_path, "Int8Tensor", data, pieces, "model.embed_tokens.weight")
    layer = anybit.open(folder).layers["model.embed_tokens"]
    assert (layer.kind, layer.scheme.activation) == ("embedding", None)


# --- what has no public folder ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("block", "grid"), [([1, 64], (4, 1)), ([4, 64], (1, 1)), ([2, 32], (2, 2)), ([4, 64], ())])
def test_fp8_by_row_tensor_and_block(tmp_path: Path, block: list[int], grid: tuple[int, ...]) -> None:
    codes = torch.randn(4, 64, generator=GENERATOR).to(torch.float8_e4m3fn)
    scale = torch.rand(grid, generator=GENERATOR)
    weight = weight_of(tmp_path, "Float8Tensor", {"block_size": block}, {"qdata": codes, "scale": scale})
    full = scale.reshape(4 // block[0], 64 // block[1]).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    assert torch.equal(weight.dequantize(), codes.float() * full)


def test_mxfp8_swizzled(tmp_path: Path) -> None:
    codes = torch.randn(4, 64, generator=GENERATOR).to(torch.float8_e4m3fn)
    scale = torch.randint(120, 130, (32, 16), generator=GENERATOR, dtype=torch.uint8)
    kwargs = {"_type": "QuantizeTensorToMXKwargs", "_data": {
        "elem_dtype": enum("torch.dtype", "float8_e4m3fn"), "block_size": 32, "scaling_mode": enum("S", "RCEIL")}}
    data = {"elem_dtype": enum("torch.dtype", "float8_e4m3fn"), "block_size": 32, "is_swizzled_scales": True,
            "act_quant_kwargs": kwargs}
    weight = weight_of(tmp_path, "MXTensor", data, {"qdata": codes, "scale": scale})
    exponents = scale.flatten().view(32, 16)[:4, :2].float() - 127
    assert torch.equal(weight.dequantize(), codes.float() * torch.exp2(exponents).repeat_interleave(32, 1))
    assert weight.scheme.activation is not None
    assert weight.scheme.activation.recipe == "mx_rceil_torchao"


def test_a_pre_scale_is_kept_as_an_input_transform(tmp_path: Path) -> None:
    data, pieces = int8()
    weight = weight_of(tmp_path, "Int8Tensor", data, {**pieces, "act_pre_scale": torch.arange(1.0, 65.0)})
    assert weight.scheme.pre_scale
    assert weight.pre_scale is not None
    assert weight.pre_scale.shape == (64,)


def test_static_activations_take_the_stored_scale(tmp_path: Path) -> None:
    arguments = {"granularity": {"_type": "PerTensor", "_data": {}}, "mapping_type": enum("MappingType", "SYMMETRIC")}
    data, pieces = int8(act_quant_kwargs={"_type": "QuantizeTensorToInt8Kwargs", "_data": arguments})
    weight = weight_of(tmp_path, "Int8Tensor", data, {**pieces, "act_quant_scale": torch.tensor([[0.5]])})
    assert weight.scheme.activation is not None
    assert (weight.scheme.activation.dynamic, weight.activation["scale"].tolist()) == (False, [0.5])


MX_KWARGS = {"elem_dtype": enum("torch.dtype", "float4_e2m1fn_x2"), "block_size": 32, "is_swizzled_scales": True}


# scale = 2^(floor(log2 v) - 2), 2^(ceil(log2 v) - 2), v rounded to two significant bits first, 2^ceil(log2(v / 6))
@pytest.mark.parametrize(("mode", "largest", "value"), [
    ("FLOOR", 3.9, 3.0), ("CEIL", 3.9, 4.0), ("EVEN", 3.9, 4.0), ("RCEIL", 3.9, 4.0),
    ("FLOOR", 3.2, 3.0), ("CEIL", 3.2, 3.0), ("EVEN", 3.2, 3.0), ("RCEIL", 3.2, 3.0),
    ("FLOOR", 2.6, 3.0), ("CEIL", 2.6, 3.0), ("EVEN", 2.6, 3.0), ("RCEIL", 2.6, 3.0),
    ("FLOOR", 2.2, 2.0), ("CEIL", 2.2, 2.0), ("EVEN", 2.2, 2.0), ("RCEIL", 2.2, 2.0),
])
def test_the_scaling_mode_of_mx_activations_is_carried_out(
    tmp_path: Path, mode: str, largest: float, value: float
) -> None:
    kwargs = {"_type": "QuantizeTensorToMXKwargs", "_data": {**MX_KWARGS, "scaling_mode": enum("S", mode)}}
    data = {"elem_dtype": enum("torch.dtype", "float4_e2m1fn_x2"), "block_size": 32, "is_swizzled_scales": False,
            "act_quant_kwargs": kwargs}
    pieces = {"qdata": torch.zeros(4, 32, dtype=torch.uint8), "scale": torch.full((4, 2), 127, dtype=torch.uint8)}
    activation = weight_of(tmp_path, "MXTensor", data, pieces).scheme.activation
    assert activation is not None
    x = torch.zeros(1, 64)
    x[0, 3] = largest
    assert quantize_dequantize(x, activation)[0, 3] == value


def int8_arguments(mapping: str, *, reduce_range: bool, granularity: Any = ROW) -> dict[str, Any]:
    arguments = {"granularity": granularity, "mapping_type": enum("MappingType", mapping), "reduce_range": reduce_range}
    return {"_type": "QuantizeTensorToInt8Kwargs", "_data": arguments}


def test_a_reduced_range_of_asymmetric_activations_has_127_steps_from_minus_64(tmp_path: Path) -> None:
    weight = weight_of(tmp_path, "Int8Tensor", *int8(act_quant_kwargs=int8_arguments("ASYMMETRIC", reduce_range=True)))
    assert weight.scheme.activation is not None
    x = torch.zeros(1, 64)
    x[0, :3] = torch.tensor([-1.0, 126.0, 0.4])  # a step of 1, zero point -64 - round(-1) = -63
    assert quantize_dequantize(x, weight.scheme.activation)[0, :4].tolist() == [-1.0, 126.0, 0.0, 0.0]


def test_static_activations_of_a_reduced_range_saturate_at_63(tmp_path: Path) -> None:
    arguments = int8_arguments("SYMMETRIC", reduce_range=True, granularity={"_type": "PerTensor", "_data": {}})
    data, pieces = int8(act_quant_kwargs=arguments)
    weight = weight_of(tmp_path, "Int8Tensor", data, {**pieces, "act_quant_scale": torch.tensor([[0.5]])})
    assert weight.scheme.activation is not None
    x = torch.tensor([[100.0, -100.0, 1.3, *[0.0] * 61]])
    assert quantize_dequantize(x, weight.scheme.activation, weight.activation)[0, :3].tolist() == [31.5, -32.0, 1.5]


def test_bounds_of_fp8_activations_act_on_the_row_maximum(tmp_path: Path) -> None:
    codes = torch.ones(4, 64).to(torch.float8_e4m3fn)
    arguments = {"float8_dtype": enum("torch.dtype", "float8_e4m3fn"), "granularity": ROW, "hp_value_lb": 448.0,
                 "hp_value_ub": 896.0}
    data = {"block_size": [1, 64], "act_quant_kwargs": {"_type": "QuantizeTensorToFloat8Kwargs", "_data": arguments}}
    weight = weight_of(tmp_path, "Float8Tensor", data, {"qdata": codes, "scale": torch.ones(4, 1)})
    assert weight.scheme.activation is not None
    x = torch.zeros(2, 64)
    x[0, 0], x[1, 0], x[1, 1] = 0.3, 5000.0, 896.0
    found = quantize_dequantize(x, weight.scheme.activation, weight.activation)
    assert found[0, 0] == 0.3125  # a scale of 1, not of 0.3 / 448: three bits of mantissa
    assert found[1, :2].tolist() == [896.0, 896.0]  # a scale of 2: 5000 saturates


def test_e5m2_activations_reach_57344(tmp_path: Path) -> None:
    arguments = {"float8_dtype": enum("torch.dtype", "float8_e5m2"), "granularity": ROW}
    data = {"block_size": [1, 64], "act_quant_kwargs": {"_type": "QuantizeTensorToFloat8Kwargs", "_data": arguments}}
    pieces = {"qdata": torch.ones(4, 64).to(torch.float8_e5m2), "scale": torch.ones(4, 1)}
    activation = weight_of(tmp_path, "Float8Tensor", data, pieces).scheme.activation
    assert activation is not None
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 1] = 57344.0, 1.1  # a scale of 1: 1.1 is 1 with two bits of mantissa
    assert quantize_dequantize(x, activation)[0, :2].tolist() == [57344.0, 1.0]


@pytest.mark.parametrize(("kwargs", "pieces", "value"), [
    ({"use_dynamic_per_tensor_scale": True}, {}, 1.0),  # s2 = 1 / 2688, so the block's scale is 448: exact
    ({"use_dynamic_per_tensor_scale": False}, {}, 1.03125),  # the block's scale is e4m3(1/6) = 0.171875, times 6
    ({"use_dynamic_per_tensor_scale": False}, {"act_per_tensor_scale": torch.tensor(0.25)}, 1.03125),
])
def test_nvfp4_activations_are_under_a_scale_of_the_call_a_stored_one_or_none(
    tmp_path: Path, kwargs: dict[str, Any], pieces: Tensors, value: float
) -> None:
    stored = {"qdata": torch.zeros(4, 32, dtype=torch.uint8), "scale": torch.ones(4, 4).to(torch.float8_e4m3fn),
              "per_tensor_scale": torch.tensor(0.5), **pieces}
    data = {"block_size": 16, "is_swizzled_scales": False,
            "act_quant_kwargs": {"_type": "QuantizeTensorToNVFP4Kwargs", "_data": kwargs}}
    weight = weight_of(tmp_path, "NVFP4Tensor", data, stored)
    assert weight.scheme.activation is not None
    x = torch.zeros(1, 64)
    x[0, 0] = 1.0
    assert float(quantize_dequantize(x, weight.scheme.activation, weight.activation)[0, 0]) == pytest.approx(value, 1e-6)


def test_the_names_of_torchao_0_14_are_read(tmp_path: Path) -> None:
    data, pieces = int8()
    told = {"_type": "Int8Tensor", "_data": data}  # without _tensor_data_names
    stored = {f"{M}.weight:{piece}": tensor for piece, tensor in pieces.items()}
    stored |= {f"{M}.bias:_data": torch.arange(4.0), "model.norm.weight:_data": torch.ones(64)}
    metadata = {f"{M}.weight": json.dumps(told), f"{M}.bias": '{"_type": "Tensor"}', "format": "pt",
                "model.norm.weight": '{"_type": "Tensor"}'}
    metadata["tensor_names"] = json.dumps([name for name in metadata if name != "format"])
    save_file(stored, tmp_path / "model.safetensors", metadata)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = anybit.open(tmp_path)
    weight = checkpoint.read(M)
    assert torch.equal(weight.dequantize(), CODES.float() * pieces["scale"])
    assert weight.bias is not None
    assert weight.bias.tolist() == [0, 1, 2, 3]
    assert torch.equal(checkpoint.read_plain("model.norm.weight"), torch.ones(64))
    assert checkpoint.has_new_names


def test_a_tensor_under_an_old_and_a_new_name_is_refused(tmp_path: Path) -> None:
    data, pieces = int8()
    folder = folder_of(tmp_path, "Int8Tensor", data, pieces)
    save_file({f"{M}.weight:scale": pieces["scale"]}, folder / "m-9.safetensors", {"format": "pt"})
    with pytest.raises(AnybitError) as caught:
        anybit.open(folder)
    assert (caught.value.kind, caught.value.where) == ("inconsistent", f"{M}.weight:scale")


# --- refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["AffineQuantizedTensor", "Int4PlainInt32Tensor", "Int4PreshuffledTensor", "os.system"])
def test_other_classes_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    error = refusal(tmp_path, kind, *int8())
    assert (error.kind, error.found) == ("unsupported", kind)


@pytest.mark.parametrize(("change", "kind"), [
    ({"block_size": [1, 16]}, "inconsistent"), ({"block_size": [1]}, "damaged"), ({"block_size": None}, "damaged"),
    ({"block_size": [1, 0]}, "damaged"), ({"act_quant_kwargs": 7}, "damaged"),
    ({"act_quant_kwargs": {"_type": "X", "_data": {"mapping_type": enum("M", "NEITHER")}}}, "unsupported"),
])
def test_attributes_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], kind: str) -> None:
    data, pieces = int8()
    assert refusal(tmp_path, "Int8Tensor", {**data, **change}, pieces).kind == kind


def test_a_static_scale_for_each_token_is_refused(tmp_path: Path) -> None:
    data, pieces = int8(act_quant_kwargs=int8_arguments("SYMMETRIC", reduce_range=False))
    error = refusal(tmp_path, "Int8Tensor", data, {**pieces, "act_quant_scale": torch.ones(7, 1)})
    assert (error.kind, error.found) == ("unsupported", "[7, 1]")


@pytest.mark.parametrize("piece", ["qdata", "scale"])
def test_a_missing_piece_is_refused(tmp_path: Path, piece: str) -> None:
    data, pieces = int8()
    del pieces[piece]
    assert refusal(tmp_path, "Int8Tensor", data, pieces).kind == "inconsistent"


def test_an_e8m0_of_255_is_refused(tmp_path: Path) -> None:
    data = {"elem_dtype": "float8_e4m3fn", "block_size": 32, "is_swizzled_scales": False}
    pieces = {"qdata": torch.ones(4, 32).to(torch.float8_e4m3fn), "scale": torch.full((4, 1), 255, dtype=torch.uint8)}
    assert refusal(tmp_path, "MXTensor", data, pieces).kind == "damaged"


def test_plain_weights_that_were_to_be_quantized_while_loading_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "Int8Tensor", *int8())
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file({f"{M}.weight": torch.ones(2, 2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AnybitError) as caught:
        anybit.open(folder)
    assert caught.value.kind == "unsupported"
