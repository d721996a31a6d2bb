"""A declared key-value cache carried out in attention: against float64 with ml_dtypes, in every cache and door."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import anybit
from anybit.errors import Inconsistent, Unsupported
from anybit.hosts import kv_cache
from anybit.hosts.kv_cache import KVQuantizer, from_rows, to_rows
from anybit.schemes import KVCacheSpec
from conftest import CHECKPOINTS, HERE, SHARED, genuine, needs_shared

sys.path.insert(0, str(HERE / "checkpoints"))
from altering import altered

DECLARING = [n for n in genuine("modelopt-*", "ct-*", "quark-*", "fp8-*")
             if '"kv_cache_' in (CHECKPOINTS / n / "config.json").read_text() and anybit.open(CHECKPOINTS / n).kv_cache]
PLAIN = genuine("gptq-v2-*")[0]
LLAMA = "modelopt-fp8-llama"
QWEN = "ct-qwen3-fp8-static-tensor"
MLA = "fp8-deepseek-block-deepseekv3"
A = "model.layers.0.self_attn"
NVFP4 = {"quantization": {"kv_cache_scheme": "NVFP4"}, "side": {"hf_quant_config.json": {"kv_cache_quant_algo": "NVFP4"}}}
CT = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
IDS = torch.tensor([[5, 17, 40, 3, 22, 9, 31, 12, 8, 27], [11, 2, 33, 19, 6, 44, 1, 38, 23, 14]])


def loaded(source: str | Path, **options: Any) -> Any:
    return anybit.load(CHECKPOINTS / source if isinstance(source, str) else source, device="cpu", **options)


def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **options).logits
    return found


def without_activations(source: str | Path) -> Any:
    """A model that quantizes its cache and no input of a layer, whose codes flip where sums have another order."""
    model = loaded(source)
    for module in model.modules():
        product = getattr(module, "product", None)
        if product is not None and not isinstance(module, KVQuantizer):
            product.scheme = replace(product.scheme, activation=None, output=None)
    return model


# sums in another order move a key or value across a tie now and then: a code of hundreds, by 1/16 of its value
FLIPS = 5e-3


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def e4m3(x: Tensor, scale: Tensor) -> np.ndarray[Any, Any]:
    """ml_dtypes' own rounding of x / scale, saturated: float64 values after scaling back in float32."""
    ratio = np.clip(x.numpy() / scale.numpy(), np.float32(-448), np.float32(448))
    rounded = ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale.numpy()
    return rounded.astype(np.float64)  # type: ignore[no-any-return]


def captured(model: Any, name: str) -> dict[str, Tensor]:
    """Inputs and outputs of a module during one forward pass of IDS."""
    kept: dict[str, Tensor] = {}
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, out: kept.update(x=args[0], y=out))
    kept["logits"] = logits(model)
    handle.remove()
    return kept


def attention_in_float64(model: Any, keys: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Causal attention of layer 0 with these keys and values [B, Hkv, T, D]: [B, T, H * D]."""
    config = model.config
    has_norm = hasattr(model.model.layers[0].self_attn, "q_norm")
    q = captured(model, f"{A}.{'q_norm' if has_norm else 'q_proj'}")["y"].numpy().astype(np.float64)
    b, t = IDS.shape
    d = keys.shape[-1]
    q = q.reshape(b, t, -1, d).transpose(0, 2, 1, 3)
    theta = config.rope_parameters["rope_theta"]
    angle = np.arange(t)[:, None] / theta ** (np.arange(0, d, 2)[None] / d)
    cos, sin = (np.concatenate([f(angle)] * 2, axis=-1) for f in (np.cos, np.sin))
    q = q * cos + np.concatenate([-q[..., d // 2 :], q[..., : d // 2]], axis=-1) * sin
    repeats = q.shape[1] // keys.shape[1]
    k, v = (np.repeat(x, repeats, axis=1) for x in (keys, values))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(d)
    scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ v
    return out.transpose(0, 2, 1, 3).reshape(b, t, -1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", DECLARING)
def test_attention_reads_what_the_codes_of_keys_and_values_mean(name: str) -> None:
    """Layer 0 sees the same input with and without the cache's quantization: only that may differ behind it."""
    off = loaded(name, kv_cache="none")
    cache = DynamicCache(config=off.config)
    logits(off, past_key_values=cache)
    key, value = off.anybit.checkpoint.read_kv_scales()[A]
    wanted = attention_in_float64(off, e4m3(cache.layers[0].keys, key), e4m3(cache.layers[0].values, value))
    unquantized = attention_in_float64(off, *(x.numpy().astype(np.float64) for x in
                                              (cache.layers[0].keys, cache.layers[0].values)))
    on = loaded(name)
    found = captured(on, f"{A}.o_proj")
    # rope, scores, softmax and sums in float32; a code on a tie moves by less
    assert relative_error(found["x"], torch.from_numpy(wanted)) < 1e-5
    assert relative_error(found["x"], torch.from_numpy(unquantized)) > 1e-3
    kv_cache.switch(on, on=False)
    assert torch.equal(logits(on), logits(off))


@pytest.mark.parametrize("name", DECLARING)
def test_the_cache_holds_the_codes_of_ml_dtypes(name: str) -> None:
    off, on = loaded(name, kv_cache="none"), loaded(name)
    plain, coded = DynamicCache(config=off.config), DynamicCache(config=on.config)
    logits(off, past_key_values=plain)
    logits(on, past_key_values=coded)
    key, value = off.anybit.checkpoint.read_kv_scales()[A]
    for half, scale in (("keys", key), ("values", value)):
        codes = getattr(coded.layers[0], half)
        assert codes.dtype == torch.uint8
        meaning = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale.numpy()
        assert np.array_equal(meaning.astype(np.float64), e4m3(getattr(plain.layers[0], half), scale))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in coded.layers)
    assert held == on.anybit.plan.memory.cache_per_token * IDS.numel()
    assert off.anybit.plan.memory.cache_per_token == 4 * on.anybit.plan.memory.cache_per_token


# --- every cache, door and mode gives the same ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECLARING)
def test_with_a_cache_without_one_and_step_by_step_the_logits_are_the_same(name: str) -> None:
    model = without_activations(name)
    wanted = logits(model)
    assert torch.equal(logits(model, use_cache=False), wanted)
    cache = DynamicCache(config=model.config)
    steps = [logits(model, part, past_key_values=cache) for part in IDS.split([4, 1, 1, 4], dim=1)]
    assert relative_error(torch.cat(steps, dim=1), wanted) < FLIPS
    static = StaticCache(config=model.config, max_cache_len=16)
    assert relative_error(logits(model, past_key_values=static), wanted) < FLIPS
    assert static.layers[0].keys.dtype == torch.uint8


def test_a_cache_of_another_class_gets_numbers_and_the_logits_are_the_same() -> None:
    class Mine(DynamicCache):
        pass

    model = loaded(DECLARING[0])
    cache = Mine(config=model.config)
    assert torch.equal(logits(model, past_key_values=cache), logits(model))
    assert cache.layers[0].keys.dtype == torch.float32


def test_a_cache_that_was_filled_with_numbers_is_continued_with_numbers() -> None:
    model = loaded(DECLARING[0])
    cache = DynamicCache(config=model.config)
    kv_cache.switch(model, on=False)
    logits(model, IDS[:, :4], past_key_values=cache)
    before = cache.layers[0].keys.clone()
    kv_cache.switch(model, on=True)
    assert logits(model, IDS[:, 4:], past_key_values=cache).isfinite().all()
    assert torch.equal(cache.layers[0].keys[:, :, :4], before)


def test_codes_are_not_read_as_numbers_after_switching_off() -> None:
    model = loaded(DECLARING[0])
    cache = DynamicCache(config=model.config)
    logits(model, IDS[:, :4], past_key_values=cache)
    kv_cache.switch(model, on=False)
    with pytest.raises(Inconsistent):
        logits(model, IDS[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}], ids=str)
def test_generate_runs_on_a_padded_batch_with_any_cache(options: dict[str, Any]) -> None:
    model = without_activations(DECLARING[0])
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0  # padding on the left
    made = [model.generate(IDS, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, **o)
            for o in (options, {**options, "use_cache": False})]
    assert torch.equal(*made)


@pytest.mark.parametrize("name", DECLARING)
def test_both_doors_carry_it_out(name: str) -> None:
    anybit.enable()
    taken = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    assert relative_error(logits(taken), logits(loaded(name))) < 1e-6
    assert kv_cache.switch(taken, on=True) == taken.config.num_hidden_layers


def test_none_is_asked_of_the_take_over_door_by_its_config() -> None:
    from anybit.hosts.quantizer import AnybitConfig

    anybit.enable()
    folder = CHECKPOINTS / DECLARING[0]
    config = AnybitConfig(kv_cache="none")
    taken = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    assert not any(isinstance(m, KVQuantizer) for m in taken.modules())


def test_eager_attention_and_sdpa_agree() -> None:
    model = without_activations(DECLARING[0])
    wanted = logits(model)
    model.set_attn_implementation("eager")
    assert relative_error(logits(model), wanted) < FLIPS


def test_casting_the_model_leaves_the_scales_alone() -> None:
    model = loaded(DECLARING[0])
    quantizer = next(m for m in model.modules() if isinstance(m, KVQuantizer))
    before = quantizer.scale("key").clone()
    model.to(torch.bfloat16)
    assert torch.equal(quantizer.scale("key"), before)
    assert logits(model).dtype == torch.bfloat16


def test_in_bfloat16_keys_are_rounded_once_after_scaling_back() -> None:
    model = loaded(DECLARING[0], dtype="bfloat16")
    quantizer = next(m for m in model.modules() if isinstance(m, KVQuantizer))
    x = torch.randn(1, 2, 3, 32, dtype=torch.bfloat16)
    wanted = torch.from_numpy(e4m3(x.float(), quantizer.scale("key"))).float().bfloat16()
    assert torch.equal(quantizer.on_values(x, quantizer.scale("key")), wanted)
    assert logits(model).isfinite().all()


def test_one_graph_holds_the_whole_model() -> None:
    model = without_activations(DECLARING[0])
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(IDS).logits
    assert relative_error(found, logits(model)) < FLIPS


def test_gradients_pass_through_the_rounding() -> None:
    x = torch.randn(1, 2, 5, 32, requires_grad=True)
    quantizer = KVQuantizer(KVCacheSpec("fp8_e4m3fn"), torch.tensor([0.01]), None)
    key, value = quantizer.update(None, x, x)
    (key * 2 + value).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 3.0))
    cache = DynamicCache()
    with torch.no_grad():
        quantizer.update(cache, x[:, :, :2], x[:, :, :2], 0)
    x.grad = None
    key, value = quantizer.update(cache, x[:, :, 2:], x[:, :, 2:], 0)
    (key * 2 + value).sum().backward()
    assert torch.equal(x.grad[0, 0, :, 0], torch.tensor([0.0, 0.0, 3.0, 3.0, 3.0]))


# --- the switch -----------------------------------------------------------------------------------------------------------


def test_without_a_declared_cache_nothing_is_installed() -> None:
    model = loaded(PLAIN)
    assert not any(isinstance(m, KVQuantizer) for m in model.modules())
    assert not model.model.layers[0].self_attn._forward_pre_hooks
    assert model.anybit.plan.kv_cache is None


def test_none_is_said_in_the_plan_and_leaves_the_model_alone() -> None:
    model = loaded(DECLARING[0], kv_cache="none")
    assert not any(isinstance(m, KVQuantizer) for m in model.modules())
    told = model.anybit.plan.kv_cache
    assert (told["is_executed"], told["executed"]) == (False, "float32, not quantized")
    assert any("--kv-cache none" in note for note in model.anybit.plan.notes)


def test_the_plan_tells_what_is_declared_and_executed() -> None:
    told = anybit.plan(CHECKPOINTS / DECLARING[0]).to_dict()["kv_cache"]
    assert told["declared"] == "fp8_e4m3fn static tensor"
    assert told["is_executed"] and told["executed"].startswith("fp8_e4m3fn codes")


def test_another_word_is_refused() -> None:
    with pytest.raises(Unsupported) as refused:
        anybit.plan(CHECKPOINTS / DECLARING[0], kv_cache="fp8")
    assert "auto, none" in refused.value.wanted


# --- other declarations ---------------------------------------------------------------------------------------------------


@needs_shared
def test_missing_scales_are_ones(tmp_path: Path) -> None:
    none: dict[str, Any] = {f"{A}.k_scale": None, f"{A}.v_scale": None}
    ones: dict[str, Any] = {name: torch.ones(1) for name in none}
    found = [loaded(altered(QWEN, tmp_path / str(i), tensors=t)) for i, t in enumerate((none, ones))]
    assert torch.equal(*(logits(model) for model in found))


@needs_shared
def test_each_head_has_its_scale_where_the_scheme_says_so(tmp_path: Path) -> None:
    scales = {f"{A}.{half}_scale": torch.tensor([0.01, 0.03]).reshape(2, 1, 1) for half in "kv"}
    scheme = {"kv_cache_scheme": {**CT, "strategy": "attn_head"}}
    model = loaded(altered(QWEN, tmp_path, tensors=scales, quantization=scheme))
    plain, coded = DynamicCache(config=model.config), DynamicCache(config=model.config)
    logits(model, past_key_values=coded)
    kv_cache.switch(model, on=False)
    logits(model, past_key_values=plain)
    meaning = coded.layers[0].keys.view(torch.float8_e4m3fn).float() * scales[f"{A}.k_scale"]
    assert np.array_equal(meaning.double().numpy(), e4m3(plain.layers[0].keys, scales[f"{A}.k_scale"]))


@needs_shared
def test_scales_of_other_heads_than_the_models_are_refused(tmp_path: Path) -> None:
    scales = {f"{A}.{half}_scale": torch.ones(3, 1, 1) for half in "kv"}
    scheme = {"kv_cache_scheme": {**CT, "strategy": "attn_head"}}
    with pytest.raises(Inconsistent) as refused:
        loaded(altered(QWEN, tmp_path, tensors=scales, quantization=scheme))
    assert refused.value.where == A


def test_a_dynamic_scale_is_that_of_its_call_and_cached_tokens_keep_it() -> None:
    quantizer = KVQuantizer(KVCacheSpec("fp8_e4m3fn", dynamic=True), None, None)
    cache = DynamicCache()
    first, second = torch.randn(1, 2, 4, 8), 10 * torch.randn(1, 2, 3, 8)
    keys, _ = quantizer.update(cache, first, first, 0)
    scale = first.abs().max().reshape(1) / 448
    assert np.array_equal(keys.double().numpy(), e4m3(first, scale))
    more, _ = quantizer.update(cache, second, second, 0)
    assert torch.equal(more[:, :, :4], keys)
    assert np.array_equal(more[:, :, 4:].double().numpy(), e4m3(second, second.abs().max().reshape(1) / 448))


def test_a_dynamic_scale_of_zeros_gives_zeros() -> None:
    quantizer = KVQuantizer(KVCacheSpec("fp8_e4m3fn", dynamic=True, granularity="head"), None, None)
    x = torch.stack([torch.zeros(3, 8), torch.ones(3, 8)])[None]
    key, _ = quantizer.update(DynamicCache(), x, x, 0)
    assert torch.equal(key, x)


@needs_shared
def test_an_nvfp4_cache_has_block_scales_of_each_token(tmp_path: Path) -> None:
    """docs/formats/modelopt.md §8, values by the definition of NVFP4: code x (block scale x global scale)."""
    model = loaded(altered(LLAMA, tmp_path, **NVFP4))
    plain, coded = DynamicCache(config=model.config), DynamicCache(config=model.config)
    wanted = logits(model, past_key_values=coded)
    assert torch.equal(logits(model, use_cache=False), wanted)
    kv_cache.switch(model, on=False)
    logits(model, past_key_values=plain)
    x, rows = plain.layers[0].keys, coded.layers[0].keys
    s2, _ = model.anybit.checkpoint.read_kv_scales()[A]
    width = x.shape[-1]
    assert rows.shape[-1] == width // 2 + width // 16
    codes = np.stack([rows[..., : width // 2] & 15, rows[..., : width // 2] >> 4], axis=-1).reshape(x.shape)
    values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    blocks = rows[..., width // 2 :].numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * float(s2)
    meaning = values * np.repeat(blocks, 16, axis=-1)
    largest = np.abs(x.double().numpy()).reshape(*x.shape[:-1], -1, 16).max(-1)
    step = np.repeat(largest / 6, 16, axis=-1)  # the widest gap of e2m1 is 2 steps: half of it, and 1/16 for the scale
    assert (np.abs(meaning - x.double().numpy()) <= step * (1 + 6 / 16) + 1e-9).all()


@pytest.mark.parametrize("width", [1, 16, 33, 64])
@pytest.mark.parametrize("spec", [KVCacheSpec("fp8_e4m3fn"), KVCacheSpec("fp8_e4m3fn", dynamic=True), KVCacheSpec("fp4_e2m1")],
                         ids=str)
def test_rows_mean_what_the_recipe_gave_bit_for_bit(spec: KVCacheSpec, width: int) -> None:
    torch.manual_seed(width)
    quantizer = KVQuantizer(spec, torch.tensor([0.0123]), None)
    x = torch.randn(2, 3, 5, width) * torch.tensor([1e-4, 1.0, 300.0]).reshape(1, 3, 1, 1)
    x[0, 0, 0, 0] = float("nan")
    found = quantizer.quantized(x, quantizer.scale("key"))
    rows = to_rows(found, spec)
    assert rows.shape == (2, 3, 5, spec.row_bytes(width))
    back = from_rows(rows, spec, quantizer.scale("key"), width)
    assert torch.equal(back.nan_to_num(7.0), found.dequantize().nan_to_num(7.0))
    assert back[0, 0, 0, 0].isnan()


@needs_shared
def test_latents_of_deepseek_are_scaled_as_keys_both(tmp_path: Path) -> None:
    """Their cache holds the latent and the rotary part in one head; runtimes scale both with k_scale."""
    scales = {f"model.layers.{i}.self_attn.{h}_scale": torch.tensor(s) for i in range(4) for h, s in (("k", 0.02), ("v", 9.0))}
    checkpoint = anybit.open(CHECKPOINTS / MLA)
    count = checkpoint.config["num_hidden_layers"]
    kept = {name: t for name, t in scales.items() if int(name.split(".")[2]) < count}
    model = loaded(altered(MLA, tmp_path, tensors=kept, quantization={"kv_cache_scheme": "static"}))
    plain, coded = DynamicCache(config=model.config), DynamicCache(config=model.config)
    logits(model, past_key_values=coded)
    kv_cache.switch(model, on=False)
    logits(model, past_key_values=plain)
    for half in ("keys", "values"):
        meaning = getattr(coded.layers[0], half).view(torch.float8_e4m3fn).float() * 0.02
        wanted = e4m3(getattr(plain.layers[0], half), torch.tensor([0.02]))
        assert np.array_equal(meaning.double().numpy(), wanted)


@needs_shared
def test_a_scale_of_the_latent_projection_is_applied_to_its_output() -> None:
    """docs/formats/quark.md §8, DeepSeek: kv_b_proj.output_scale."""
    model = loaded(MLA)
    before = captured(model, f"{A}.kv_b_proj")
    spec = KVCacheSpec("fp8_e4m3fn", {A: ("s", "s")}, latent=frozenset({A}))
    scale = torch.tensor([0.05])
    stub: Any = SimpleNamespace(kv_cache=spec, read_kv_scales=lambda: {A: (scale, scale)}, layers=model.anybit.checkpoint.layers)
    naming: Any = SimpleNamespace(parameter=lambda name: name, modules=dict(model.named_modules()))
    assert kv_cache.install(model, stub, naming, lambda _: torch.device("cpu")) == []
    after = captured(model, f"{A}.kv_b_proj")
    assert np.array_equal(after["y"].double().numpy(), e4m3(before["y"], scale))


@needs_shared
def test_a_sliding_window_keeps_codes_too(tmp_path: Path) -> None:
    name = "fp8-static-activation-scale-mistral"
    folder = altered(name, tmp_path, config={"sliding_window": 5}, quantization={"kv_cache_scheme": "static"})
    model = without_activations(folder)
    cache = DynamicCache(config=model.config)
    steps = [logits(model, part, past_key_values=cache) for part in IDS.split([4, 1, 1, 4], dim=1)]
    assert relative_error(torch.cat(steps, dim=1), logits(model, use_cache=False)) < FLIPS
    assert (cache.layers[0].keys.dtype, cache.layers[0].keys.shape[-2]) == (torch.uint8, 4)


@needs_shared
def test_a_checkpoint_that_quantizes_nothing_but_its_cache_runs_through_both_doors(tmp_path: Path) -> None:
    """docs/formats/modelopt.md §3: quant_algo null with a cache."""
    from safetensors.torch import load_file, save_file

    source = loaded(LLAMA, kv_cache="none")
    held = {name: source.anybit.checkpoint.read(name) for name in source.anybit.checkpoint.layers}
    folder = altered(LLAMA, tmp_path, quantization={"quant_algo": None, "config_groups": None},
                     side={"hf_quant_config.json": {"quant_algo": None}})
    (file,) = folder.glob("*.safetensors")
    kept = {n: t for n, t in load_file(file).items() if not n.endswith(("weight_scale", "input_scale"))}
    save_file(kept | {f"{n}.weight": w.dequantize() for n, w in held.items()}, file)
    model = loaded(folder)
    assert kv_cache.switch(model, on=True) == 1
    anybit.enable()
    taken = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert relative_error(logits(taken), logits(model)) < 1e-6


assert SHARED is None or len(DECLARING) >= 6
