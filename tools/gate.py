"""Compile every Triton kernel for every architecture that it claims; check and record what came out.

    python tools/gate.py                 compile what changed since the record, all architectures; write the record
    python tools/gate.py --all           compile everything
    python tools/gate.py --arch gfx942   only these (repeatable); --kernel NAME likewise
    python tools/gate.py --check         no compiling: is the record of every case current and clean?

A case is clean if it compiles, spills no more registers than it allows, needs no more shared memory than the
architecture has, and its assembly holds the matrix instructions that it expects. No GPU is needed. Each compile runs
in a worker process with a time limit: a failed assertion of a compiler pass ends the process.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src"
RECORD = ROOT / "tests" / "kernels" / "compiled.json"
TIMEOUT_SECONDS = 240
# what a compiled kernel multiplies with, in the assembly of each vendor
MATRIX_INSTRUCTIONS = {
    "amd": re.compile(r"\b(v_(?:mfma|smfmac|wmma|swmmac)_\w+)"),
    "nvidia": re.compile(r"\b((?:wgmma\.mma_async|mma|tcgen05\.mma)\.[\w.:]+)"),
}

for folder in (SOURCES, ROOT / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from support_matrix import entries  # noqa: E402

from anybit.kernels.catalogue import KERNELS  # noqa: E402
from anybit.kernels.compiling import CompileCase  # noqa: E402
from anybit.kernels.request import REGIMES, KernelSpec, Request  # noqa: E402
from anybit.kernels.triton import block_launch  # noqa: E402
from anybit.platforms import ARCHS, PLATFORMS, Platform  # noqa: E402
from anybit.schemes import Scheme  # noqa: E402

Row = dict[str, Any]
BESIDE = ((block_launch.NAME, block_launch.compile_cases),)  # kernels that are no products: no plan chooses them


def all_cases(archs: Iterable[str] = (), kernels: Iterable[str] = ()) -> list[CompileCase]:
    """Every case of every kernel, of these architectures and kernels only where any are named."""
    archs, kernels = set(archs), set(kernels)
    sources = [*((spec.name, spec.cases) for spec in KERNELS), *BESIDE]
    return [
        case
        for name, cases in sources
        if not kernels or name in kernels
        for arch in ARCHS
        if not archs or arch in archs
        for case in cases(arch)
    ]


def name_of(case: CompileCase) -> str:
    """The case's key in the record."""
    return f"{case.kernel} | {case.arch} | {case.label}"


def source_hash(case: CompileCase) -> str:
    """Digest of all that decides the compiled code: the function's module, its own imports, the case's settings."""
    texts = _texts(case.function.partition(":")[0])
    settings = json.dumps(asdict(case), sort_keys=True, default=str)
    return hashlib.sha256("\0".join([*texts, settings]).encode()).hexdigest()[:16]


@cache
def _texts(module: str) -> tuple[str, ...]:
    return tuple(path.read_text() for path in sorted(_closure(module)))


def _closure(module: str) -> set[Path]:
    """Files of `module` and of the Triton modules that it imports, and they import."""
    seen: set[Path] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = SOURCES / (name.replace(".", "/") + ".py")
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("anybit.kernels.triton"):
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return seen


def faults(case: CompileCase, row: Row) -> list[str]:
    """What is wrong with a compiled case, in words; empty if it is clean."""
    if row.get("error"):
        return [str(row["error"])]
    found = []
    if row["spills"] > case.spills:
        found.append(f"{row['spills']} registers spilled, {case.spills} allowed")
    available = ARCHS[case.arch].shared_bytes
    if row["shared_bytes"] > available:
        found.append(f"{row['shared_bytes']} bytes of shared memory, {case.arch} has {available}")
    present = " ".join(row["instructions"])
    found += [f"no {wanted} in the assembly, but {present or 'no matrix instruction'}"
              for wanted in case.expects if not re.search(wanted, present)]
    return found


# ------------------------------------------------------------------------------------------------------- the worker
def compile_case(case: CompileCase) -> Row:
    """Compile in this process; the row without its hash."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    vendor = ARCHS[case.arch].vendor
    if vendor == "amd":
        target = GPUTarget("hip", case.arch, ARCHS[case.arch].wave)
    else:
        target = GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32)
    module, _, function = case.function.partition(":")
    kernel = getattr(importlib.import_module(module), function)
    names = kernel.arg_names
    constants = {n: _constant(v) for n, v in case.constants.items()}
    signature = {n: "constexpr" if n in constants else case.types[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n not in constants and (case.types[n].startswith("*") or n in case.divisible)
    }
    source_of: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source_of
    source = source_of(kernel, signature, constexprs={(names.index(n),): v for n, v in constants.items()},
                       attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(source, target=target, options=options)
    text = compiled.asm["amdgcn" if vendor == "amd" else "ptx"]
    count = Counter(MATRIX_INSTRUCTIONS[vendor].findall(text))
    registers, spills = _amd_registers(text) if vendor == "amd" else _nvidia_registers(compiled.asm["cubin"])
    return {
        "triton": triton.__version__,
        "registers": registers,
        "spills": spills,
        "shared_bytes": compiled.metadata.shared,
        "instructions": dict(sorted(count.items())),
    }


def _constant(value: Any) -> Any:
    """A constexpr; "tl.bfloat16" and the like stand for Triton's own types."""
    if isinstance(value, str) and value.startswith("tl."):
        import triton.language

        return getattr(triton.language, value.removeprefix("tl."))
    return value


def _amd_registers(text: str) -> tuple[int, int]:
    def largest(field: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{field}:\s+(\d+)", text)), default=0)

    return largest("vgpr_count"), largest("vgpr_spill_count")


def _nvidia_registers(cubin: bytes) -> tuple[int, int]:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers = max((int(n) for n in re.findall(r"REG:(\d+)", done.stdout)), default=0)
    stack = max((int(n) for n in re.findall(r"STACK:(\d+)", done.stdout)), default=0)
    return registers, -(-stack // 4)


def worker() -> int:
    """Read cases as JSON lines, answer a row for each."""
    for line in sys.stdin:
        case = CompileCase(**json.loads(line))
        try:
            row = compile_case(case)
        except Exception as error:  # a compiler's own exceptions have no common base
            lines = str(error).strip().splitlines() or [""]
            row = {"error": f"{type(error).__name__}: {lines[-1]}"}
        print("ROW " + json.dumps(row), flush=True)
    return 0


# ------------------------------------------------------------------------------------------------------- the driver
def compile_all(cases: Sequence[CompileCase], jobs: int = 1) -> Iterator[tuple[CompileCase, Row]]:
    """Compile in `jobs` worker processes at a time, a new one after each that died or hung; in no fixed order."""
    waiting: SimpleQueue[CompileCase] = SimpleQueue()
    done: SimpleQueue[tuple[CompileCase, Row]] = SimpleQueue()
    for case in cases:
        waiting.put(case)
    for _ in range(max(1, min(jobs, len(cases)))):
        threading.Thread(target=_keep_working, args=(waiting, done), daemon=True).start()
    for _ in cases:
        yield done.get()


def _keep_working(waiting: SimpleQueue[CompileCase], done: SimpleQueue[tuple[CompileCase, Row]]) -> None:
    while not waiting.empty():
        for case, row in _one_worker(_taken(waiting)):
            done.put((case, row))


def _taken(waiting: SimpleQueue[CompileCase]) -> Iterator[CompileCase]:
    while True:
        try:
            yield waiting.get_nowait()
        except Empty:
            return


def _one_worker(cases: Iterable[CompileCase]) -> Iterator[tuple[CompileCase, Row]]:
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as remarks:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1",
                       "PYTHONPATH": str(SOURCES), "TRITON_DEFAULT_FP_FUSION": "1"}
        command = [sys.executable, __file__, "--worker"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=remarks, text=True,
                              env=environment) as process:
            for case in cases:
                line = _ask(process, json.dumps(asdict(case), default=str))
                if line is None:
                    process.kill()
                    yield case, {"error": _last_words(remarks)}
                    return
                yield case, json.loads(line)


def _last_words(remarks: Any) -> str:
    """Why a worker ended, from what it wrote to stderr."""
    remarks.seek(0)
    told = [line.strip() for line in remarks if re.search(r"ssert|rror|LLVM", line)]
    return f"the compiler died or took over {TIMEOUT_SECONDS} s: {(told or ['no message'])[-1][:200]}"


def _ask(process: subprocess.Popen[str], line: str) -> str | None:
    import selectors

    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while ready.select(TIMEOUT_SECONDS):
            answer = process.stdout.readline()
            if answer == "":
                return None
            if answer.startswith("ROW "):
                return answer[4:]
    return None


def read_record() -> dict[str, Row]:
    """The committed record; empty if there is none."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def write_record(record: dict[str, Row]) -> None:
    """One line a case, sorted, so that a change reads as a diff."""
    lines = [f"{json.dumps(name)}: {json.dumps(record[name], sort_keys=True)}" for name in sorted(record)]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def stale(cases: Iterable[CompileCase], record: dict[str, Row]) -> list[CompileCase]:
    """Cases whose code or settings are not those of the record."""
    return [case for case in cases if record.get(name_of(case), {}).get("hash") != source_hash(case)]


def unclaimed() -> list[str]:
    """Claims that nothing compiled stands for.

    A kernel that runs any recorded scheme on an architecture names a case to compile there, and one that runs it
    natively names a case that expects a matrix instruction.
    """
    found: dict[str, None] = {}
    for spec in KERNELS:
        module = spec.implementation.partition(":")[0]
        if not (SOURCES / (module.replace(".", "/") + ".py")).read_text().count("anybit.kernels.triton"):
            continue
        for platform in PLATFORMS.values():
            if platform.vendor == "cpu":
                continue
            cases = spec.cases(platform.arch) or _cases_beside(spec, platform.arch)
            if any(case.expects for case in cases):
                continue
            for scheme, execution in _claims(spec, platform):
                what = f"{spec.name} claims {platform.arch}"
                if not cases:
                    found[f"{what} ({scheme}) but names no case to compile"] = None
                    break
                if execution == "native":
                    found[f"{what} natively ({scheme}) but no case expects a matrix instruction"] = None
                    break
    return sorted(found)


def _cases_beside(spec: KernelSpec, arch: str) -> list[CompileCase]:
    """For a library's product, which compiles nothing itself: the cases of the Triton kernels that it runs among."""
    if any(spec.cases(known) for known in ARCHS):
        return []
    return [case for other in KERNELS if other.implementation == spec.implementation for case in other.cases(arch)]


def _claims(spec: KernelSpec, platform: Platform) -> Iterator[tuple[Scheme, str]]:
    """The recorded schemes that a kernel says it runs, and how."""
    for entry in entries():
        for regime in REGIMES:
            request = Request(entry.kind, entry.scheme, entry.shape, "bfloat16", regime)
            if spec.can_implement(request, platform).ok:
                yield entry.scheme, spec.executes(request, platform)


def check(cases: list[CompileCase], record: dict[str, Row]) -> list[str]:
    """What is wrong with the record: stale, missing, unclean or left-over cases, claims without a case."""
    wrong = [f"{name_of(case)}: changed since it was compiled; run `make gate`" for case in stale(cases, record)]
    wrong += [f"{name_of(case)}: {fault}" for case in cases if name_of(case) in record
              for fault in faults(case, record[name_of(case)])]
    return wrong + unclaimed()


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 clean, 1 a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="compile everything, changed or not")
    parser.add_argument("--check", action="store_true", help="compile nothing: is the record current and clean?")
    parser.add_argument("--arch", action="append", default=[], choices=list(ARCHS))
    parser.add_argument("--kernel", action="append", default=[])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return worker()
    cases = all_cases(options.arch, options.kernel)
    record = read_record()
    if options.check:
        wrong = check(cases, record)
        print("\n".join(wrong) if wrong else f"{len(cases)} cases compiled, current and clean")
        return 1 if wrong else 0
    due = cases if options.all else stale(cases, record)
    print(f"{len(cases)} cases, {len(due)} to compile", flush=True)
    failed = 0
    for case, row in compile_all(due, options.jobs):
        found = faults(case, row)
        failed += bool(found)
        record[name_of(case)] = {"hash": source_hash(case), **row}
        print(f"{'FAIL' if found else 'ok':4} {name_of(case)}  "
              + ("; ".join(found) or f"{row['registers']} registers, {row['shared_bytes']} B shared"), flush=True)
    if not options.arch and not options.kernel:
        known = {name_of(case) for case in cases}
        record = {name: row for name, row in record.items() if name in known}
    write_record(record)
    wrong = unclaimed()
    print("\n".join([*wrong, f"{len(due) - failed} clean, {failed} failed"]))
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
