"""Unquantized layers: of a plain checkpoint, and those that a quantized one leaves as they are.

`dense_layers` is shared by every dialect: after it has claimed its own tensors, what is left and looks like a matrix
is a Dense layer; everything else (norms, biases of nothing, buffers) stays a plain tensor of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.contents import FLOAT_DTYPES, Contents
from anybit.schemes import Layer, LayerKind, dense

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense

NAME: Final = "plain"

# Last components of module names that hold lookup tables, in the families that transformers knows.
EMBEDDINGS: Final = frozenset(
    {"embed_tokens", "tok_embeddings", "wte", "wpe", "word_embeddings", "embed_in", "embedding", "embeddings",
     "token_embedding", "position_embeddings", "token_type_embeddings", "embed_positions", "shared"}
)
# Stacked experts are parameters, not modules: their names end without ".weight".
STACKED_EXPERTS: Final = ("experts.gate_up_proj", "experts.down_proj", "experts.gate_proj", "experts.up_proj")


def recognizes(contents: Contents) -> bool:
    """True if nothing says that the checkpoint is quantized."""
    return not contents.quantization


def declare(contents: Contents) -> dict[str, Layer]:
    """Every matrix as a Dense layer, experts as [E, N, K] whichever way they are stacked."""
    layers = dense_layers(contents, taken=())
    turned = {name for name, layer in layers.items() if layer.kind == "experts" and _is_turned(layer, layers)}
    return {name: _turned(layer) if name in turned else layer for name, layer in layers.items()}


def _is_turned(layer: Layer, layers: Mapping[str, Layer]) -> bool:
    """True for experts stored [E, in, out], as transformers has them for gpt-oss and Llama 4.

    Seen from both projections: gate_up makes twice what down reads, and reads what down makes.
    """
    stem = layer.name.rpartition(".")[0]
    gate_up, down = layers.get(f"{stem}.gate_up_proj"), layers.get(f"{stem}.down_proj")
    if gate_up is None or down is None:
        return False
    return gate_up.shape[1:] == (down.shape[2], 2 * down.shape[1])


def _turned(layer: Layer) -> Layer:
    count, columns, rows = layer.shape
    return replace(layer, shape=(count, rows, columns), storage={**layer.storage, "transposed": True})


def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> Dense:
    """The stored tensor itself, or its view as [E, N, K]."""
    from anybit.weights import Dense

    weight = tensors["weight"]
    return Dense(layer.scheme, weight.mT if layer.storage.get("transposed") else weight, tensors.get("bias"))


def dense_layers(contents: Contents, taken: Collection[str]) -> dict[str, Layer]:
    """Dense layers of all wide-float matrices whose tensor names are not in `taken`."""
    layers = {}
    for name, info in contents.tensors.items():
        if name in taken or info.dtype not in FLOAT_DTYPES:
            continue
        if len(info.shape) == 2 and name.endswith(".weight"):
            layer = _matrix(contents, name)
        elif len(info.shape) == 3 and name.endswith(STACKED_EXPERTS):
            layer = _stack(contents, name)
        else:
            continue
        layers[layer.name] = layer
    return layers


def _matrix(contents: Contents, tensor: str) -> Layer:
    info = contents.tensors[tensor]
    module = tensor.removesuffix(".weight")
    kind: LayerKind = "embedding" if module.rpartition(".")[2] in EMBEDDINGS else "linear"
    names = {"weight": tensor}
    bias = f"{module}.bias"
    if bias in contents.tensors:
        names["bias"] = bias
    return Layer(
        module, kind, info.shape, dense(FLOAT_DTYPES[info.dtype]), names,
        stored_bytes=contents.bytes_of(*names.values()),
    )


def _stack(contents: Contents, tensor: str) -> Layer:
    info = contents.tensors[tensor]
    names = {"weight": tensor}
    if f"{tensor}_bias" in contents.tensors:
        names["bias"] = f"{tensor}_bias"
    return Layer(
        tensor, "experts", info.shape, dense(FLOAT_DTYPES[info.dtype]), names,
        stored_bytes=contents.bytes_of(*names.values()),
    )
