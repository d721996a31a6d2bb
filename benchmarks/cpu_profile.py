"""Where the time of a decode step goes on this CPU: the demo model, one token after 64.

    python benchmarks/cpu_profile.py [--threads 2] [--steps 64]

First the step as it runs, decoder blocks as one call each; then the host's own way, whose parts are timed by themselves
with the shapes and tensors of the real step, so they need not sum to the whole exactly: `rest` is what remains (Python
of the host: modules, rotary embedding, cache, residuals).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable


def timed(work: Callable[[], object], rounds: int) -> float:
    """Median milliseconds of `work`."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    import torch

    import anybit
    from anybit.hosts.modules import AnybitLinear, TiedHead
    from anybit.kernels.native.planes import keep_threads

    torch.set_num_threads(options.threads)
    model = anybit.load("smollm2", dtype="float32", device="cpu")
    layers = [m for m in model.modules() if isinstance(m, AnybitLinear)]
    head = model.lm_head if isinstance(model.lm_head, TiedHead) else None
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    token = torch.tensor([[1000]])
    with torch.inference_mode():
        cache = model(torch.arange(1000, 1064)[None], use_cache=True).past_key_values
        short = timed(lambda: model(token, past_key_values=cache, use_cache=True, logits_to_keep=1), options.steps)
        for layer in (m for m in model.modules() if hasattr(m, "self_attn")):
            layer.__dict__.pop("forward", None)  # the short way, where the layer has one
        step = timed(lambda: model(token, past_key_values=cache, use_cache=True, logits_to_keep=1), options.steps)
        keep_threads(options.threads)
        torch.set_num_threads(1)
        inputs = {k: torch.randn(1, 1, k) for k in {m.in_features for m in layers}}
        planes = [(m.product.stored.step, inputs[m.in_features]) for m in layers]
        kernels = timed(lambda: [run(x) for run, x in planes], options.steps)
        calls = timed(lambda: [m(inputs[m.in_features]) for m in layers], options.steps)
        hidden = torch.randn(1, 1, model.config.hidden_size)
        logits = timed(lambda: head(hidden), options.steps) if head is not None else 0.0
        norm = timed(lambda: [m(hidden) for m in norms], options.steps)
        heads, kv = model.config.num_attention_heads, model.config.num_key_value_heads
        q, k = torch.randn(1, heads, 1, 64), torch.randn(1, kv, 128, 64)
        attend = torch.nn.functional.scaled_dot_product_attention
        attention = timed(lambda: [attend(q, k, k, enable_gqa=True) for _ in range(30)], options.steps)
    rows = [("packed products, 210 layers", kernels), ("their modules' Python", calls - kernels),
            ("packed product, head", logits), ("norms", norm), ("attention", attention)]
    rows.append(("rest: the host's Python", step - sum(ms for _, ms in rows)))
    for name, ms in rows:
        print(f"{name:30} {ms:6.2f} ms  {ms / step:5.0%}")
    print(f"{'a decode step, host blocks':30} {step:6.2f} ms")
    print(f"{'a decode step':30} {short:6.2f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
