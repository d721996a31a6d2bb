"""Every numbered trap of docs/formats has a test, and every test that a table names is there.

The tables are `traps_a.py` and, for the other dialects, `traps_b.py`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FORMATS = TESTS.parent / "docs" / "formats"
TABLES = [file.stem for file in sorted(Path(__file__).parent.glob("traps_*.py"))]
TRAPS = {document: entry for table in TABLES for document, entry in importlib.import_module(f"checkpoints.{table}").TRAPS.items()}
_HEADING = re.compile(r"^## \d+\.? .*\btraps\b.*$", re.MULTILINE | re.IGNORECASE)


def numbered_traps(document: str) -> set[int]:
    """Numbers of the list under the document's heading on traps."""
    text = (FORMATS / f"{document}.md").read_text()
    found = _HEADING.search(text)
    assert found is not None, f"{document}.md has no section on traps"
    section = text[found.end() :].partition("\n## ")[0]
    return {int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)}


@pytest.mark.parametrize("document", TRAPS)
def test_every_trap_of_a_document_has_a_test(document: str) -> None:
    assert set(TRAPS[document][1]) == numbered_traps(document)


@pytest.mark.parametrize("document", TRAPS)
def test_every_test_that_the_table_names_exists(document: str) -> None:
    file, tests = TRAPS[document]
    places = [name.rpartition("::") for names in tests.values() for name in names]
    texts = {place: (TESTS / (place or file)).read_text() for place, _, _ in places}
    assert [name for place, _, name in places if f"def {name}(" not in texts[place]] == []
