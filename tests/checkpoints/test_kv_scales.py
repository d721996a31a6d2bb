"""Scales of a declared key-value cache: where each dialect's document puts them, what is missing, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from altering import altered
from small_checkpoints import write

import anybit
from anybit.checkpoints.dialects import compressed_tensors, fp8, modelopt, quark
from anybit.errors import AnybitError, Damaged, Unsupported
from anybit.schemes import KVCacheSpec
from conftest import needs_shared

A = "model.layers.0.self_attn"
NORM = {"model.norm.weight": torch.ones(1)}
STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
CT = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": STATIC}
CT_HEAD = {**CT, "kv_cache_scheme": {**STATIC, "strategy": "attn_head"}}
CT_DYNAMIC = {**CT, "kv_cache_scheme": {**STATIC, "dynamic": True}}
FP8 = {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": None,
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}
MODELOPT_NVFP4 = {**MODELOPT, "kv_cache_scheme": "NVFP4"}
QUARK = {"quant_method": "quark", "global_quant_config": {}, "layer_quant_config": {}, "exclude": [],
         "export": {"kv_cache_group": ["*k_proj", "*v_proj"], "pack_method": "reorder",
                    "weight_format": "real_quantized"}}
DIALECTS = {"ct": (compressed_tensors, CT), "fp8": (fp8, FP8), "modelopt": (modelopt, MODELOPT), "quark": (quark, QUARK)}
GENUINE = "ct-qwen3-fp8-static-tensor"  # bf16 scales of shape [1]


def cache_of(folder: Path, dialect: Any, quantization: dict[str, Any], **scales: torch.Tensor) -> KVCacheSpec:
    tensors = NORM | {f"{A}.{name.replace('__', '.')}": tensor for name, tensor in scales.items()}
    cache = dialect.kv_cache(write(folder, quantization, tensors))
    assert cache is not None
    return cache


@pytest.mark.parametrize(
    ("dialect", "key", "value"),
    [("ct", "k_scale", "v_scale"), ("ct", "k_proj__output_scale", "v_proj__output_scale"),  # up to 0.5
     ("fp8", "k_scale", "v_scale"), ("fp8", "k_proj__output_scale", "v_proj__output_scale"),
     ("modelopt", "k_proj__k_scale", "v_proj__v_scale"), ("modelopt", "k_scale", "v_scale"),
     ("quark", "k_proj__output_scale", "v_proj__output_scale"), ("quark", "k_scale", "v_scale")],
)
def test_scales_are_found_where_the_dialect_puts_them(tmp_path: Path, dialect: str, key: str, value: str) -> None:
    cache = cache_of(tmp_path, *DIALECTS[dialect], **{key: torch.tensor(0.5), value: torch.tensor(0.25)})
    names = tuple(f"{A}.{name.replace('__', '.')}" for name in (key, value))
    assert cache.scales == {A: names}
    assert str(cache) == "fp8_e4m3fn static tensor"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_fused_scale_is_that_of_keys_and_of_values(tmp_path: Path, dialect: str) -> None:
    cache = cache_of(tmp_path, *DIALECTS[dialect], kv_scale=torch.tensor(0.5))
    assert cache.scales == {A: (f"{A}.kv_scale", f"{A}.kv_scale")}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_declared_cache_needs_no_scales(tmp_path: Path, dialect: str) -> None:
    cache = cache_of(tmp_path, *DIALECTS[dialect])
    assert (cache.element, cache.scales) == ("fp8_e4m3fn", {})


def test_the_oldest_scales_beside_newer_ones_are_not_used(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, compressed_tensors, CT, k_scale=torch.tensor(0.5), k_proj__output_scale=torch.tensor(2.0),
                     v_scale=torch.tensor(0.5))
    assert cache.scales == {A: (f"{A}.k_scale", f"{A}.v_scale")}


def test_fp8_scales_alone_declare_a_cache(tmp_path: Path) -> None:
    """docs/formats/fp8.md §5: AutoFP8's own key may be missing."""
    quantization = {"quant_method": "fp8", "activation_scheme": "static"}
    assert cache_of(tmp_path, fp8, quantization, k_scale=torch.tensor(0.5)).scales == {A: (f"{A}.k_scale", "")}


def test_modelopt_declares_nvfp4_with_a_global_scale(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, modelopt, MODELOPT_NVFP4, k_proj__k_scale=torch.tensor(0.5))
    assert (cache.activation.recipe, cache.activation.group_size) == ("nvfp4_reciprocal", 16)


@pytest.mark.parametrize(
    ("cache", "width", "found"),
    [(KVCacheSpec("fp8_e4m3fn"), 128, 128), (KVCacheSpec("fp8_e4m3fn", dynamic=True), 128, 132),
     (KVCacheSpec("fp4_e2m1"), 128, 72), (KVCacheSpec("fp4_e2m1"), 33, 17 + 3)],
    ids=["fp8", "dynamic", "nvfp4", "odd"],
)
def test_bytes_of_a_cached_row_are_codes_and_the_scales_of_its_own(cache: KVCacheSpec, width: int, found: int) -> None:
    assert cache.row_bytes(width) == found


def test_a_scale_for_each_head_needs_the_strategy_that_says_so(tmp_path: Path) -> None:
    scales = {"k_scale": torch.ones(4, 1, 1), "v_scale": torch.ones(4, 1, 1)}
    assert cache_of(tmp_path / "head", compressed_tensors, CT_HEAD, **scales).granularity == "head"
    with pytest.raises(Unsupported) as refused:
        cache_of(tmp_path / "tensor", compressed_tensors, CT, **scales)
    assert f"{A}.k_scale" in refused.value.where or f"{A}.v_scale" in refused.value.where


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float64])
def test_scales_in_other_dtypes_than_floats_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(Unsupported):
        cache_of(tmp_path, modelopt, MODELOPT, k_scale=torch.ones(1, dtype=dtype))


def test_a_dynamic_scheme_takes_its_scales_from_the_data(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, compressed_tensors, CT_DYNAMIC)
    assert cache.dynamic and cache.activation.dynamic


@pytest.mark.parametrize(
    "scheme", [{**STATIC, "type": "int"}, {**STATIC, "num_bits": 4}, {**STATIC, "symmetric": False},
               {**STATIC, "strategy": "channel"}], ids=["int8", "4 bits", "asymmetric", "channel"],
)
def test_caches_that_no_runtime_of_the_dialect_keeps_are_refused(tmp_path: Path, scheme: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as refused:
        cache_of(tmp_path, compressed_tensors, {**CT, "kv_cache_scheme": scheme})
    assert "kv_cache_scheme" in refused.value.where


def test_an_affine_cache_is_refused_by_its_name(tmp_path: Path) -> None:
    """docs/formats/modelopt.md §8: k_bias and v_bias would have to be subtracted and added."""
    with pytest.raises(Unsupported) as refused:
        cache_of(tmp_path, modelopt, {**MODELOPT, "kv_cache_scheme": "NVFP4_AFFINE"})
    assert "NVFP4_AFFINE" in refused.value.found


# --- values, in a genuine folder --------------------------------------------------------------------------------------


@needs_shared
def test_scales_are_read_as_float32(tmp_path: Path) -> None:
    changes = {f"{A}.k_scale": torch.tensor([0.5], dtype=torch.bfloat16), f"{A}.v_scale": torch.tensor([0.25]).half()}
    scales = anybit.open(altered(GENUINE, tmp_path, tensors=changes)).read_kv_scales()
    key, value = scales[A]
    assert key is not None and value is not None
    assert (key.dtype, key.tolist(), value.tolist()) == (torch.float32, [0.5], [0.25])


@needs_shared
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_one_is_refused_by_its_name(tmp_path: Path, scale: float) -> None:
    """bad_inputs QT19: R damaged."""
    name = f"{A}.v_scale"
    folder = altered(GENUINE, tmp_path, tensors={name: torch.tensor([scale])})
    with pytest.raises(Damaged) as refused:
        anybit.open(folder).read_kv_scales()
    assert refused.value.where == name
    with pytest.raises(AnybitError):
        anybit.load(folder, device="cpu")
    assert anybit.load(folder, device="cpu", kv_cache="none") is not None  # the scale is not used then


@needs_shared
def test_half_a_pair_is_completed_with_one_and_said(tmp_path: Path) -> None:
    checkpoint = anybit.open(altered(GENUINE, tmp_path, tensors={f"{A}.v_scale": None}))
    key, value = checkpoint.read_kv_scales()[A]
    assert key is not None and value is None
    assert any("1.0" in note and f"{A}.v" in note for note in checkpoint.notes)


@needs_shared
def test_a_cache_without_any_scale_is_said_to_have_ones(tmp_path: Path) -> None:
    none = {f"{A}.v_scale": None, f"{A}.k_scale": None}
    checkpoint = anybit.open(altered(GENUINE, tmp_path / "static", tensors=none))
    assert checkpoint.read_kv_scales() == {}
    assert any("without scales" in note for note in checkpoint.notes)
    dynamic = {"kv_cache_scheme": {**STATIC, "dynamic": True}}
    checkpoint = anybit.open(altered(GENUINE, tmp_path / "dynamic", tensors=none, quantization=dynamic))
    assert not any("without scales" in note for note in checkpoint.notes)


@needs_shared
def test_scales_and_their_zero_points_are_no_tensors_of_the_model(tmp_path: Path) -> None:
    extra = {f"{A}.{half}_zero_point": torch.zeros(1, dtype=torch.int8) for half in "kv"}
    checkpoint = anybit.open(altered(GENUINE, tmp_path, tensors=extra))
    assert not [name for name in checkpoint.plain if A in name and ("scale" in name or "zero_point" in name)]


def test_an_affine_fp8_cache_is_refused_by_its_biases(tmp_path: Path) -> None:
    scales = {"k_proj__k_scale": torch.tensor(0.5), "v_proj__v_scale": torch.tensor(0.25),
              "k_proj__k_bias": torch.zeros(1, 2, 1, 4)}
    with pytest.raises(Unsupported) as refused:
        cache_of(tmp_path, modelopt, MODELOPT, **scales)
    assert refused.value.where == f"{A}.k_proj.k_bias"
