"""bitsandbytes: the public folders bit for bit, the traps and the refusals of docs/formats/bitsandbytes.md."""

from __future__ import annotations

import json
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
from small_checkpoints import write

from anybit.checkpoints.dialects import bitsandbytes as dialect
from anybit.errors import AnybitError
from anybit.numerics.formats import FP4_BNB_VALUES, NF4_VALUES
from anybit.weights import QuantizedWeight
from conftest import genuine, needs_shared

FOLDERS = genuine("bnb-*")
M = "model.layers.0.self_attn.q_proj"
BOOKS = {"nf4": NF4_VALUES, "fp4": FP4_BNB_VALUES}
Tensors = dict[str, torch.Tensor]


def config(**other: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, **other}


def text(value: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def four_bit(
    rows: int = 3, columns: int = 40, kind: str = "nf4", dtype: str = "float32", block: int = 64, **state: Any
) -> tuple[Tensors, torch.Tensor]:
    """Tensors of a module, and its weight computed element by element."""
    count = rows * columns
    codes = [(7 * i + i // 16) % 16 for i in range(count)]
    padded = [*codes, 0]
    packed = [padded[i] << 4 | padded[i + 1] for i in range(0, count, 2)]
    absmax = torch.tensor([0.5 + 0.37 * i for i in range(-(-count // block))])
    told = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": [rows, columns], **state}
    book = torch.tensor(BOOKS[kind])
    weight = torch.stack([book[code] * absmax[i // block] for i, code in enumerate(codes)]).view(rows, columns)
    tensors = {
        f"{M}.weight": torch.tensor(packed, dtype=torch.uint8).view(-1, 1), f"{M}.weight.absmax": absmax,
        f"{M}.weight.quant_map": book, f"{M}.weight.quant_state.bitsandbytes__{kind}": text(told),
    }
    return tensors, weight.to(getattr(torch, dtype)).float()


def eight_bit(**other: torch.Tensor) -> Tensors:
    codes = torch.tensor([[127, -127, 3], [1, 0, -64]], dtype=torch.int8)
    named = {"weight": codes, "SCB": torch.tensor([2.5, 0.3]), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {f"{M}.{leaf}": tensor for leaf, tensor in {**named, **other}.items()}


def weight_of(folder: Path, tensors: Tensors, **other: Any) -> QuantizedWeight:
    return read(dialect, write(folder, config(**other), tensors), M)


def refusal(folder: Path, tensors: Tensors, **other: Any) -> AnybitError:
    with pytest.raises(AnybitError) as caught:
        weight_of(folder, tensors, **other)
    return caught.value


@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    assert_reads_bit_for_bit(dialect, folder)


@pytest.mark.parametrize("folder", [name for name in FOLDERS if "int8" in name])
def test_a_layer_computes_what_the_genuine_runtime_computes(folder: str) -> None:
    assert assert_computes_what_the_runtime_computes(dialect, folder) >= 2


@needs_shared
def test_every_public_folder_is_read() -> None:
    assert len(FOLDERS) == 4


@needs_shared
def test_the_worked_bytes_of_the_document() -> None:
    weight = genuine_weight(dialect, "bnb-nf4-llama", M)
    assert weight.codes[0, :8].tolist() == [13, 3, 5, 6, 6, 0, 2, 5]
    assert weight.dequantize()[0, :4].tolist() == [0.11328125, -0.07958984375, -0.037109375, -0.018310546875]


# --- recognition -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("old", [{"load_in_8bit": True}, {"load_in_4bit": True}, {"_load_in_8bit": True}])
def test_an_old_config_without_a_method_is_recognised(tmp_path: Path, old: dict[str, Any]) -> None:
    assert dialect.recognizes(write(tmp_path, old, eight_bit()))


@pytest.mark.parametrize("other", [{"quant_method": "gptq", "load_in_4bit": True}, {"load_in_4bit": False}, {}])
def test_another_config_is_not(tmp_path: Path, other: dict[str, Any]) -> None:
    assert not dialect.recognizes(write(tmp_path, other, eight_bit()))


def test_a_config_over_plain_weights_is_read_as_plain_and_says_so(tmp_path: Path) -> None:
    contents = write(tmp_path, config(), {f"{M}.weight": torch.ones(2, 2)})
    assert not dialect.declare(contents)[M].scheme.is_quantized
    assert "no weight is quantized" in dialect.notes(contents)[0]


# --- the traps, by their numbers in the document -------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_traps_1_and_6_high_nibble_first_through_the_stored_table(tmp_path: Path, kind: str) -> None:
    tensors, wanted = four_bit(2, 64, kind)
    assert torch.equal(weight_of(tmp_path, tensors).dequantize(), wanted)


@pytest.mark.parametrize("shape", [(3, 40), (5, 33), (1, 7), (2, 96)])
def test_trap_2_blocks_run_over_the_ends_of_rows(tmp_path: Path, shape: tuple[int, int]) -> None:
    tensors, wanted = four_bit(*shape)
    weight = weight_of(tmp_path, tensors)
    assert weight.scheme.scales[0].placement == "flat"
    assert torch.equal(weight.dequantize(), wanted)


def test_blocks_that_end_with_the_row_are_groups(tmp_path: Path) -> None:
    tensors, wanted = four_bit(4, 256, block=128)
    weight = weight_of(tmp_path, tensors)
    assert (weight.scheme.scales[0].placement, weight.scheme.scales[0].block) == ("grid", (1, 128))
    assert torch.equal(weight.dequantize(), wanted)


@pytest.mark.parametrize("storage", [torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_trap_3_the_storage_dtype_is_a_view_of_bytes(tmp_path: Path, storage: torch.dtype) -> None:
    tensors, wanted = four_bit(4, 64)
    tensors[f"{M}.weight"] = tensors[f"{M}.weight"].flatten().view(storage).view(-1, 1)
    assert torch.equal(weight_of(tmp_path, tensors).dequantize(), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_trap_4_values_are_rounded_to_the_quant_states_dtype(tmp_path: Path, dtype: str) -> None:
    tensors, wanted = four_bit(2, 64, dtype=dtype)
    assert torch.equal(weight_of(tmp_path, tensors, bnb_4bit_compute_dtype="float32").dequantize(), wanted)


def test_traps_5_and_10_nested_maxima_are_decoded_with_a_short_last_block(tmp_path: Path) -> None:
    told: dict[str, Any] = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.2593663633}
    tensors, _ = four_bit(257, 64, **told)
    codes = torch.arange(257) % 256
    above, book = torch.tensor([0.7, 0.011]), torch.linspace(-0.9, 1.0, 256)
    tensors |= {f"{M}.weight.absmax": codes.to(torch.uint8), f"{M}.weight.nested_absmax": above,
                f"{M}.weight.nested_quant_map": book}
    weight = weight_of(tmp_path, tensors)
    offset = torch.tensor(0.2593663633)
    wanted = [(book[code] * above[i // 256] + offset).item() for i, code in enumerate(codes)]
    assert weight.scales[0].flatten().tolist() == wanted


def test_trap_7_row_maxima_are_divided_by_127_in_a_second_rounding(tmp_path: Path) -> None:
    weight = weight_of(tmp_path, eight_bit()).dequantize()
    third = torch.tensor(0.007874015718698502)
    wanted = torch.tensor([[127.0, -127, 3], [1, 0, -64]]) * torch.tensor([[2.5], [0.3]]) * third
    assert torch.equal(weight, wanted)


def test_trap_8_outlier_columns_stay_and_the_row_maximum_skips_their_outliers_only(tmp_path: Path) -> None:
    weight = weight_of(tmp_path, eight_bit(), llm_int8_threshold=4.0)
    assert weight.scheme.activation is not None
    assert weight.scheme.activation.bound == 4.0
    x = torch.tensor([[5.0, 1.0, 0.5], [2.0, 0.25, 1.0]])  # column 0 is an outlier in row 0; its 2.0 counts in row 1
    quantized = torch.tensor([[5.0, 127 / 127, 64 / 127], [2.0, 16 * 2 / 127, 64 * 2 / 127]])
    wanted = quantized.double() @ weight.dequantize().double().T
    assert torch.allclose(product(weight, x), wanted, rtol=1e-6)


def test_a_threshold_of_zero_means_no_outliers(tmp_path: Path) -> None:
    weight = weight_of(tmp_path, eight_bit(), llm_int8_threshold=0.0)
    y = product(weight, torch.tensor([[300.0, 1.0, 1.0]]))  # 1/300 of the maximum is below half a step
    assert torch.allclose(y, torch.tensor([[300.0, 0.0, 0.0]]).double() @ weight.dequantize().double().T, rtol=1e-6)


def test_trap_9_the_tensors_decide_over_the_config(tmp_path: Path) -> None:
    tensors, wanted = four_bit(2, 64, "fp4")
    weight = weight_of(tmp_path, tensors, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                       llm_int8_skip_modules=[M])
    assert weight.scheme.element == "fp4_bnb"
    assert torch.equal(weight.dequantize(), wanted)


def test_a_missing_weight_format_is_row_major(tmp_path: Path) -> None:
    tensors = eight_bit()
    del tensors[f"{M}.weight_format"]
    assert weight_of(tmp_path, tensors).codes.tolist() == [[127, -127, 3], [1, 0, -64]]


def test_a_bias_belongs_to_its_module(tmp_path: Path) -> None:
    tensors, _ = four_bit(3, 40)
    weight = weight_of(tmp_path, {**tensors, f"{M}.bias": torch.tensor([1.0, 2.0, 3.0])})
    assert weight.bias is not None
    assert weight.bias.tolist() == [1.0, 2.0, 3.0]


# --- refusals ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("order", [1, 2, 3])
def test_tiled_int8_is_refused(tmp_path: Path, order: int) -> None:
    error = refusal(tmp_path, eight_bit(weight_format=torch.tensor(order, dtype=torch.uint8)))
    assert (error.kind, error.found) == ("unsupported", f"[{order}]")


@pytest.mark.parametrize(("change", "kind"), [
    ({"blocksize": 48}, "unsupported"), ({"dtype": "int8"}, "damaged"), ({"dtype": None}, "damaged"),
    ({"shape": [3]}, "damaged"), ({"shape": [3, 41]}, "inconsistent"), ({"quant_type": "fp4"}, "inconsistent"),
    ({"nested_blocksize": 256, "nested_offset": 0.1}, "inconsistent"),
    ({"nested_blocksize": 256, "nested_offset": "x"}, "damaged"),
])
def test_a_quant_state_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], kind: str) -> None:
    tensors, _ = four_bit(3, 40)
    told = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [3, 40], **change}
    assert refusal(tmp_path, {**tensors, f"{M}.weight.quant_state.bitsandbytes__nf4": text(told)}).kind == kind


@pytest.mark.parametrize("leaf", ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"])
def test_a_missing_companion_is_refused(tmp_path: Path, leaf: str) -> None:
    tensors, _ = four_bit(3, 40)
    del tensors[f"{M}.{leaf}"]
    assert refusal(tmp_path, tensors).kind == "inconsistent"


def test_another_four_bit_type_is_refused(tmp_path: Path) -> None:
    tensors, _ = four_bit(3, 40)
    tensors[f"{M}.weight.quant_state.bitsandbytes__af4"] = tensors.pop(f"{M}.weight.quant_state.bitsandbytes__nf4")
    assert refusal(tmp_path, tensors).kind == "unsupported"


def test_two_quant_states_are_refused(tmp_path: Path) -> None:
    tensors, _ = four_bit(3, 40)
    other, _ = four_bit(3, 40, "fp4")
    assert refusal(tmp_path, {**other, **tensors}).kind == "inconsistent"


@pytest.mark.parametrize(("leaf", "tensor"), [
    ("weight.absmax", torch.ones(3)), ("weight.absmax", torch.tensor([1.0, float("nan")])),
    ("weight.absmax", torch.tensor([1.0, -1.0])), ("weight.quant_map", torch.linspace(-1, 1, 16)),
    ("weight", torch.zeros(61, 1, dtype=torch.uint8)),
])
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, leaf: str, tensor: torch.Tensor) -> None:
    tensors, _ = four_bit(3, 40)
    assert refusal(tmp_path, {**tensors, f"{M}.{leaf}": tensor}).kind in ("damaged", "inconsistent")


def test_int8_codes_without_maxima_are_refused(tmp_path: Path) -> None:
    tensors = eight_bit()
    del tensors[f"{M}.SCB"]
    assert f"{M}.SCB" in refusal(tmp_path, tensors).wanted


@pytest.mark.parametrize("other", [{"load_in_8bit": True}, {"llm_int8_threshold": -1}, {"llm_int8_threshold": "6"}])
def test_an_unsound_config_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    assert refusal(tmp_path, four_bit()[0], **other).kind == "damaged"
