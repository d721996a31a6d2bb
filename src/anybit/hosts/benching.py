"""Decode speed of a whole model of random weights: the layers of a real architecture, made on the device on the spot.

One token at a time through transformers with a static cache; on a GPU the step is captured once as a graph and
replayed, so that what counts is the device's time and not Python's. The unquantized model is transformers' own, layer
for layer; "dense" is the same in our hands.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from anybit.checkpoints.online import quantizer
from anybit.errors import Unsupported
from anybit.hosts.meter import Meter
from anybit.hosts.modules import AnybitLinear
from anybit.hosts.tuning import EMPTY_LAUNCH_SECONDS, copy_bandwidth
from anybit.kernels.catalogue import implementation
from anybit.kernels.product import product_of
from anybit.kernels.request import Request
from anybit.kernels.trials import sample_weight
from anybit.planning import measured
from anybit.planning.choose import Choice, Policy, choose
from anybit.planning.fit import BETWEEN_SECONDS, HOSTS_BETWEEN_SECONDS
from anybit.platforms import Platform
from anybit.schemes import Layer, Scheme, dense

CONFIGS: Final[dict[str, dict[str, int]]] = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                 "num_key_value_heads": 4, "vocab_size": 32000},
}
_CONTEXT: Final = 256  # room of the static cache
_PROMPT: Final = 16
_STEPS: Final = 48
DENSE: Final = "dense"  # in place of a scheme: unquantized layers, but our kernels and blocks


def decode_speed(
    config: str, quantization: str | None, platform: Platform, device: str, dtype: str, *, compiled: bool = False
) -> dict[str, Any]:
    """Tokens a second, bytes held, the share of the streaming floor, and what a plan predicts of them; batch 1.

    quantization  an online name for the layers (the head stays as it is), None: all of `dtype` and transformers' own,
                  DENSE: all of `dtype`, on the kernels that a plan chooses
    compiled      torch.compile fuses what lies between the products first; takes a minute
    The prediction of speed is that of `anybit fit`: the chosen kernels' prices and a constant for each block.
    """
    kind: torch.dtype = getattr(torch, dtype)
    predicted = _Predicted()
    with Meter(device) as meter:
        model = _model(CONFIGS[config], quantization, platform, device, kind, predicted)
        short = _shortened(model, kind) if quantization is not None and not compiled and platform.vendor != "cpu" else 0
    with torch.inference_mode():
        seconds = _decode_seconds(model, device, compiled=compiled)
    weights = sum(b.nbytes for b in [*model.buffers(), *model.parameters()])
    embedding = cast("nn.Module", model.get_input_embeddings())
    embedding_bytes = list(embedding.parameters())
    weights -= sum(p.nbytes for p in embedding_bytes)  # a step reads one row of it
    a_block = (BETWEEN_SECONDS if short else HOSTS_BETWEEN_SECONDS)[platform.vendor]
    between = CONFIGS[config]["num_hidden_layers"] * a_block
    floor = weights / copy_bandwidth(device) + EMPTY_LAUNCH_SECONDS
    held = meter.held_bytes
    del model
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return {"quantization": quantization, "tokens_per_second": 1 / seconds, "held_bytes": held,
            "weight_bytes": weights, "share_of_floor": floor / seconds, "kernels": sorted(predicted.kernels),
            "predicted_tokens_per_second": 1 / (predicted.seconds + between), "is_compiled": compiled,
            "short_blocks": short,
            "predicted_bytes": predicted.bytes + sum(p.nbytes for p in embedding_bytes)}


@dataclass
class _Predicted:
    """Sums over the layers of a model: seconds of a decode step, bytes as stored."""

    seconds: float = 0.0
    bytes: int = 0
    kernels: set[str] = field(default_factory=set)

    def add(self, choice: Choice, request: Request) -> None:
        """Count one layer."""
        chosen = choice.kernels["decode"]
        self.seconds += chosen.price.seconds
        self.bytes += chosen.spec.stored_bytes(request)
        self.kernels.add(chosen.spec.name)


def _model(
    sizes: dict[str, int], quantization: str | None, platform: Platform, device: str, dtype: torch.dtype,
    predicted: _Predicted,
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    made = cast("Any", LlamaConfig)(**sizes, max_position_embeddings=4096, tie_word_embeddings=False,
                                    attn_implementation="sdpa", dtype=dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(made)
    rules = None if quantization in (None, DENSE) else quantizer(quantization)
    known = measured.read(platform)
    policy = known.policy(str(dtype).removeprefix("torch."))
    for index, (path, module) in enumerate(list(model.named_modules())):
        if not isinstance(module, nn.Linear):
            continue
        shape = (module.out_features, module.in_features)
        scheme: Scheme | None = None
        if rules is not None and path != "lm_head":
            scheme = rules.scheme_of(Layer(path, "linear", shape, dense(str(dtype).removeprefix("torch."))))
        request = Request("linear", scheme or dense(str(dtype).removeprefix("torch.")), shape,
                          str(dtype).removeprefix("torch."))
        own = _linear(request, index, platform, policy, device, dtype, predicted)
        if quantization is not None:
            model.set_submodule(path, own)
        else:
            module.weight = nn.Parameter(own.product.stored.dequantize().to(dtype), requires_grad=False)
    _materialize(model, device, dtype)
    model.train(False)
    return model


def _shortened(model: Any, dtype: torch.dtype) -> int:
    """Decoder blocks that take the short way."""
    from anybit.hosts.blocks_gpu import shorten_steps

    return shorten_steps(model, dtype)


def _linear(
    request: Request, seed: int, platform: Platform, policy: Policy, device: str, dtype: torch.dtype,
    predicted: _Predicted,
) -> AnybitLinear:
    choice = choose(request, platform, policy=policy)
    if not isinstance(choice, Choice):
        raise Unsupported("no kernel runs this layer", found=str(request.scheme), wanted="another scheme")
    predicted.add(choice, request)
    rows, columns = request.shape
    weight = sample_weight(request.scheme, (rows, columns), seed, device)
    stored = implementation(choice.spec).prepare(weight, dtype, choice.names)
    return AnybitLinear(product_of(weight, stored, device))


def _materialize(model: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Norms of ones, a random table, and the rotary frequencies, which the config decides."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.ones(parameter.shape, device=device, dtype=dtype) if parameter.dim() == 1 else \
                    torch.randn(parameter.shape, device=device, dtype=dtype) * 0.02
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    for path, module in list(model.named_modules()):
        if any(b.is_meta for b in module.buffers(recurse=False)):
            fresh = type(module)(model.config)
            model.set_submodule(path, fresh.to(device))


def _decode_seconds(model: Any, device: str, *, compiled: bool) -> float:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=_CONTEXT)
    token = torch.full((1, 1), 7, device=device, dtype=torch.long)
    prompt = torch.arange(_PROMPT, device=device)[None] + 5
    model(prompt, past_key_values=cache, use_cache=True, cache_position=torch.arange(_PROMPT, device=device))
    position = torch.full((1,), _PROMPT, device=device, dtype=torch.long)

    forward = torch.compile(model.forward, dynamic=False) if compiled else model

    def step() -> None:
        logits = forward(token, past_key_values=cache, use_cache=True, cache_position=position,
                       position_ids=position[None]).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    run = step
    if torch.device(device).type == "cuda":
        run = _captured(step, position)
    return _median(run, position, device)


def _captured(step: Any, position: Tensor) -> Any:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _median(run: Any, position: Tensor, device: str) -> float:
    is_gpu = torch.device(device).type == "cuda"
    times = []
    for i in range(_STEPS):
        position.fill_(_PROMPT + i)
        if is_gpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        if is_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)
