"""Decode and prefill speed of a GGUF model on this CPU, beside llama.cpp on the same file in the same run.

    python benchmarks/cpu_model.py [--model FILE.gguf] [--rounds 5] [--threads 2] [--dtype float32] [--json FILE]

Method: prefill is one forward of 512 tokens from an empty cache; decode is 64 single-token forwards after 16 tokens,
greedy, key-value cache kept; both engines in turn (A B A B ...), medians over the rounds. llama.cpp takes part when
the Python package llama-cpp-python is installed (here, or where the interpreter LLAMA_PYTHON names is). A shared
machine is noisy: compare within one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

PREFILL, PROMPT, DECODE = 512, 16, 64
GIVEN = dict(os.environ)  # llama.cpp's own threads are OpenMP's and want to spin
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does: docs/performance.md, "One thread pool"

LLAMA = r"""
import sys, time
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=1024, n_threads=int(sys.argv[2]), n_threads_batch=int(sys.argv[2]), verbose=False)
tokens = list(range(1000, 1512))
for line in sys.stdin:
    llm.reset(); start = time.perf_counter(); llm.eval(tokens); prefill = 512 / (time.perf_counter() - start)
    llm.reset(); llm.eval(tokens[:16]); start = time.perf_counter()
    for token in tokens[:64]:
        llm.eval([token])
    print(prefill, 64 / (time.perf_counter() - start), flush=True)
"""


class Llama:
    """llama.cpp in its own process, asked for one round at a time."""

    def __init__(self, python: str, file: Path, threads: int) -> None:
        command = [python, "-c", LLAMA, str(file), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=GIVEN)

    def round(self) -> tuple[float, float]:
        """(prefill, decode) in tokens a second."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        prefill, decode = self.process.stdout.readline().split()
        return float(prefill), float(decode)


def our_round(model: object) -> tuple[float, float]:
    """(prefill, decode) in tokens a second through the transformers model."""
    import torch

    tokens = torch.arange(1000, 1000 + PREFILL)[None]
    with torch.inference_mode():
        start = time.perf_counter()
        model(tokens, use_cache=True, logits_to_keep=1)  # type: ignore[operator]
        prefill = PREFILL / (time.perf_counter() - start)
        out = model(tokens[:, :PROMPT], use_cache=True, logits_to_keep=1)  # type: ignore[operator]
        cache = out.past_key_values
        start = time.perf_counter()
        for i in range(DECODE):
            token = tokens[:, i : i + 1]
            out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)  # type: ignore[operator]
            out.logits.argmax(-1)
        decode = DECODE / (time.perf_counter() - start)
    return prefill, decode


def find_llama(threads: int, file: Path) -> Llama | None:
    """llama.cpp, if an interpreter with llama-cpp-python is at hand."""
    for python in (os.environ.get("LLAMA_PYTHON", ""), sys.executable):
        probe = [python, "-c", "import llama_cpp"]
        if python and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return Llama(python, file, threads)
    return None


def main() -> int:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a GGUF file; the demo model without it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    import torch

    import anybit
    from anybit.hosts.meter import anonymous_bytes

    torch.set_num_threads(options.threads)
    checkpoint = anybit.open(options.model)
    model = anybit.load(checkpoint, dtype=options.dtype, device="cpu", quantization=options.quantization)
    llama = find_llama(options.threads, checkpoint.path)
    our_round(model)
    rows: dict[str, list[tuple[float, float]]] = {"anybit": [], "llama.cpp": []}
    if llama is not None:
        llama.round()
    for _ in range(options.rounds):
        rows["anybit"].append(our_round(model))
        if llama is not None:
            rows["llama.cpp"].append(llama.round())
    report(rows, options, anonymous_bytes(), torch.__version__)
    return 0


def report(rows: dict[str, list[tuple[float, float]]], options: argparse.Namespace, held: int, torch: str) -> None:
    """Medians, spreads and ratios on stdout; JSON where asked."""
    print(f"{Path(options.model).name}, {options.dtype} activations, {options.threads} threads, {platform.machine()}")
    medians: dict[str, tuple[float, float]] = {}
    for engine, rounds in rows.items():
        if not rounds:
            continue
        columns = list(zip(*rounds, strict=True))
        medians[engine] = (statistics.median(columns[0]), statistics.median(columns[1]))
        spread = [f"{min(c):.0f} to {max(c):.0f}" for c in columns]
        print(f"{engine:10} prefill {medians[engine][0]:7.1f} tok/s ({spread[0]})   "
              f"decode {medians[engine][1]:6.1f} tok/s ({spread[1]})")
    if "llama.cpp" in medians:
        ours, theirs = medians["anybit"], medians["llama.cpp"]
        print(f"ratio      prefill {ours[0] / theirs[0]:.2f}   decode {ours[1] / theirs[1]:.2f}   (llama.cpp = 1)")
    else:
        print("llama.cpp absent: pip install llama-cpp-python (builds in minutes), or set LLAMA_PYTHON")
    print(f"anonymous memory of the process {held / 2**20:.0f} MiB")
    if options.json:
        document = {"rounds": rows, "medians": medians, "torch": torch, "machine": platform.platform(),
                    "threads": options.threads, "dtype": options.dtype}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
