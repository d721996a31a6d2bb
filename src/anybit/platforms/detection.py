"""The machine at hand as a Platform, without torch: files of the system and vendors' own small tools.

Where there is no GPU nothing here takes more than two seconds. Where its driver is loaded, a slow tool is waited for:
on a busy server nvidia-smi takes seconds, and a GPU that is not seen would be replaced by the CPU silently.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform as host
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Final

from anybit.errors import DeviceProblem
from anybit.platforms.archs import ARCHS
from anybit.platforms.platform import Platform
from anybit.platforms.table import OF_ARCH, PLATFORMS
from anybit.platforms.table import features as features_of

_TIMEOUT: Final = 2.0
_PATIENCE: Final = 30.0  # where the device files of the driver are there
_NVIDIA_FILES: Final = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
_KFD: Final = Path("/sys/class/kfd/kfd/topology/nodes")
# what a kernel may ask for, as Linux spells it in /proc/cpuinfo
_CPU_FLAGS: Final = frozenset(
    {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_vbmi", "amx_tile",
     "amx_int8", "amx_bf16", "avx_vnni", "asimd", "sve", "bf16", "i8mm"}
)
_PYTHON_PROVIDERS: Final = ("torch", "triton", "aiter", "humming")
# import name -> (distribution, from this version, before that one): what its adapter is written for
_VERSIONS: Final = {"humming": ("humming-kernels", (0, 1, 19), (0, 2))}


def detect(device: str = "auto") -> Platform:
    """The platform at hand: "cpu", "cuda" (NVIDIA or AMD), or "auto" (a GPU where there is one).

    Raises DeviceProblem if a GPU is asked for and none answers.
    """
    if device.startswith("cpu"):
        return _cpu()
    gpu = _nvidia(_index(device)) or _amd(_index(device))
    if gpu is not None:
        return gpu
    if device == "auto":
        return _cpu()
    raise DeviceProblem(
        f"no GPU answers to {device!r}",
        found="neither nvidia-smi nor the AMD kernel driver lists a device",
        wanted="an NVIDIA or AMD GPU with its driver",
        remedy="--device cpu, or `anybit doctor`",
    )


def _index(device: str) -> int:
    _, _, number = device.partition(":")
    return int(number) if number.isdigit() else 0


def _is_known(name: str) -> bool:
    """False for a package of another version than the one whose interface and arithmetic we know."""
    if name not in _VERSIONS:
        return True
    distribution, first, beyond = _VERSIONS[name]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return first <= tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < beyond


def _providers() -> frozenset[str]:
    found = {name for name in _PYTHON_PROVIDERS if importlib.util.find_spec(name) is not None and _is_known(name)}
    folder = Path(__file__).resolve().parent.parent / "kernels" / "native"
    spec = importlib.util.find_spec("anybit.kernels")
    folders = [folder, *(Path(p) / "native" for p in (spec.submodule_search_locations if spec else None) or [])]
    library = any(f.suffix in (".so", ".dylib", ".dll") for place in folders if place.is_dir() for f in place.iterdir())
    if library and os.environ.get("ANYBIT_NATIVE", "1") != "0":
        found.add("native")
    return frozenset(found)


def _cpu() -> Platform:
    flags, model = _cpuinfo()
    features = frozenset(flags & _CPU_FLAGS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    basis = _nearest_cpu(host.machine(), features)
    share = cores / basis.cores
    return Platform(
        name=model or "cpu",
        vendor="cpu",
        arch=host.machine(),
        features=features,
        providers=_providers(),
        memory_bytes=_memory_bytes(),
        bandwidth=basis.bandwidth * min(1.0, max(share, 0.25)),
        rates={k: v * share for k, v in basis.rates.items()},
        cores=cores,
        sources={"bandwidth": "modelled from the number of cores", "rates": "modelled from the number of cores"},
        is_detected=True,
    )


def _nearest_cpu(arch: str, features: frozenset[str]) -> Platform:
    """The described CPU of this arch with the most features that the one at hand has, and none that it lacks."""
    rows = [p for p in PLATFORMS.values() if p.vendor == "cpu" and p.arch == arch]
    able = [p for p in rows if p.features - {"neon"} <= features]
    return max(able or rows or [PLATFORMS["cpu"]], key=lambda p: len(p.features) if able else -len(p.features))


def _cpuinfo() -> tuple[set[str], str]:
    flags: set[str] = set()
    model = ""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return flags, host.processor()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
        elif key.strip() == "model name" and not model:
            model = value.strip()
    return flags, model


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _nvidia(index: int) -> Platform | None:
    tool = shutil.which("nvidia-smi")
    if tool is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    query = [tool, "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits"]
    timeout = _PATIENCE if any(path.exists() for path in _NVIDIA_FILES) else _TIMEOUT
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=timeout, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    index = _physical(index, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if index >= len(rows) or len(rows[index]) != 4:
        return None
    name, capability, mebibytes, driver = (word.strip() for word in rows[index])
    arch = "sm_" + capability.replace(".", "")
    memory = int(mebibytes) * 2**20 if mebibytes.isdigit() else 0  # "[N/A]" where the memory is the host's (GB10)
    return _from_table(name, "nvidia", arch, memory, driver)


def _physical(index: int, visible: str) -> int:
    """The device that a process sees under `index`, where a list of numbers says which it sees."""
    numbers = [word.strip() for word in visible.split(",") if word.strip()]
    is_list = bool(numbers) and all(word.isdigit() for word in numbers)
    return int(numbers[index]) if is_list and index < len(numbers) else index


def _amd(index: int) -> Platform | None:
    """AMD's kernel driver describes each node in files: gfx_target_version 90402 is gfx942."""
    found = []
    for node in sorted(_KFD.glob("*/properties"), key=lambda p: p.parent.name.zfill(4)):
        version = _properties(node).get("gfx_target_version", 0)
        if version:
            major, minor, step = version // 10000, version // 100 % 100, version % 100
            found.append((f"gfx{major}{minor:x}{step:x}", node.parent))
    index = _physical(index, os.environ.get("HIP_VISIBLE_DEVICES", ""))
    if index >= len(found):
        return None
    arch, folder = found[index]
    banks = (_properties(bank).get("size_in_bytes", 0) for bank in folder.glob("mem_banks/*/properties"))
    driver = _first_line(Path("/sys/module/amdgpu/version"))
    return _from_table(f"AMD {arch}", "amd", arch, max(banks, default=0), driver)


def _properties(file: Path) -> dict[str, int]:
    """Lines `name number` of a file of the AMD driver; what a container may not read has none."""
    try:
        words = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in words if len(row) == 2 and row[1].isdigit()}


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip().split("\n")[0]
    except OSError:
        return ""


def _from_table(name: str, vendor: str, arch: str, memory_bytes: int, driver: str) -> Platform:
    """The detected device with the figures of the described one that it is: by name, else by arch and memory."""
    same_arch = [p for p in PLATFORMS.values() if p.vendor == vendor and p.arch == arch]
    plain = name.lower().replace(" ", "").replace("-", "")
    named_so = [p for p in same_arch if p.name.replace("-", "") in plain]
    if named_so:
        described = max(named_so, key=lambda p: len(p.name))
    elif same_arch:
        usual = OF_ARCH.get(arch)
        described = min(same_arch, key=lambda p: (abs(p.memory_bytes - memory_bytes) if memory_bytes else 0,
                                                  p.name != usual))
    else:
        known = features_of(arch) if arch in ARCHS else frozenset()
        described = Platform(arch, "nvidia" if vendor == "nvidia" else "amd", arch, known)
    return replace(
        described, name=name, memory_bytes=memory_bytes or described.memory_bytes, providers=_providers(),
        is_detected=True, driver=driver,
    )
