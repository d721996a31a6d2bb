"""Hostile and damaged checkpoints: one line of bad_inputs.md, one test; the id is the line's id.

Here: safetensors files, folders and indexes, what the reader asks of a config, scales and patterns. GGUF files:
test_bad_gguf.py. What a host must refuse is tested with the host.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit import limits
from anybit.checkpoints.checkpoint import Checkpoint
from anybit.checkpoints.checks import refuse_bad_scales
from anybit.checkpoints.folder import demand_no_code
from anybit.checkpoints.patterns import Patterns
from anybit.checkpoints.safetensors import read_header, read_tensor
from anybit.errors import AnybitError, Damaged, LimitExceeded
from checkpoints.writing import (
    CONFIG,
    LINES,
    entry,
    file_of,
    floats,
    folder_of,
    framed,
    index_of,
    line,
    matrix,
)
from conftest import CHECKPOINTS, SHARED, genuine, needs_shared

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(anybit.__file__).parents[1])}
Case = tuple[str, Any, str, str]  # id, content, kind, words of the message


def ids(cases: list[Case]) -> list[str]:
    return [f"{case[0]}-{number}" for number, case in enumerate(cases)]


def refusal(call: Callable[[], object], seconds: float = 1.0) -> AnybitError:
    """The error of a call, which must be cheap and say where."""
    start = time.process_time()
    with pytest.raises(AnybitError) as caught:
        call()
    assert time.process_time() - start < 2 * seconds  # twice the promise: the machine may be busy
    assert caught.value.where
    return caught.value


def of_file(content: bytes, folder: Path) -> AnybitError:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return refusal(lambda: read_header(path), 1 + 0.15 * len(content) / 1e6)


def one(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8, data: bytes = bytes(8)) -> bytes:
    return framed(json.dumps({"t": entry(dtype, list(shape), begin, end)}), data)


def several(data: bytes, **entries: Any) -> bytes:
    return framed(json.dumps(entries), data)


def raw_number(text: str) -> bytes:
    """A header whose dimension is written as `text`."""
    return framed(f'{{"t":{{"dtype":"F32","shape":[{text}],"data_offsets":[0,8]}}}}', bytes(8))


F32 = entry("F32", [2], 0, 8)
ENTRY = json.dumps(F32)

FILES: list[Case] = [
    *[("ST01", bytes(n), "damaged", "needs 8 bytes") for n in (0, 3, 7)],
    ("ST01", bytes(8), "damaged", "header is empty"),
    *[("ST02", struct.pack("<Q", n) + b"\1\2", "damaged", f"length {n:,} in a file of 10 bytes")
      for n in (2**63, 2**64 - 1, 1000)],
    ("ST04", b"PK\3\4" + bytes(range(200, 240)), "damaged", "a ZIP archive"),
    ("ST04", b"\x80\x04\x95\xff\0\0\0\0\0\0\0}", "damaged", "a pickle"),
    ("ST04", b"GGUF\3\0\0\0" + bytes(40), "damaged", "a GGUF file"),
    ("ST04", b"<!DOCTYPE html><html>", "damaged", "an HTML page"),
    ("ST04", b"Access denied\n", "damaged", "a text file"),
    ("ST05", framed(b'{"t\xff":1}'), "damaged", "byte 0xff at 3"),
    ("ST05", framed(b"\xef\xbb\xbf{}"), "damaged", "byte-order mark"),
    ("ST05", framed(b"{}\0\0"), "damaged", "0x00 at 11"),
    ("ST05", framed(b"{}\0{}"), "damaged", "column 3"),
    *[("ST06", framed(text), "damaged", "an object") for text in ("[]", "null", '"x"', "7")],
    *[("ST06", framed("[" * n + "]" * n), "damaged", "nested deeper than 64") for n in (200, 100_000)],
    *[("ST06", framed('{"a":' * n + "1" + "}" * n), "damaged", "nested deeper than 64") for n in (200, 100_000)],
    ("ST07", framed(f'{{"t":{ENTRY},"t":{{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}}}', bytes(8)), "damaged",
     "'t' is declared twice"),
    ("ST08", framed('{"t":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8)), "damaged",
     "'dtype' is declared twice"),
    ("ST08", framed('{"__metadata__":{},"__metadata__":{}}'), "damaged", "'__metadata__' is declared twice"),
    ("ST08", framed('{"__metadata__":{"a":"1","a":"2"}}'), "damaged", "'a' is declared twice"),
    *[("ST09", raw_number(text), "damaged", "model.safetensors: t: shape is not a list of non-negative integers")
      for text in ("NaN", "Infinity", "1e999", "1.0", "1e2", "true", '"1"', "-1", str(2**64))],
    ("ST09", raw_number("1" * 5000), "damaged", "an integer of 5000 digits"),
    ("ST09", one(begin=-8, end=0), "damaged", "t: data_offsets is not a list of non-negative integers"),
    *[("ST10", framed(json.dumps({"__metadata__": m})), "damaged", "not a map of strings")
      for m in ({"a": 1}, {"a": {}}, ["a"])],
    ("ST12", framed('{"t":{"dtype":"F32","data_offsets":[0,8]}}', bytes(8)), "damaged", "shape"),
    *[("ST12", framed(json.dumps({"t": {**F32, "data_offsets": offsets}}), bytes(8)), "damaged", "[begin, end]")
      for offsets in ([0], [0, 4, 8])],
    ("ST13", one(begin=8, end=0), "damaged", "[begin, end]"),
    ("ST13", one(shape=[4], end=16), "damaged", "8 bytes missing: incomplete download?"),
    ("ST13", one(data=bytes(5)), "damaged", "3 bytes missing: incomplete download?"),
    ("ST14", several(bytes(12), a=F32, b=entry("F32", [2], 4, 12)), "damaged", "a and b"),
    ("ST14", several(bytes(8), **{f"t{n}": F32 for n in range(100_000)}), "damaged", "two tensors overlap"),
    ("ST15", one(begin=4, end=12, data=bytes(12)), "damaged", "belong to no tensor"),
    ("ST15", several(bytes(20), a=F32, b=entry("F32", [2], 12, 20)), "damaged", "belong to no tensor"),
    ("ST15", one(data=bytes(8) + b"PK\3\4" + bytes(100)), "damaged", "belong to no tensor"),
    ("ST16", one(shape=[1]), "damaged", "8 bytes"),
    ("ST16", one(shape=[3]), "damaged", "12 for F32"),
    ("ST17", one(shape=[2**32, 2**32], end=0, data=b""), "damaged", "span differs"),
    ("ST17", one("U8", [4194305, 4194305, 211106198978564], end=4, data=bytes(4)), "damaged", "span differs"),
    *[("ST18", one(shape=shape, end=0, data=b""), "limit", "MAX_DIM") for shape in ([0, 2**63, 2], [2**63, 2, 0])],
    *[("ST18", one(shape=[1] * n, end=4, data=bytes(4)), "limit", "MAX_RANK") for n in (9, 100_000)],
    ("ST18", one(shape=[2**63] * 100_000, end=4, data=bytes(4)), "limit", "MAX_RANK"),
    ("ST19", several(bytes(8), a=F32, b=entry("F32", [0], 5, 5)), "damaged", "two tensors overlap"),
    *[("ST21", one(dtype), "damaged", "F8_E4M3") for dtype in ("F3", "f32", 3)],
    ("ST21", one("F4", [3], end=1, data=bytes(1)), "damaged", "whole bytes"),
    ("ST22", several(bytes(8), **{"": F32}), "damaged", "name is empty"),
    ("ST22", several(bytes(8), **{"x" * 513: F32}), "limit", "MAX_NAME_BYTES"),
    ("ST22", framed(f'{{"\\ud800":{ENTRY}}}', bytes(8)), "damaged", "not valid text"),
    ("FO09", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4900000000\n", "damaged",
     "for 4.9 GB"),
]  # fmt: skip


@pytest.mark.parametrize(("id", "content", "kind", "words"), FILES, ids=ids(FILES))
def test_a_damaged_file_is_refused(id: str, content: bytes, kind: str, words: str, tmp_path: Path) -> None:
    error = of_file(content, tmp_path)
    assert error.kind == kind
    assert words in str(error)


SOUND: list[Case] = [
    ("ST05", framed(f'  {{"t":{ENTRY}}} \n\t ', floats(2)), "t", ""),
    *[("ST10", framed(json.dumps({"__metadata__": m, "t": F32}), floats(2)), "t", "") for m in ({}, None)],
    ("ST12", framed(json.dumps({"t": {**F32, "colour": [1, {"a": None}]}}), floats(2)), "t", ""),
    ("ST19", several(floats(2), empty=entry("F32", [0, 4], 0, 0), t=F32), "t", ""),
    ("ST19", several(floats(2), t=F32, empty=entry("F32", [0, 4], 8, 8)), "t", ""),
    ("ST19", several(bytes(4) + floats(2), t=entry("F32", [2], 4, 12), first=entry("F32", [], 0, 4)), "t", ""),
    ("ST20", several(b"\1" + floats(2), a=entry("U8", [1], 0, 1), t=entry("F32", [2], 1, 9)), "t", ""),
    ("ST20", framed(f'{{"t":{ENTRY}}} ' + " " * (len(ENTRY) % 2), floats(2)), "t", ""),
    *[("ST22", framed(json.dumps({name: F32}), floats(2)), name, "")
      for name in ("\x1b]8;;http://x\x07", "a\0b", "a\nb", "a\u202eb", "../x", "x" * 512)],
]  # fmt: skip


@pytest.mark.parametrize(("id", "content", "name", "_"), SOUND, ids=ids(SOUND))
def test_what_only_looks_bad_is_read(id: str, content: bytes, name: str, _: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tensors = read_header(path).tensors
    assert read_tensor(tensors[name]).tolist() == [0.0, 1.0]
    assert all(read_tensor(info).shape == info.shape for info in tensors.values())


@line("ST03")
@pytest.mark.parametrize(("length", "kind"), [(100_000_001, "limit"), (99_999_992, "damaged")])
def test_a_sparse_header_costs_little(length: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(8 + length)
    assert refusal(lambda: read_header(path), 2.0).kind == kind


@line("ST05", "ST14")
@pytest.mark.parametrize("text", ['{"' + '\\"' * 2_000_000, '{"a' + "[" * 2_000_000, "[[" * 10 + '"\\' * 1_000_000])
def test_a_header_that_never_closes_its_strings_costs_little(text: str, tmp_path: Path) -> None:
    assert of_file(framed("{" + "[" * 40 + "]" * 40 + text), tmp_path).kind == "damaged"


@line("ST21")
@pytest.mark.parametrize(("dtype", "shape", "size"), [
    ("F4", [2, 4], 4), ("F6_E2M3", [4, 4], 12), ("F6_E3M2", [4, 4], 12), ("F8_E8M0", [2, 4], 8), ("U16", [2, 2], 8),
    ("F8_E4M3FNUZ", [2, 4], 8),
])  # fmt: skip
def test_dtypes_that_torch_hardly_knows_come_as_bytes(dtype: str, shape: list[int], size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    raw = bytes(range(size))
    path.write_bytes(file_of({"t": (dtype, shape, raw)}))
    assert bytes(read_tensor(read_header(path).tensors["t"]).view(torch.uint8).flatten().tolist()) == raw


@line("ST21")
def test_complex_numbers_are_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"t": ("C64", [1], bytes(8))}))
    info = read_header(path).tensors["t"]
    assert refusal(lambda: read_tensor(info)).kind == "unsupported"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def exchange(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(matrix("m.weight", first=5.0))
    other.replace(path)


def remove(path: Path) -> None:
    path.unlink()


@line("ST23")
@pytest.mark.parametrize("change", [cut, exchange, remove])
def test_a_file_that_changes_after_opening_is_refused(change: Callable[[Path], None], tmp_path: Path) -> None:
    checkpoint = anybit.open(folder_of(tmp_path / "m", {"model.safetensors": matrix("m.weight")}))
    assert checkpoint.read("m").dequantize().shape == (2, 3)
    change(tmp_path / "m" / "model.safetensors")
    error = refusal(lambda: checkpoint.read("m"))
    assert error.kind == "damaged"
    assert "changed while being read" in error.problem or error.found == "No such file or directory"


@line("ST23")
def test_a_file_cut_while_a_tensor_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(matrix("m.weight"))
    info = read_header(path).tensors["m.weight"]
    cut(path)
    assert "changed while being read" in str(refusal(lambda: read_tensor(info)))


@line("ST24")
def test_what_is_not_a_regular_file_is_never_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "model.safetensors"
    os.mkfifo(fifo)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    for path in (fifo, folder, Path("/dev/zero")):
        error = refusal(lambda path=path: read_header(path))  # type: ignore[misc]
        assert (error.kind, error.problem) == ("damaged", "not a regular file")
    assert refusal(lambda: anybit.open(fifo)).kind == "damaged"


@line("ST24", "FO15")
@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_read_permission_says_so(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {"model.safetensors": matrix("m.weight")})
    for name in ("model.safetensors", "config.json"):
        (folder / name).chmod(0)
        assert "Permission denied" in str(refusal(lambda: anybit.open(folder)))
        (folder / name).chmod(0o600)


# --- folder and index ------------------------------------------------------------------------------------------------

TWO = {"a.safetensors": matrix("x.weight"), "b.safetensors": matrix("y.weight")}
MAP = {"x.weight": "a.safetensors", "y.weight": "b.safetensors"}
INDEX = "model.safetensors.index.json"


def indexed(weight_map: Any, **files: Any) -> dict[str, Any]:
    return {**TWO, "sub.safetensors/x": "", **files, INDEX: index_of(weight_map)}


FOLDERS: list[Case] = [
    *[("FO01", indexed({**MAP, "z": name}), "unsafe", "outside the folder")
      for name in ("../x.safetensors", "a/../../x", "/etc/passwd", "C:\\x", "\\\\host\\s\\x", "x\0y", ".", "", "..",
                   "sub.safetensors", "\ud800", "a//b", "./a.safetensors")],
    ("FO04", {**TWO, INDEX: index_of({**MAP, "z": "c.safetensors"})}, "inconsistent", "c.safetensors"),
    ("FO04", {**TWO, INDEX: index_of({**MAP, **{f"z{n}": f"c{n}.safetensors" for n in range(10)}})}, "inconsistent",
     "and 9 more"),
    ("FO04", {**TWO, INDEX: index_of({**MAP, "z": "a.safetensors", "w": "b.safetensors"})}, "inconsistent", "and 1 more"),
    ("FO04", {INDEX: index_of(MAP)}, "inconsistent", "b.safetensors"),
    ("FO06", {"a.safetensors": matrix("x.weight"), "b.safetensors": matrix("x.weight")}, "inconsistent",
     "a.safetensors and b.safetensors"),
    *[("FO07", {**TWO, INDEX: content}, "damaged", "weight_map")
      for content in ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"x.weight": 7}})],
    ("FO08", {**TWO, INDEX: index_of(MAP), "model.safetensors": file_of({"x.weight": ("F16", [2, 3], bytes(12))})},
     "inconsistent", "F16 [2, 3] here, F32 [2, 3] in a.safetensors"),
    ("FO08", {"model-1.safetensors": matrix("x.weight"),
              "consolidated.safetensors": file_of({"x.weight": ("F32", [3, 2], floats(6))})}, "inconsistent", "[3, 2] here"),
    ("FO08", {**TWO, "c.safetensors.incomplete": b""}, "damaged", "an unfinished download"),
    *[("FO09", {**TWO, name: "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4900000000\n"}, "damaged",
       "git lfs pull") for name in ("a.safetensors", "tokenizer.json", "config.json", "tokenizer.model")],
    *[("FO10", {name: b"\x80\x04."}, "unsafe", "a pickle can run code")
      for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "weights.npz")],
    ("FO13", {**TWO, "model.gguf": b"GGUF"}, "inconsistent", "model.gguf"),
    ("FO13", {"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, "inconsistent", "a.gguf, b.gguf"),
    ("FO13", {"adapter_config.json": "{}", "adapter_model.safetensors": matrix("x.weight")}, "unsupported", "adapter"),
    ("FO13", {}, "inconsistent", "no tensors"),
    *[("FO14", {**TWO, "config.json": content}, "damaged", words) for content, words in [
        (b"", "config.json: empty"), (b" \n", "config.json: empty"), (b"\xef\xbb\xbf{}", "line 1 column 1"),
        ('{"model_type": "llama"}'.encode("utf-16"), "line 1 column 1"), ('{"model_type": "llama",}', "line 1 column 2"),
        ("[]", "a list"), ("null", "null"), ("[" * 100_000, "nested deeper"), ('{"a":' * 100_000, "nested deeper"),
        ('{"model_type": "llama", "model_type": "qwen2"}', "'model_type' is declared twice"),
        ('{"hidden_size": NaN}', "hidden_size"), (b'{"a": "\xff"}', "not UTF-8"),
    ]],
    ("FO14", {**TWO, "config.json": " " * (17 * 2**20)}, "limit", "MAX_CONFIG_JSON"),
    ("FO14", {**TWO, "quantize_config.json": "{"}, "damaged", "quantize_config.json"),
]  # fmt: skip


@pytest.mark.parametrize(("id", "files", "kind", "words"), FOLDERS, ids=ids(FOLDERS))
def test_a_bad_folder_is_refused(id: str, files: dict[str, Any], kind: str, words: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", files)
    error = refusal(lambda: anybit.open(folder))
    assert error.kind == kind
    assert words in str(error)


@line("FO02")
def test_shards_may_lie_in_folders_below(tmp_path: Path) -> None:
    files = {"sub/a.safetensors": matrix("x.weight"), INDEX: index_of({"x.weight": "sub/a.safetensors"})}
    assert list(anybit.open(folder_of(tmp_path, files)).layers) == ["x"]


@line("FO02")
def test_the_hubs_cache_of_links_is_read(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0a1b"
    folder_of(snapshot / "sub", {})
    folder_of(blobs, {"h1": matrix("x.weight"), "h2": json.dumps(CONFIG)})
    (snapshot / "model.safetensors").symlink_to("../../blobs/h1")
    (snapshot / "config.json").symlink_to("../../blobs/h2")
    assert list(anybit.open(snapshot).layers) == ["x"]
    (tmp_path / "name").symlink_to(snapshot)
    assert list(anybit.open(tmp_path / "name").layers) == ["x"]


LINKS = [("model.safetensors", "../elsewhere/model.safetensors", "unsafe", "elsewhere/model.safetensors"),
         ("model.safetensors", "gone", "damaged", "download unfinished"),
         ("model.safetensors", "model.safetensors", "damaged", "leads nowhere"),
         ("config.json", "../elsewhere/config.json", "unsafe", "elsewhere/config.json"),
         ("config.json", "gone", "damaged", "download unfinished"),
         ("tokenizer.json", "/etc/hostname", "unsafe", "/etc/hostname")]  # fmt: skip


@line("FO03")
@pytest.mark.parametrize(("name", "target", "kind", "words"), LINKS)
def test_a_link_out_of_the_folder_is_refused(name: str, target: str, kind: str, words: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "elsewhere", {"model.safetensors": matrix("x.weight")})
    folder = folder_of(tmp_path / "m", {"model.safetensors": matrix("x.weight")})
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    error = refusal(lambda: anybit.open(folder))
    assert error.kind == kind
    assert words in str(error)


@line("FO03")
def test_a_folder_linked_from_below_is_outside_too(tmp_path: Path) -> None:
    folder_of(tmp_path / "elsewhere", {"a.safetensors": matrix("x.weight")})
    folder = folder_of(tmp_path / "m", {INDEX: index_of({"x.weight": "sub/a.safetensors"})})
    (folder / "sub").symlink_to("../elsewhere")
    assert refusal(lambda: anybit.open(folder)).kind == "unsafe"


ODD: list[Case] = [
    ("FO05", {**TWO, INDEX: index_of({"x.weight": "a.safetensors"})}, "x", "b.safetensors is not read"),
    ("FO05", {"a.safetensors": matrix("x.weight", "y.weight"), INDEX: index_of({"x.weight": "a.safetensors"})}, "x y",
     "1 tensors that the index does not name"),
    ("FO06", {"a.safetensors": matrix("x.weight"), "b.safetensors": matrix("x.weight", "y.weight", first=9),
              INDEX: index_of(MAP)}, "x y", "1 tensors that the index takes from other files"),
    ("FO08", {**TWO, INDEX: index_of(MAP), "model.safetensors": matrix("x.weight", "y.weight")}, "x y",
     "model.safetensors is not read"),
    ("FO08", {"model-1.safetensors": matrix("x.weight"), "consolidated.safetensors": matrix("layers.x.weight")}, "x",
     "consolidated.safetensors is not read: it holds the model a second time"),
    ("FO15", {**TWO, "modeling_x.py": "raise SystemExit(3)", "x.pth": "import os"}, "x y",
     "contains code, not run: modeling_x.py, x.pth"),
]  # fmt: skip


@pytest.mark.parametrize(("id", "files", "layers", "words"), ODD, ids=ids(ODD))
def test_what_is_odd_is_decided_and_said(id: str, files: dict[str, Any], layers: str, words: str, tmp_path: Path) -> None:
    checkpoint = anybit.open(folder_of(tmp_path / "m", files))
    assert sorted(checkpoint.layers) == layers.split()
    assert any(words in note for note in checkpoint.notes)
    if "x" in layers:
        assert checkpoint.read("x").dequantize()[0, 0] == 0.0


@line("FO05")
@pytest.mark.parametrize("total", [7, "24"])
def test_a_wrong_total_size_is_said(total: Any, tmp_path: Path) -> None:
    checkpoint = anybit.open(folder_of(tmp_path / "m", {**TWO, INDEX: index_of(MAP, total_size=total)}))
    assert any("total_size" in note for note in checkpoint.notes)


@line("FO07")
def test_a_huge_index_is_refused_by_its_size(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", TWO)
    with (folder / INDEX).open("wb") as file:
        file.truncate(300_000_000)
    assert "MAX_INDEX_JSON" in str(refusal(lambda: anybit.open(folder)))


@line("FO07")
def test_twenty_thousand_shards_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {})
    for number in range(limits.MAX_SHARDS + 1):
        (folder / f"{number}.safetensors").touch()
    assert "MAX_SHARDS" in str(refusal(lambda: anybit.open(folder)))


@line("FO10", "FO11")
def test_no_pickle_is_ever_loaded() -> None:
    source = Path(anybit.__file__).parent
    calls = re.compile(r"torch\.load\(|^\s*(import|from) pickle|allow_pickle=True", re.MULTILINE)
    assert [str(p) for p in source.rglob("*.py") if calls.search(p.read_text())] == []


class Hostile:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def archive(pickled: bytes, **members: bytes) -> bytes:
    """A file as torch.save writes it, and members as nobody does: deflated, or outside."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in members.items():
            file.writestr(name, content, zipfile.ZIP_DEFLATED)
    return raw.getvalue()


@line("FO11", "FO12")
@pytest.mark.parametrize("name", ["qmodel.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("how", ["bare", "zipped", "bomb", "outside", "marks"])
def test_a_hostile_pickle_runs_nothing(name: str, how: str, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    bad = pickle.dumps(Hostile(mark), protocol=2)
    content = {
        "bare": lambda: bad, "zipped": lambda: archive(bad), "bomb": lambda: archive(bad, **{"archive/data/0": bytes(10**8)}),
        "outside": lambda: archive(bad, **{"../../x": b"x"}), "marks": lambda: archive(b"\x80\2" + b"(" * 10**6 + b"."),
    }[how]()
    config = {"quantization_config": {"quant_method": "hqq", "quant_config": {}}}
    error = refusal(lambda: anybit.open(folder_of(tmp_path / "m", {name: content}, config)))
    assert error.kind in ("unsafe", "damaged")
    assert not mark.exists()
    with pytest.raises(AnybitError):
        anybit.open(tmp_path / "m" / name)
    assert not mark.exists()


@line("ST11")
@pytest.mark.parametrize("kind", ["os.system", "Unheard", "__import__", "{not json"])
def test_a_class_named_by_a_file_is_never_looked_up(kind: str, tmp_path: Path) -> None:
    told = kind if kind.startswith("{") else json.dumps({"_type": kind, "_data": {"command": f"mkdir {tmp_path}/ran"}})
    content = file_of({"x.weight_qdata": ("I8", [2, 3], bytes(6))}, {"x.weight": told, "tensor_names": '["x.weight"]'})
    config = {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {"_type": kind}}}}
    refusal(lambda: anybit.open(folder_of(tmp_path / "m", {"model.safetensors": content}, config)))
    assert not (tmp_path / "ran").exists()


@line("FO13")
@pytest.mark.parametrize("name", ["", "no such", "x" * 5000, "a\0b", "~/nothing", "gone/model.gguf"])
def test_a_path_that_does_not_exist_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnybitError):
        anybit.open(name)


@line("FO13")
def test_a_near_name_is_told(tmp_path: Path) -> None:
    folder_of(tmp_path / "llama-w4", TWO)
    assert "llama-w4" in refusal(lambda: anybit.open(tmp_path / "lama-w4")).remedy


@line("FO13")
def test_a_hub_id_without_a_network_is_refused_in_time(tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads HF_HUB_OFFLINE when it is imported."""
    code = (
        "import anybit\ntry: anybit.open('organisation/missing-model')\n"
        "except anybit.AnybitError as e: print(e.kind)"
    )
    environment = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=10, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "unsupported"


@line("FO14")
def test_nan_elsewhere_in_a_config_is_accepted(tmp_path: Path) -> None:
    content = '{"model_type": "llama", "router_jitter": NaN, "limit": [Infinity]}'
    assert anybit.open(folder_of(tmp_path / "m", {**TWO, "config.json": content})).config["model_type"] == "llama"


@line("FO15")
def test_code_beside_the_model_is_never_imported(tmp_path: Path) -> None:
    """The working folder is the checkpoint's own, whose modules have names that a reader might import."""
    trap = "raise SystemExit(3)"
    names = ("json.py", "setup.py", "sitecustomize.py", "transformers.py", "modeling_x.py", "safetensors.py")
    folder = folder_of(tmp_path / "m", {**TWO, **dict.fromkeys(names, trap)})
    # -P: what the installed command gets; without it Python itself puts the folder first
    code = "import anybit; print(sorted(anybit.open('.').layers))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=folder, env=ENVIRONMENT
    )
    assert done.stdout.strip() == "['x', 'y']"


@line("WR05")
def test_a_half_written_conversion_is_not_opened(tmp_path: Path) -> None:
    assert "unfinished conversion" in str(refusal(lambda: anybit.open(folder_of(tmp_path / "m.anybit-partial", TWO))))


# --- model config ----------------------------------------------------------------------------------------------------

CONFIGS: list[Case] = [
    *[("CF05", {key: value}, "limit", key) for key, value in
      [("hidden_size", 10**18), ("num_hidden_layers", 10**9), ("vocab_size", 2**63)]],
    *[("CF05", {"hidden_size": value}, "damaged", "hidden_size") for value in (0, -1, "64", 64.0, True, None)],
    ("CF05", {"text_config": {"hidden_size": 0}}, "damaged", "hidden_size"),
    ("CF09", {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "inconsistent",
     "no tensor is quantized"),
    *[("CF10", {"quantization_config": {"quant_method": method}}, "unsupported", words)
      for method, words in [("gtpq", "perhaps gptq"), ("nonsense", "compressed-tensors"), (["gptq"], "unknown")]],
    *[("CF10", {"quantization_config": value}, "damaged", "not an object") for value in ("gptq", 4, ["gptq"])],
]  # fmt: skip


@pytest.mark.parametrize(("id", "config", "kind", "words"), CONFIGS, ids=ids(CONFIGS))
def test_a_bad_config_is_refused(id: str, config: dict[str, Any], kind: str, words: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", TWO, config)
    error = refusal(lambda: anybit.open(folder))
    assert error.kind == kind
    assert words in str(error)


@line("CF01", "CF02", "CF10")
@pytest.mark.parametrize("config", [
    {"model_type": None}, {"model_type": "unheard-of"}, {"model_type": ["llama"]}, {"quantization_config": None},
    {"auto_map": {"AutoConfig": "code.X"}}, {"num_key_value_heads": None}, {"num_attention_heads": [1]},
])  # fmt: skip
def test_what_only_loading_minds_can_be_opened(config: dict[str, Any], tmp_path: Path) -> None:
    assert sorted(anybit.open(folder_of(tmp_path / "m", TWO, config)).layers) == ["x", "y"]


CODE: list[Case] = [
    *[("CF02", {"auto_map": {}, "model_type": name}, "unsafe", "never run") for name in (None, "unheard-of", ["llama"])],
    ("CF02", {"model_type": "llama", "text_config": {"auto_map": {}, "model_type": "odd"}}, "unsafe", "never run"),
    ("CF03", {"_attn_implementation_internal": "org/kernel"}, "unsafe", "org/kernel"),
    ("CF03", {"text_config": {"_experts_implementation": "org/kernel"}}, "unsafe", "org/kernel"),
    ("CF03", {"attn_implementation": {"text_config": "org/kernel"}}, "unsafe", "org/kernel"),
    *[("CF04", {"torch_dtype": dtype}, "unsupported", "bfloat16") for dtype in ("os", "load", "float13", ["float16"])],
]  # fmt: skip


@pytest.mark.parametrize(("id", "config", "kind", "words"), CODE, ids=ids(CODE))
def test_a_config_that_leads_to_code_is_not_loaded(id: str, config: dict[str, Any], kind: str, words: str) -> None:
    error = refusal(lambda: demand_no_code(config), 60.0)  # imports transformers
    assert error.kind == kind
    assert words in str(error)


@line("CF02", "CF03", "CF04")
@pytest.mark.parametrize("config", [
    {"auto_map": {"AutoModel": "code.X"}, "model_type": "llama"}, {"_attn_implementation_autoset": True},
    {"_attn_implementation": "sdpa"}, {"torch_dtype": "bfloat16"}, {"dtype": None}, {"torch_dtype": "torch.float16"},
    {"quantization_config": {"dtype": "int4", "auto_map": {}}},
])  # fmt: skip
def test_a_config_of_a_known_class_is_loaded(config: dict[str, Any]) -> None:
    demand_no_code(config)


PACKED = [("x.qweight", "I32"), ("x.weight_packed", "I32"), ("x.weight_scale", "F32"), ("x.weight", "F8_E4M3"),
          ("x.weight", "I8"), ("x.weight", "U8")]  # fmt: skip


@line("CF09")
@pytest.mark.parametrize(("name", "dtype"), PACKED)
def test_packed_codes_without_a_config_are_never_plain_weights(name: str, dtype: str, tmp_path: Path) -> None:
    size = 4 if dtype in ("I32", "F32") else 1
    content = file_of({name: (dtype, [2, 3], bytes(6 * size))})
    error = refusal(lambda: anybit.open(folder_of(tmp_path / "m", {"model.safetensors": content})))
    assert error.kind == "inconsistent"
    assert name in str(error)


# --- scales and patterns ---------------------------------------------------------------------------------------------


@line("QT02", "QT03")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_not_finite_are_refused_with_count_and_place(bad: float) -> None:
    scales = torch.ones(3, 4)
    scales[1, 2] = scales[2, 0] = bad
    with pytest.raises(Damaged) as caught:
        refuse_bad_scales(scales, "m.scale", allow_zero=True, allow_negative=True)
    assert caught.value.where == "m.scale"
    assert "at [1, 2], 2 such of 12" in caught.value.found


@line("QT04", "QT05")
def test_zero_and_negative_scales_are_the_dialects_choice() -> None:
    scales = torch.tensor([0.0, -1.0], dtype=torch.float16)
    refuse_bad_scales(scales, "m", allow_zero=True, allow_negative=True)
    for zero, negative in ((True, False), (False, True)):
        with pytest.raises(Damaged):
            refuse_bad_scales(scales, "m", allow_zero=zero, allow_negative=negative)


@line("QT06")
@pytest.mark.parametrize("smallest", [torch.tensor(2.0**-24).half(), torch.tensor(2.0**-133).bfloat16()])
def test_subnormal_scales_are_sound(smallest: torch.Tensor) -> None:
    refuse_bad_scales(smallest.reshape(1), "m", allow_zero=False, allow_negative=False)


@line("QT22")
def test_nan_in_a_plain_weight_is_read(tmp_path: Path) -> None:
    content = file_of({"x.weight": ("BF16", [1, 2], b"\xc0\x7f\x80\x3f")})
    weight = anybit.open(folder_of(tmp_path / "m", {"model.safetensors": content})).read("x").dequantize()
    assert weight.isnan().tolist() == [[True, False]]


@line("QT23")
@pytest.mark.parametrize("pattern", [r"^(.*\.)*(.*)*$x", r"(a|aa)+$", r"(a+)+$", r"(?:a|a?)+b$"])
def test_exponential_patterns_cost_nothing(pattern: str) -> None:
    start = time.process_time()
    assert Patterns.match([pattern], where="ignore").first("a" * 200 + ".b!") is None
    assert time.process_time() - start < 0.5


LOOK_AHEAD = [("^(?!.*experts).*$", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.experts.3.up_proj"),
              (r"^(?!.*\.mlp\.experts(?:\.|$)).*$", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.1"),
              (r"(\w+)\.\1$", "gate.gate", "gate.up")]  # fmt: skip


@line("QT24", "QT25")
@pytest.mark.parametrize(("pattern", "hit", "miss"), LOOK_AHEAD)
def test_look_ahead_and_back_references_work(pattern: str, hit: str, miss: str) -> None:
    patterns = Patterns.match([pattern], where="ignore")
    assert patterns.first(hit) == 0
    assert patterns.first(miss) is None


@line("QT24")
def test_a_look_ahead_that_stalls_is_unsafe() -> None:
    patterns = Patterns.match([r"^(a*)(a*)(a*)(a*)(a*)\1\2[bd]$"], where="ignore")
    error = refusal(lambda: patterns.first("a" * 200 + "c"))
    assert error.kind == "unsafe"
    assert "PATTERN_SECONDS" in error.wanted


@line("QT25")
def test_a_broken_pattern_is_named() -> None:
    error = refusal(lambda: Patterns.match(["ok", "["], where="config.json: ignore"))
    assert error.kind == "damaged"
    assert "'['" in error.found


@line("QT25")
def test_too_many_or_too_long_patterns_are_refused() -> None:
    with pytest.raises(LimitExceeded, match="too many patterns"):
        Patterns.fnmatch((f"name{n}" for n in range(limits.MAX_PATTERNS + 1)), where="ignore")
    with pytest.raises(LimitExceeded, match="too long"):
        Patterns.match(["a" * (limits.MAX_PATTERN_CHARS + 1)], where="ignore")


@line("QT25")
def test_a_hundred_thousand_names_against_three_hundred_thousand_layers() -> None:
    start = time.process_time()
    patterns = Patterns.fnmatch((f"model.layers.{n}" for n in range(limits.MAX_PATTERNS)), where="ignore")
    assert sum(patterns.first(f"model.layers.{n}") is not None for n in range(300_000)) == limits.MAX_PATTERNS
    assert time.process_time() - start < 5.0


# --- beyond the lines ------------------------------------------------------------------------------------------------


def outcome(path: Path, content: bytes, wanted: dict[str, Any]) -> None:
    path.write_bytes(content)
    try:
        tensors = read_header(path).tensors
    except AnybitError:
        return
    for info in tensors.values():
        assert info.offset + info.nbytes <= len(content)
    assert sum(info.nbytes for info in tensors.values()) == sum(info.nbytes for info in wanted.values())


def test_every_cut_and_every_flipped_header_byte_gives_our_error_or_sound_spans(tmp_path: Path) -> None:
    raw = file_of({"a.weight": ("F32", [2, 3], floats(6)), "b": ("U8", [], b"\7")}, {"format": "pt"})
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    wanted = read_header(path).tensors
    header = 8 + int.from_bytes(raw[:8], "little")
    for position in range(len(raw)):
        with pytest.raises(AnybitError):
            path.write_bytes(raw[:position])
            read_header(path)
    for position in range(header):
        for mask in (0xFF, 0x01, 0x80):
            flipped = bytearray(raw)
            flipped[position] ^= mask
            outcome(path, bytes(flipped), wanted)


SMALL = [*genuine("gptq-w2-*", "ct-llama-nvfp4", "awq-gemm-llama")][:2]


@pytest.mark.parametrize("name", SMALL)
def test_a_genuine_folder_with_a_flipped_config_byte_gives_our_error_or_opens(name: str, tmp_path: Path) -> None:
    """Every 7th byte: 1 s a folder."""
    for file in (CHECKPOINTS / name).glob("*"):
        target = tmp_path / file.name
        target.write_bytes(file.read_bytes())
    raw = (tmp_path / "config.json").read_bytes()
    for position in range(0, len(raw), 7):
        flipped = bytearray(raw)
        flipped[position] ^= 0x04
        (tmp_path / "config.json").write_bytes(bytes(flipped))
        try:
            assert isinstance(anybit.open(tmp_path), Checkpoint)
        except AnybitError as error:
            assert error.problem


def test_a_refusal_imports_no_torch_and_takes_little_memory(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "m", {"model.safetensors": struct.pack("<Q", 2**40) + b"{}"})
    code = (
        "import json, resource, sys, anybit\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try: anybit.open(sys.argv[1])\n"
        "except anybit.AnybitError as e: print(json.dumps([e.kind, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert json.loads(done.stdout) == ["damaged", False]


# Lines that are tested where the code is: id -> file below tests, a test in it
ELSEWHERE = {
    "QT07": ("checkpoints/test_compressed_tensors.py", "test_trap_14_exponent_byte_255_is_refused"),
    "QT10": ("checkpoints/test_fp8.py", "test_a_scale_off_the_grid_is_refused"),
    "QT11": ("checkpoints/test_compressed_tensors.py", "test_trap_7_a_code_beyond_its_bits_is_refused"),
    "QT14": ("checkpoints/test_gptq.py", "test_an_all_zero_g_idx_of_several_groups_was_never_written"),
    "QT18": ("checkpoints/test_fp8.py", "test_trap_5_fused_layers_keep_their_own_scales"),
}
TABLES = ("ST", "FO", "CF", "QT")


def ids_in(text: str) -> set[str]:
    return set(re.findall(rf'"((?:{"|".join(TABLES)})\d\d)"', text))


def test_the_lines_said_to_be_tested_elsewhere_are() -> None:
    for file, test in ELSEWHERE.values():
        assert f"def {test}(" in (TESTS / file).read_text()


@needs_shared
def test_every_line_of_its_tables_has_a_test() -> None:
    assert SHARED is not None
    table = (SHARED / "bad_inputs.md").read_text()
    wanted = set(re.findall(rf"^\| ((?:{'|'.join(TABLES)})\d\d) ", table, re.MULTILINE))
    tested = set().union(*(ids_in(file.read_text()) for file in TESTS.rglob("test_*.py") if file != Path(__file__)))
    tested |= LINES | {case[0] for cases in (FILES, SOUND, FOLDERS, ODD, CONFIGS, CODE) for case in cases}
    assert wanted - tested - ELSEWHERE.keys() == set()
    assert not ELSEWHERE.keys() & tested, "tested here as well: the entry is no longer needed"
