"""What one call of a layer costs the host, outside of a graph: microseconds until the call returns, nothing waited for.

    PYTHONPATH=src python benchmarks/host_cost.py [--write FILE.json] [SCHEME ...]      (needs a GPU)

A column each: the module (`model.layer(x)`, x [1, M, K] as transformers gives it), the product alone (x [M, K]), and
torch's own unquantized module for comparison. The least of 100 groups of 10 calls each, the device idle at the start of
a group, so that no queue is full. The goal: 25 us, 35 us where x is quantized.
"""

from __future__ import annotations

import argparse
import json
import platform as machine
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anybit.checkpoints.online import quantizer
from anybit.hosts.modules import AnybitLinear
from anybit.kernels.catalogue import implementation
from anybit.kernels.product import product_of
from anybit.kernels.request import Request, regime_of
from anybit.kernels.trials import sample_weight
from anybit.planning.choose import Choice, choose
from anybit.platforms import detect
from anybit.schemes import Layer, Scheme, dense

SCHEMES = ("none", "int4_g128", "nvfp4_a16", "nvfp4", "fp8_per_channel", "fp8_per_block", "int8_per_channel",
           "int8_asym")
SHAPES = ((1024, 1024), (6144, 4096))  # N, K
TOKENS = (1, 16)


def microseconds(call: Callable[[], object]) -> float:
    """The host's time of one call."""
    for _ in range(20):
        call()
    least = float("inf")
    for _ in range(100):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            call()
        least = min(least, (time.perf_counter() - start) / 10)
    torch.cuda.synchronize()
    return least * 1e6


def scheme_of(name: str, shape: tuple[int, int]) -> Scheme:
    """The scheme of an online name; "none" is unquantized."""
    plain = dense("bfloat16")
    return plain if name == "none" else quantizer(name).scheme_of(Layer("layer", "linear", shape, plain))


def layer_of(name: str, shape: tuple[int, int]) -> tuple[AnybitLinear, Choice]:
    """A layer of random weights as the plan would run it here."""
    scheme = scheme_of(name, shape)
    choice = choose(Request("linear", scheme, shape, "bfloat16"), detect("cuda"))
    assert isinstance(choice, Choice)
    weight = sample_weight(scheme, shape, device="cuda")
    stored = implementation(choice.spec).prepare(weight, torch.bfloat16, choice.names)
    return AnybitLinear(product_of(weight, stored, "cuda")), choice


def rows_of(name: str) -> list[dict[str, Any]]:
    """All cells of a scheme."""
    found = []
    for shape in SHAPES:
        layer, choice = layer_of(name, shape)
        plain = torch.nn.Linear(shape[1], shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
        for tokens in TOKENS:
            x = torch.randn(1, tokens, shape[1], device="cuda", dtype=torch.bfloat16)
            flat = x[0]
            with torch.inference_mode():
                found.append({
                    "scheme": name, "shape": shape, "tokens": tokens, "kernel": choice.names[regime_of(tokens)],
                    "module": microseconds(lambda x=x, layer=layer: layer(x)),
                    "product": microseconds(lambda x=flat, layer=layer: layer.product(x)),
                    "torch": microseconds(lambda x=x, plain=plain: plain(x)),
                })
    return found


def main() -> None:
    """Measure, print a table, write the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    rows = []
    print("| scheme | K x N | M | kernel | module us | product us | torch's Linear us |\n|---|---|---|---|---|---|---|")
    for name in asked.schemes:
        for row in rows_of(name):
            n, k = row["shape"]
            print(f"| {name} | {k} x {n} | {row['tokens']} | {row['kernel']} | {row['module']:.1f} | "
                  f"{row['product']:.1f} | {row['torch']:.1f} |", flush=True)
            rows.append(row)
    if asked.write:
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": machine.python_version()}
        asked.write.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
