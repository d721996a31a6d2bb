"""Cutting the stored tensors and then reading gives what reading and then cutting gives, where a layout can be cut.

Along N, K and experts, for gptq, awq, bitsandbytes, torchao and gpt-oss. HQQ's slabs and blocks over the flattened
weight cannot be cut as stored; there the canonical weight is cut, or says why not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import anybit
from anybit.checkpoints.dialects import dialect
from anybit.errors import AnybitError, Unsupported
from anybit.schemes import ActivationSpec, Layer, ScaleLevel, Scheme, group
from anybit.weights import QuantizedWeight
from conftest import CHECKPOINTS, genuine

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@dataclass(frozen=True)
class Cut:
    """How the tensors of a layout are cut along one axis of the weight.

    axis   -3 experts, -2 outputs, -1 inputs
    at     where the weight is cut: the part is [at, end)
    roles  role -> (dimension, weights along the axis that one index of it holds); others stay whole
    drop   roles that a part does not need
    """

    folder: str
    module: str
    axis: int
    at: int
    roles: Mapping[str, tuple[int, int]]
    drop: tuple[str, ...] = ()


GPTQ_N = {"qweight": (1, 1), "qzeros": (1, 8), "scales": (1, 1), "bias": (0, 1)}
CUTS = (
    Cut("gptq-w4-g128-sym-llama", Q, -2, 64, GPTQ_N),
    Cut("gptq-w4-g64-asym-descact-qwen2", Q, -2, 72, GPTQ_N),  # g_idx serves every part of the outputs
    Cut("gptq-w4-g128-sym-llama", Q, -1, 128, {"qweight": (0, 8), "qzeros": (0, 128), "scales": (0, 128)}, ("g_idx",)),
    Cut("gptq-w2-g64-llama", Q, -1, 64, {"qweight": (0, 16), "qzeros": (0, 64), "scales": (0, 64)}, ("g_idx",)),
    Cut("gptq-w3-g128-llama", Q, -1, 128, {"qweight": (0, 32 / 3), "qzeros": (0, 128), "scales": (0, 128)},
        ("g_idx",)),
    Cut("gptq-w8-channel-llama", Q, -2, 32, {"qweight": (1, 1), "qzeros": (1, 4), "scales": (1, 1)}),
    Cut("gptq-w8-channel-llama", Q, -1, 64, {"qweight": (0, 4)}, ("g_idx",)),
    Cut("awq-gemm-llama", Q, -2, 64, {"qweight": (1, 8), "qzeros": (1, 8), "scales": (1, 1)}),
    Cut("awq-gemm-llama", Q, -1, 128, {"qweight": (0, 1), "qzeros": (0, 128), "scales": (0, 128)}),
    Cut("awq-gemv-qwen2", Q, -2, 40, {"qweight": (0, 1), "qzeros": (0, 1), "scales": (0, 1), "bias": (0, 1)}),
    Cut("awq-gemvfast-llama", Q, -2, 64, {"qweight": (0, 4), "qzeros": (1, 1), "scales": (1, 1)}),
    Cut("bnb-int8-llama", Q, -2, 40, {"weight": (0, 1), "row_maxima": (0, 1)}),
    Cut("bnb-int8-llama", Q, -1, 56, {"weight": (1, 1)}),
    Cut("torchao-int8da-llama", Q, -2, 40, {"qdata": (0, 1), "scale": (0, 1), "zero_point": (0, 1)}),
    Cut("torchao-int4wo-llama", Q, -2, 40, {"qdata": (0, 1), "scale": (1, 1), "zero_point": (1, 1)}),
    Cut("torchao-int4wo-llama", Q, -1, 64, {"qdata": (1, 2), "scale": (0, 64), "zero_point": (0, 64)}),
    Cut("torchao-8da4w-qwen2", Q, -1, 32, {"qdata": (1, 1), "scale": (1, 32), "zero_point": (1, 32)}),
    Cut("torchao-fp8da-qwen3", Q, -2, 40, {"qdata": (0, 1), "scale": (0, 1)}),
    *(Cut("gptoss-mxfp4", "model.layers.0.mlp.experts.gate_up_proj", axis, at, roles) for axis, at, roles in (
        (-3, 1, {"blocks": (0, 1), "scales": (0, 1), "bias": (0, 1)}),
        (-2, 64, {"blocks": (1, 1), "scales": (1, 1), "bias": (1, 1)}),
        (-1, 32, {"blocks": (2, 32), "scales": (2, 32)}),
    )),
)


def part_of(layer: Layer, cut: Cut) -> Layer:
    shape = list(layer.shape)
    shape[cut.axis] -= cut.at
    return replace(layer, shape=tuple(shape))


def cut_tensors(tensors: Mapping[str, Tensor], cut: Cut) -> dict[str, Tensor]:
    found = {}
    for role, tensor in tensors.items():
        if role in cut.roles:
            dim, held = cut.roles[role]
            start = round(cut.at / held)
            tensor = tensor.narrow(dim, start, tensor.shape[dim] - start).contiguous()
        if role not in cut.drop:
            found[role] = tensor
    return found


@pytest.mark.parametrize("cut", [c for c in CUTS if (CHECKPOINTS / c.folder).is_dir()],
                         ids=lambda c: f"{c.folder}{c.axis}")
def test_a_part_of_the_stored_tensors_reads_as_the_part_of_the_weight(cut: Cut) -> None:
    checkpoint = anybit.open(CHECKPOINTS / cut.folder)
    layer = checkpoint.layers[cut.module]
    whole = checkpoint.read(cut.module)
    assert isinstance(whole, QuantizedWeight)
    stored = {role: checkpoint._read_tensor(checkpoint.contents.tensors[name]) for role, name in layer.tensors.items()}
    read = dialect(checkpoint.dialect).canonicalize(part_of(layer, cut), cut_tensors(stored, cut))
    narrowed = whole.narrow(cut.axis, cut.at, whole.shape[cut.axis] - cut.at)
    assert torch.equal(read.dequantize(), narrowed.dequantize())
    if cut.axis != -1 and whole.bias is not None:
        assert read.bias is not None
        assert narrowed.bias is not None
        assert torch.equal(read.bias, narrowed.bias)


FOLDERS = genuine("gptq-*", "awq-*", "bnb-*", "torchao-*", "hqq-*", "gptoss-*")


def parts(weight: QuantizedWeight, axis: int, at: int) -> list[Any]:
    return [weight.narrow(axis, 0, at), weight.narrow(axis, at, weight.shape[axis] - at)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_any_cut_of_a_read_weight_is_exact_or_refused_with_its_reason(folder: str) -> None:
    """Also where the cut is in the middle of a word, a group or a block; experts can always be cut."""
    checkpoint = anybit.open(CHECKPOINTS / folder)
    for name in [n for n, layer in checkpoint.layers.items() if layer.scheme.is_quantized][:4]:
        weight = checkpoint.read(name)
        assert isinstance(weight, QuantizedWeight)
        whole = weight.dequantize()
        for axis in range(-whole.dim(), 0):
            for at in {1, 32, 64, 100, whole.shape[axis] - 1} & set(range(1, whole.shape[axis])):
                try:
                    found = parts(weight, axis, at)
                except AnybitError as refusal:
                    assert axis != -3
                    assert refusal.kind == "unsupported"
                    assert refusal.found
                    assert refusal.wanted
                    continue
                assert torch.equal(torch.cat([p.dequantize() for p in found], dim=axis), whole), (name, axis, at)


def test_a_cut_between_experts_keeps_each_its_own_input_scale() -> None:
    """A tensor of two dimensions has a row for each expert; a smaller one belongs to all."""
    spec = ActivationSpec("fp8_e4m3fn", False, "tensor", "fp8_static_divide")
    weight = QuantizedWeight(
        Scheme("int8", (ScaleLevel("float32", (1, 0)),), activation=spec), (4, 2, 3),
        torch.arange(24, dtype=torch.int8).reshape(4, 2, 3), (torch.ones(4, 2, 1),),
        activation={"scale": torch.tensor([[1.0], [2.0], [3.0], [4.0]]), "global_scale": torch.tensor([5.0])},
    )
    second_half = weight.narrow(0, 2, 2)
    assert second_half.activation["scale"].tolist() == [[3.0], [4.0]]
    assert second_half.expert(1).activation["scale"].tolist() == [4.0]
    assert second_half.activation["global_scale"].tolist() == [5.0]


def test_rows_of_a_flattened_weight_are_cut_where_a_block_ends_and_nowhere_else() -> None:
    codes = torch.arange(8 * 24, dtype=torch.uint8).reshape(8, 24) % 16
    scales = torch.arange(1.0, 4.0)  # 192 weights in blocks of 64: a third of a row more than two rows each
    weight = QuantizedWeight(Scheme("nf4", (ScaleLevel("float32", group(64), placement="flat"),)), (8, 24), codes,
                             (scales,))
    tall = replace(weight, shape=(16, 12), stored_codes=codes.reshape(16, 12))
    for whole, at, first in ((tall, 16, 3), (replace(weight, shape=(24, 8), stored_codes=codes.reshape(24, 8)), 8, 1)):
        part = whole.narrow(-2, 0, at)
        assert torch.equal(part.dequantize(), whole.dequantize()[:at])
        assert part.scales[0].numel() == first
    with pytest.raises(Unsupported, match="would split a block"):
        weight.narrow(-2, 0, 4)
