"""What a dialect sees of a checkpoint before any tensor is read: headers, config, side files.

Torch-free. A container (`safetensors.py`, `gguf.py`) has proven every `TensorInfo` against its file: names are unique,
spans lie inside the file and equal dtype x shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

JSON = dict[str, Any]  # a parsed JSON object; a dialect checks every value that it takes out

# safetensors dtype -> (bits of one element, name of the torch dtype that holds its bytes)
DTYPES: Final[Mapping[str, tuple[int, str]]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "F32": (32, "float32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "uint8"),  # kept as bytes: torch's e8m0 dtype supports next to nothing
    "F6_E2M3": (6, "uint8"),
    "F6_E3M2": (6, "uint8"),
    "F4": (4, "uint8"),
}

# names of vLLM for a kernel that runs a dialect, met as quant_method now and then -> the dialect's own
METHOD_ALIASES: Final = {"awq_marlin": "awq", "gptq_marlin": "gptq", "inc": "auto-round"}

FLOAT_DTYPES: Final = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # -> wide number formats


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its container declares it.

    dtype   a key of DTYPES; for GGUF the ggml type name ("Q4_1", "F32")
    shape   as a Hugging Face tensor: GGUF's fastest-first dimensions are already reversed
    offset  first byte in `file`
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """Everything about a checkpoint that is known without reading a tensor.

    path      folder, or the first .gguf file
    config    config.json (for GGUF: a Hugging Face config made from the metadata)
    side      other JSON files of the folder by name: "hf_quant_config.json", "quantize_config.json", ...
    tensors   by name, over all shards
    metadata  `__metadata__` of all shards merged
    gguf      key-value pairs of a GGUF file
    """

    path: Path
    config: JSON
    tensors: Mapping[str, TensorInfo]
    side: Mapping[str, JSON] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    gguf: Mapping[str, Any] | None = None

    @property
    def quantization(self) -> JSON:
        """`quantization_config` of config.json or its text_config; {} where there is none."""
        for holder in (self.config, self.config.get("text_config")):
            if isinstance(holder, dict):
                for key in ("quantization_config", "compression_config"):
                    found = holder.get(key)
                    if isinstance(found, dict):
                        method = found.get("quant_method")
                        alias = METHOD_ALIASES.get(method) if isinstance(method, str) else None
                        return found if alias is None else {**found, "quant_method": alias}
        return {}

    @property
    def quant_method(self) -> str:
        """`quant_method` in lower case, "" where there is none."""
        method = self.quantization.get("quant_method")
        return method.lower() if isinstance(method, str) else ""

    def bytes_of(self, *names: str) -> int:
        """Stored bytes of the tensors called so."""
        return sum(self.tensors[name].nbytes for name in names)
