"""A folder's contents: which files are read, and what a dialect gets to see."""

from __future__ import annotations

from pathlib import Path

import pytest

from anybit.checkpoints.folder import read_folder
from anybit.errors import Damaged
from checkpoints.writing import file_of, floats, folder_of, index_of, matrix

INDEX = "model.safetensors.index.json"


def test_one_file_of_any_name_is_the_model(tmp_path: Path) -> None:
    """AutoGPTQ wrote gptq_model-4bit-128g.safetensors."""
    found = read_folder(folder_of(tmp_path, {"gptq_model-4bit-128g.safetensors": matrix("x.weight")}))
    assert list(found.contents.tensors) == ["x.weight"]
    assert found.remarks == ()


def test_shards_without_an_index_are_all_read(tmp_path: Path) -> None:
    files = {f"model-{n}.safetensors": matrix(f"x{n}.weight") for n in range(3)}
    assert sorted(read_folder(folder_of(tmp_path, files)).contents.tensors) == ["x0.weight", "x1.weight", "x2.weight"]


def test_the_index_decides_between_two_files(tmp_path: Path) -> None:
    files = {"a.safetensors": matrix("x"), "b.safetensors": matrix("x", "y")}
    index = index_of({"x": "b.safetensors", "y": "b.safetensors"}, total_size=48)
    found = read_folder(folder_of(tmp_path, {**files, INDEX: index}))
    assert found.contents.tensors["x"].file.name == "b.safetensors"
    assert found.remarks == ("a.safetensors is not read: the index does not name it",)


def test_metadata_of_all_shards_is_merged(tmp_path: Path) -> None:
    files = {f"{n}.safetensors": file_of({n: ("F32", [1], floats(1))}, {n: "1"}) for n in "ab"}
    assert read_folder(folder_of(tmp_path, files)).contents.metadata == {"a": "1", "b": "1"}


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_side_files_are_parsed(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"m.safetensors": matrix("x"), name: {"bits": 4}})
    assert read_folder(folder).contents.side == {name: {"bits": 4}}


def test_stamps_are_those_of_the_shards(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"m.safetensors": matrix("x")})
    stamps = read_folder(folder).stamps
    assert list(stamps) == [folder / "m.safetensors"]
    assert stamps[folder / "m.safetensors"][2] == (folder / "m.safetensors").stat().st_size


def test_sizes_that_are_lists_belong_to_the_architecture(tmp_path: Path) -> None:
    config = {"num_key_value_heads": [1, 2], "intermediate_size": [8, 16]}
    found = read_folder(folder_of(tmp_path, {"m.safetensors": matrix("x")}, config))
    assert found.contents.config["vocab_size"] == 8


def test_a_file_in_place_of_a_folder_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(Damaged):
        read_folder(tmp_path / "x")
