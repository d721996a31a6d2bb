"""Matrix-vector speed of every packed format on this CPU, as a share of the read bandwidth measured beside it.

    python benchmarks/cpu_matvec.py [--rows 4096] [--columns 4096] [--threads 2] [--only NAME ...] [--json FILE]

Method: random weights of each scheme, made in turn; several copies whose sum exceeds `--cold` megabytes are multiplied
one after another, so that none lies in a cache; one token, float32; median of the calls. Bytes are those of codes,
scales and offsets as stored. The reference is the sum over 256 MB of float32 by torch, measured before and after each
format; shares are of the larger. A column "products" tells how many weights a second are multiplied: formats of few
bits are bound by that, not by memory. On a shared machine compare within one run, or run with real-time priority.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from anybit.schemes import CHANNEL, TENSOR, Offset, ScaleLevel, Scheme, group

READ_BYTES = 256 << 20
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads would spin where the product's should run


def zero_point(size: int) -> Offset:
    """Of unsigned 4-bit codes, a number for each group."""
    return Offset("zero_point", "uint4", group(size))


def schemes() -> dict[str, Scheme]:
    """What is measured: each integer width, each float, codebooks, and what GGUF files hold."""
    from anybit.checkpoints.dialects import gguf

    bf16, f32 = "bfloat16", "float32"
    nvfp4 = (ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel(f32, TENSOR))
    mx = (ScaleLevel("e8m0", group(32)),)
    found = {f"int{bits} g128": Scheme(f"int{bits}", (ScaleLevel(bf16, group(128)),)) for bits in range(2, 9)}
    found |= {
        "int4 g32": Scheme("int4", (ScaleLevel(bf16, group(32)),)),
        "int8 channel": Scheme("int8", (ScaleLevel(f32, CHANNEL),)),
        "uint4 zp g128": Scheme("uint4", (ScaleLevel("float16", group(128)),), offset=zero_point(128)),
        "uint4 zp g32": Scheme("uint4", (ScaleLevel("float16", group(32)),), offset=zero_point(32)),
        "uint8 zp g128": Scheme("uint8", (ScaleLevel(bf16, group(128)),), offset=Offset("zero_point", "uint8",
                                                                                       group(128))),
        "nvfp4": Scheme("fp4_e2m1", nvfp4),
        "mxfp4": Scheme("fp4_e2m1", mx),
        "mxfp6 e2m3": Scheme("fp6_e2m3", mx),
        "mxfp6 e3m2": Scheme("fp6_e3m2", mx),
        "mxfp8": Scheme("fp8_e4m3fn", mx),
        "fp8 channel": Scheme("fp8_e4m3fn", (ScaleLevel(f32, CHANNEL),)),
        "fp8 block 128": Scheme("fp8_e4m3fn", (ScaleLevel(f32, (128, 128)),)),
        "fp8 e5m2 tensor": Scheme("fp8_e5m2", (ScaleLevel(f32, TENSOR),)),
        "nf4 g64": Scheme("nf4", (ScaleLevel(f32, group(64)),)),
        "fp4_bnb g64": Scheme("fp4_bnb", (ScaleLevel(f32, group(64)),)),
    }
    found |= {f"gguf {name}": scheme for name, scheme in gguf.SCHEMES.items()}
    return found


def read_bandwidth(data: object) -> float:
    """Bytes a second at which torch sums `data`, the best of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        data.sum()  # type: ignore[attr-defined]
        seconds.append(time.perf_counter() - start)
    return READ_BYTES / min(seconds)


def median_seconds(calls: list[Callable[[], object]], rounds: int) -> float:
    """Median seconds of a call, the calls in turn."""
    seconds = []
    for _ in range(rounds):
        for call in calls:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(scheme: Scheme, shape: tuple[int, int], cold: float, rounds: int) -> tuple[float, int]:
    """(median seconds of one product, its bytes)."""
    import torch

    from anybit.kernels.native.planes import Planes, from_weight
    from anybit.kernels.trials import sample_weight
    from anybit.weights import QuantizedWeight

    weight = sample_weight(scheme, shape)
    assert isinstance(weight, QuantizedWeight)
    first = from_weight(weight)
    planes = [t for t in first.buffers if t.dim() == 2]
    x = torch.randn(1, shape[1])
    packed = [first]
    while len(packed) < 2 or len(packed) * first.nbytes < cold * 1e6:
        packed.append(Planes(scheme, shape, [t.clone() for t in planes], weight.scales, weight.offset,
                             weight.offset_scales))
    return median_seconds([lambda p=p: p.linear(x) for p in packed], rounds), first.nbytes  # type: ignore[misc]


def main() -> int:
    """Measure and print a line a format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cold", type=float, default=100, help="megabytes of copies that are read in turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=[], help="formats whose names contain one of these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    from anybit.kernels import native

    torch.set_num_threads(options.threads)
    shape, data = (options.rows, options.columns), torch.ones(READ_BYTES // 4)
    print(f"[{shape[0]}, {shape[1]}] x one token, {options.threads} threads, {platform.machine()} {native.isa()}")
    print(f"{'format':18} {'MB':>6} {'GB/s':>6} {'read':>6} {'share':>6} {'Gproducts/s':>12}")
    rows = []
    for name, scheme in schemes().items():
        if options.only and not any(part in name for part in options.only):
            continue
        before = read_bandwidth(data)
        seconds, nbytes = measure(scheme, shape, options.cold, options.rounds)
        read = max(before, read_bandwidth(data))
        row = {"format": name, "bytes": nbytes, "bytes_per_second": nbytes / seconds, "read": read,
               "share": nbytes / seconds / read, "products_per_second": shape[0] * shape[1] / seconds}
        rows.append(row)
        print(f"{name:18} {nbytes / 1e6:6.1f} {nbytes / seconds / 1e9:6.1f} {read / 1e9:6.1f} {row['share']:6.0%} "
              f"{shape[0] * shape[1] / seconds / 1e9:12.1f}", flush=True)
    if options.json:
        document = {"rows": rows, "shape": shape, "threads": options.threads, "machine": platform.platform(),
                    "torch": torch.__version__, "isa": native.isa()}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
