"""The store of measurements: kept by device and versions, never trusted blindly, never a reason to fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from anybit.planning import measured
from anybit.planning.measured import Measured
from anybit.platforms import named

HERE = replace(named("cpu"), is_detected=True, driver="7")
CELL = ("native-matvec", "int4·g128·bf16", 4096, 14336, "float32", 1)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path))
    return tmp_path


def test_what_was_measured_is_read_again() -> None:
    measured.write(HERE, Measured({CELL: 1.5e-3}, {("torch-tiled", "nvfp4"): "3 times the bound"}))
    found = measured.read(HERE)
    assert found.seconds[CELL] == 1.5e-3
    assert found.disproved == {("torch-tiled", "nvfp4"): "3 times the bound"}
    assert found.prices("float32") == {("native-matvec", "int4·g128·bf16", 4096, 14336, 1): 1.5e-3}
    assert found.prices("bfloat16") == {}
    assert found.remarks == ()


def test_another_driver_has_a_file_of_its_own() -> None:
    measured.write(HERE, Measured({CELL: 1.5e-3}))
    assert CELL not in measured.read(replace(HERE, driver="8")).seconds


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 99}', "\x00\x01", '{"version": 1, "key": {}}'])
def test_a_file_that_cannot_be_used_is_ignored_and_said(text: str) -> None:
    path = measured.write(HERE, Measured({CELL: 1.5e-3}))
    path.write_text(text)
    found = measured.read(HERE)
    assert CELL not in found.seconds
    assert len(found.remarks) == 1
    assert str(path) in found.remarks[0]


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e9, float("nan"), "quick"])
def test_times_that_cannot_be_times_make_the_file_unusable(seconds: object) -> None:
    path = measured.write(HERE, Measured({CELL: 1.5e-3}))
    document = json.loads(path.read_text())
    document["cells"][0]["seconds"]["1"] = seconds
    path.write_text(json.dumps(document))
    found = measured.read(HERE)
    assert found.remarks
    assert CELL not in found.seconds


def test_a_file_of_another_machine_is_ignored_even_under_this_name() -> None:
    path = measured.write(HERE, Measured({CELL: 1.5e-3}))
    document = json.loads(path.read_text())
    document["key"]["device"] = "another"
    path.write_text(json.dumps(document))
    assert "another device" in measured.read(HERE).remarks[0]


def test_a_described_platform_has_no_file() -> None:
    assert not measured.path_of(named("mi300x")).exists()
    assert measured.read(named("mi300x")).disproved == {}


def test_nothing_half_written_is_left(store: Path) -> None:
    measured.write(HERE, Measured({CELL: 1.5e-3}))
    assert [p.suffix for p in (store / "measured").iterdir()] == [".json"]
