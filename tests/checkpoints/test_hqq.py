"""HQQ: the public folders bit for bit, the traps and the refusals of docs/formats/hqq.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import anybit
from anybit.errors import AnybitError
from anybit.weights import QuantizedWeight
from conftest import CHECKPOINTS, digest, expected, genuine, needs_shared

FOLDERS = genuine("hqq-*")
M = "model.layers.0.self_attn.k_proj"
PACKINGS = {8: ("8bit_u8", 1), 4: ("4bit_u8", 2), 3: ("3bit_32", 10), 2: ("2bit_u8", 4), 1: ("1bit_u8", 8)}
GENERATOR = torch.Generator().manual_seed(9)
Tensors = dict[str, torch.Tensor]


def packed(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """Slabs of rows, the first in the highest bits, written out as the document says."""
    slabs = PACKINGS[bits][1]
    fill = -matrix.shape[0] % slabs
    rows = torch.cat([matrix.long(), torch.zeros(fill, matrix.shape[1], dtype=torch.long)])
    step = rows.shape[0] // slabs
    words = sum(rows[i * step : (i + 1) * step] << (bits * (slabs - 1 - i)) for i in range(slabs))
    assert isinstance(words, torch.Tensor)
    return words.to(torch.int32 if bits == 3 else torch.uint8)


def ascii_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def module(
    shape: tuple[int, int], bits: int, axis: int, size: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensors, torch.Tensor]:
    """The tensors of layout A, and the weight computed from the group matrix."""
    count = shape[0] * shape[1]
    groups = count // size
    matrix = torch.randint(0, 2**bits, (groups, size) if axis == 1 else (size, groups), generator=GENERATOR)
    each = (groups, 1) if axis == 1 else (1, groups)
    scale = (torch.rand(each, generator=GENERATOR) + 0.01).to(dtype)
    zero = (torch.rand(each, generator=GENERATOR) * 9 - 2).to(dtype)
    weight = ((matrix.float() - zero.float()) * scale.float()).reshape(shape)
    named = {
        "W_q": packed(matrix, bits), "scale": scale, "zero": zero, "shape": torch.tensor(shape),
        "nbits": torch.tensor(bits, dtype=torch.int32), "axis": torch.tensor(axis, dtype=torch.int32),
        "group_size": torch.tensor(size, dtype=torch.int32), "packing": ascii_tensor(PACKINGS[bits][0]),
        "unpack_view_dtype": ascii_tensor("torch.int32" if bits == 3 else "torch.uint8"),
        "compute_dtype": ascii_tensor(str(dtype)), "view_as_float": torch.tensor(0, dtype=torch.uint8),
        "round_zero": torch.tensor(1, dtype=torch.uint8),
    }
    return {f"{M}.{key}": tensor for key, tensor in named.items()}, weight


def folder_of(folder: Path, tensors: Tensors, quantization: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    config: dict[str, Any] = {"model_type": "llama"}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weight_of(folder: Path, tensors: Tensors) -> QuantizedWeight:
    weight = anybit.open(folder_of(folder, tensors, {"quant_method": "hqq", "quant_config": {}})).read(M)
    assert isinstance(weight, QuantizedWeight)
    return weight


def refusal(folder: Path, tensors: Tensors) -> AnybitError:
    with pytest.raises(AnybitError) as caught:
        weight_of(folder, tensors)
    return caught.value


@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    checkpoint = anybit.open(CHECKPOINTS / folder)
    wanted = expected(folder)["weights"]
    assert {name for name, layer in checkpoint.layers.items() if layer.scheme.is_quantized} == set(wanted)
    for name, want in wanted.items():
        assert digest(checkpoint.read(name).dequantize()) == want["sha256"], name


@needs_shared
def test_every_public_folder_is_read() -> None:
    assert len(FOLDERS) == 5


def test_tensors_alone_tell_the_dialect(tmp_path: Path) -> None:
    tensors, _ = module((8, 64), 4, 1, 64)
    assert anybit.open(folder_of(tmp_path, tensors)).dialect == "hqq"


# --- the traps, by their numbers in the document -----------------------------------------------------------------------

@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("shape", "size"), [((16, 64), 32), ((24, 48), 16), ((16, 24), 64), ((16, 24), 16)])
def test_traps_1_2_3_and_5_slabs_axes_ragged_groups_and_padding(
    tmp_path: Path, bits: int, axis: int, shape: tuple[int, int], size: int
) -> None:
    rows = size if axis == 0 else shape[0] * shape[1] // size
    if bits != 3 and rows % PACKINGS[bits][1]:
        pytest.skip("hqq cannot pack such rows")
    tensors, wanted = module(shape, bits, axis, size)
    assert torch.equal(weight_of(tmp_path, tensors).dequantize(), wanted)


@pytest.mark.parametrize(("axis", "size", "block"), [(1, 64, (1, 0)), (0, 16, (0, 1)), (1, 32, (1, 32))])
def test_groups_that_are_blocks_are_told_as_blocks(tmp_path: Path, axis: int, size: int, block: tuple[int, int]) -> None:
    level = weight_of(tmp_path, module((16, 64), 4, axis, size)[0]).scheme.scales[0]
    assert (level.placement, level.block) == ("grid", block)


def test_traps_4_and_6_zeros_stay_fractional_and_are_subtracted_in_float32(tmp_path: Path) -> None:
    tensors, wanted = module((16, 64), 4, 1, 32, torch.bfloat16)
    weight = weight_of(tmp_path, tensors)
    assert weight.scheme.offset is not None
    assert (weight.scheme.offset.kind, weight.scheme.offset.format) == ("zero_point", "bfloat16")
    assert torch.equal(weight.dequantize(), wanted)


def test_traps_7_and_9_the_modules_own_description_counts(tmp_path: Path) -> None:
    tensors, wanted = module((16, 64), 4, 1, 32)
    config = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 2, "group_size": None}}}
    assert torch.equal(anybit.open(folder_of(tmp_path, tensors, config)).read(M).dequantize(), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 3])
def test_trap_10_view_as_float_is_a_view(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    tensors, wanted = module((16, 64), bits, 1, 32, dtype)
    tensors[f"{M}.W_q"] = tensors[f"{M}.W_q"].view(dtype)
    tensors[f"{M}.view_as_float"] = torch.tensor(1, dtype=torch.uint8)
    assert torch.equal(weight_of(tmp_path, tensors).dequantize(), wanted)


@pytest.mark.parametrize(("bits", "most", "element"), [(1.58, 3, "uint2"), (5, 32, "uint5"), (6, 64, "uint6")])
def test_odd_widths_lie_in_wider_containers(tmp_path: Path, bits: float, most: int, element: str) -> None:
    tensors, _ = module((16, 64), 2 if bits == 1.58 else 8, 1, 32)
    codes = torch.randint(0, most, (32, 32), generator=GENERATOR)
    tensors |= {f"{M}.W_q": packed(codes, 2 if bits == 1.58 else 8),
                f"{M}.nbits": torch.tensor(bits, dtype=torch.float32 if bits == 1.58 else torch.int32)}
    weight = weight_of(tmp_path, tensors)
    assert weight.scheme.element == element
    assert torch.equal(weight.codes, codes.view(16, 64).to(torch.uint8))


# --- refusals ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("key", "tensor", "kind"), [
    ("nbits", torch.tensor(7, dtype=torch.int32), "unsupported"), ("packing", ascii_tensor("2bit_u8"), "unsupported"),
    ("packing", ascii_tensor("4bit_32"), "unsupported"), ("axis", torch.tensor(2, dtype=torch.int32), "damaged"),
    ("group_size", torch.tensor(48, dtype=torch.int32), "inconsistent"), ("shape", torch.tensor([16, 65]), "inconsistent"),
    ("shape", torch.tensor([-16, 64]), "damaged"), ("scale", torch.ones(31, 1), "inconsistent"),
    ("zero", torch.full((32, 1), float("nan")), "damaged"), ("scale", torch.full((32, 1), -1.0), "damaged"),
    ("W_q", torch.zeros(16, 31, dtype=torch.uint8), "inconsistent"), ("lora_A", torch.ones(2, 2), "unsupported"),
])
def test_what_does_not_fit_is_refused(tmp_path: Path, key: str, tensor: torch.Tensor, kind: str) -> None:
    tensors, _ = module((16, 64), 4, 1, 32)
    assert refusal(tmp_path, {**tensors, f"{M}.{key}": tensor}).kind == kind


@pytest.mark.parametrize("key", ["scale", "zero", "shape", "axis", "nbits"])
def test_a_missing_companion_is_refused(tmp_path: Path, key: str) -> None:
    tensors, _ = module((16, 64), 4, 1, 32)
    del tensors[f"{M}.{key}"]
    assert refusal(tmp_path, tensors).kind in ("inconsistent", "damaged", "unsupported")
