"""The experts of one layer on a GPU: a captured call, and the loop over experts outside a graph.

    PYTHONPATH=src python benchmarks/experts.py [--schemes int4_g128,fp8_per_block] [--shape 128,8,2048,768]

A line each for 1 to 512 tokens with routes of the dice: microseconds of a call replayed from a graph (four calls a
graph, ten replays), eager, and one expert after another, which reads the router's choice back to the host.
"""

from __future__ import annotations

import argparse
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

TOKENS = (1, 4, 16, 64, 512)


class Gating(nn.Module):
    """What AnybitExperts asks of the module that it replaces."""

    act_fn = nn.SiLU()


def experts_of(name: str, count: int, hidden: int, inner: int) -> AnybitExperts:
    """Experts of random weights under an online scheme, with the kernels that the plan takes."""
    made = {}
    for role, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
        scheme = quantizer(name).scheme_of(Layer("layer", "linear", shape, dense("bfloat16")))
        choice = choose(Request("linear", scheme, shape, "bfloat16"), detect("cuda"))
        assert isinstance(choice, Choice)
        prepare = implementation(choice.spec).prepare
        weights = [sample_weight(scheme, shape, seed=i, device="cuda") for i in range(count)]
        made[role] = [AnybitLinear(product_of(w, prepare(w, torch.bfloat16, choice.names), "cuda")) for w in weights]
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


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", default="int4_g128,fp8_per_block,fp8_per_channel")
    parser.add_argument("--shape", default="128,8,2048,768", help="experts, chosen, hidden, inner")
    options = parser.parse_args()
    count, chosen, hidden, inner = (int(part) for part in options.shape.split(","))
    for name in options.schemes.split(","):
        layer = experts_of(name, count, hidden, inner)
        for tokens in TOKENS:
            x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
            weights = torch.rand(tokens, chosen, device="cuda", dtype=torch.bfloat16)
            index = torch.stack([torch.randperm(count, device="cuda")[:chosen] for _ in range(tokens)])
            with torch.inference_mode():
                at_once = eager(lambda: layer(x, index, weights), 5)  # noqa: B023
                recorded = captured(lambda: layer(x, index, weights))  # noqa: B023
                stacks, layer._stacks = layer._stacks, {}
                loop = eager(lambda: layer(x, index, weights), 2)  # noqa: B023
                layer._stacks = stacks
            print(f"{name} M {tokens}: captured {recorded:.0f}, eager {at_once:.0f}, one by one {loop:.0f}", flush=True)


if __name__ == "__main__":
    main()
