"""The command line refuses every kind of broken checkpoint: exit code 2, what and where on stderr, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anybit.cli import main
from checkpoints.broken import BROKEN
from checkpoints.writing import folder_of, matrix
from cli.tiny_model import write_tiny_llama

SEEN_BY_OPEN = [name for name, case in BROKEN.items() if case.is_seen_by_open]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "COLUMNS": "400"}


def anybit(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user types it."""
    command = [sys.executable, "-P", "-m", "anybit", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=cwd, timeout=60)


def with_tokenizer(folder: Path) -> str:
    """The folder, with what `run` asks for before it loads anything."""
    donor = write_tiny_llama(folder.parent / "donor")
    for file in donor.glob("*token*"):
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return str(folder)


@pytest.mark.parametrize("name", SEEN_BY_OPEN)
@pytest.mark.parametrize("command", ["inspect", "explain"])
def test_commands_that_read_headers_refuse_it(
    command: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    case = BROKEN[name]
    assert main.main([command, str(case.make(tmp_path / "m"))]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert case.words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", BROKEN)
def test_run_refuses_it(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    case = BROKEN[name]
    assert main.main(["run", with_tokenizer(case.make(tmp_path / "m")), "hello", "--device", "cpu"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert case.words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("command", "name"), [
    ("inspect", "a missing scale in one layer"), ("inspect", "an index that leaves the folder"), ("run", "a NaN scale"),
])  # fmt: skip
def test_the_process_itself_ends_with_2(command: str, name: str, tmp_path: Path) -> None:
    case = BROKEN[name]
    folder = with_tokenizer(case.make(tmp_path / "m"))
    done = anybit(command, folder, *(["hello", "--device", "cpu"] if command == "run" else []), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert case.words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", SEEN_BY_OPEN)
def test_a_refusal_is_data_for_programs(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = BROKEN[name]
    assert main.main(["inspect", str(case.make(tmp_path / "m")), "--json"]) == 2
    out, err = capfd.readouterr()
    told = json.loads(out or err)
    assert case.kind in json.dumps(told)


@pytest.mark.parametrize("path", ["no such", "", "/dev/null", "gone/model.gguf", "-", "a\nb"])
def test_a_path_that_is_no_checkpoint_is_refused(
    path: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["inspect", "--", path]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_a_name_full_of_controls_reaches_the_terminal_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b]8;;http://x\x07\u202e.weight_packed"
    folder = folder_of(tmp_path / "m", {"model.safetensors": matrix(name)})
    assert main.main(["inspect", str(folder)]) == 2
    _, err = capfd.readouterr()
    assert not set(err) & {"\x1b", "\x07", "\u202e"}
    assert "\\x1b" in err
