"""gpt-oss MXFP4: the public folder bit for bit, the traps and the refusals of docs/formats/gpt_oss_mxfp4.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_checks import assert_reads_bit_for_bit, genuine_weight, read
from small_checkpoints import tensors_of, write

from anybit.checkpoints.dialects import gpt_oss_mxfp4 as dialect
from anybit.errors import AnybitError, Damaged, Inconsistent
from anybit.weights import QuantizedWeight
from conftest import genuine, needs_shared

FOLDERS = genuine("gptoss-mxfp4*")
E = "model.layers.0.mlp.experts"
M = f"{E}.down_proj"
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
Tensors = dict[str, torch.Tensor]


def stack(byte: int = 0x22, scale: int = 127, name: str = M, **other: torch.Tensor) -> Tensors:
    """Two experts [2, 3, 64] of one byte and one scale."""
    blocks = torch.full((2, 3, 2, 16), byte, dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.full((2, 3, 2), scale, dtype=torch.uint8),
            **{f"{name}_{leaf}": tensor for leaf, tensor in other.items()}}


def weight(folder: Path, tensors: Tensors, name: str = M, quantization: dict[str, Any] | None = CONFIG) -> QuantizedWeight:
    return read(dialect, write(folder, quantization, tensors), name)


@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    assert_reads_bit_for_bit(dialect, folder)


@needs_shared
def test_every_public_folder_is_read() -> None:
    assert len(FOLDERS) == 1


@needs_shared
def test_the_documents_values_are_read_as_written_there() -> None:
    name = f"{E}.gate_up_proj"
    stored = genuine_weight(dialect, "gptoss-mxfp4", name)
    at = (stored.codes[0, 0, :8].tolist(), int(stored.scales[0][0, 0, 0]))
    assert at == ([0xE, 0xA, 9, 0, 8, 2, 2, 2], 123)
    wanted = [-0.25, -0.0625, -0.03125, 0.0, -0.0, 0.0625, 0.0625, 0.0625]
    assert stored.dequantize()[0, 0, :8].tolist() == wanted


# --- the traps, by their numbers in the document -----------------------------------------------------------------------

def test_trap_1_the_low_nibble_is_first(tmp_path: Path) -> None:
    assert weight(tmp_path, stack(0x72)).dequantize()[0, 0, :4].tolist() == [1.0, 6.0, 1.0, 6.0]


def test_trap_2_rows_keep_their_interleaved_order(tmp_path: Path) -> None:
    tensors = stack(name=f"{E}.gate_up_proj")
    tensors[f"{E}.gate_up_proj_scales"][:] = torch.tensor([127, 128, 129])[:, None]
    got = weight(tmp_path, tensors, f"{E}.gate_up_proj")
    assert got.dequantize()[1, :, 0].tolist() == [1.0, 2.0, 4.0]


def test_traps_3_and_8_a_square_matrix_is_not_transposed(tmp_path: Path) -> None:
    tensors = {f"{M}_blocks": torch.zeros(1, 32, 1, 16, dtype=torch.uint8),
               f"{M}_scales": torch.full((1, 32, 1), 127, dtype=torch.uint8)}
    tensors[f"{M}_blocks"][0, 3, 0, 5] = 0x02  # output 3, input 10
    got = weight(tmp_path, tensors).dequantize()
    assert got.nonzero().tolist() == [[0, 3, 10]]


@pytest.mark.parametrize(("byte", "wanted"), [(127, 1.0), (200, 2.0**73), (1, 2.0**-126), (0, 2.0**-127)])
def test_traps_4_5_and_6_scales_are_biased_by_127_and_subnormals_are_kept(
    tmp_path: Path, byte: int, wanted: float
) -> None:
    assert weight(tmp_path, stack(0x22, byte)).dequantize().unique().tolist() == [wanted]
    assert weight(tmp_path, stack(0x11, byte)).dequantize().unique().tolist() == [wanted / 2]


def test_trap_7_biases_are_per_expert(tmp_path: Path) -> None:
    bias = torch.arange(6.0).reshape(2, 3).bfloat16()
    got = weight(tmp_path, stack(bias=bias))
    assert got.bias is not None
    assert torch.equal(got.bias, bias)


def test_traps_9_and_10_blocks_alone_say_what_is_quantized(tmp_path: Path) -> None:
    tensors = {**stack(), "model.layers.0.mlp.router.weight": torch.ones(2, 64).bfloat16()}
    layers = dialect.declare(write(tmp_path, CONFIG, tensors))
    assert {name for name, layer in layers.items() if layer.scheme.is_quantized} == {M}
    assert str(layers[M].scheme) == "mxfp4·g32·e8m0"


def test_openais_own_file_names_are_read(tmp_path: Path) -> None:
    blocks, scales = stack(0x72).values()
    name = "block.0.mlp.mlp1_weight"
    tensors = {f"{name}.blocks": blocks, f"{name}.scales": scales, "block.0.mlp.mlp1_bias": torch.ones(2, 3).bfloat16()}
    got = weight(tmp_path, tensors, name, quantization=None)
    assert got.shape == (2, 3, 64)
    assert got.bias is not None


def test_codes_stay_packed(tmp_path: Path) -> None:
    got = weight(tmp_path, stack())
    assert got.nbytes == 2 * 3 * 2 * (16 + 1)


# --- refusals --------------------------------------------------------------------------------------------------------------

def refusal(folder: Path, tensors: Tensors) -> AnybitError:
    contents = write(folder, CONFIG, tensors)
    with pytest.raises(AnybitError) as caught:
        layer = dialect.declare(contents)[M]
        dialect.canonicalize(layer, tensors_of(contents, layer))
    return caught.value


def test_blocks_without_scales_are_refused(tmp_path: Path) -> None:
    tensors = stack()
    del tensors[f"{M}_scales"]
    assert isinstance(refusal(tmp_path, tensors), Inconsistent)


@pytest.mark.parametrize("blocks", [(2, 3, 4, 8), (2, 3, 2, 32)])
def test_blocks_of_another_shape_are_refused(tmp_path: Path, blocks: tuple[int, ...]) -> None:
    tensors = {**stack(), f"{M}_blocks": torch.zeros(blocks, dtype=torch.uint8)}
    assert isinstance(refusal(tmp_path, tensors), Inconsistent)


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    tensors = {**stack(), f"{M}_scales": torch.zeros(2, 2, 3, dtype=torch.uint8)}
    assert isinstance(refusal(tmp_path, tensors), Inconsistent)


@pytest.mark.parametrize("leaf", ["blocks", "scales"])
def test_tensors_that_are_no_bytes_are_refused(tmp_path: Path, leaf: str) -> None:
    tensors = stack()
    tensors[f"{M}_{leaf}"] = tensors[f"{M}_{leaf}"].view(torch.int8)
    assert isinstance(refusal(tmp_path, tensors), Inconsistent)


def test_scale_255_is_damage(tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path, stack(0x00, 255)), Damaged)


@pytest.mark.parametrize(("byte", "scale"), [(0x06, 253), (0x04, 254), (0xE0, 253), (0x70, 254)])
def test_values_beyond_float32_are_damage(tmp_path: Path, byte: int, scale: int) -> None:
    error = refusal(tmp_path, stack(byte, scale))
    assert isinstance(error, Damaged)
    assert f"byte {scale}" in error.found


@pytest.mark.parametrize(("byte", "scale", "wanted"), [(0x05, 253, 3 * 2.0**126), (0x03, 254, 1.5 * 2.0**127)])
def test_the_largest_values_of_float32_are_read(tmp_path: Path, byte: int, scale: int, wanted: float) -> None:
    assert weight(tmp_path, stack(byte, scale)).dequantize().max().item() == wanted
