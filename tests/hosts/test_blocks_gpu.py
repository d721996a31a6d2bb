"""The short way of a decoder block on a GPU: equal to the host's, taken only where it is proven, caches kept whole.

Without a GPU all of it runs in Triton's interpreter, in processes of their own and in float16.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from anybit.numerics.formats import number_format
from conftest import CHECKPOINTS, genuine

HERE = Path(__file__).resolve().parent
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ON = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float16)
HIDDEN, INNER = (128, 256) if ON[0] == "cuda" else (64, 96)  # the interpreter is slow
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 512}
PROMPT = [[3, 5, 7, 9, 11]]


def model_of(kind: str = "Llama", **more: Any) -> Any:
    """A small model of random weights, its norms not all ones."""
    import transformers

    torch.manual_seed(4)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more}, dtype=ON[1], attn_implementation="sdpa")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(*ON).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def quantized(model: Any, name: str) -> Any:
    """The same with layers of an online scheme, on kernels of this family."""
    from anybit.checkpoints.online import quantizer
    from anybit.hosts.modules import AnybitLinear
    from anybit.kernels.catalogue import implementation, kernel
    from anybit.kernels.product import product_of
    from anybit.kernels.trials import sample_weight
    from anybit.schemes import Layer, dense

    if ON[0] == "cpu":  # the interpreter runs the portable twin
        from anybit.kernels.triton import planes

        planes.arch_of = lambda device: "gfx942"
    chosen = "triton-fused" if "4" in name else "triton-w8a8-int8" if "int8" in name else "triton-w8a8-fp8"
    for number, (path, module) in enumerate(list(model.named_modules())):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            shape = (module.out_features, module.in_features)
            scheme = quantizer(name).scheme_of(Layer(path, "linear", shape, dense("bfloat16")))
            assert scheme is not None
            weight = sample_weight(scheme, shape, number, ON[0])
            stored = implementation(kernel(chosen)).prepare(weight, ON[1], dict.fromkeys(
                ("decode", "small", "prefill"), chosen))
            model.set_submodule(path, AnybitLinear(product_of(weight, stored, ON[0])))
    return model


def shorten(model: Any) -> int:
    from anybit.hosts import blocks_gpu

    return blocks_gpu.shorten_steps(model, ON[1])


def counted() -> list[int]:
    """How often the short way was taken, from now on."""
    from anybit.hosts.blocks_gpu import ShortWay

    calls, own = [0], ShortWay.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        return own(self, *args, **kwargs)

    ShortWay.__call__ = call  # type: ignore[method-assign]
    return calls


def cache_of(model: Any, kind: str) -> Any:
    from transformers import DynamicCache, StaticCache

    return DynamicCache(config=model.config) if kind == "growing" else StaticCache(config=model.config, max_cache_len=40)


def steps(model: Any, kind: str, prompt: list[list[int]] = PROMPT, **more: Any) -> tuple[Tensor, Any]:
    """Logits of some single tokens, then of three at once; the cache."""
    cache, found = cache_of(model, kind), []
    with torch.inference_mode():
        ids = torch.tensor(prompt, device=ON[0])
        model(ids, past_key_values=cache, use_cache=True, **more)
        for token in (20, 21, 22, [30, 31, 32]):
            one = torch.tensor([token if isinstance(token, list) else [token]] * len(prompt), device=ON[0])
            found.append(model(one, past_key_values=cache, use_cache=True, **more).logits.flatten(0, 1).float())
    return torch.cat(found), cache


def share(found: Tensor, wanted: Tensor) -> float:
    """Difference by the root of the mean square."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


ROUNDINGS = 0.03 if ON[1] == torch.bfloat16 else 0.004  # of a few layers, some ten roundings each


# --- checks, in a process that has the interpreter, or on a GPU -------------------------------------------------------


def check_steps_equal_the_hosts() -> None:
    for kind, more in (("Llama", {}), ("Qwen2", {}), ("Qwen3", {"head_dim": 48})):
        model = model_of(kind, **more)
        wanted = {name: steps(model, name) for name in ("growing", "static")}
        assert shorten(model) == 2
        calls = counted()
        for name, (logits, cache) in wanted.items():
            calls[0] = 0
            found, own = steps(model, name)
            assert calls[0] == 8, (kind, name, calls)
            assert share(found, logits) < ROUNDINGS, (kind, name, share(found, logits))
            for a, b in zip(own.layers, cache.layers, strict=True):
                assert int(a.get_seq_length()) == int(b.get_seq_length()) == 11
                assert a.keys.shape == b.keys.shape
                assert share(a.keys, b.keys) < ROUNDINGS
                assert share(a.values, b.values) < ROUNDINGS


def check_packed_layers() -> None:
    names = ("int4_g128", "int4_g32_asym", "nvfp4", "mxfp4", "fp8_per_channel", "fp8_per_block", "int8_asym")
    for name in names if ON[0] == "cuda" else ("int4_g128", "fp8_per_channel"):  # it has no bfloat16
        model = quantized(model_of(num_hidden_layers=1, hidden_size=128, intermediate_size=128, head_dim=32), name)
        before = {path: module.product.stored.dequantize() for path, module in model.named_modules()
                  if hasattr(module, "product")}
        logits, _ = steps(model, "static")
        assert shorten(model) == 1, name
        calls = counted()
        found, _ = steps(model, "static")
        assert calls[0] == 4
        # a rounding that falls to the other side turns codes of activations, by a large step where they have 4 bits
        assert share(found, logits) < (0.3 if name in ("nvfp4", "mxfp4") else 0.1), (name, share(found, logits))
        for path, weight in before.items():
            assert torch.equal(model.get_submodule(path).product.stored.dequantize(), weight), (name, path)


def check_what_differs_is_left_to_the_host() -> None:
    def gelu(layer: Any) -> None:
        layer.mlp.act_fn = torch.nn.GELU()

    def norm(layer: Any) -> None:
        own = layer.input_layernorm.forward
        layer.input_layernorm.forward = lambda x: own(x) * 1.01

    def residual(layer: Any) -> None:
        own = layer.forward
        layer.forward = lambda x, **more: own(x, **more) * 0.95

    def scaling(layer: Any) -> None:
        layer.self_attn.forward = scaled(layer.self_attn)

    def scaled(attention: Any) -> Any:
        own = attention.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            attention.scaling = 0.9
            return own(*args, **kwargs)

        return forward

    def far(layer: Any) -> None:  # as attentions do that scale scores beyond the length they were trained on
        own = layer.self_attn.forward

        def forward(*args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
            found, weights = own(*args, position_ids=position_ids, **kwargs)
            return found * (1 + (position_ids > 256)).to(found.dtype)[..., None], weights

        layer.self_attn.forward = forward

    for change in (gelu, norm, residual, scaling, far):
        model = model_of(num_hidden_layers=2)
        change(model.model.layers[0])
        was = model.model.layers[0].forward
        assert shorten(model) == 1, change
        assert model.model.layers[0].forward == was, change


def check_a_layer_put_in_place_of_another_is_called() -> None:
    """As adapters do, after the model was loaded."""
    model = model_of(num_hidden_layers=2)
    shorten(model)
    plain, _ = steps(model, "static")

    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    model.model.layers[1].mlp.up_proj = Adapter(model.model.layers[1].mlp.up_proj)
    calls = counted()
    changed, _ = steps(model, "static")
    assert calls[0] == 4  # of the other block
    assert share(changed, plain) > 0.02


def check_calls_out_of_the_ordinary() -> None:
    model = model_of()
    with torch.inference_mode():
        logits = model(torch.tensor(PROMPT, device=ON[0]), use_cache=False).logits
    assert shorten(model) == 2
    calls = counted()
    with torch.inference_mode():
        assert torch.equal(model(torch.tensor(PROMPT, device=ON[0]), use_cache=False).logits, logits)
        cache = cache_of(model, "growing")
        model(torch.tensor([list(range(20))], device=ON[0]), past_key_values=cache)
        model(torch.tensor([[3] * 9], device=ON[0]), past_key_values=cache)  # more tokens than are few
        model(torch.tensor([[3]], device=ON[0]), past_key_values=cache, output_attentions=True)
    assert calls[0] == 0
    cache = cache_of(model, "static")
    model(torch.tensor(PROMPT, device=ON[0]), past_key_values=cache)
    embedded = model.get_input_embeddings()(torch.tensor([[5]], device=ON[0])).requires_grad_()
    model(inputs_embeds=embedded, past_key_values=cache).logits.float().sum().backward()
    assert embedded.grad is not None
    assert calls[0] == 0


def check_padded_batches() -> None:
    """Left padding: a boolean mask that the kernels read."""
    model = model_of()
    ids, masked = [[0, 0, 5, 6], [3, 4, 5, 6]], [[0, 0, 1, 1], [1, 1, 1, 1]]

    def run(kind: str) -> Tensor:
        cache, mask, found = cache_of(model, kind), torch.tensor(masked, device=ON[0]), []
        with torch.inference_mode():
            at = (mask.cumsum(1) - 1).clamp(min=0)
            model(torch.tensor(ids, device=ON[0]), past_key_values=cache, attention_mask=mask, position_ids=at)
            for i in range(3):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                at = mask.sum(1, keepdim=True) - 1
                one = torch.tensor([[9 + i], [8 + i]], device=ON[0])
                found.append(model(one, past_key_values=cache, attention_mask=mask, position_ids=at).logits.float())
        return torch.stack(found)

    wanted = {kind: run(kind) for kind in ("growing", "static")}
    shorten(model)
    calls = counted()
    for kind, logits in wanted.items():
        calls[0] = 0
        assert share(run(kind), logits) < ROUNDINGS, kind
        assert calls[0] == 6


def check_a_growing_cache_is_the_hosts() -> None:
    """It may be cropped, reordered and outgrow its room, and the host goes on with it."""
    from anybit.hosts import blocks_gpu

    model = model_of(num_hidden_layers=2)

    def run(hosts_turn: int) -> Tensor:
        cache = cache_of(model, "growing")
        found = []
        with torch.inference_mode():
            model(torch.tensor(PROMPT * 2, device=ON[0]), past_key_values=cache)
            for i in range(9):
                if i == 4:
                    cache.crop(-2)
                if i == 6:
                    cache.reorder_cache(torch.tensor([1, 0], device=ON[0]))
                one = torch.tensor([[20 + i], [40 + i]], device=ON[0])
                more = {"output_attentions": True} if i == hosts_turn else {}
                found.append(model(one, past_key_values=cache, **more).logits.float())
            assert cache.get_seq_length() == 12
        return torch.stack(found)

    wanted = run(-1)
    shorten(model)
    room, blocks_gpu._ROOM = blocks_gpu._ROOM, 3  # type: ignore[misc]
    assert share(run(-1), wanted) < ROUNDINGS
    assert share(run(5), wanted) < ROUNDINGS
    blocks_gpu._ROOM = room  # type: ignore[misc]


def check_hooks_see_and_change_what_passes() -> None:
    model = model_of()
    shorten(model)
    seen: list[Tensor] = []
    plain, _ = steps(model, "static")
    handle = model.model.layers[0].register_forward_hook(lambda m, i, y: seen.append(y.clone()) or y.mul_(1.5))
    hooked, _ = steps(model, "static")
    handle.remove()
    assert len(seen) == 5
    assert share(hooked, plain) > 0.05
    again, _ = steps(model, "static")
    assert torch.equal(again, plain)
    inner: list[Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, i, y: inner.append(y))
    steps(model, "static")
    handle.remove()
    assert len(inner) == 5


def check_a_deleted_model_is_gone() -> None:
    """At once, without the garbage collector: on a GPU its memory is wanted."""
    model = model_of()
    steps(model, "growing")
    assert shorten(model) == 2
    logits, cache = steps(model, "growing")
    held = [weakref.ref(layer.mlp.down_proj) for layer in model.model.layers]
    gc.collect()
    gc.disable()
    del model, logits, cache
    left = [ref() for ref in held]
    gc.enable()
    assert left == [None] * 2


CHECKS = [name for name in sorted(globals()) if name.startswith("check_")]


def run_all() -> None:
    """Every check in this process, which must run with TRITON_INTERPRET=1: a line for each, and why it failed."""
    torch.set_num_threads(1)
    from anybit.hosts.blocks_gpu import ShortWay

    own = ShortWay.__call__
    for name in CHECKS:
        try:
            globals()[name]()
            print(f"CHECK {name} right", flush=True)
        except Exception:
            print(f"CHECK {name} {traceback.format_exc()!r}", flush=True)
        ShortWay.__call__ = own  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What each check said in the interpreter."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "import test_blocks_gpu as t; t.run_all()"],
                          capture_output=True, text=True, cwd=HERE, timeout=290,
                          env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                               "PYTHONPATH": os.pathsep.join(["../../src", *sys.path])})
    found = [line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.startswith("CHECK ")]
    assert found, done.stderr[-3000:]
    return dict(found)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU below")
@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[name] == "right"


@gpu
@needs_gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.hosts.blocks_gpu import ShortWay

    monkeypatch.setattr(ShortWay, "__call__", ShortWay.__call__)  # put back what a check counts with
    globals()[name]()


@gpu
@needs_gpu
@pytest.mark.parametrize("name", ["", "int4_g128", "nvfp4", "fp8_per_channel", "fp8_per_block"])
def test_a_captured_step_goes_on_token_after_token(name: str) -> None:
    model = model_of()
    if name:
        quantized(model, name)
    shorten(model)
    ids = torch.tensor(PROMPT, device="cuda")

    def begin() -> Any:
        cache = cache_of(model, "static")
        model(ids, past_key_values=cache)
        return cache

    token = torch.tensor([[7]], device="cuda")
    with torch.inference_mode():
        eager, cache = [], begin()
        for i in range(8):
            eager.append(model(token + i, past_key_values=cache).logits.clone())
        cache = begin()
        one = token.clone()
        model(one, past_key_values=cache)  # compiles
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(one, past_key_values=cache).logits
        for i in range(8):
            one.copy_(token + i)
            graph.replay()
            assert torch.equal(logits, eager[i])
    assert all(int(layer.get_seq_length()) == 13 for layer in cache.layers)


@gpu
@needs_gpu
@pytest.mark.parametrize("name", genuine(
    "ct-llama-*", "ct-qwen*-fp8-*", "gptq-w4-g128-*", "awq-gemm-llama", "modelopt-*-llama", "quark-mxfp4-a-mxfp4-llama",
    "fp8-block-e8m0-qwen3", "gguf-q4_k_m-llama"))
def test_genuine_checkpoints_have_short_ways_that_equal_the_hosts(name: str) -> None:
    import anybit

    model = anybit.load(CHECKPOINTS / name, dtype="bfloat16", device="cuda")
    layers = [m for m in model.modules() if hasattr(m, "self_attn")]
    is_short = ["forward" in layer.__dict__ for layer in layers]
    if model.anybit.checkpoint.kv_cache is not None:  # its codes are the host's business
        assert not any(is_short)
        return
    assert all(is_short)
    calls = counted()
    short = {kind: steps(model, kind)[0] for kind in ("growing", "static")}
    assert calls[0] == 8 * len(layers)
    for layer in [*layers, model.model.norm]:
        del layer.__dict__["forward"]
    schemes = [m.product.scheme for m in model.modules() if hasattr(m, "product")]
    bits = min((number_format(s.activation.element).bits for s in schemes if s.activation), default=16)
    for kind, found in short.items():
        assert share(found, steps(model, kind)[0]) < (0.3 if bits <= 6 else 0.1 if bits == 8 else ROUNDINGS), kind


def test_a_block_whose_weights_moved_goes_the_hosts_way_again() -> None:
    from anybit.hosts import blocks_gpu

    layer = torch.nn.Linear(4, 4)
    own = layer.forward
    layer.forward = lambda x: "short"
    blocks_gpu._leave_when_moved(layer, SimpleNamespace(weight=layer.weight), own)
    layer.to("cpu")  # moves nothing
    assert layer(torch.zeros(1, 4)) == "short"
    layer.double()
    assert layer.forward == own
    assert "_apply" not in layer.__dict__
