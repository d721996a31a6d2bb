"""The support matrix: current, complete, and made of the choices that plans make."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_docs  # noqa: E402
import support_matrix  # noqa: E402
from support_matrix import COLUMNS, VLLM_NAMES, cells_by_dialect, chosen  # noqa: E402

from anybit.planning.choose import Choice  # noqa: E402


def test_the_plan_replay_is_current() -> None:
    recorded = (ROOT / "tests" / "planning" / "plan_replay.txt").read_text()
    assert support_matrix.replay() == recorded, "a choice changed: look at the difference that `make docs` writes"


def test_the_support_page_is_current() -> None:
    assert make_docs.support() == (ROOT / "docs" / "support.md").read_text(), "run `make docs`"


@pytest.mark.parametrize("column", COLUMNS)
def test_no_recorded_scheme_is_refused(column: str) -> None:
    at = list(COLUMNS).index(column)
    refused = [scheme for schemes in cells_by_dialect().values() for scheme, cells in schemes.items()
               if cells[at].execution == "refused"]
    assert refused == []


@pytest.mark.parametrize("name", VLLM_NAMES)
def test_every_name_of_vllm_stands_for_schemes_here(name: str) -> None:
    matrix = cells_by_dialect()
    assert VLLM_NAMES[name]
    assert all(matrix[dialect] for dialect in VLLM_NAMES[name])


def test_unquantized_layers_are_chosen_too() -> None:
    from anybit.schemes import dense

    for column in COLUMNS:
        assert isinstance(chosen("linear", dense("bfloat16"), (4096, 4096), column), Choice)
