"""Genuine quantized checkpoints with one tensor or one key made wrong: bad_inputs.md, quantized tensors and configs.

The id is the line's id. Each is opened and every layer read, as a host would; what a dialect alone knows is tested
with the dialect.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit.checkpoints.checkpoint import Checkpoint
from anybit.errors import AnybitError
from checkpoints.altering import altered, put, put_byte
from checkpoints.writing import folder_of, line, matrix
from conftest import CHECKPOINTS, needs_shared

ACT_ORDER = "gptq-w4-g64-asym-descact-qwen2"  # K 256, 4 groups of 64, quantize_config.json
CT = "ct-llama-w4a16-g128"
CT_INT8 = "ct-qwen2-w8a8-int8-dynamic"
CT_FP8 = "ct-qwen3-fp8-dynamic"
CT_NVFP4 = "ct-llama-nvfp4"
NVFP4 = "modelopt-nvfp4-llama"  # with an FP8 cache, hf_quant_config.json
FP8 = "modelopt-fp8-llama"
AWQ = "awq-gemm-mixtral"
AWQ_EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1"
Q = "model.layers.0.self_attn.q_proj"
INF, NAN = float("inf"), float("nan")


def read_all(folder: Path) -> Checkpoint:
    checkpoint = anybit.open(folder)
    for name in checkpoint.layers:
        checkpoint.read(name)
    return checkpoint


def refused(folder: Path) -> AnybitError:
    with pytest.raises(AnybitError) as caught:
        read_all(folder)
    assert caught.value.where
    return caught.value


def scaled(name: str) -> str:
    return {ACT_ORDER: f"{Q}.scales", AWQ: f"{AWQ_EXPERT}.scales"}.get(name, f"{Q}.weight_scale")


Tensors = dict[str, Any]
BAD: list[tuple[str, str, Tensors, str, str]] = [
    *[("QT01", name, {scaled(name): None}, "inconsistent", "a tensor of a quantized layer is missing")
      for name in (ACT_ORDER, CT, CT_INT8, CT_FP8, CT_NVFP4, NVFP4, FP8, AWQ)],
    ("QT01", NVFP4, {f"{Q}.weight_scale_2": None}, "inconsistent", "weight_scale_2"),
    ("QT01", CT_NVFP4, {f"{Q}.weight_global_scale": None}, "inconsistent", "weight_global_scale"),
    *[("QT01", name, {tensor: None}, "inconsistent", "qzeros")
      for name, tensor in ((ACT_ORDER, f"{Q}.qzeros"), (AWQ, f"{AWQ_EXPERT}.qzeros"))],
    *[("QT02", name, {scaled(name): put(value)}, "damaged", "at [0, 0], 1 such of")
      for name in (ACT_ORDER, CT, CT_INT8, AWQ) for value in (NAN, INF, -INF)],
    *[("QT02", name, {scaled(name): put_byte(0x7F, 1, 2)}, "damaged", "nan at [1, 2], 1 such of")
      for name in (NVFP4, CT_NVFP4)],
    *[("QT03", name, {f"{Q}.{leaf}": put(value)}, "damaged", f"{Q}.{leaf}: scales that no writer means")
      for name, leaf in ((NVFP4, "weight_scale_2"), (NVFP4, "input_scale"), (CT_NVFP4, "weight_global_scale"),
                         (CT_NVFP4, "input_global_scale"))
      for value in (INF, NAN, 0.0, -1.0)],
    *[("QT05", name, {scaled(name): put_byte(0x81)}, "damaged", "unsigned") for name in (NVFP4, CT_NVFP4)],
    *[("QT08", name, {f"{Q}.weight": put_byte(byte)}, "damaged", "NaN codes")
      for name in (CT_FP8, FP8) for byte in (0x7F, 0xFF)],
    *[("QT09", name, {scaled(name): change}, "inconsistent", "unexpected dtype")
      for name in (ACT_ORDER, CT) for change in (torch.Tensor.int, torch.Tensor.bool)],
    *[("QT09", name, {scaled(name): torch.Tensor.t}, "inconsistent", "") for name in (ACT_ORDER, CT, AWQ, NVFP4)],
    *[("QT09", name, {tensor: change}, kind, words) for name, tensor, change, kind, words in [  # codes, not scales
        (ACT_ORDER, f"{Q}.qweight", torch.Tensor.float, "inconsistent", "I32"),
        (CT, f"{Q}.weight_packed", torch.Tensor.short, "inconsistent", "unexpected dtype"),
        (CT_INT8, f"{Q}.weight", torch.Tensor.int, "unsupported", "I8"),
        (CT_FP8, f"{Q}.weight", torch.Tensor.float, "unsupported", "a float weight with a scale beside it"),
        (NVFP4, f"{Q}.weight", torch.Tensor.float, "inconsistent", "a scale beside a weight that is not quantized"),
        (FP8, f"{Q}.weight", torch.Tensor.float, "inconsistent", "a scale beside a weight that is not quantized"),
        (FP8, f"{Q}.weight", torch.Tensor.bfloat16, "inconsistent", "a scale beside a weight that is not quantized"),
    ]],
    *[("QT13", ACT_ORDER, {f"{Q}.g_idx": put(value)}, "damaged", f"{value} at position 0")
      for value in (4, 2**31 - 1, -5)],
    ("QT13", ACT_ORDER, {f"{Q}.g_idx": torch.Tensor.float}, "damaged", "no integers"),
    ("QT13", ACT_ORDER, {f"{Q}.g_idx": lambda t: t[:200]}, "inconsistent", "200 g_idx entries"),
    *[("QT15", CT, {f"{Q}.weight_shape": torch.tensor([256, k])}, "inconsistent", "[256, 256]")
      for k in (10**12, -1, 512)],
    ("QT17", "modelopt-fp8-qwen3moe",
     {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(4, 192, 128, dtype=torch.bfloat16)}, "inconsistent",
     "experts are stored twice"),
    *[("QT21", name, {f"{Q}.bias": torch.ones(257, dtype=torch.float16)}, "inconsistent", "[257]")
      for name in (ACT_ORDER, CT)],
]  # fmt: skip


@pytest.mark.parametrize(("id", "name", "tensors", "kind", "words"), BAD, ids=[f"{b[0]}-{b[1]}-{n}" for n, b in enumerate(BAD)])
def test_a_bad_tensor_is_refused(id: str, name: str, tensors: Tensors, kind: str, words: str, tmp_path: Path) -> None:
    error = refused(altered(name, tmp_path / "m", tensors))
    assert error.kind == kind
    assert words in str(error)
    assert any(tensor.rpartition(".")[0] in str(error) for tensor in tensors)


@line("QT01")
def test_one_missing_scale_among_many_layers_is_named(tmp_path: Path) -> None:
    last = "model.layers.1.mlp.down_proj.weight_scale"
    if last not in anybit.open(CHECKPOINTS / CT).contents.tensors:
        last = "model.layers.0.mlp.down_proj.weight_scale"
    assert last in str(refused(altered(CT, tmp_path / "m", {last: None})))


SOUND: list[tuple[str, str, Tensors, float | None]] = [
    ("QT04", NVFP4, {scaled(NVFP4): put_byte(0)}, 0.0),
    ("QT04", CT_NVFP4, {scaled(CT_NVFP4): put_byte(0)}, 0.0),
    ("QT08", FP8, {f"{Q}.weight": put_byte(0x80)}, 0.0),
]


@pytest.mark.parametrize(("id", "name", "tensors", "first"), SOUND, ids=[f"{s[0]}-{s[1]}" for s in SOUND])
def test_what_only_looks_bad_is_read(id: str, name: str, tensors: Tensors, first: float, tmp_path: Path) -> None:
    assert anybit.open(altered(name, tmp_path / "m", tensors)).read(Q).dequantize()[0, 0] == first


@line("QT05")
def test_negative_float16_scales_keep_their_sign(tmp_path: Path) -> None:
    plain = anybit.open(CHECKPOINTS / ACT_ORDER).read(Q).dequantize()
    folder = altered(ACT_ORDER, tmp_path / "m", {f"{Q}.scales": torch.Tensor.neg})
    assert torch.equal(anybit.open(folder).read(Q).dequantize(), -plain)


@line("QT06")
def test_the_smallest_float16_scale_is_not_flushed(tmp_path: Path) -> None:
    """2^-24: every weight is a whole multiple of it, and some are not zero."""
    folder = altered(ACT_ORDER, tmp_path / "m", {f"{Q}.scales": lambda t: torch.full_like(t, 2.0**-24)})
    multiples = anybit.open(folder).read(Q).dequantize() * 2.0**24
    assert torch.equal(multiples, multiples.round())
    assert 1 <= multiples.abs().max() <= 15


@line("QT13")
def test_group_indices_count_from_the_end(tmp_path: Path) -> None:
    """-1 … -groups, as torch indexes."""
    plain = anybit.open(CHECKPOINTS / ACT_ORDER).read(Q).dequantize()
    folder = altered(ACT_ORDER, tmp_path / "m", {f"{Q}.g_idx": lambda groups: groups - 4})
    assert torch.equal(anybit.open(folder).read(Q).dequantize(), plain)


NOTED: list[tuple[str, str, Tensors, str]] = [
    ("QT01", CT, {"model.layers.9.x.weight_scale": torch.ones(2, 2)}, "of no quantized layer: model.layers.9.x.weight_scale"),
    ("QT01", ACT_ORDER, {"model.layers.9.x.scales": torch.ones(2, 2)}, "of no quantized layer: model.layers.9.x.scales"),
    *[("QT01", name, {f"{Q}.colour": torch.ones(2)}, f"does not use: {Q}.colour") for name in (ACT_ORDER, CT, NVFP4)],
    ("QT19", NVFP4, {"model.layers.0.self_attn.v_proj.v_scale": None}, "taken as 1.0"),
]


@pytest.mark.parametrize(("id", "name", "tensors", "words"), NOTED, ids=[f"{n[0]}-{n[1]}-{i}" for i, n in enumerate(NOTED)])
def test_what_is_left_over_is_said(id: str, name: str, tensors: Tensors, words: str, tmp_path: Path) -> None:
    notes = read_all(altered(name, tmp_path / "m", tensors)).notes
    assert any(words in note for note in notes)


# --- configs against tensors and against each other ------------------------------------------------------------------

SIDE = "quantize_config.json"
MODELOPT_SIDE = "hf_quant_config.json"


@line("CF11")
@pytest.mark.parametrize(("name", "file", "keys", "words"), [
    (ACT_ORDER, SIDE, {"bits": 8}, ("the bits", "4 ·", ": 8")),
    (ACT_ORDER, SIDE, {"group_size": 128}, ("the group size", "64 ·", ": 128")),
    (ACT_ORDER, SIDE, {"quant_method": "awq"}, ("the method", "'gptq' ·", ": 'awq'")),
    (NVFP4, MODELOPT_SIDE, {"quant_algo": "FP8"}, ("the algorithm", "NVFP4 ·", ": FP8")),
    (NVFP4, MODELOPT_SIDE, {"kv_cache_quant_algo": "NVFP4"}, ("the key-value cache", "fp8", "fp4")),
    (NVFP4, MODELOPT_SIDE, {"exclude_modules": ["lm_head", "model.layers.0*"]}, ("unquantized modules", "model.layers.0*")),
    (NVFP4, MODELOPT_SIDE, {"group_size": 32}, ("group size", "32", "16")),
])  # fmt: skip
def test_two_config_files_that_disagree_are_refused_with_both_values(
    name: str, file: str, keys: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    error = refused(altered(name, tmp_path / "m", side={file: keys}))
    assert error.kind == "inconsistent"
    assert all(word in str(error) for word in words)


@line("CF11")
def test_two_quantization_configs_in_one_file_that_disagree_are_refused(tmp_path: Path) -> None:
    inner = {"quant_method": "gptq", "bits": 8, "group_size": 64}
    folder = altered(ACT_ORDER, tmp_path / "m", config={"text_config": {"quantization_config": inner}})
    assert "disagree about the bits" in str(refused(folder))


@line("CF11")
@pytest.mark.parametrize(("name", "file", "keys"), [
    (ACT_ORDER, SIDE, {"bits": None}), (ACT_ORDER, SIDE, None), (ACT_ORDER, SIDE, {"note": 1}),
    (NVFP4, MODELOPT_SIDE, {"kv_cache_quant_algo": None}), (NVFP4, MODELOPT_SIDE, {"group_size": None}),
])  # fmt: skip
def test_absent_and_null_keys_are_no_disagreement(
    name: str, file: str, keys: dict[str, Any] | None, tmp_path: Path
) -> None:
    wanted = anybit.open(CHECKPOINTS / name).read(Q).dequantize()
    assert torch.equal(read_all(altered(name, tmp_path / "m", side={file: keys})).read(Q).dequantize(), wanted)


@line("CF09")
@pytest.mark.parametrize(("name", "changes"), [
    (ACT_ORDER, {"config": {"quantization_config": None}}),
    (ACT_ORDER, {"quantization": {"quant_method": None}, "side": {SIDE: None}}),
    (AWQ, {"quantization": {"quant_method": None}}),
    (NVFP4, {"config": {"quantization_config": None}}),
    (NVFP4, {"quantization": {"quant_method": None}}),
    (CT, {"quantization": {"quant_method": None}}),
    (CT_FP8, {"quantization": {"quant_method": None}}),
])  # fmt: skip
def test_a_method_that_nobody_names_is_found_where_one_fits_and_said(name: str, changes: Any, tmp_path: Path) -> None:
    genuine = anybit.open(CHECKPOINTS / name)
    checkpoint = read_all(altered(name, tmp_path / "m", **changes))
    assert checkpoint.dialect == genuine.dialect
    assert checkpoint.layers.keys() == genuine.layers.keys()
    assert all(checkpoint.layers[layer].scheme == genuine.layers[layer].scheme for layer in genuine.layers)
    assert any(f"read as {genuine.dialect}" in note for note in checkpoint.notes)


@line("CF09")
@pytest.mark.parametrize("name", [ACT_ORDER, CT, CT_INT8, CT_FP8, NVFP4, FP8, AWQ])
def test_without_any_config_quantized_tensors_are_refused(name: str, tmp_path: Path) -> None:
    folder = altered(name, tmp_path / "m", config={"quantization_config": None})
    for file in (SIDE, MODELOPT_SIDE):
        (folder / file).unlink(missing_ok=True)
    error = refused(folder)
    assert error.kind == "inconsistent"
    assert "without a quantization_config" in error.problem


def groups_of(name: str, **weights: Any) -> dict[str, Any]:
    """config_groups of a genuine compressed-tensors folder with these keys changed."""
    config = json.loads((CHECKPOINTS / name / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    for group in groups.values():
        group["weights"] |= weights
    return {"config_groups": groups}


@line("CF09")
@pytest.mark.parametrize("declared", [
    {"quant_method": "gptq", "bits": 4, "group_size": 128}, {"quant_method": "awq", "bits": 4, "group_size": 128},
    {"quant_method": "fp8"}, {"quant_method": "fbgemm_fp8"}, {"quant_method": "modelopt", "quant_algo": "FP8"},
    {"quant_method": "auto-round", "bits": 4, "group_size": 128}, "compressed-tensors",
])  # fmt: skip
def test_plain_tensors_under_a_quantized_config_are_refused(declared: Any, tmp_path: Path) -> None:
    if isinstance(declared, str):
        declared = {"quant_method": declared, "format": "pack-quantized", **groups_of(CT)}
    files = {"model.safetensors": matrix("model.layers.0.self_attn.q_proj.weight")}
    error = refused(folder_of(tmp_path / "m", files, {"quantization_config": declared}))
    assert error.kind == "inconsistent"
    assert "no tensor is quantized" in error.problem


@line("CF12")
@pytest.mark.parametrize("key", ["bits", "group_size"])
@pytest.mark.parametrize("value", ["4", 3.5, 0, True, -2, [4]])
@pytest.mark.parametrize("name", [ACT_ORDER, AWQ])
def test_an_unsound_number_is_refused_with_the_allowed_ones(name: str, key: str, value: Any, tmp_path: Path) -> None:
    side = {SIDE: {key: None}} if name == ACT_ORDER else {}
    error = refused(altered(name, tmp_path / "m", quantization={key: value}, side=side))
    assert error.kind == "damaged"
    assert key in error.problem
    assert repr(value) in error.found
    assert "integer" in error.wanted


@line("CF12")
@pytest.mark.parametrize(("key", "value"), [("num_bits", v) for v in ("4", 3.5, 0, True)] +
                         [("group_size", v) for v in ("128", 0, -2, 1.5)])  # fmt: skip
def test_an_unsound_number_of_a_config_group_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    error = refused(altered(CT, tmp_path / "m", quantization=groups_of(CT, **{key: value})))
    assert error.kind == "damaged"
    assert repr(value) in error.found


@line("CF12", "QT15")
@pytest.mark.parametrize(("name", "quantization"), [
    (ACT_ORDER, {"bits": 8}), (ACT_ORDER, {"group_size": 10**9}), (ACT_ORDER, {"group_size": -1}),
    (AWQ, {"group_size": 10**9}), (CT, groups_of(CT, num_bits=8)), (CT, groups_of(CT, group_size=10**9)),
])  # fmt: skip
def test_numbers_that_fit_no_stored_shape_are_refused(name: str, quantization: dict[str, Any], tmp_path: Path) -> None:
    side = dict.fromkeys({SIDE} if name == ACT_ORDER else set())
    assert refused(altered(name, tmp_path / "m", quantization=quantization, side=side)).kind == "inconsistent"


# --- bitsandbytes' descriptions, zero points, rules of a config --------------------------------------------------------

BNB = "bnb-nf4-llama"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


def state(**keys: Any) -> Any:
    """A quant_state with these keys changed."""
    return lambda stored: text({**json.loads(bytes(stored.tolist())), **keys})


def text(value: Any) -> torch.Tensor:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.tensor(list(raw), dtype=torch.uint8)


@needs_shared
@line("QT20")
@pytest.mark.parametrize(("tensor", "change", "kinds"), [
    (f"{Q}.weight.absmax", lambda t: t[:-1], {"inconsistent", "damaged"}),
    (f"{Q}.weight.quant_map", lambda t: t[:15], {"inconsistent", "damaged"}),
    (STATE, lambda t: text(b"not json"), {"damaged"}),
    (STATE, lambda t: text(b"[1]"), {"damaged"}),
    (STATE, lambda t: text(b"[" * 2000), {"damaged"}),
    (STATE, lambda t: t.repeat(1000), {"limit", "damaged"}),
    (STATE, state(blocksize=0), {"damaged", "unsupported"}),
    (STATE, state(dtype="os"), {"damaged"}),
    (STATE, state(shape=[1 << 40, 1 << 40]), {"damaged", "inconsistent", "limit"}),
])  # fmt: skip
def test_a_description_of_bitsandbytes_that_does_not_hold_is_refused(
    tensor: str, change: Any, kinds: set[str], tmp_path: Path
) -> None:
    error = refused(altered(BNB, tmp_path / "m", {tensor: change}))
    assert error.kind in kinds
    assert Q in str(error)


@needs_shared
@line("QT12")
def test_an_int8_zero_point_outside_the_codes_is_refused(tmp_path: Path) -> None:
    """Six-bit codes one an int8: -32 ... 31."""
    error = refused(altered("ct-llama-w6a16-asym-naive", tmp_path / "m", {f"{Q}.weight_zero_point": put(32)}))
    assert error.kind == "damaged"
    assert "-32 … 31" in error.wanted


@needs_shared
@line("QT12")
def test_zero_points_of_weights_called_symmetric_count(tmp_path: Path) -> None:
    """compressed-tensors says so; of Quark, whose symmetric files hold zeros too, only values could tell."""
    asymmetric = "ct-qwen2-w4a16-asym-g128"
    wanted = anybit.open(CHECKPOINTS / asymmetric).read(Q).dequantize()
    checkpoint = read_all(altered(asymmetric, tmp_path / "m", quantization=groups_of(asymmetric, symmetric=True)))
    assert torch.equal(checkpoint.read(Q).dequantize(), wanted)
    assert "the tensors decide" in " ".join(checkpoint.layers[Q].notes)


@needs_shared
@line("QT12")
def test_asymmetric_codes_without_zero_points_are_refused(tmp_path: Path) -> None:
    error = refused(altered("ct-qwen2-w4a16-asym-g128", tmp_path / "m", {f"{Q}.weight_zero_point": None}))
    assert error.kind == "inconsistent"
    assert f"{Q}.weight_zero_point" in str(error)


def twice() -> dict[str, Any]:
    """The one group of the folder a second time."""
    groups = groups_of(CT)["config_groups"]
    return {"config_groups": groups | {"again": next(iter(groups.values()))}}


@line("QT26")
@pytest.mark.parametrize(("quantization", "words"), [
    ({"ignore": ["lm_head", Q]}, "config.json ignores it, but it holds codes: the tensors decide"),
    ({"ignore": ["lm_head", "lm_haed"]}, "ignored modules that are not there: lm_haed"),
    ({"config_groups": {"none": {"targets": ["re:.*no_such_proj"], "weights": {"num_bits": 8}},
                        **groups_of(CT)["config_groups"]}}, "targets that match no module: re:.*no_such_proj"),
    (twice(), "several config groups target Linear"),
], ids=["ignored-but-packed", "ignore-names-no-layer", "targets-match-nothing", "two-groups"])  # fmt: skip
def test_rules_of_a_config_that_mean_nothing_or_two_things_are_said(
    quantization: dict[str, Any], words: str, tmp_path: Path
) -> None:
    wanted = anybit.open(CHECKPOINTS / CT).read(Q).dequantize()
    checkpoint = read_all(altered(CT, tmp_path / "m", quantization=quantization))
    assert torch.equal(checkpoint.read(Q).dequantize(), wanted)
    assert any(words in note for note in (*checkpoint.notes, *checkpoint.layers[Q].notes))


@line("QT26")
def test_a_plain_module_in_targets_and_ignore_is_unquantized(tmp_path: Path) -> None:
    checkpoint = anybit.open(CHECKPOINTS / CT)
    assert "lm_head" in checkpoint.config["quantization_config"]["ignore"]
    assert not any(layer.scheme.is_quantized for name, layer in checkpoint.layers.items() if name == "lm_head")


@line("QT01")
@pytest.mark.parametrize("name", [CT_INT8, CT_FP8, NVFP4, FP8])
def test_all_modules_that_lack_their_scales_are_named(name: str, tmp_path: Path) -> None:
    modules = [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"]
    modules = [m for m in modules if m in anybit.open(CHECKPOINTS / name).layers]
    error = refused(altered(name, tmp_path / "m", {f"{m}.weight_scale": None for m in modules}))
    assert len(modules) > 1
    assert all(module in str(error) for module in modules)


LLAMA = "ct-llama-w8a8-int8-static"  # attention_bias false


@needs_shared
@line("QT21")
@pytest.mark.parametrize(("value", "said"), [(0.0, False), (-0.5, True)])
def test_a_bias_that_the_config_denies_is_said_unless_it_is_zero(value: float, said: bool, tmp_path: Path) -> None:
    bias = torch.zeros(anybit.open(CHECKPOINTS / LLAMA).layers[Q].shape[0])
    bias[3] = value
    checkpoint = read_all(altered(LLAMA, tmp_path / "m", {f"{Q}.bias": bias.bfloat16()}))
    assert checkpoint.config["attention_bias"] is False
    remark = f"biases although config.json says attention_bias false, applied all the same: {Q}.bias"
    assert (remark in checkpoint.notes) == said


@line("CF10")
def test_an_unknown_method_is_refused_with_all_that_are_known(tmp_path: Path) -> None:
    error = refused(altered(CT, tmp_path / "m", quantization={"quant_method": "mxfp5"}))
    assert error.kind == "unsupported"
    assert error.wanted == ("one of: auto-round, awq, bitsandbytes, compressed-tensors, fbgemm_fp8, fp8, gptq, hqq, "
                            "modelopt, mxfp4, mxfp8, quark, torchao")
    assert "mxfp4" in error.remedy
