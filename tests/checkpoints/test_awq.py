"""AWQ: every public folder bit for bit, the traps and the refusals of docs/formats/awq.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_checks import assert_reads_bit_for_bit, genuine_weight, read, stream, with_side
from small_checkpoints import tensors_of, write

from anybit.checkpoints.dialects import awq as dialect
from anybit.checkpoints.dialects import gptq
from anybit.errors import AnybitError, Damaged, Inconsistent, Unsupported
from anybit.schemes import CHANNEL
from anybit.weights import QuantizedWeight
from conftest import genuine, needs_shared

FOLDERS = genuine("awq-*")
M = "model.layers.0.self_attn.q_proj"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
AUTO_ROUND = {"provider": "auto-round"}
Tensors = dict[str, torch.Tensor]


def config(**other: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm", **other}


def random_codes(rows: int, columns: int, bits: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator)


def in_awq_order(codes: torch.Tensor) -> torch.Tensor:
    """Columns of each eight in the order in which AWQ packs them."""
    return codes.unflatten(1, (-1, 8))[..., ORDER].flatten(1)


def named(**tensors: torch.Tensor) -> Tensors:
    return {f"{M}.{leaf}": tensor for leaf, tensor in tensors.items()}


def gemm(codes: torch.Tensor, zeros: torch.Tensor, bits: int = 4, ordered: bool = True, **other: torch.Tensor) -> Tensors:
    """A module of codes [N, K] and zero points [N, G], scales 1, 2, 4 ... by group."""
    arrange = in_awq_order if ordered else torch.Tensor.contiguous
    scales = (2.0 ** torch.arange(zeros.shape[1]))[:, None].repeat(1, len(codes)).half()
    return named(qweight=stream(arrange(codes.t()), bits), qzeros=stream(arrange(zeros.t()), bits), scales=scales, **other)


def weight(folder: Path, quantization: dict[str, Any], tensors: Tensors) -> QuantizedWeight:
    return read(dialect, write(folder, quantization, tensors), M)


def values(codes: torch.Tensor, zeros: torch.Tensor, group: int) -> torch.Tensor:
    """The reference value under scales 1, 2, 4 ... by group."""
    of = torch.arange(codes.shape[1]) // group
    return (codes - zeros[:, of]).float() * 2.0**of


# --- the genuine folders -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", FOLDERS)
def test_reading_equals_the_genuine_tool_bit_for_bit(folder: str) -> None:
    assert_reads_bit_for_bit(dialect, folder)


@needs_shared
def test_every_public_folder_is_read() -> None:
    assert len(FOLDERS) == 7


@needs_shared
def test_the_documents_gemm_words_are_read_as_written_there() -> None:
    got = genuine_weight(dialect, "awq-gemm-llama", M)
    assert got.codes[:8, 0].tolist() == [3, 1, 13, 5, 8, 7, 8, 10]
    assert got.offset is not None
    assert got.offset[:8, 0].tolist() == [7, 0, 15, 7, 15, 7, 7, 7]


@needs_shared
def test_the_documents_gemv_words_are_read_as_written_there() -> None:
    got = genuine_weight(dialect, "awq-gemv-qwen2", M)
    assert got.codes[0, :8].tolist() == [5, 6, 2, 5, 9, 5, 5, 5]
    assert got.offset is not None
    assert got.offset[0].tolist() == [7, 9, 8, 8]


@needs_shared
def test_the_documents_gemv_fast_words_are_read_as_written_there() -> None:
    got = genuine_weight(dialect, "awq-gemvfast-llama", M)
    assert got.codes[0, :16].tolist() == [7, 9, 6, 10, 14, 3, 5, 8, 1, 5, 4, 15, 6, 9, 9, 9]
    assert (got.codes[0, 16], got.codes[0, 24]) == (6, 1)


@needs_shared
def test_the_documents_8_bit_words_are_read_as_written_there() -> None:
    got = genuine_weight(dialect, "awq-gptqmodel-w8-llama", M)
    assert got.codes[:4, 0].tolist() == [123, 65, 154, 188]


# --- the traps, by their numbers in the document -----------------------------------------------------------------------

def test_traps_1_and_2_gemm_packs_eights_of_outputs_in_awq_order(tmp_path: Path) -> None:
    codes, zeros = random_codes(16, 24), random_codes(16, 3)
    got = weight(tmp_path, config(), gemm(codes, zeros))
    assert got.shape == (16, 24)
    assert torch.equal(got.dequantize(), values(codes, zeros, 8))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
def test_trap_3_other_widths_of_gptqmodel_are_a_plain_stream(tmp_path: Path, bits: int) -> None:
    codes, zeros = random_codes(32, 16, bits), random_codes(32, 2, bits)
    got = weight(tmp_path, config(bits=bits, **GPTQMODEL), gemm(codes, zeros, bits, ordered=False))
    assert torch.equal(got.dequantize(), values(codes, zeros, 8))


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_other_widths_of_auto_round_are_ordered_and_then_a_stream(tmp_path: Path, bits: int) -> None:
    codes, zeros = random_codes(32, 16, bits), random_codes(32, 2, bits)
    got = weight(tmp_path, config(bits=bits, **AUTO_ROUND), gemm(codes, zeros, bits))
    assert torch.equal(got.dequantize(), values(codes, zeros, 8))


def test_the_tail_of_a_stream_of_outputs_is_cut(tmp_path: Path) -> None:
    codes, zeros = random_codes(12, 8, 8), random_codes(12, 1, 8)
    codes, zeros = codes[:10], zeros[:10]  # 10 codes of 8 bits: two and a half words
    got = weight(tmp_path, config(bits=8, **GPTQMODEL), gemm(codes, zeros, 8, ordered=False))
    assert torch.equal(got.dequantize(), values(codes, zeros, 8))


def gemv(codes: torch.Tensor, zeros: torch.Tensor, width: int) -> Tensors:
    """A gemv module with `width` words of zero points, the groups beyond those in use padded with 0."""
    rows, groups = zeros.shape
    padded = torch.zeros(rows, 8 * width, dtype=torch.int64)
    padded[:, :groups] = zeros
    scales = torch.zeros(rows, 8 * width)
    scales[:, :groups] = 2.0 ** torch.arange(groups)
    return named(qweight=stream(codes, 4), qzeros=stream(padded, 4), scales=scales.half())


# K, group, width of the zero points in words: docs/formats/awq.md §4
@pytest.mark.parametrize(("columns", "group", "width"), [(256, 64, 2), (256, 32, 4), (256, 128, 1), (64, 16, 8)])
def test_traps_3_and_5_gemv_is_in_natural_order_and_padded(tmp_path: Path, columns: int, group: int, width: int) -> None:
    codes, zeros = random_codes(8, columns), random_codes(8, columns // group)
    got = weight(tmp_path, config(version="gemv", group_size=group), gemv(codes, zeros, width))
    assert got.scales[0].shape == (8, columns // group)
    assert torch.equal(got.dequantize(), values(codes, zeros, group))


def gemv_fast(codes: torch.Tensor, minima: torch.Tensor, width: int, zeros: str = "qzeros") -> Tensors:
    """A gemv_fast module: words placed one by one, as docs/formats/awq.md §2 says it."""
    rows, columns = codes.shape
    words = [[0] * columns for _ in range(rows // 4)]
    for n in range(rows):
        for k in range(columns):
            block, inside = divmod(k, 64)
            half, inside = divmod(inside, 32)
            nibble, c = divmod(inside, 8)
            words[n // 4][64 * block + 16 * (n % 4) + 8 * half + c] |= int(codes[n, k]) << (4 * nibble)
    groups = minima.shape[1]
    scales, offsets = torch.zeros(8 * width, rows), torch.zeros(8 * width, rows)
    scales[:groups] = (2.0 ** torch.arange(groups))[:, None]
    offsets[:groups] = minima.t()
    packed = torch.tensor(words).to(torch.int16)
    return named(qweight=packed, scales=scales.half(), **{zeros: offsets.half()})


@pytest.mark.parametrize(("version", "leaf"), [("gemv_fast", "qzeros"), ("GEMV_FAST", "qzeros"), ("llm-awq", "scaled_zeros")])
def test_trap_4_gemv_fast_adds_a_float_that_is_already_scaled(tmp_path: Path, version: str, leaf: str) -> None:
    codes = random_codes(8, 128)
    minima = torch.linspace(-7.3, -0.1, 16).reshape(8, 2).half()
    got = weight(tmp_path, config(version=version, group_size=64), gemv_fast(codes, minima, 2, leaf))
    assert got.scheme.offset is not None
    assert (got.scheme.offset.kind, got.scheme.offset.format) == ("minimum", "float16")
    of = torch.arange(128) // 64
    assert torch.equal(got.dequantize(), codes.float() * 2.0**of + minima[:, of].float())


@pytest.mark.parametrize("version", ["gemv", "gemm"])
def test_trap_6_backend_llm_awq_overrides_the_version(tmp_path: Path, version: str) -> None:
    tensors = gemv_fast(random_codes(4, 64), torch.ones(4, 1), 2, "scaled_zeros")
    got = weight(tmp_path, config(version=version, backend="llm-awq", group_size=64), tensors)
    assert got.shape == (4, 64)


@pytest.mark.parametrize("version", ["exllama", "EXLLAMAV2", "ipex"])
def test_versions_of_transformers_that_name_a_runtime_are_the_gemm_layout(tmp_path: Path, version: str) -> None:
    codes, zeros = random_codes(8, 8), random_codes(8, 1)
    got = weight(tmp_path, config(version=version), gemm(codes, zeros))
    assert torch.equal(got.dequantize(), values(codes, zeros, 8))


def test_trap_7_zero_points_are_stored_as_they_are(tmp_path: Path) -> None:
    zeros = torch.tensor([[0], [15]]).repeat(4, 1)
    got = weight(tmp_path, config(), gemm(random_codes(8, 8), zeros))
    assert got.offset is not None
    assert got.offset[:, 0].tolist() == [0, 15] * 4


def test_trap_8_symmetric_files_store_zero_points_too(tmp_path: Path) -> None:
    codes, zeros = random_codes(8, 8), torch.full((8, 1), 8)
    got = weight(tmp_path, config(zero_point=False), gemm(codes, zeros))
    assert torch.equal(got.dequantize(), values(codes, zeros, 8))


def test_trap_9_bfloat16_scales_stay_bfloat16(tmp_path: Path) -> None:
    tensors = gemm(torch.full((8, 8), 9), torch.full((8, 1), 8))
    tensors[f"{M}.scales"] = torch.full((1, 8), 1e-30, dtype=torch.bfloat16)  # 0 in float16
    got = weight(tmp_path, config(), tensors)
    assert got.scheme.scales[0].format == "bfloat16"
    assert got.dequantize().unique().tolist() == [torch.tensor(1e-30).bfloat16().item()]


def test_trap_10_the_tensors_say_what_is_quantized_not_the_list(tmp_path: Path) -> None:
    tensors = {**gemm(random_codes(8, 8), random_codes(8, 1)), "model.gate.weight": torch.ones(8, 8)}
    for listed in (None, ["gate"], ["q_proj"]):
        layers = dialect.declare(write(tmp_path, config(modules_to_not_convert=listed), tensors))
        assert layers[M].scheme.is_quantized
        assert not layers["model.gate"].scheme.is_quantized


def test_a_bias_is_kept(tmp_path: Path) -> None:
    got = weight(tmp_path, config(), gemm(random_codes(8, 8), random_codes(8, 1), bias=torch.arange(8).half()))
    assert got.bias is not None
    assert got.bias.tolist() == list(range(8))


def test_group_size_minus_one_is_a_channel(tmp_path: Path) -> None:
    codes, zeros = random_codes(8, 24), random_codes(8, 1)
    got = weight(tmp_path, config(group_size=-1), gemm(codes, zeros))
    assert got.scheme.scales[0].block == CHANNEL
    assert torch.equal(got.dequantize(), values(codes, zeros, 24))


def test_a_partial_last_group_has_its_own_row(tmp_path: Path) -> None:
    codes, zeros = random_codes(8, 20), random_codes(8, 3)
    assert torch.equal(weight(tmp_path, config(), gemm(codes, zeros)).dequantize(), values(codes, zeros, 8))


def test_marlin_tiles_are_those_of_gptq(tmp_path: Path) -> None:
    words = torch.randint(-(2**31), 2**31, (8, 128), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    scales = torch.linspace(0.5, 1.5, 64)[None].half()
    ours = weight(tmp_path / "awq", config(version="marlin", zero_point=False, group_size=128),
                  named(qweight=words, scales=scales))
    theirs = read(gptq, write(tmp_path / "gptq", {"quant_method": "marlin", "bits": 4, "group_size": 128},
                              named(B=words, s=scales)), M)
    assert torch.equal(ours.dequantize(), theirs.dequantize())


# --- recognition and refusals --------------------------------------------------------------------------------------------

def test_an_old_repository_has_only_quant_config_json(tmp_path: Path) -> None:
    contents = write(tmp_path, None, gemm(random_codes(16, 8), random_codes(16, 1)))
    old = with_side(contents, quant_config={"w_bit": 4, "q_group_size": 8, "zero_point": True, "version": "GEMM"})
    assert dialect.recognizes(old)
    assert not gptq.recognizes(old)
    assert dialect.declare(old)[M].shape == (16, 8)


def test_an_old_gemv_repository_is_known_by_its_version(tmp_path: Path) -> None:
    contents = write(tmp_path, None, gemv(random_codes(8, 256), random_codes(8, 8), 4))  # qweight and scales: [8, 32]
    old = with_side(contents, quant_config={"w_bit": 4, "q_group_size": 32, "version": "GEMV"})
    assert dialect.recognizes(old)
    assert not gptq.recognizes(old)
    assert dialect.declare(old)[M].shape == (8, 256)


def refusal(folder: Path, quantization: dict[str, Any], tensors: Tensors | None = None) -> AnybitError:
    contents = write(folder, quantization, tensors or gemm(random_codes(8, 16), random_codes(8, 2)))
    with pytest.raises(AnybitError) as caught:
        layer = dialect.declare(contents)[M]
        dialect.canonicalize(layer, tensors_of(contents, layer))
    return caught.value


def test_unread_layouts_are_refused_by_name(tmp_path: Path) -> None:
    error = refusal(tmp_path, config(version="bitblas"))
    assert isinstance(error, Unsupported)
    assert "bitblas" in error.problem


def test_other_widths_without_a_known_writer_are_refused(tmp_path: Path) -> None:
    tensors = gemm(random_codes(32, 16, 8), random_codes(32, 2, 8), 8, ordered=False)
    assert isinstance(refusal(tmp_path, config(bits=8), tensors), Unsupported)


def test_8_bits_by_auto_round_are_refused(tmp_path: Path) -> None:
    tensors = gemm(random_codes(32, 16, 8), random_codes(32, 2, 8), 8, ordered=False)
    assert isinstance(refusal(tmp_path, config(bits=8, **AUTO_ROUND), tensors), Unsupported)


def test_gemv_of_other_widths_is_refused(tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path, config(version="gemv", bits=8)), Unsupported)


def test_marlin_with_zero_points_is_refused(tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path, config(version="marlin")), Unsupported)


def test_an_awq_module_with_group_indices_is_refused(tmp_path: Path) -> None:
    tensors = gemm(random_codes(8, 16), random_codes(8, 2), g_idx=torch.zeros(16, dtype=torch.int32))
    assert isinstance(refusal(tmp_path, config(), tensors), Inconsistent)


def test_a_layout_that_the_tensors_contradict_is_refused(tmp_path: Path) -> None:
    fast = gemv_fast(random_codes(4, 64), torch.ones(4, 1), 2)
    assert isinstance(refusal(tmp_path, config(group_size=64), fast), Inconsistent)
    assert isinstance(refusal(tmp_path, config(version="gemv")), Inconsistent)


def test_versions_that_differ_are_refused(tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path, config(format="gemv")), Inconsistent)


def test_a_width_that_fits_no_shape_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    error = refusal(tmp_path, config(bits=8, **GPTQMODEL))
    assert isinstance(error, Inconsistent)
    assert "4 bits" in error.wanted


def test_missing_zero_points_are_refused(tmp_path: Path) -> None:
    tensors = gemm(random_codes(8, 16), random_codes(8, 2))
    del tensors[f"{M}.qzeros"]
    assert isinstance(refusal(tmp_path, config(), tensors), Inconsistent)


@pytest.mark.parametrize("leaf", ["scales", "qzeros"])
def test_scales_and_minima_that_are_no_numbers_are_damage(tmp_path: Path, leaf: str) -> None:
    tensors = gemv_fast(random_codes(4, 64), torch.ones(4, 1), 2)
    tensors[f"{M}.{leaf}"][0, 1] = float("nan")
    assert isinstance(refusal(tmp_path, config(version="gemv_fast", group_size=64), tensors), Damaged)


def test_corrupted_names_of_quark_are_read(tmp_path: Path) -> None:
    """Quark 0.13 on transformers 5.6 and later wrote qscales and qqzeros: docs/formats/quark.md §9."""
    import json

    from safetensors.torch import load_file, save_file

    import anybit
    from conftest import CHECKPOINTS

    source = CHECKPOINTS / "awq-gemm-mixtral"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(next(source.glob("*.safetensors")))
    renamed = {k.replace(".scales", ".qscales").replace(".qzeros", ".qqzeros"): v for k, v in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    wanted, found = anybit.open(source), anybit.open(tmp_path)
    for name in [n for n, layer in wanted.layers.items() if layer.scheme.is_quantized][:3]:
        assert torch.equal(found.read(name).dequantize(), wanted.read(name).dequantize())
