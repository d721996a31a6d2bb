"""What fits where, how it would be cut, and what a cut would change: all from headers and chip facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

import anybit
from anybit.errors import Unsupported
from anybit.planning.cuts import cut_of, tensor_parallel
from anybit.planning.fit import LINK_BYTES_PER_SECOND, USABLE, fit
from anybit.planning.plan import plan_layers
from anybit.platforms import Platform, named
from anybit.schemes import ActivationSpec, Layer, Offset, ScaleLevel, Scheme, dense, group
from conftest import CHECKPOINTS, genuine

INT4 = Scheme("uint4", (ScaleLevel("float16", group(128)),), offset=Offset("zero_point", "uint4", group(128)))
BLOCKS = Scheme("fp8_e4m3fn", (ScaleLevel("float32", (128, 128)),),
                activation=ActivationSpec("fp8_e4m3fn", True, "group", "fp8_group", 128))
INT8 = Scheme("int8", (ScaleLevel("float32", (1, 0)),), activation=ActivationSpec("int8", True, "token", "int8_token"))
FLAT = Scheme("nf4", (ScaleLevel("float32", (1, 64), placement="flat"),))
CONFIG: dict[str, Any] = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                          "hidden_size": 4096, "head_dim": 128, "max_position_embeddings": 8192}


@dataclass
class Model:
    """Headers of a model of 32 blocks."""

    layers: Mapping[str, Layer]
    config: Mapping[str, Any] = field(default_factory=lambda: CONFIG)
    dialect: str = "gptq"
    plain_elements: int = 65 * 4096


def layer(name: str, n: int, k: int, scheme: Scheme, kind: str = "linear") -> Layer:
    return Layer(name, kind, (n, k), scheme, stored_bytes=n * k // 2)  # type: ignore[arg-type]


def llama(scheme: Scheme, inner: int = 14336) -> Model:
    layers = [layer("model.embed_tokens", 128256, 4096, dense("bfloat16"), "embedding"),
              layer("lm_head", 128256, 4096, dense("bfloat16"))]
    for i in range(32):
        at = f"model.layers.{i}."
        layers += [layer(f"{at}self_attn.{name}", n, 4096, scheme)
                   for name, n in (("q_proj", 4096), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", 4096))]
        layers += [layer(f"{at}mlp.{name}", inner, 4096, scheme) for name in ("gate_proj", "up_proj")]
        layers.append(layer(f"{at}mlp.down_proj", 4096, inner, scheme))
    return Model({found.name: found for found in layers})


def answer(model: Model, platform: Platform, context: int = 4096, batch: int = 1):  # type: ignore[no-untyped-def]
    plan = plan_layers(model, platform, dtype="bfloat16")
    return fit(plan, model.layers, model.config, context, batch)


def test_an_8b_model_of_4_bits_fits_a_gaming_card_and_its_cache_bounds_the_context() -> None:
    found = answer(llama(INT4), named("rtx4090"))
    assert found.fits
    assert found.devices == 1
    cache = 2 * 32 * 8 * 128 * 2  # bytes a token: keys and values of 8 heads of 128 in 16 bits
    free = found.available - found.plan.memory.at(0)
    assert found.most_context == free // cache
    assert found.own_context == 8192
    assert answer(llama(INT4), named("rtx4090"), context=found.most_context).fits
    assert not answer(llama(INT4), named("rtx4090"), context=found.most_context + 1).fits


def test_needed_memory_is_weights_plain_tensors_workspace_and_cache_for_the_batch() -> None:
    found = answer(llama(INT4), named("h100"), context=1000, batch=3)
    memory = found.plan.memory
    assert found.needed == memory.weights + memory.plain + memory.workspace + 3000 * memory.cache_per_token
    assert found.available == int(named("h100").memory_bytes * USABLE["nvidia"])


def test_what_does_not_fit_names_the_devices_and_the_offload() -> None:
    small = replace(named("rtx4090"), memory_bytes=4 * 2**30)
    found = answer(llama(INT4), small)
    assert not found.fits
    assert found.devices == 2
    assert found.offload is not None
    assert found.offload.kind == "blocks"
    assert found.offload.host_bytes >= found.needed - found.available
    assert found.offload.host_bytes - found.needed + found.available < found.offload.host_bytes // found.offload.count
    fast = answer(llama(INT4), named("rtx4090"))
    assert 1 / found.decode > found.offload.bytes_a_token / LINK_BYTES_PER_SECOND
    assert found.decode < fast.decode


def test_experts_are_offloaded_before_whole_blocks_and_only_the_active_are_sent() -> None:
    model = llama(INT4)
    experts = {f"model.layers.{i}.mlp.experts.{e}.{name}": layer(f"model.layers.{i}.mlp.experts.{e}.{name}", 2048, 4096,
                                                                INT4)
               for i in range(32) for e in range(16) for name in ("gate_proj", "up_proj")}
    config = {**CONFIG, "num_experts": 16, "num_experts_per_tok": 2}
    found = answer(Model({**model.layers, **experts}, config), replace(named("rtx4090"), memory_bytes=7 * 2**30))
    assert found.offload is not None
    assert found.offload.kind == "experts"
    assert found.offload.bytes_a_token == pytest.approx(found.offload.host_bytes / 8, rel=1e-6)


def test_a_prompt_sends_all_that_the_host_holds_over_the_link() -> None:
    found = answer(llama(INT4), replace(named("rtx4090"), memory_bytes=4 * 2**30))
    assert found.offload is not None and found.prefill is not None
    assert 512 / found.prefill > found.offload.host_bytes / LINK_BYTES_PER_SECOND


def test_a_cpu_has_no_host_to_move_blocks_to_and_no_speed_where_the_model_does_not_fit() -> None:
    found = answer(llama(INT4), replace(named("cpu"), memory_bytes=4 * 2**30))
    assert not found.fits
    assert (found.offload, found.decode, found.prefill) == (None, None, None)


def test_more_devices_than_heads_share_no_more_of_the_cache() -> None:
    config = {**CONFIG, "num_key_value_heads": 1}
    model = replace(llama(INT4), config=config)
    tokens = 2**20  # 16 GiB of keys and values, on every device
    found = answer(model, replace(named("h100"), memory_bytes=16 * 2**30), context=tokens)
    assert found.plan.memory.cache(tokens) == 16 * 2**30
    assert found.devices is None


def test_decoding_reads_weights_and_cache_at_most_at_the_memorys_rate() -> None:
    platform = named("h200")
    found = answer(llama(INT4), platform, context=8192)
    weights = sum(unit.stored_bytes * len(unit.layers) for unit in found.plan.units if unit.kind != "embedding")
    least = (weights + 8192 * found.plan.memory.cache_per_token) / platform.bandwidth
    assert found.decode <= 1 / least


def test_a_longer_context_and_a_larger_batch_change_the_speed() -> None:
    one, long, many = (answer(llama(INT4), named("h200"), c, b) for c, b in ((1, 1), (100_000, 1), (1, 8)))
    assert long.decode < one.decode
    assert many.decode > one.decode


def test_sizes_that_divide_heads_dimensions_and_groups_divide_the_model() -> None:
    found = {row.size: row for row in tensor_parallel(llama(INT4).layers.values(), CONFIG)}
    assert found[2].divides and found[4].divides and found[8].divides
    assert found[8].obstacles == ()


@pytest.mark.parametrize(("scheme", "inner", "size", "code", "words"), [
    (INT4, 14336 - 128, 4, "splits", "would split a group of 128"),
    (BLOCKS, 14336 + 64 * 2, 2, "splits", "would split a block of 128"),
    (INT4, 14337, 2, "divides", "is no multiple of 2"),
    (FLAT, 14336, 2, "position", "scales lie over the flattened matrix"),
    (INT8, 14336, 2, "changes", "scale is computed over a token"),
])
def test_what_stands_against_a_cut_is_named_with_its_layers(
    scheme: Scheme, inner: int, size: int, code: str, words: str
) -> None:
    rows = tensor_parallel(llama(scheme, inner).layers.values(), CONFIG, [size])
    obstacles = [o for row in rows for o in row.obstacles if o.code == code]
    assert any(words in o.text for o in obstacles)
    assert any("model.layers.3.mlp.down_proj" in o.layers for o in obstacles)


def test_a_changed_result_does_not_forbid_a_cut() -> None:
    [row] = tensor_parallel(llama(INT8).layers.values(), CONFIG, [2])
    assert row.divides
    assert {o.code for o in row.obstacles} == {"changes"}


def test_heads_that_cannot_be_shared_out_forbid_a_size() -> None:
    [row] = tensor_parallel(llama(INT4).layers.values(), {**CONFIG, "num_attention_heads": 33}, [2])
    assert not row.divides
    assert row.obstacles[0].text == "33 attention heads are no multiple of 2"


def test_more_devices_than_key_value_heads_are_allowed_where_heads_are_copied() -> None:
    [row] = tensor_parallel(llama(INT4).layers.values(), CONFIG, [16])
    assert [o for o in row.obstacles if o.code == "heads"] == []


def test_a_block_over_the_whole_dimension_is_one_scale_that_every_part_keeps() -> None:
    cut = layer("model.layers.0.mlp.down_proj", 4096, 128, Scheme("uint4", (ScaleLevel("float16", group(128)),)))
    assert [row.obstacles for row in tensor_parallel([cut], {}, (2, 4))] == [(), ()]


def test_a_cut_through_groups_of_the_input_changes_the_result() -> None:
    cut = layer("model.layers.0.mlp.down_proj", 4096, 128, BLOCKS)
    (found,) = tensor_parallel([cut], {}, (2,))
    assert [(o.code, o.text) for o in found.obstacles] == [
        ("changes", "its input's scale is computed over groups of 128, which a cut would split")]
    assert found.divides


def test_rows_of_a_flattened_weight_are_cut_where_a_block_ends() -> None:
    whole, odd = (layer("model.layers.0.mlp.up_proj", n, 96, FLAT) for n in (64, 66))
    assert next(tensor_parallel([whole], {}, (2,))).obstacles == ()
    (obstacle,) = next(tensor_parallel([odd], {}, (2,))).obstacles
    assert (obstacle.code, obstacle.text) == ("splits", "N / 2 = 33 rows of 96 would split a block of 64")


@pytest.mark.parametrize("folder", genuine("*"))
def test_a_cut_without_obstacle_is_exact_and_one_with_an_obstacle_is_refused(folder: str) -> None:
    checkpoint = anybit.open(CHECKPOINTS / folder)
    distinct = {(cut_of(found), found.scheme, found.shape): found for found in checkpoint.layers.values()
                if cut_of(found) != "none" and found.kind != "embedding"}
    for found in distinct.values():
        weight = checkpoint.read(found.name)
        whole, dim = weight.dequantize(), -2 if cut_of(found) == "rows" else -1
        for row in tensor_parallel([found], {}, (2, 4)):
            if any(obstacle.code == "divides" for obstacle in row.obstacles):
                continue
            length = weight.shape[dim] // row.size
            if not row.divides:
                with pytest.raises(Unsupported):
                    tuple(weight.narrow(dim, i * length, length) for i in range(row.size))
                continue
            for i in range(row.size):
                part = weight.narrow(dim, i * length, length).dequantize()
                assert torch.equal(part, whole.narrow(dim, i * length, length)), (found.name, row.size, i)
