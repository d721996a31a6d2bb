"""What every dialect is held to, on the genuine folders: the tool's weights bit for bit, the runtime's layer values."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from small_checkpoints import contents_of, tensors_of

from anybit.checkpoints.contents import Contents
from anybit.numerics.activations import quantize_dequantize
from anybit.weights import Dense, QuantizedWeight
from conftest import CHECKPOINTS, EXPECTED, digest, expected


def assert_reads_bit_for_bit(dialect: ModuleType, folder: str) -> None:
    contents = contents_of(CHECKPOINTS / folder)
    assert dialect.recognizes(contents)
    layers = dialect.declare(contents)
    wanted = expected(folder)["weights"]
    assert {name for name, layer in layers.items() if layer.scheme.is_quantized} == set(wanted)
    for name, want in wanted.items():
        weight = dialect.canonicalize(layers[name], tensors_of(contents, layers[name])).dequantize()
        assert list(weight.shape) == want["shape"] == list(layers[name].shape), name
        assert digest(weight) == want["sha256"], name


def assert_computes_what_the_runtime_computes(dialect: ModuleType, folder: str) -> int:
    """Compare the recorded inputs and outputs of layers; how many there were."""
    contents = contents_of(CHECKPOINTS / folder)
    layers = dialect.declare(contents)
    with safe_open(EXPECTED / f"{folder}.safetensors", "pt") as recorded:
        names = {key.split("/")[1] for key in recorded.keys() if key.startswith("layer/")}  # noqa: SIM118
        for name in names:
            x, y = (recorded.get_tensor(f"layer/{name}/{part}") for part in "xy")
            got = product(dialect.canonicalize(layers[name], tensors_of(contents, layers[name])), x.float())
            # float64 on both sides: only the order of a float64 sum differs
            assert (got - y).norm() / y.norm() < 1e-5, name
    return len(names)


def product(weight: QuantizedWeight | Dense, x: torch.Tensor) -> torch.Tensor:
    activation = weight.scheme.activation
    if isinstance(weight, QuantizedWeight) and activation is not None:
        x = quantize_dequantize(x, activation, weight.activation)
    y = x.double() @ weight.dequantize().double().T
    return y if weight.bias is None else y + weight.bias.double()


def read(dialect: ModuleType, contents: Contents, name: str) -> QuantizedWeight:
    """The canonical weight of one quantized layer."""
    assert dialect.recognizes(contents)
    layer = dialect.declare(contents)[name]
    weight = dialect.canonicalize(layer, tensors_of(contents, layer))
    assert isinstance(weight, QuantizedWeight)
    return weight


def genuine_weight(dialect: ModuleType, folder: str, name: str) -> QuantizedWeight:
    return read(dialect, contents_of(CHECKPOINTS / folder), name)


def with_side(contents: Contents, **files: Any) -> Contents:
    """The contents with side files; `quantize_config={...}` is quantize_config.json."""
    return replace(contents, side={f"{name}.json": value for name, value in files.items()})


def codes_down_k(codes: torch.Tensor, bits: int, word_bits: int = 32) -> torch.Tensor:
    """Pack codes [N, K] as GPTQ does, [K*bits/w, N], written out bit by bit: an oracle, not the code under test."""
    return stream(codes, bits, word_bits).t().contiguous()


def stream(codes: torch.Tensor, bits: int, word_bits: int = 32) -> torch.Tensor:
    """Rows of codes [R, C] as a little-endian bit stream in words [R, ceil(C*bits/w)]."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        count = -(-len(row) * bits // word_bits)
        rows.append([number >> (word_bits * i) & (2**word_bits - 1) for i in range(count)])
    dtype = {32: torch.int32, 16: torch.int16, 8: torch.int8}[word_bits]
    return torch.tensor(rows, dtype=torch.int64).to(dtype)
