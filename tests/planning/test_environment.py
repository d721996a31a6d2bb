"""docs/environment.md lists exactly the environment variables that the source reads or sets."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"get", "getenv", "setdefault", "pop"}


def names_in(tree: ast.Module) -> Iterator[str]:
    """Every key of os.environ and os.getenv in a module, through constants of the module and of overrides.py."""
    constants = {
        target.id: node.value.value
        for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    for node in ast.walk(tree):
        key = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            if ast.unparse(node.func.value) in ("os.environ", "environ", "os") and node.args:
                key = node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            key = node.slice
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            key = node.left
        if isinstance(key, ast.Constant):
            yield str(key.value)
        elif isinstance(key, ast.Name):
            yield constants.get(key.id, key.id)


def test_the_page_lists_exactly_the_variables_of_the_source() -> None:
    found = {name for path in (ROOT / "src").rglob("*.py") for name in names_in(ast.parse(path.read_text()))}
    found = {"ANYBIT_KERNEL" if name == "VARIABLE" else name for name in found}  # planning/overrides.py names it
    page = (ROOT / "docs" / "environment.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert "ANYBIT_KERNEL" in found
    assert found == listed


def test_the_compiled_library_reads_no_variable() -> None:
    folder = ROOT / "src" / "anybit" / "kernels" / "native"
    sources = [path.read_text() for path in folder.iterdir() if path.suffix in (".c", ".h")]
    assert sources
    assert not any("getenv" in text for text in sources)
