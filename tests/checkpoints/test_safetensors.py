"""The safetensors container: what a sound file gives, whoever wrote it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anybit.checkpoints.safetensors import read_header, read_tensor
from checkpoints.writing import entry, file_of, floats, framed
from conftest import CHECKPOINTS


def genuine_files() -> list[Path]:
    return sorted(CHECKPOINTS.glob("*/*.safetensors"))


@pytest.mark.parametrize("file", genuine_files(), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_genuine_tensor_reads_as_the_genuine_library_reads_it(file: Path) -> None:
    wanted = load_file(file)
    header = read_header(file)
    assert header.tensors.keys() == wanted.keys()
    for name, info in header.tensors.items():
        assert info.shape == tuple(wanted[name].shape)
        assert info.nbytes == wanted[name].nbytes
        got = read_tensor(info)
        assert got.shape == wanted[name].shape
        assert got.contiguous().view(-1).view(torch.uint8).equal(wanted[name].contiguous().view(-1).view(torch.uint8))


DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_the_library_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.arange(48, dtype=torch.uint8)
    tensor = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
    save_file({"t": tensor.reshape(2, -1)}, tmp_path / "t.safetensors")
    got = read_tensor(read_header(tmp_path / "t.safetensors").tensors["t"])
    assert got.dtype == dtype
    assert got.view(torch.uint8).equal(tensor.reshape(2, -1).view(torch.uint8))


def test_metadata_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(file_of({}, {"format": "pt"}))
    assert read_header(tmp_path / "a.safetensors").metadata == {"format": "pt"}


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])  # written 80 02, 80 03 ...: as pickles begin
def test_a_header_whose_length_looks_like_a_pickle_is_read(length: int, tmp_path: Path) -> None:
    header = '{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(framed(header.ljust(length), floats(2)))
    assert read_tensor(read_header(path).tensors["t"]).tolist() == [0.0, 1.0]


def test_a_tensor_is_a_buffer_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of({"t": ("F32", [2], floats(2))}))
    info = read_header(path).tensors["t"]
    first = read_tensor(info)
    first[0] = 7
    assert read_tensor(info).tolist() == [0.0, 1.0]


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(framed(f'{{"t":{entry("F32", [1], 0, 4)}}}'.replace("'", '"'), floats(1)))
    code = (
        "import sys; from pathlib import Path; from anybit.checkpoints.safetensors import read_header;"
        "read_header(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
