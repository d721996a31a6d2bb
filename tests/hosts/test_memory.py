"""The memory contract, small: benchmarks/memory.py does the same with more than a gigabyte."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["modelopt", "gptq"])
def test_loading_holds_what_the_plan_predicts_and_never_a_second_copy(dialect: str) -> None:
    command = [sys.executable, str(BENCHMARK), "--dialect", dialect, "--layers", "4", "--hidden", "2048"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr  # peak within the contract's bound
    difference = float(re.search(r"\(([+-][\d.]+)%\)", done.stdout)[1])  # type: ignore[index]
    assert abs(difference) <= 3.0, done.stdout
