"""The ways to be broken that every door must refuse: opening, loading, the command line.

name -> (makes the folder, kind of the refusal, words of its message, does `open` alone see it)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoints.altering import altered, put
from checkpoints.writing import folder_of, index_of, matrix

CT = "ct-llama-w4a16-g128"
FP8 = "modelopt-fp8-llama"
INDEX = "model.safetensors.index.json"
LAST = "model.layers.0.mlp.down_proj"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4900000000\n"


class Broken(NamedTuple):
    """A broken checkpoint and what is said about it."""

    make: Callable[[Path], Path]
    kind: str
    words: str
    is_seen_by_open: bool = True


def cut_short(folder: Path) -> Path:
    made = altered(CT, folder)
    os.truncate(made / "model.safetensors", (made / "model.safetensors").stat().st_size - 1000)
    return made


def pointer(folder: Path) -> Path:
    made = altered(CT, folder)
    (made / "model.safetensors").write_text(LFS)
    return made


def only_a_pickle(folder: Path) -> Path:
    made = altered(CT, folder)
    (made / "model.safetensors").rename(made / "pytorch_model.bin")
    return made


def index_outside(folder: Path) -> Path:
    folder_of(folder.parent / "other", {"model.safetensors": matrix("x.weight")})
    return folder_of(folder, {"a.safetensors": matrix("y.weight"),
                              INDEX: index_of({"x.weight": "../other/model.safetensors", "y.weight": "a.safetensors"})})


def _altered(name: str, **changes: object) -> Callable[[Path], Path]:
    return partial(_made, name, changes)


def _made(name: str, changes: dict[str, object], folder: Path) -> Path:
    return altered(name, folder, **changes)  # type: ignore[arg-type]


BROKEN = {
    "a missing scale in one layer": Broken(
        _altered(CT, tensors={f"{LAST}.weight_scale": None}), "inconsistent", f"{LAST}.weight_scale"),
    "a NaN scale": Broken(
        _altered(CT, tensors={f"{LAST}.weight_scale": put(float("nan"), 3, 1)}), "damaged", "nan at [3, 1]", False),
    "an infinite scale": Broken(
        _altered(FP8, tensors={f"{LAST}.weight_scale": put(float("inf"))}), "damaged", "inf", False),
    "codes of a wrong dtype": Broken(
        _altered(CT, tensors={f"{LAST}.weight_packed": torch.Tensor.short}), "inconsistent", "unexpected dtype"),
    "codes stored as floats": Broken(
        _altered(FP8, tensors={f"{LAST}.weight": torch.Tensor.float}), "inconsistent", "not quantized"),
    "an index that leaves the folder": Broken(index_outside, "unsafe", "../other/model.safetensors"),
    "a truncated shard": Broken(cut_short, "damaged", "1,000 bytes missing"),
    "a Git-LFS pointer": Broken(pointer, "damaged", "git lfs pull"),
    "an unknown method": Broken(
        _altered(CT, quantization={"quant_method": "compresed-tensors"}), "unsupported", "perhaps compressed-tensors"),
    "quantized tensors without a config": Broken(
        _altered(CT, config={"quantization_config": None}), "inconsistent", "without a quantization_config"),
    "a quantized config over plain tensors": Broken(
        lambda folder: folder_of(folder, {"a.safetensors": matrix("x.weight")},
                                 {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        "inconsistent", "no tensor is quantized"),
    "a pickle only": Broken(only_a_pickle, "unsafe", "a pickle can run code"),
    "shapes unlike the config": Broken(
        _altered(CT, config={"hidden_size": 128}), "inconsistent", "by config.json", False),
}  # fmt: skip
