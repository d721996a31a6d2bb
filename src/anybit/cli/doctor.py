"""`anybit doctor`: what this machine has for anybit, and the command that mends what is missing.

Nothing is imported into this process: versions come from package metadata, and torch is tried in a process of its own,
so a broken installation is a red line and not a crash.
"""

from __future__ import annotations

import importlib.util
import json as json_module
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Final, Literal

import typer

import anybit
from anybit.checkpoints.names import cache_folder, demo_file
from anybit.cli import options
from anybit.cli.output import EXIT_CHECK_FAILED, make_output, shown, size
from anybit.errors import AnybitError
from anybit.kernels import native
from anybit.platforms import detect

State = Literal["ok", "absent", "missing"]  # absent: something optional
_TORCH_SECONDS: Final = 60.0
_OLDEST_PYTHON: Final = (3, 11)

# package -> oldest version; all are needed
_NEEDED: Final = {
    "torch": "2.9",
    "transformers": "5.17",
    "tokenizers": "0.22",
    "safetensors": "0.6",
    "huggingface-hub": "1.0",
    "google-re2": "1.1",
    "regex": "2024.11.6",
    "typer": "0.16",
    "rich": "13.9",
}
# package -> (what it adds, how to get it)
_OPTIONAL: Final = {
    "triton": ("kernels for GPUs", "pip install 'anybit[gpu]' (Linux)"),
    "gguf": ("GGUF's IQ types", "pip install gguf"),
    "vllm": ("serving", "pip install 'anybit[vllm]'"),
    "humming-kernels": ("more GPU kernels", "pip install 'anybit[gpu]'"),
    "aiter": ("AMD's own kernels", "install AITER from its repository"),
    "lm-eval": ("benchmarks of answers", "pip install 'anybit[eval]'"),
}
_TRY_TORCH: Final = (
    "import json, torch; c = torch.cuda.is_available(); print(json.dumps({'version': torch.__version__, "
    "'cuda': torch.version.cuda, 'hip': torch.version.hip, 'gpus': [torch.cuda.get_device_name(i) for i in "
    "range(torch.cuda.device_count())] if c else [], 'threads': torch.get_num_threads()}))"
)


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, what was found, and the command that mends it."""

    name: str
    state: State
    found: str
    remedy: str = ""


def doctor(json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Is everything here: Python, torch, compiled kernels, GPU, demo model; and how to mend what is not.

    anybit doctor

    anybit doctor --json
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    checks = list(_checks())
    healthy = all(check.state != "missing" for check in checks)
    if json:
        output.document("doctor", {"anybit": anybit.__version__, "healthy": healthy,
                                   "checks": [asdict(check) for check in checks]})
    else:
        marks = {"ok": "ok", "absent": "-", "missing": "MISSING"}
        rows = [(marks[c.state], c.name, shown(c.found), f"do: {c.remedy}" if c.remedy else "") for c in checks]
        output.rows(rows, indent=0)
    if not healthy:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _checks() -> Iterator[Check]:
    yield _python()
    tried = _try_torch()
    for name, oldest in _NEEDED.items():
        yield _package(name, oldest)
    yield _torch(tried)
    yield _compiled()
    yield _compiler()
    yield _gpu(tried)
    for name, (adds, remedy) in _OPTIONAL.items():
        found = _version(name)
        yield Check(name, "ok" if found else "absent", found or f"not installed; adds {adds}", "" if found else remedy)
    yield _demo()
    yield _cache()


def _python() -> Check:
    is_old = sys.version_info < _OLDEST_PYTHON
    found = f"{platform.python_version()} on {platform.platform(terse=True)}"
    return Check("python", "missing" if is_old else "ok", found, "install Python 3.11 or later" if is_old else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        module = package.replace("-", "_")
        return "found, version unknown" if importlib.util.find_spec(module) is not None else ""


def _package(name: str, oldest: str) -> Check:
    found = _version(name)
    remedy = f"pip install '{name}>={oldest}'"
    if not found:
        return Check(name, "missing", "not installed", remedy)
    if _numbers(found) and _numbers(found) < _numbers(oldest):
        return Check(name, "missing", f"{found}, wanted {oldest} or later", remedy)
    return Check(name, "ok", found)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of "2.13.0+cpu"."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _try_torch() -> dict[str, Any] | str:
    """What torch says of itself, or why it could not be imported."""
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    command = [sys.executable, "-c", _TRY_TORCH]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TORCH_SECONDS, check=False)  # noqa: S603
        told: dict[str, Any] = json_module.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"no answer within {_TORCH_SECONDS:.0f} s"
    except (OSError, ValueError, IndexError):
        return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return told


def _torch(tried: dict[str, Any] | str) -> Check:
    if isinstance(tried, str):
        return Check("torch imports", "missing", tried, "pip install --force-reinstall torch")
    build = f"CUDA {tried['cuda']}" if tried["cuda"] else f"ROCm {tried['hip']}" if tried["hip"] else "CPU build"
    return Check("torch imports", "ok", f"{build}, {tried['threads']} threads")


def _compiled() -> Check:
    why = native.why_missing()
    if why:
        return Check("compiled kernels", "absent", f"{why}; torch does their work, slower",
                     "install a C compiler, then pip install --force-reinstall --no-deps anybit")
    return Check("compiled kernels", "ok", f"instruction set {native.isa()}")


def _compiler() -> Check:
    named = os.environ.get("CC")
    found = next((path for name in (named, "cc", "gcc", "clang") if name and (path := shutil.which(name))), None)
    if found is None:
        return Check("C compiler", "absent", "none; needed only to build the compiled kernels", "apt install gcc")
    return Check("C compiler", "ok", found)


def _gpu(tried: dict[str, Any] | str) -> Check:
    """The driver's view of the GPU, against torch's."""
    try:
        here = detect("cuda")
    except AnybitError:
        return Check("GPU", "absent", "no NVIDIA or AMD driver lists one; the CPU runs everything")
    names = [] if isinstance(tried, str) else tried["gpus"]
    found = f"{here.title}, {size(here.memory_bytes)}"
    if not names:
        index = "rocm6.4" if here.vendor == "amd" else "cu128"
        return Check("GPU", "missing", f"{found}, but torch cannot use it",
                     f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{index}")
    return Check("GPU", "ok", f"{found}, {len(names)} seen by torch")


def _demo() -> Check:
    found = demo_file()
    if found is None:
        return Check("demo model", "absent", "smollm2 is not here yet", "anybit run smollm2 \"Hello\" (fetches 93 MB)")
    return Check("demo model", "ok", f"{found.name}, {size(found.stat().st_size)}")


def _cache() -> Check:
    folder = cache_folder()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(place, os.W_OK):
        return Check("cache folder", "missing", f"{folder} cannot be written", "set ANYBIT_CACHE to a folder of yours")
    free = shutil.disk_usage(place).free
    return Check("cache folder", "ok", f"{folder}, {size(free)} free")
