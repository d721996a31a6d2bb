"""The experts of one layer: all of them in one call, and one after another.

    PYTHONPATH=src python benchmarks/experts.py [--device cpu] [--schemes int4_g128,fp8_per_block]
                                               [--shape 128,8,2048,768]

A line each with routes of the dice. On a GPU for 1 to 512 tokens: microseconds of a call replayed from a graph (four
calls a graph, ten replays), eager, and one expert after another, which reads the router's choice back to the host. On a
CPU for up to 8 tokens in float32: medians of 30 calls of either way, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from anybit.checkpoints.online import quantizer
from anybit.hosts.modules import AnybitExperts, AnybitLinear
from anybit.kernels.catalogue import implementation
from anybit.kernels.product import product_of
from anybit.kernels.request import Request
from anybit.kernels.trials import sample_weight
from anybit.planning.choose import Choice, choose
from anybit.platforms import detect
from anybit.schemes import Layer, dense

TOKENS = {"cuda": (1, 4, 16, 64, 512), "cpu": (1, 2, 4, 8)}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


class Gating(nn.Module):
    """What AnybitExperts asks of the module that it replaces."""

    act_fn = nn.SiLU()


def experts_of(name: str, count: int, hidden: int, inner: int, device: str) -> AnybitExperts:
    """Experts of random weights under an online scheme, with the kernels that the plan takes."""
    made = {}
    for role, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
        scheme = quantizer(name).scheme_of(Layer("layer", "linear", shape, dense("bfloat16")))
        dtype = DTYPES[device]
        choice = choose(Request("linear", scheme, shape, str(dtype).removeprefix("torch.")), detect(device))
        assert isinstance(choice, Choice)
        prepare = implementation(choice.spec).prepare
        weights = [sample_weight(scheme, shape, seed=i, device=device) for i in range(count)]
        made[role] = [AnybitLinear(product_of(w, prepare(w, dtype, choice.names), device)) for w in weights]
    return AnybitExperts(Gating(), count, made)


def eager(call: Callable[[], object], times: int) -> float:
    """Microseconds of a call, waited for."""
    call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / times * 1e6


def captured(call: Callable[[], object]) -> float:
    """Microseconds of a call in a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            call()
    graph.replay()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(10):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) / 40 * 1e3


def on_gpu(layer: AnybitExperts, given: tuple[torch.Tensor, ...]) -> str:
    """The three ways there, in words."""
    at_once = eager(lambda: layer(*given), 5)
    recorded = captured(lambda: layer(*given))
    stacks, layer._stacks = layer._stacks, {}
    loop = eager(lambda: layer(*given), 2)
    layer._stacks = stacks
    return f"captured {recorded:.0f}, eager {at_once:.0f}, one by one {loop:.0f}"


def on_cpu(layer: AnybitExperts, given: tuple[torch.Tensor, ...]) -> str:
    """The two ways there, in words."""
    together, times = layer._together_on_cpu, {True: [], False: []}
    for _ in range(30):
        for at_once in (True, False):
            layer._together_on_cpu = together if at_once else {}
            begun = time.perf_counter()
            layer(*given)
            times[at_once].append((time.perf_counter() - begun) * 1e6)
    layer._together_on_cpu = together
    return f"at once {statistics.median(times[True]):.0f}, one by one {statistics.median(times[False]):.0f}"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=sorted(TOKENS))
    parser.add_argument("--schemes", default="int4_g128,fp8_per_block,fp8_per_channel")
    parser.add_argument("--shape", default="128,8,2048,768", help="experts, chosen, hidden, inner")
    options = parser.parse_args()
    count, chosen, hidden, inner = (int(part) for part in options.shape.split(","))
    device = options.device
    for name in options.schemes.split(","):
        layer = experts_of(name, count, hidden, inner, device)
        for tokens in TOKENS[device]:
            x = torch.randn(tokens, hidden, device=device, dtype=DTYPES[device])
            weights = torch.rand(tokens, chosen, device=device, dtype=x.dtype)
            index = torch.stack([torch.randperm(count, device=device)[:chosen] for _ in range(tokens)])
            with torch.inference_mode():
                said = (on_gpu if device == "cuda" else on_cpu)(layer, (x, index, weights))
            print(f"{name} M {tokens}: {said}", flush=True)


if __name__ == "__main__":
    main()
