"""Documents say what is: their Python blocks run, their links lead somewhere, their commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from anybit.cli.main import COMMANDS
from conftest import needs_smollm2

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def blocks(page: Path, language: str) -> list[str]:
    return [text for word, text in BLOCK.findall(page.read_text()) if word == language]


@needs_smollm2
@pytest.mark.slow
def test_the_python_blocks_of_the_readme_run() -> None:
    for block in blocks(ROOT / "README.md", "python"):
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [p for p in PAGES if "formats" not in p.parts], ids=lambda p: p.name)
def test_no_block_is_left_without_a_language(page: Path) -> None:
    assert not blocks(page, "") or page.name == "design.md"  # its drawing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", BLOCK.sub("", page.read_text())):
        assert (page.parent / target).exists(), target


def test_the_commands_of_the_readme_exist() -> None:
    known = {name for name, _ in COMMANDS}
    text = (ROOT / "README.md").read_text()
    used = {found for block in blocks(ROOT / "README.md", "text") for found in re.findall(r"^anybit (\w+)", block, re.M)}
    assert used and used <= known
    assert text.count("\n") <= 160
    make = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", text):
        assert f"\n{target}:" in make


def test_the_first_block_of_the_readme_is_the_two_commands() -> None:
    first = blocks(ROOT / "README.md", "text")[0]
    assert [line.split("#")[0].strip() for line in first.strip().splitlines()] == ["make run", "make test"]
