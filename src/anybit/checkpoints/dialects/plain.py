"""Unquantized layers: of a plain checkpoint, and those that a quantized one leaves as they are.

`dense_layers` is shared by every dialect: after it has claimed its own tensors, what is left and looks like a matrix
is a Dense layer; everything else (norms, biases of nothing, buffers) stays a plain tensor of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    """Every matrix as a Dense layer."""
    return dense_layers(contents, taken=())


def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> Dense:
    """The stored tensor itself."""
    from anybit.weights import Dense

    return Dense(layer.scheme, tensors["weight"], tensors.get("bias"))


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
