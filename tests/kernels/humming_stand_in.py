"""A stand-in for the package humming on a CPU: its interface, an order of bits of its own, and a product in float64.

The order is not humming's and need not be: our side may assume none. The operator's schema is copied from humming-kernels
0.1.19, csrc/launcher/launcher.cpp.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SCHEMA = (
    "launch_kernel.out(Tensor configs, Tensor a, Tensor b, Tensor bs, Tensor? bs2, Tensor? as_, Tensor? as2, "
    "Tensor? bzp, Tensor? bias, Tensor(a!) c, Tensor? sorted_ids, Tensor? expert_ids, Tensor? num_tokens_padded, "
    "Tensor? expert_layout, Tensor(b!) locks, SymInt top_k, SymInt valid_shape_m, bool should_check_tensor = True) -> ()"
)
TILE = 64


def order_of(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def bits_of(words: Tensor) -> Tensor:
    shifts = torch.arange(32, dtype=torch.int64)
    return ((words.long() & 0xFFFFFFFF)[..., None] >> shifts & 1).flatten(-2)


def words_of(bits: Tensor) -> Tensor:
    found = (bits.long().view(*bits.shape[:-1], -1, 32) << torch.arange(32)).sum(-1)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


def repack_weight(
    inputs: Tensor, weight_bits: int, activation_bits: int, is_weight_packed: bool, use_packed_k_layout: bool = False,
    use_native_dequant: bool = False,
) -> Tensor:  # fmt: skip
    """[N, K bits / 32] -> [K / columns, columns N bits / 32]: the bits of each tile of 64 x 64 codes in another order.

    columns: 16 for activations of 16 bits, 32 for those of 8, 64 in the packed layout.
    """
    assert is_weight_packed and not use_native_dequant
    columns = 64 if use_packed_k_layout else 256 // activation_bits
    n, k = inputs.shape[0], inputs.shape[1] * 32 // weight_bits
    tiles = bits_of(inputs).view(n // TILE, TILE, k // TILE, TILE * weight_bits).transpose(1, 2).flatten(2)
    shuffled = tiles[..., order_of(TILE * TILE * weight_bits, weight_bits)]
    rows = shuffled.view(n // TILE, k // TILE, TILE // columns, -1).permute(1, 2, 0, 3).reshape(k // columns, -1)
    return words_of(rows)


def transform_humming_weight_scale(weight_scale: Tensor, to_apply_on_c: bool = False) -> Tensor:
    turned = weight_scale.transpose(-1, -2).contiguous()
    order = order_of(TILE, 100 + to_apply_on_c)
    return turned.view(-1, TILE)[:, order].view(turned.shape)


def _from_the_middle(words: Tensor, bits: int) -> Tensor:
    """Offset binary codes as distances from the middle up, and from the code below it down."""
    fields = bits_of(words).view(-1, bits)
    codes = (fields << torch.arange(bits)).sum(-1)
    middle = 2 ** (bits - 1)
    codes = torch.where(codes >= middle, codes - middle, 2 * middle - 1 - codes)
    return words_of((codes[:, None] >> torch.arange(bits) & 1).view(words.shape[0], -1))


def _zero_points(packed: Tensor, bits: int) -> Tensor:
    groups, n = packed.shape[1], packed.shape[0] * 32 // bits
    fields = bits_of(packed.T.contiguous()).view(groups, n, bits)
    width = 4 if bits <= 4 else 8
    wide = torch.zeros(groups, n, width, dtype=torch.int64)
    wide[..., :bits] = fields
    order = order_of(TILE, 100)
    return words_of(wide.view(groups, -1, TILE, width)[:, :, order].reshape(groups, -1))


def transform_humming_tensors(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    words, scale = tensors["weight"], tensors["weight_scale"]
    is_coded = config.dtype == "float8e4m3"
    if is_coded or (config.weight["dtype"] == "uint8" and config.dtype == "bfloat16"):  # kShouldPreprocessForINT2FP
        words = _from_the_middle(words, config.bits)
    if scale.dtype == torch.float8_e8m0fnu and config.dtype == "float16":  # transform.py: pack_e8m0_scale_for_fp16
        scale = ((scale.view(torch.uint8).int() - 112).clamp(0, 30) << 3).to(torch.uint8).view(scale.dtype)
    width, packed = (8, config.use_packed_k_layout) if is_coded else (16, False)
    made = {"weight": repack_weight(words, config.bits, width, True, use_packed_k_layout=packed)}
    if config.weight.get("scale_type") == "tensor":
        made["weight_scale"] = scale
    elif config.weight.get("group_size_n"):
        made["weight_scale"] = scale.T.contiguous()
    else:
        made["weight_scale"] = transform_humming_weight_scale(scale, config.should_apply_bs_on_c)
    if "zero_point" in tensors:
        made["zero_point"] = _zero_points(tensors["zero_point"], config.bits)
    if "weight_scale_2" in tensors:
        made["weight_scale_2"] = tensors["weight_scale_2"]
    return made


@dataclass
class Seen:
    """What was asked of the package."""

    launches: list[dict[str, Any]] = field(default_factory=list)
    tuned: list[int] = field(default_factory=list)
    steps: list[list[Any]] = field(default_factory=list)
    answer: Tensor | None = None  # the weight [N, K] that a launch multiplies by


def modules(seen: Seen) -> dict[str, ModuleType]:
    """The modules of the package by name."""

    def module(name: str, **contents: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(contents)
        return made

    def layer(n: int, k: int, weight: dict[str, Any], given: dict[str, Any], torch_dtype: Any, device: Any) -> Any:
        bits = next(int(c) for c in weight["dtype"] if c.isdigit())
        return SimpleNamespace(
            weight=weight, bits=bits, dtype=given["dtype"], use_native_dequant=False,
            use_packed_k_layout=given["dtype"] == "float8e4m3" and weight["group_size"] == 128, should_apply_bs_on_c=weight["group_size"] == 0,
            to_str=lambda: json.dumps([n, k, weight, given]),
        )

    def tuned(config: Any, shape_m: int, device: Any) -> dict[str, Any]:
        seen.tuned.append(shape_m)
        return {"block_shape": [shape_m, 128, 64]}

    def prepare_kernels(layer: str, compute: Any, tuning: str, device: Any) -> Tensor:
        seen.steps = json.loads(tuning)
        rows = [[low, high, number, 0] for number, (low, high, _) in enumerate(seen.steps)]
        return torch.tensor(rows, dtype=torch.int64).flatten()

    schema = SimpleNamespace(from_config=dict)
    return {
        "humming": module("humming"),
        "humming.ops": module("humming.ops", repack_weight=repack_weight),
        "humming.schema": module("humming.schema", BaseWeightSchema=schema, BaseInputSchema=schema),
        "humming.transform": module("humming.transform", prepare_layer_config=layer,
                                    transform_humming_tensors=transform_humming_tensors,
                                    transform_humming_weight_scale=transform_humming_weight_scale),
        "humming.tune": module("humming.tune", get_heuristics_config=tuned),
        "humming.kernel": module("humming.kernel"),
        "humming.kernel.humming": module("humming.kernel.humming",
                                         HummingKernel=SimpleNamespace(prepare_kernels=prepare_kernels)),
    }  # fmt: skip


def operator(seen: Seen) -> torch.library.Library:
    """torch.ops.humming.launch_kernel.out; keep what is returned for as long as it is called."""
    library = torch.library.Library("humming", "FRAGMENT")
    library.define(SCHEMA)
    names = [part.split("=")[0].split()[-1] for part in SCHEMA.partition("(")[2].rpartition(")")[0].split(", ")]
    names = [name.rstrip(")") for name in names]

    def launch(*given: Any) -> None:
        asked = dict(zip(names, given, strict=False))
        seen.launches.append(asked)
        if seen.answer is not None:
            asked["c"].copy_(asked["a"].double() @ seen.answer.double().T)

    library.impl("launch_kernel.out", launch, "CPU")
    return library
