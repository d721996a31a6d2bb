"""Make the virtual environment that the Makefile uses: the right build of torch, then anybit in editable form.

    python tools/setup_env.py .venv [extra ...]

torch comes in several builds. On a machine without a GPU the default one on Linux brings gigabytes of CUDA packages;
so pip is first asked what it would install (nothing is downloaded but metadata), and if that includes CUDA packages
and no NVIDIA GPU is here, PyTorch's own index of CPU builds is used. TORCH_INDEX overrides the choice, for example
with PyTorch's ROCm index on a machine with an AMD GPU. Only the standard library is used.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(folder: str, *extras: str) -> int:
    """Create or complete the environment in `folder`."""
    place = Path(folder)
    if not (place / "bin" / "python").exists():
        print(f"creating {place}", flush=True)
        venv.EnvBuilder(with_pip=True).create(place)
    python = str(place / "bin" / "python")
    if not has_torch(python):
        install_torch(python)
    wanted = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    print("installing anybit" + (f" with {', '.join(extras)}" if extras else ""), flush=True)
    return pip(python, "install", "-qq", "-c", str(CONSTRAINTS), "-e", wanted)


def has_torch(python: str) -> bool:
    """True if torch is in the environment already."""
    return subprocess.run([python, "-c", "import importlib.util as u; raise SystemExit(u.find_spec('torch') is None)"],
                          check=False).returncode == 0


def install_torch(python: str) -> None:
    """Install the build of torch that fits the machine."""
    pinned = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    index = os.environ.get("TORCH_INDEX", "")
    if not index and not has_nvidia() and brings_cuda(python, pinned):
        index = CPU_INDEX
    print(f"installing {pinned}" + (f" from {index}" if index else ""), flush=True)
    code = pip(python, "install", "-qq", pinned, *(["--index-url", index] if index else []))
    if code:
        raise SystemExit(code)


def has_nvidia() -> bool:
    """True if an NVIDIA GPU answers."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        return subprocess.run([tool, "-L"], capture_output=True, timeout=10, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def brings_cuda(python: str, pinned: str) -> bool:
    """True if the default index would install CUDA packages with torch."""
    asked = [python, "-m", "pip", "install", "--dry-run", "-qq", "--ignore-installed", "--report", "-", pinned]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        return False
    names = [entry["metadata"]["name"].lower() for entry in json.loads(done.stdout)["install"]]
    return any(name.startswith(("nvidia-", "cuda-")) for name in names)


def pip(python: str, *words: str) -> int:
    """Run pip; its exit code."""
    return subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *words], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
