"""The short way of a decoder block: equal to the host's, taken only where nothing differs from the plain case."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

import anybit
from anybit.hosts import blocks
from anybit.kernels import native
from anybit.kernels.native.block import Block, BlockParts
from anybit.kernels.native.planes import from_weight
from anybit.schemes import dense
from anybit.weights import Dense
from conftest import CHECKPOINTS, genuine

pytestmark = pytest.mark.skipif(native.library() is None, reason="the compiled library is not built")
FOLDERS = genuine("gptq-w4-g128-*", "ct-llama-w4a16-g128", "gguf-q4_k_m-llama", "gguf-q2_k-qwen3", "hqq-w4-axis1-*",
                  "modelopt-w4a16-nvfp4-*", "quark-mxfp4-wonly-*")


def loaded(name: str) -> Any:
    return anybit.load(CHECKPOINTS / name, dtype="float32", device="cpu")


def shortened(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "self_attn") and "forward" in m.__dict__]


def host_only(model: Any) -> None:
    for layer in shortened(model):
        del layer.__dict__["forward"]


def generate(model: Any, steps: int, **options: Any) -> torch.Tensor:
    ids = torch.arange(3, 10)[None]
    return model.generate(ids, max_new_tokens=steps, do_sample=False, pad_token_id=0, eos_token_id=-1, **options)


def step_logits(model: Any, steps: int) -> torch.Tensor:
    with torch.inference_mode():
        out = model(torch.arange(3, 10)[None], use_cache=True)
        found = []
        for token in (20 + i % 200 for i in range(steps)):
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("name", FOLDERS)
def test_steps_equal_the_hosts_own(name: str) -> None:
    model = loaded(name)
    count = len(shortened(model))
    assert count == model.config.num_hidden_layers
    short = step_logits(model, 12)
    host_only(model)
    own = step_logits(model, 12)
    assert (short - own).abs().max() <= 2e-5 * own.abs().max()


def chained(model: Any) -> bool:
    return "forward" in model.model.__dict__


class Adapter(torch.nn.Module):
    """Put in place of a layer after the model was loaded."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.base(x)


@pytest.mark.parametrize("how", ["replaced", "hooked", "patched"])
def test_a_layer_that_was_changed_after_loading_is_called(how: str) -> None:
    model, plain = loaded(FOLDERS[0]), loaded(FOLDERS[0])
    mlp = model.model.layers[1].mlp
    if how == "replaced":
        mlp.up_proj = Adapter(mlp.up_proj)
    elif how == "hooked":
        mlp.up_proj.register_forward_hook(lambda module, given, y: 2 * y)
    else:
        own = mlp.up_proj.forward
        mlp.up_proj.forward = lambda x: 2 * own(x)
    found = step_logits(model, 6)
    assert not torch.allclose(found, step_logits(plain, 6), rtol=1e-3)
    host_only(model)
    model.model.__dict__.pop("forward", None)
    wanted = step_logits(model, 6)
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", genuine("gptq-w4-g128-*", "ct-llama-w4a16-g128"))
def test_plain_from_pretrained_takes_the_short_way_too(name: str) -> None:
    from transformers import AutoModelForCausalLM

    anybit.enable()
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    assert len(shortened(model)) == model.config.num_hidden_layers
    assert chained(model)
    wanted = step_logits(loaded(name), 12)
    assert (step_logits(model, 12) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_step_through_all_blocks_equals_block_by_block(name: str) -> None:
    model = loaded(name)
    assert chained(model)
    together = step_logits(model, blocks._ROOM + 20)
    del model.model.__dict__["forward"]
    assert torch.equal(together, step_logits(model, blocks._ROOM + 20))


def prompt_logits(model: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every token of a prompt, then of a token after it."""
    with torch.inference_mode():
        out = model(5 + torch.arange(tokens)[None] % 200, use_cache=True)
        after = model(torch.tensor([[7]]), past_key_values=out.past_key_values, use_cache=True)
    return out.logits, after.logits


@pytest.mark.parametrize("tokens", [2, 14, 33, 520])  # less and more than a tile, a panel, and what is held at once
@pytest.mark.parametrize("name", FOLDERS)
def test_prompts_equal_the_hosts_own(name: str, tokens: int) -> None:
    model = loaded(name)
    short = prompt_logits(model, tokens)
    host_only(model)
    own = prompt_logits(model, tokens)
    assert all((a - b).abs().max() <= 2e-5 * b.abs().max() for a, b in zip(short, own, strict=True))


@pytest.mark.parametrize("size", [32, 64, 96])
def test_a_prompt_of_heads_of_any_whole_size_attends_causally(size: int) -> None:
    """The compiled block against plain torch in float64: grouped heads, biases, K beyond a piece, 600 tokens."""
    torch.manual_seed(size)
    heads, kv_heads, hidden, inner, tokens = 4, 2, 96, 1056, 600
    weights = {name: torch.randn(rows, cols) * cols**-0.5 for name, rows, cols in (
        ("qkv", (heads + 2 * kv_heads) * size, hidden), ("o", hidden, heads * size), ("gate_up", 2 * inner, hidden),
        ("down", hidden, inner))}
    bias = torch.randn(weights["qkv"].shape[0])
    norms = [1 + 0.1 * torch.randn(hidden) for _ in range(2)]
    packed = {name: [from_weight(Dense(dense("float32"), w, bias if name == "qkv" else None))]
              for name, w in weights.items()}
    block = Block(BlockParts(**packed, norm1=norms[0], norm2=norms[1], q_norm=None, k_norm=None, eps=1e-6,
                             scaling=size**-0.5, heads=heads, kv_heads=kv_heads, dim=size))
    angles = torch.arange(tokens)[:, None] * torch.rand(size // 2)
    cosine, sine = (f(torch.cat([angles, angles], 1)) for f in (torch.cos, torch.sin))
    x = torch.randn(1, tokens, hidden)
    keys, values = (torch.full((1, kv_heads, tokens + 3, size), float("nan")) for _ in range(2))
    y = block.many(x, cosine, sine, keys, values, 0)

    w = {name: weight.double() for name, weight in weights.items()}

    def norm(t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return t * (t.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()

    def turned(t: torch.Tensor) -> torch.Tensor:
        half = torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1)
        return t * cosine.double() + half * sine.double()

    rows = norm(x[0].double(), norms[0]) @ w["qkv"].T + bias.double()
    q, k, v = (part.view(tokens, -1, size).transpose(0, 1)
               for part in rows.split([heads * size, kv_heads * size, kv_heads * size], -1))
    q, k = turned(q), turned(k)
    attended = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True,
                                                                enable_gqa=True)[0]
    middle = x[0].double() + attended.transpose(0, 1).reshape(tokens, -1) @ w["o"].T
    gate, up = (norm(middle, norms[1]) @ w["gate_up"].T).chunk(2, -1)
    wanted = middle + (torch.nn.functional.silu(gate) * up) @ w["down"].T
    assert (y[0].double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    assert (keys[0, :, :tokens].double() - k).abs().max() <= 1e-5 * k.abs().max()
    assert torch.isnan(values[0, :, tokens:]).all()


def first() -> Any:
    if not FOLDERS:
        pytest.skip("needs the genuine checkpoints")
    return loaded(FOLDERS[0])


def test_a_cache_grows_beyond_its_room() -> None:
    model = first()
    steps = blocks._ROOM + 40
    short = step_logits(model, min(steps, 300))
    host_only(model)
    assert torch.allclose(short, step_logits(model, min(steps, 300)), rtol=0, atol=2e-4 * float(short.abs().max()))


def test_a_cropped_cache_goes_on_from_where_it_was_cropped() -> None:
    model = first()

    def run() -> torch.Tensor:
        with torch.inference_mode():
            out = model(torch.arange(3, 10)[None], use_cache=True)
            cache = out.past_key_values
            for token in (11, 12, 13):
                model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache.crop(-2)
            assert cache.get_seq_length() == 8
            return model(torch.tensor([[14]]), past_key_values=cache, use_cache=True).logits

    short = run()
    host_only(model)
    assert torch.allclose(short, run(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [
    {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}, {"output_hidden_states": True,
                                                                             "return_dict_in_generate": True},
], ids=["static cache", "beams", "no cache", "hidden states"])
def test_every_other_way_to_generate_gives_the_same_tokens(options: dict[str, Any]) -> None:
    model = first()

    def tokens(found: Any) -> torch.Tensor:
        return found if isinstance(found, torch.Tensor) else found.sequences

    short = tokens(generate(model, 8, **options))
    host_only(model)
    assert torch.equal(short, tokens(generate(model, 8, **options)))


def test_padded_batches_go_the_hosts_way() -> None:
    model = first()
    ids = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    short = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    alone = model.generate(ids[:1, 2:], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert torch.equal(short[0, 4:], alone[0, 2:])


def test_gradients_reach_the_input() -> None:
    model = first()
    x = model.get_input_embeddings()(torch.tensor([[5]])).detach().requires_grad_()
    model(inputs_embeds=x, use_cache=True).logits.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("change", ["activation", "norm", "scaling of heads", "extra residual", "rotation"])
def test_a_block_that_computes_something_else_is_left_to_the_host(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = first()
    host_only(model)
    layer = model.model.layers[0]
    if change == "activation":
        layer.mlp.act_fn = torch.nn.GELU()
    elif change == "norm":
        own = layer.input_layernorm.forward
        layer.input_layernorm.forward = lambda x: own(x) * 1.01
    elif change == "scaling of heads":
        own_qk = layer.self_attn.k_proj.forward
        layer.self_attn.k_proj.forward = lambda x: own_qk(x) * 1.02
    elif change == "extra residual":
        whole = layer.forward
        monkeypatch.setattr(type(layer), "forward", lambda self, x, **k: whole(x, **k) + 0.01 * x)
    else:
        turn = model.model.rotary_emb.forward
        model.model.rotary_emb.forward = lambda x, position_ids: tuple(t[..., :-2] for t in turn(x, position_ids))
    blocks.shorten_steps(model)
    assert "forward" not in layer.__dict__


def test_other_dtypes_and_batch_invariance_keep_the_hosts_blocks() -> None:
    if not FOLDERS:
        pytest.skip("needs the genuine checkpoints")
    assert shortened(anybit.load(CHECKPOINTS / FOLDERS[0], dtype="bfloat16", device="cpu")) == []
    assert shortened(anybit.load(CHECKPOINTS / FOLDERS[0], dtype="float32", device="cpu", batch_invariant=True)) == []


def calls_of_the_chain(model: Any) -> list[Any]:
    """What the chain answers from now on: None where the host had to."""
    from anybit.hosts.chain import _Steps

    seen: list[Any] = []
    steps = next(c.cell_contents for c in model.model.forward.__closure__ if isinstance(c.cell_contents, _Steps))
    answer = type(steps).__call__

    class Watched(_Steps):
        def __call__(self, given: dict[str, Any]) -> Any:
            seen.append(answer(self, given))
            return seen[-1]

    steps.__class__ = Watched
    return seen


@pytest.mark.parametrize("what", ["plain", "mask", "hidden states", "hook", "position", "grown mask", "config"])
def test_the_chain_steps_aside_where_a_step_is_not_plain(what: str) -> None:
    model = first()
    seen = calls_of_the_chain(model)
    ids, token = torch.arange(3, 10)[None], torch.tensor([[11]])
    given: dict[str, Any] = {}
    if what == "mask":
        given["attention_mask"] = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])
    if what == "grown mask":
        given["attention_mask"] = torch.ones(1, 8, dtype=torch.int64)
    if what == "position":
        given["position_ids"] = torch.tensor([[40]])
    if what == "hidden states":
        given["output_hidden_states"] = True
    if what == "config":
        model.config.output_hidden_states = True
    heard: list[int] = []
    if what == "hook":
        model.model.layers[0].register_forward_hook(lambda *_: heard.append(1))
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        out = model(token, past_key_values=cache, use_cache=True, **given)
        taken = seen[-1] is not None
        assert taken == (what in ("plain", "grown mask"))
        host_only(model)
        cache = model(ids, use_cache=True).past_key_values
        wanted = model(token, past_key_values=cache, use_cache=True, **given)
    assert (out.logits - wanted.logits).abs().max() <= 2e-5 * wanted.logits.abs().max()
    if what in ("hidden states", "config"):
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert what != "hook" or heard


def test_a_copied_cache_and_its_original_go_on_apart() -> None:
    model = first()
    with torch.inference_mode():
        out = model(torch.arange(3, 10)[None], use_cache=True)
        cache = out.past_key_values
        model(torch.tensor([[11]]), past_key_values=cache, use_cache=True)
        copied = copy.deepcopy(cache)
        found = [model(torch.tensor([[token]]), past_key_values=held, use_cache=True).logits
                 for held, token in ((copied, 12), (cache, 13))]
        host_only(model)
        wanted = []
        for token in (12, 13):
            again = model(torch.arange(3, 10)[None], use_cache=True).past_key_values
            model(torch.tensor([[11]]), past_key_values=again, use_cache=True)
            wanted.append(model(torch.tensor([[token]]), past_key_values=again, use_cache=True).logits)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_a_deleted_model_is_freed_at_once() -> None:
    model = first()
    step_logits(model, 2)
    base = weakref.ref(model.model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert base() is None
    finally:
        gc.enable()
