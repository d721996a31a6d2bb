"""The dialects: how each tool lays out a quantized layer. One file a dialect, one line a dialect in `DIALECTS`.

A dialect module holds

    NAME: str
    recognizes(contents) -> bool            headers and config only
    declare(contents) -> dict[str, Layer]   headers and config only; no torch; refuses what it cannot read, by name
    canonicalize(layer, tensors) -> QuantizedWeight | Dense     pure; `tensors` by role, as `layer.tensors` names them
    express(weight) -> dict[str, Tensor]    where the dialect can be written (optional)
    with_known_names(contents) -> Contents  tensors of older versions under the names that `declare` reads (optional)

and is tried in the order of the table: the first that recognizes the checkpoint has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.checkpoints.contents import Contents
    from anybit.schemes import Layer
    from anybit.weights import Dense, QuantizedWeight

DIALECTS: Final = {
    "gguf": "anybit.checkpoints.dialects.gguf",
    "modelopt": "anybit.checkpoints.dialects.modelopt",
    "compressed-tensors": "anybit.checkpoints.dialects.compressed_tensors",
    "auto-round": "anybit.checkpoints.dialects.auto_round",
    "gptq": "anybit.checkpoints.dialects.gptq",
    "awq": "anybit.checkpoints.dialects.awq",
    "fp8": "anybit.checkpoints.dialects.fp8",
    "fbgemm_fp8": "anybit.checkpoints.dialects.fbgemm_fp8",
    "gpt_oss_mxfp4": "anybit.checkpoints.dialects.gpt_oss_mxfp4",
    "bitsandbytes": "anybit.checkpoints.dialects.bitsandbytes",
    "torchao": "anybit.checkpoints.dialects.torchao",
    "hqq": "anybit.checkpoints.dialects.hqq",
    "quark": "anybit.checkpoints.dialects.quark",
    "plain": "anybit.checkpoints.dialects.plain",
}


class Dialect(Protocol):
    """The face of a dialect module."""

    NAME: str

    def recognizes(self, contents: Contents) -> bool:
        """True if headers and config say that this dialect wrote the checkpoint."""

    def declare(self, contents: Contents) -> dict[str, Layer]:
        """All layers by module name, from headers and config alone."""

    def canonicalize(self, layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
        """The canonical weight of one layer, bit for bit."""


def dialect(name: str) -> Dialect:
    """The dialect module called `name`."""
    return cast("Dialect", import_module(DIALECTS[name]))
