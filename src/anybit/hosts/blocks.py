"""Decoder blocks as one call each, where the host's block is proven to be the one that the library knows.

No list of architectures: a block qualifies if it has the parts of the common one (norm, q/k/v, o, norm, gate/up, down,
all packed for the compiled library) and if the library's answer equals the host's own on probing inputs, cache
included. Whatever differs (another norm, another activation, a rotation of pairs, a soft cap) fails the probe and
stays with the host. A call takes the short way only in the plain case: one token, or a prompt into an empty cache;
float32, no mask, an ordinary growing cache, nothing that records gradients or inner results; every other call goes to
the host's code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from anybit.hosts.modules import AnybitLinear, Place, are_in_place
from anybit.kernels.linear.planes_native import StoredPlanes
from anybit.kernels.linear.planes_unit import StoredPart, whole_unit
from anybit.kernels.native.block import Block, BlockParts
from anybit.kernels.native.planes import Planes

_ROOM: Final = 256  # tokens by which a cache grows at least
_TOLERANCE: Final = 2e-5  # of the largest magnitude; the order of sums differs
_PROBE_TOKENS: Final = 5
RECORDED: Final = ("output_attentions", "output_hidden_states")
OF_BLOCK: Final = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
OF_ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")
OF_MLP: Final = ("gate_proj", "up_proj", "down_proj")


def shorten_steps(model: nn.Module) -> dict[nn.Module, ShortWay]:
    """Give every qualifying decoder block of a model on the CPU its short way; the blocks that have one."""
    config = cast("Any", model).config.get_text_config()
    rotary = next((m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)
    if rotary is None or getattr(config, "num_attention_heads", None) is None:
        return {}
    found = {}
    for layer in decoder_layers(model):
        short = _short_way(layer, config)
        if short is not None and _is_proven(layer, short, config, rotary):
            _install(layer, short)
            found[layer] = short
    return found


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that have the parts of a decoder block, in their order."""
    for module in model.modules():
        if hasattr(module, "self_attn") and hasattr(module, "mlp") and hasattr(module, "input_layernorm"):
            yield module


def _planes(module: object) -> list[Planes] | None:
    """The library's weight of a packed linear layer that does nothing but multiply; None for any other."""
    if not isinstance(module, AnybitLinear) or not module.product.is_plain:
        return None
    stored = module.product.stored
    if isinstance(stored, StoredPlanes):
        return stored.packed
    return None


def _joined(parent: nn.Module, *names: str) -> list[Planes] | None:
    """The layers of `parent` as one product: their unit's, or one after another."""
    modules = [getattr(parent, name, None) for name in names]
    linears = [m for m in modules if isinstance(m, AnybitLinear) and m.product.is_plain]
    if len(linears) < len(names):
        return None
    parts = [m.product.stored for m in linears if isinstance(m.product.stored, StoredPart)]
    if len(parts) == len(names):
        whole = whole_unit(parts)
        return None if whole is None else whole.packed
    found = [_planes(m) for m in linears]
    return None if any(f is None for f in found) else [plane for f in found if f is not None for plane in f]


def parts_of(layer: nn.Module) -> tuple[Place, ...]:
    """The modules of a block that its short way stands for, each with its parent's table and its name there."""
    attention, mlp = cast("Any", layer).self_attn, cast("Any", layer).mlp
    places = ((layer, OF_BLOCK), (attention, OF_ATTENTION), (mlp, OF_MLP))
    tables = [(cast("nn.Module", parent)._modules, name) for parent, names in places for name in names]
    return tuple((table, name, module) for table, name in tables if (module := table.get(name)) is not None)


class ShortWay:
    """One block's call, and what must hold for it."""

    def __init__(self, block: Block, index: int, found: tuple[Place, ...] = ()) -> None:
        """`found`: what `parts_of` says of the host's block."""
        self.block = block
        self.index = index
        self.found = found
        self.takes_prompts = False  # until proven
        self.forward: Callable[..., Any] | None = None  # what the layer got

    def __call__(self, x: Tensor, cosine: Tensor, sine: Tensor, layer: Any) -> Tensor:
        """The block's y; the token's keys and values are appended to the cache's layer."""
        tokens = int(layer.keys.shape[2])
        keys, values = room_of(layer, tokens)
        y = self.block.step(x, cosine, sine, keys, values, tokens)
        layer.keys, layer.values = keys[:, :, : tokens + 1], values[:, :, : tokens + 1]
        return y

    def prompt(self, x: Tensor, cosine: Tensor, sine: Tensor, layer: Any) -> Tensor:
        """The same for the tokens x [1, T, hidden] of a prompt; the cache's layer is empty."""
        tokens = x.shape[1]
        shape = (1, self.block.kv_heads, tokens + _ROOM, self.block.dim)
        keys, values = (torch.empty(shape, dtype=torch.float32) for _ in range(2))
        y = self.block.many(x, cosine, sine, keys, values, 0)
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys[:, :, :tokens], values[:, :, :tokens]
        layer._anybit_room = (keys, values)
        return y


def room_of(layer: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Buffers that the layer's keys and values are the beginning of, with room for one token more."""
    held = getattr(layer, "_anybit_room", None)
    if held is not None:
        keys, values = held
        same = keys.data_ptr() == layer.keys.data_ptr() and values.data_ptr() == layer.values.data_ptr()
        if same and tokens < keys.shape[2]:
            return keys, values
    shape = (*layer.keys.shape[:2], tokens + max(_ROOM, tokens // 2), layer.keys.shape[3])
    keys, values = (torch.empty(shape, dtype=torch.float32) for _ in range(2))
    keys[:, :, :tokens] = layer.keys
    values[:, :, :tokens] = layer.values
    layer._anybit_room = (keys, values)
    return keys, values


def _short_way(layer: nn.Module, config: Any) -> ShortWay | None:
    """The library's block of a host's block, not yet proven; None where a part is missing or of another kind."""
    attention, mlp = cast("Any", layer).self_attn, cast("Any", layer).mlp
    products = [_joined(attention, "q_proj", "k_proj", "v_proj"), _joined(attention, "o_proj"),
                _joined(mlp, "gate_proj", "up_proj"), _joined(mlp, "down_proj")]
    if any(p is None for p in products) or getattr(attention, "sliding_window", None) is not None:
        return None
    qkv, o, gate_up, down = (cast("list[Planes]", p) for p in products)
    first, second = (_weight_of(getattr(layer, n, None)) for n in ("input_layernorm", "post_attention_layernorm"))
    norm = getattr(layer, "input_layernorm", None)
    eps = next((float(v) for name in ("variance_epsilon", "eps") if (v := getattr(norm, name, None))), None)
    if first is None or second is None or eps is None:
        return None
    dim = int(getattr(attention, "head_dim", 0) or config.hidden_size // config.num_attention_heads)
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads or config.num_attention_heads)
    q_norm, k_norm = (_weight_of(getattr(attention, n, None)) for n in ("q_norm", "k_norm"))
    if any(w is not None and w.numel() != dim for w in (q_norm, k_norm)):
        return None
    if sum(p.rows for p in qkv) != (heads + 2 * kv_heads) * dim or len(down) != 1:
        return None
    scaling = float(getattr(attention, "scaling", dim**-0.5))
    parts = BlockParts(qkv, o, gate_up, down, first, second, q_norm, k_norm, eps, scaling, heads, kv_heads, dim)
    index = getattr(attention, "layer_idx", None)
    return None if not isinstance(index, int) else ShortWay(Block(parts), index, parts_of(layer))


def _weight_of(norm: object) -> Tensor | None:
    """The float32 weight [n] of a norm; None for anything else."""
    weight = getattr(norm, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 1 and weight.dtype == torch.float32 else None


def _is_proven(layer: nn.Module, short: ShortWay, config: Any, rotary: nn.Module) -> bool:
    """True if block and cache equal the host's for a token after a few others; sets `takes_prompts` by a prompt."""
    made = torch.Generator().manual_seed(short.index)
    x = torch.randn(1, _PROBE_TOKENS + 1, short.block.hidden, generator=made)
    positions = far_positions(config, _PROBE_TOKENS + 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.inference_mode():
            cosine, sine = rotary(x, positions)
            if cosine.shape[-1] != short.block.dim:
                return False
            host = partial(run_host, layer, x, cosine, sine, positions)
            if not _steps_agree(host, short, config, x, cosine, sine):
                return False
            short.takes_prompts = short.block.takes_many and _prompts_agree(host, short, config, x, cosine, sine)
            return True
    except Exception:  # whatever the host's block is, it is not the one we know
        return False
    finally:
        torch.set_num_threads(threads)


def far_positions(config: Any, tokens: int) -> Tensor:
    """The last positions of a context [1, tokens]: some attentions scale their scores there and nowhere else."""
    return torch.arange(tokens)[None] + max(3, int(getattr(config, "max_position_embeddings", 0) or 0) - tokens)


_Host = Callable[[Any, slice], Tensor]  # (cache, which tokens) -> the host's y


def _steps_agree(host: _Host, short: ShortWay, config: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    from transformers import DynamicCache

    caches = [DynamicCache(config=config), DynamicCache(config=config)]
    for cache in caches:
        for i in range(_PROBE_TOKENS):
            host(cache, slice(i, i + 1))
    if not is_plain_layer(caches[1], short.index):
        return False
    last = slice(_PROBE_TOKENS, _PROBE_TOKENS + 1)
    wanted = host(caches[0], last)
    own, kept = (cast("Any", cache.layers[short.index]) for cache in caches)
    turn = [t[:, last].contiguous() for t in (cosine, sine)]
    found = short(x[:, last].contiguous(), turn[0], turn[1], kept)
    return all(close(a, b) for a, b in ((found, wanted), (kept.keys, own.keys), (kept.values, own.values)))


def _prompts_agree(host: _Host, short: ShortWay, config: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    """True if a host that gets no mask attends causally, as the library does, and all else is equal."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    wanted = host(cache, slice(None))
    own, kept = cast("Any", cache.layers[short.index]), _empty_layer(DynamicCache(config=config), short.index)
    if kept is None:
        return False
    found = short.prompt(x, cosine.contiguous(), sine.contiguous(), kept)
    return all(close(a, b) for a, b in ((found, wanted), (kept.keys, own.keys), (kept.values, own.values)))


def run_host(
    layer: nn.Module, x: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor, cache: Any, at: slice
) -> Tensor:
    """The block's y as the host computes it, without a mask."""
    found = layer(x[:, at], attention_mask=None, position_ids=positions[:, at], past_key_values=cache, use_cache=True,
                  position_embeddings=(cosine[:, at], sine[:, at]))
    return cast("Tensor", found[0] if isinstance(found, tuple) else found)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal but for the order of sums."""
    return found.shape == wanted.shape and bool(
        ((found - wanted).abs() <= _TOLERANCE * wanted.abs().amax().clamp(min=1e-6)).all()
    )


def is_plain_layer(cache: Any, index: int) -> bool:
    """True for a layer of an ordinary growing cache that holds tokens of one sequence in float32."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", ())
    if index >= len(layers) or type(layers[index]) is not DynamicLayer:
        return False
    keys = layers[index].keys
    return isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[0] == 1 and keys.dtype == torch.float32


def _empty_layer(cache: Any, index: int) -> Any | None:
    """The layer of an ordinary growing cache that holds nothing yet, made where the cache makes it later; or None."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False):
        return None
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        while len(layers) <= index:
            layers.append(cast("Any", DynamicLayer)())
    if index >= len(layers) or type(layers[index]) is not DynamicLayer or layers[index].get_seq_length():
        return None
    return layers[index]


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's forward, without a hold on the module: a cycle would keep a deleted model's memory for a while."""
    own: Any = module.forward
    if getattr(own, "__self__", None) is not module:
        return cast("Callable[..., Any]", own)
    function, held = own.__func__, weakref.ref(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(held(), *args, **kwargs)

    return forward


def _install(layer: nn.Module, short: ShortWay) -> None:
    """The layer's forward: the short way in the plain case, its own code otherwise."""
    own = own_forward(layer)
    hidden, dim = short.block.hidden, short.block.dim

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rotation = kwargs.get("position_embeddings")
        cache = kwargs.get("past_key_values")
        tokens = hidden_states.numel() // hidden
        if (
            (tokens == 1 or short.takes_prompts) and hidden_states.dtype == torch.float32 and not args
            and rotation is not None and cache is not None and kwargs.get("attention_mask") is None
            and not torch.is_grad_enabled() and hidden_states.is_contiguous() and hidden_states.device.type == "cpu"
            and not any(kwargs.get(name) for name in RECORDED) and not torch.compiler.is_compiling()
            and are_in_place(short.found)
        ):
            cosine, sine = rotation
            fits = cosine.dtype == torch.float32 and cosine.numel() == tokens * dim
            if fits and tokens == 1 and is_plain_layer(cache, short.index):
                return short(hidden_states, cosine.contiguous(), sine.contiguous(), cache.layers[short.index])
            if fits and tokens > 1 and hidden_states.shape[0] == 1:
                empty = _empty_layer(cache, short.index)
                if empty is not None:
                    return short.prompt(hidden_states, cosine.contiguous(), sine.contiguous(), empty)
        return own(hidden_states, *args, **kwargs)

    layer.forward = short.forward = forward
