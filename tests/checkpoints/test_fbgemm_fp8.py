"""fbgemm_fp8: the public folder bit for bit, the traps and the refusals of docs/formats/fbgemm_fp8.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_checks import assert_computes_what_the_runtime_computes, assert_reads_bit_for_bit, product, read
from small_checkpoints import fp8_bytes, tensors_of, write

from anybit.checkpoints.dialects import fbgemm_fp8 as dialect
from anybit.errors import AnybitError, Damaged, Inconsistent
from anybit.weights import QuantizedWeight
from conftest import genuine, needs_shared

FOLDERS = genuine("fbgemm-*")
M = "model.layers.1.mlp.up_proj"
EXPERTS = "model.layers.1.feed_forward.experts"
FLOOR = 1 / (448 * 512)
Tensors = dict[str, torch.Tensor]


def config(**other: Any) -> dict[str, Any]:
    return {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": None, **other}


def module(scale: torch.Tensor, **other: torch.Tensor) -> Tensors:
    """A weight of ones, 3 x 3: square, so that a scale in the wrong direction would go unseen by shapes."""
    codes = torch.full((3, 3), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return {f"{M}.{leaf}": tensor for leaf, tensor in {"weight": codes, "weight_scale": scale, **other}.items()}


SCALES = torch.tensor([[1.0], [2.0], [4.0]])


def weight(folder: Path, quantization: dict[str, Any], tensors: Tensors, name: str = M) -> QuantizedWeight:
    return read(dialect, write(folder, quantization, tensors), name)


@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    assert_reads_bit_for_bit(dialect, folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_layer_computes_what_the_genuine_runtime_computes(folder: str) -> None:
    assert assert_computes_what_the_runtime_computes(dialect, folder) >= 3


@needs_shared
def test_every_public_folder_is_read() -> None:
    assert len(FOLDERS) == 1


# --- the traps, by their numbers in the document -----------------------------------------------------------------------

def test_trap_1_the_bound_is_on_the_row_maximum_not_on_the_scale(tmp_path: Path) -> None:
    got = weight(tmp_path, config(activation_scale_ub=2.0), module(SCALES))
    assert got.scheme.activation is not None
    assert got.scheme.activation.bound == 2.0
    y = product(got, torch.tensor([[10.0, 0.0, 0.0]]))  # clipped at 2
    assert torch.allclose(y, torch.tensor([[2.0, 4.0, 8.0]]).double(), rtol=1e-6)


@pytest.mark.parametrize("scale", [SCALES, SCALES.flatten(), SCALES.bfloat16()])
def test_trap_2_a_scale_belongs_to_an_output(tmp_path: Path, scale: torch.Tensor) -> None:
    got = weight(tmp_path, config(), module(scale))
    assert got.dequantize().tolist() == [[1.0] * 3, [2.0] * 3, [4.0] * 3]


def test_trap_4_weights_have_no_bound(tmp_path: Path) -> None:
    assert weight(tmp_path, config(activation_scale_ub=0.5), module(SCALES)).dequantize().max() == 4.0


def test_traps_3_and_5_a_small_row_has_the_floor_as_its_scale(tmp_path: Path) -> None:
    got = weight(tmp_path, config(), module(SCALES))
    x = torch.tensor([[FLOOR * 8, 0.0, 0.0], [0.0, 0.0, 0.0]])  # absmax / 448 is far below the floor
    assert product(got, x)[:, 0].tolist() == [torch.tensor(FLOOR).item() * 8, 0.0]


def test_trap_6_llama_4s_experts_are_transposed_and_their_down_scales_are_outputs(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    gate_up, down = (torch.randn(2, *shape, generator=generator).to(torch.float8_e4m3fn) for shape in ((4, 6), (3, 4)))
    gate_up_scale, down_scale = torch.arange(1.0, 13.0).reshape(2, 1, 6), torch.arange(1.0, 9.0).reshape(2, 4, 1)
    tensors = {f"{EXPERTS}.gate_up_proj": gate_up, f"{EXPERTS}.gate_up_proj_scale": gate_up_scale,
               f"{EXPERTS}.down_proj": down, f"{EXPERTS}.down_proj_scale": down_scale}
    contents = write(tmp_path, config(), tensors)
    first = read(dialect, contents, f"{EXPERTS}.gate_up_proj")
    assert first.shape == (2, 6, 4)
    assert torch.equal(first.dequantize(), (gate_up.float() * gate_up_scale).transpose(1, 2))
    second = read(dialect, contents, f"{EXPERTS}.down_proj")
    assert second.shape == (2, 4, 3)
    assert torch.equal(second.dequantize(), down.float().transpose(1, 2) * down_scale)


def test_trap_7_no_activation_scale_is_expected_on_disk(tmp_path: Path) -> None:
    got = weight(tmp_path, config(), module(SCALES, bias=torch.ones(3)))
    assert got.activation == {}
    assert got.bias is not None


# --- refusals --------------------------------------------------------------------------------------------------------------

def refusal(folder: Path, quantization: dict[str, Any], tensors: Tensors) -> AnybitError:
    contents = write(folder, quantization, tensors)
    with pytest.raises(AnybitError) as caught:
        layer = dialect.declare(contents)[M]
        dialect.canonicalize(layer, tensors_of(contents, layer))
    return caught.value


def test_a_missing_bound_is_1200_with_a_note(tmp_path: Path) -> None:
    layer = dialect.declare(write(tmp_path, {"quant_method": "fbgemm_fp8"}, module(SCALES)))[M]
    assert layer.scheme.activation is not None
    assert layer.scheme.activation.bound == 1200.0
    assert "1200" in layer.notes[0]


@pytest.mark.parametrize("bound", [0, -1.0, "1200", True, [1]])
def test_an_unsound_bound_is_damage(tmp_path: Path, bound: object) -> None:
    assert isinstance(refusal(tmp_path, config(activation_scale_ub=bound), module(SCALES)), Damaged)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_not_positive_are_damage(tmp_path: Path, value: float) -> None:
    assert isinstance(refusal(tmp_path, config(), module(torch.tensor([[1.0], [value], [1.0]]))), Damaged)


def test_nan_codes_are_damage(tmp_path: Path) -> None:
    tensors = {f"{M}.weight": fp8_bytes(0x38, 0xFF), f"{M}.weight_scale": torch.ones(1, 1)}
    assert isinstance(refusal(tmp_path, config(), tensors), Damaged)


def test_a_weight_without_scale_is_refused(tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path, config(), {f"{M}.weight": fp8_bytes(0x38)}), Inconsistent)


def test_a_scale_along_the_inputs_is_refused(tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path, config(), module(SCALES.t())), Inconsistent)
