"""Genuine checkpoints with one thing changed: a tensor, a key of a config, a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from conftest import CHECKPOINTS

Change = torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None


def altered(
    name: str,
    folder: Path,
    tensors: Mapping[str, Change] | None = None,
    config: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
    side: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> Path:
    """A copy of the genuine folder `name` (of one safetensors file) with these changes.

    tensors       name -> new tensor, function of the old one, or None to leave it out
    config        top-level keys of config.json; a value None is written as null
    quantization  keys of its quantization_config
    side          file name -> keys of its innermost object ("quantization" of ModelOpt's), or None to leave the file out
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = CHECKPOINTS / name
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".model"):
            (folder / file.name).write_bytes(file.read_bytes())
    _write_tensors(source, folder, tensors or {})
    written = json.loads((source / "config.json").read_text())
    written |= config or {}
    if quantization:
        written["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(written))
    for file_name, keys in (side or {}).items():
        if keys is None:
            (folder / file_name).unlink()
            continue
        content = json.loads((source / file_name).read_text())
        content.get("quantization", content).update(keys)
        (folder / file_name).write_text(json.dumps(content))
    return folder


def _write_tensors(source: Path, folder: Path, changes: Mapping[str, Change]) -> None:
    (file,) = source.glob("*.safetensors")
    held = load_file(file)
    for name, change in changes.items():
        if change is None:
            del held[name]
        elif isinstance(change, torch.Tensor):
            held[name] = change
        else:
            held[name] = change(held[name].clone())
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / file.name)


def put(value: float, *index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change that writes `value` at one place (the first, if none is given)."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0:
            return torch.full_like(tensor, value)
        tensor[index or (0,) * tensor.dim()] = value
        return tensor

    return change


def put_byte(byte: int, *index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change that writes a byte of an 8-bit tensor, whatever its dtype."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.view(torch.uint8)
        raw[index or (0,) * raw.dim()] = byte
        return raw.view(tensor.dtype)

    return change
