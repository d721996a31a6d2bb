"""Checkpoints of a few tensors, written by the genuine safetensors library, and their headers read independently."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from anybit.checkpoints.contents import DTYPES, Contents, TensorInfo
from anybit.schemes import Layer

Tensors = dict[str, torch.Tensor]
SIDE_FILES = ("hf_quant_config.json",)


def write(
    folder: Path, quantization: dict[str, Any] | None, tensors: Tensors, side: dict[str, Any] | None = None,
    key: str = "quantization_config",
) -> Contents:
    """A checkpoint of these tensors and configs, as a dialect sees it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": "llama"} if quantization is None else {"model_type": "llama", key: quantization}
    (folder / "config.json").write_text(json.dumps(config))
    if side is not None:
        (folder / SIDE_FILES[0]).write_text(json.dumps(side))
    return contents_of(folder)


def contents_of(folder: Path) -> Contents:
    """Headers and configs of a folder, without anybit's own readers."""
    infos: dict[str, TensorInfo] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            header = json.loads(f.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            infos[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, 8 + size + begin, end - begin)
    side = {name: json.loads((folder / name).read_text()) for name in SIDE_FILES if (folder / name).exists()}
    return Contents(folder, json.loads((folder / "config.json").read_text()), infos, side)


def stored(info: TensorInfo) -> torch.Tensor:
    """The tensor itself."""
    with info.file.open("rb") as file:
        file.seek(info.offset)
        data = torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=torch.uint8)
    return data.view(getattr(torch, DTYPES[info.dtype][1])).reshape(info.shape)


def tensors_of(contents: Contents, layer: Layer) -> Tensors:
    """The layer's tensors by role, as `canonicalize` takes them."""
    return {role: stored(contents.tensors[name]) for role, name in layer.tensors.items()}


def words(*values: int) -> torch.Tensor:
    """A row of int32 words from their unsigned values."""
    return torch.tensor([values], dtype=torch.int64).to(torch.int32)


def fp8_bytes(*values: int) -> torch.Tensor:
    """A row of float8_e4m3fn from its bytes."""
    return torch.tensor([values], dtype=torch.uint8).view(torch.float8_e4m3fn)
