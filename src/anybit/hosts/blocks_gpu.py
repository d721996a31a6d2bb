"""Decoder blocks of few kernels on a GPU, where the host's block is proven to be the one that they compute.

The contract is that of `blocks.py`: no list of architectures. A block qualifies if it has the parts of the common one
(norm, q/k/v, o, norm, gate/up, down, a silu between) and if its answer, keys and values equal the host's own on probing
inputs, in a growing and in a static cache. A call takes the short way for up to 8 tokens of all sequences together,
in 16 bits, with a boolean mask, or for one token without; nothing that records gradients or inner results, no compiler.
Every other call goes to the host's code.

Eight launches a block: q/k/v and gate/up are one product each where their stored weights fit below each other, what a
product reads is quantized by the kernel that makes it, the cache is written by the kernel that reads it, and the last
launch is the next block's norm. All of it can be captured in a graph and goes on from where the cache is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from anybit.hosts.blocks import OF_ATTENTION, OF_BLOCK, OF_MLP, RECORDED, decoder_layers, own_forward, parts_of
from anybit.hosts.blocks_parts import Products, products_of
from anybit.hosts.modules import AnybitLinear, Place, are_in_place
from anybit.kernels.triton.block import AS_THEY_ARE, Attention, Gate, Norm, Rows
from anybit.kernels.triton.block_launch import LARGEST_M, LARGEST_ROW, needs_row
from anybit.kernels.triton.devices import on_device

__all__ = ["shorten_steps"]

_DTYPES: Final = (torch.bfloat16, torch.float16)
_NEEDED: Final = frozenset((*OF_BLOCK, *OF_ATTENTION, *OF_MLP)) - {"q_norm", "k_norm"}
_WIDEST: Final = 8192  # columns that one program quantizes by one scale in good time
_ROOM: Final = 256  # tokens by which a growing cache grows at least


def shorten_steps(model: nn.Module, dtype: torch.dtype) -> int:
    """Give every qualifying decoder block of a model on a GPU its short way; how many there are."""
    from anybit.hosts.blocks_proof import is_proven

    config = cast("Any", model).config.get_text_config()
    rotary = next((m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)
    if rotary is None or dtype not in _DTYPES or getattr(config, "num_attention_heads", None) is None:
        return 0
    layers = list(decoder_layers(model))
    found: dict[int, ShortWay] = {}
    for number, layer in enumerate(layers):
        short = short_way(layer, config, dtype)
        if short is not None and is_proven(layer, short, config, rotary):
            found[number] = short
    for number, short in found.items():
        follower = layers[number + 1] if number + 1 in found else None
        if follower is not None:
            short.next = found[number + 1].first
        elif number + 1 == len(layers):
            follower, short.next = _final_norm(model, layers[number], short)
        _install(layers[number], short, follower)
    return len(found)


# --- the parts --------------------------------------------------------------------------------------------------------


class Reader:
    """A norm, and the products that read it (None: nothing in particular)."""

    def __init__(self, norm: Norm, products: Products | None = None) -> None:
        self.norm, self._products = norm, products
        self._made: tuple[Tensor, Rows] | None = None

    def __call__(self, x: Tensor, **more: Any) -> tuple[Tensor, Rows]:
        """As `Norm`."""
        wanted = AS_THEY_ARE if self._products is None else self._products.wanted(x.shape[0], x.device)
        return self.norm(x, wanted, **more)

    def keep(self, x: Tensor, rows: Rows) -> None:
        """What the norm makes of this very tensor, made beforehand."""
        self._made = (x, rows)

    def take(self, x: Tensor) -> Rows | None:
        """What was kept for this very tensor; once."""
        made, self._made = self._made, None
        return made[1] if made is not None and made[0] is x else None


@dataclass
class ShortWay:
    """One block's call, and what must hold for it.

    index              of its layer in a cache
    found              the host's modules that it stands for, each with its parent's table and its name there
    next               the norm that reads the answer first: of the next block, or of the model
    grows, is_static   kinds of caches that it is proven for
    """

    index: int
    found: tuple[Place, ...]
    first: Reader
    qkv: Products
    attention: Attention
    o: Products
    second: Reader
    gate_up: Products
    gate: Gate
    down: Products
    next: Reader | None = None
    grows: bool = False
    is_static: bool = False

    @property
    def weight(self) -> Tensor:
        """Of its first norm: where the block is, its width and dtype."""
        return self.first.norm.weight

    @property
    def is_whole(self) -> bool:
        """False while another module is in the place of one (an adapter), or one is hooked or patched."""
        return are_in_place(self.found)

    def __call__(
        self, x: Tensor, cosine: Tensor, sine: Tensor, layer: Any, mask: Tensor | None, *, leads: bool = False
    ) -> Tensor:
        """The block's y [B, T, hidden]; the tokens' keys and values are in the cache's layer.

        leads  the next norm is made along: nobody sees or changes y before it
        """
        batch, tokens, hidden = x.shape
        (o,) = self.o(Rows(self.attend(x, cosine, sine, layer, mask)))
        middle, down = self.feed(x.view(-1, hidden), o, layer, tokens)
        if self.next is None or not leads:
            return (middle + down).view(batch, tokens, hidden)
        total, made = self.next(middle, delta=down)
        y = total.view(batch, tokens, hidden)
        self.next.keep(y, made)
        return y

    def attend(self, x: Tensor, cosine: Tensor, sine: Tensor, layer: Any, mask: Tensor | None) -> Tensor:
        """What o reads, [B T, heads dim]; keys and values are stored, and a static cache has yet to count them."""
        tokens = x.shape[1]
        made = self.first.take(x)
        if made is None:
            _, made = self.first(x.view(-1, x.shape[2]))
        q, k, v = self.qkv(made)
        if _is_static(layer):
            count: Tensor = layer.cumulative_length
            return self.attention(q, k, v, cosine, sine, layer.keys, layer.values, tokens, count, mask)
        held = int(layer.keys.shape[2])
        keys, values = _room(layer, tokens)
        attended = self.attention(q, k, v, cosine, sine, keys, values, tokens, held, mask)
        layer.keys, layer.values = keys[:, :, : held + tokens], values[:, :, : held + tokens]
        return attended

    def feed(self, x: Tensor, o: Tensor, layer: Any, tokens: int) -> tuple[Tensor, Tensor]:
        """x + o, and what down makes, both [B T, hidden]; a static cache has counted its tokens."""
        count = layer.cumulative_length if _is_static(layer) else None
        middle, made = self.second(x, delta=o, count=count, added=tokens)
        lit, up = self.gate_up(made)
        (down,) = self.down(self.gate(lit, up, self.down.wanted(x.shape[0], x.device)))
        return middle, down


def short_way(layer: nn.Module, config: Any, dtype: torch.dtype) -> ShortWay | None:
    """The kernels' block of a host's block, not yet proven; None where a part is missing or of another kind."""
    attention, mlp = cast("Any", layer).self_attn, cast("Any", layer).mlp
    norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    weights = [weight_of(n, dtype) for n in norms]
    if any(w is None or w.numel() > LARGEST_ROW for w in weights):
        return None
    if getattr(attention, "sliding_window", None) is not None or not isinstance(attention.layer_idx, int):
        return None
    if getattr(attention, "attention_dropout", 0.0):
        return None
    groups = [(attention, ("q_proj", "k_proj", "v_proj")), (mlp, ("gate_proj", "up_proj")), (mlp, ("down_proj",))]
    found = parts_of(layer)
    if not {name for _, name, _ in found} >= _NEEDED:
        return None
    layers = [[getattr(parent, name) for name in names] for parent, names in groups]
    products = [products_of(modules, dtype, is_alone=_is_wide(modules[0])) for modules in layers]
    o = products_of([attention.o_proj], dtype, is_alone=True)
    heads = _attention_of(attention, config, dtype)
    if o is None or heads is None or any(p is None for p in products):
        return None
    qkv, gate_up, down = cast("list[Products]", products)
    sizes = (heads.heads * heads.dim, heads.kv_heads * heads.dim, heads.kv_heads * heads.dim)
    if qkv.rows != sizes or gate_up.rows[0] != gate_up.rows[1] or gate_up.rows[0] > LARGEST_ROW:
        return None
    first, second = (Reader(Norm(cast("Tensor", w), eps_of(n)), p)
                     for w, n, p in zip(weights, norms, (qkv, gate_up), strict=True))
    return ShortWay(attention.layer_idx, found, first, qkv, heads, o, second, gate_up, Gate(), down)


def _is_wide(module: Any) -> bool:
    """True where one program is slow to see a row that its scale needs: a kernel of several quantizes it."""
    spec = module.product.scheme.activation if isinstance(module, AnybitLinear) else None
    return spec is not None and module.in_features > _WIDEST and needs_row(spec)


def _attention_of(attention: Any, config: Any, dtype: torch.dtype) -> Attention | None:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    dim = int(getattr(attention, "head_dim", 0) or config.hidden_size // heads)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = (weight_of(n, dtype) for n in norms)
    if any(n is not None and (w is None or w.numel() != dim) for n, w in zip(norms, (q_norm, k_norm), strict=True)):
        return None
    if dim % 2 or dim > 256 or heads % kv_heads or heads // kv_heads * LARGEST_M > 256:
        return None
    eps = next((eps_of(n) for n in norms if n is not None), 0.0)
    return Attention(heads, kv_heads, dim, float(getattr(attention, "scaling", dim**-0.5)), q_norm, k_norm, eps)


def weight_of(found: object, dtype: torch.dtype) -> Tensor | None:
    """The weight [n] of a norm in the dtype of the activations; None for anything else."""
    weight = getattr(found, "weight", None)
    fits = isinstance(weight, Tensor) and weight.dim() == 1 and weight.dtype == dtype
    return cast("Tensor", weight) if fits else None


def eps_of(found: object) -> float:
    """What a norm adds to the mean of squares; 0 where it does not say."""
    return next((float(v) for name in ("variance_epsilon", "eps") if (v := getattr(found, name, None))), 0.0)


def _final_norm(model: nn.Module, last: nn.Module, short: ShortWay) -> tuple[nn.Module | None, Reader | None]:
    """The model's norm after its last block where it is of the blocks' kind, taking what the block made for it."""
    from anybit.hosts.blocks_proof import is_norm_proven

    parents = [m for m in model.modules() if any(last in list(child) for child in m.children()
                                                 if isinstance(child, nn.ModuleList))]
    found = getattr(parents[0], "norm", None) if len(parents) == 1 else None
    weight = weight_of(found, short.weight.dtype)
    if not isinstance(found, nn.Module) or weight is None or weight.shape != short.weight.shape:
        return None, None
    final = Reader(Norm(weight, eps_of(found)))
    if not is_norm_proven(found, final):
        return None, None
    own = own_forward(found)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = None if torch.compiler.is_compiling() else final.take(x)
        return own(x, *args, **kwargs) if made is None else cast("Tensor", made.values).view(x.shape)

    found.forward = forward
    return found, final


# --- caches -----------------------------------------------------------------------------------------------------------


def _is_static(layer: Any) -> bool:
    from transformers.cache_utils import StaticLayer

    return type(layer) is StaticLayer


def _layer_of(cache: Any, index: int, short: ShortWay, x: Tensor, mask: Tensor | None) -> Any | None:
    """The cache's layer, holding tokens as the kernels read them, with a mask that they know; else None."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", ())
    if index >= len(layers) or getattr(cache, "offloading", False):
        return None
    layer, (batch, tokens, _) = layers[index], x.shape
    if not getattr(layer, "is_initialized", False) or layer.keys.dim() != 4:
        return None
    keys, values = layer.keys, layer.values
    wanted = (batch, short.attention.kv_heads, keys.shape[2], short.attention.dim)
    if any(t.shape != wanted or t.dtype != x.dtype or t.device != x.device or t.stride()[2:] != (wanted[3], 1)
           for t in (keys, values)):
        return None
    seen = keys.shape[2]
    if _is_static(layer):
        count = getattr(layer, "cumulative_length", None)
        if not (short.is_static and isinstance(count, Tensor) and count.device == x.device
                and count.dtype == torch.int64 and mask is not None):
            return None
    elif type(layer) is DynamicLayer and short.grows and seen:
        seen += tokens
        if mask is None and tokens > 1:
            return None
    else:
        return None
    return layer if mask is None or _is_read(mask, (batch, 1, tokens, seen)) else None


def _is_read(mask: Tensor, shape: tuple[int, ...]) -> bool:
    return mask.dtype == torch.bool and mask.stride(-1) == 1 and mask.shape in (shape, (1, *shape[1:]))


def _room(layer: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Buffers that a growing layer's keys and values are the beginning of, with room for more tokens."""
    held = int(layer.keys.shape[2])
    kept = getattr(layer, "_anybit_room", None)
    if kept is not None:
        same = all(a.data_ptr() == b.data_ptr() and a.shape[:2] == b.shape[:2]
                   for a, b in zip(kept, (layer.keys, layer.values), strict=True))
        if same and held + tokens <= kept[0].shape[2]:
            return cast("tuple[Tensor, Tensor]", kept)
    layer._anybit_room = kept = None  # freed before more is asked for
    shape = (*layer.keys.shape[:2], held + max(_ROOM, held // 8), layer.keys.shape[3])
    keys, values = (torch.empty(shape, dtype=layer.keys.dtype, device=layer.keys.device) for _ in range(2))
    keys[:, :, :held] = layer.keys
    values[:, :, :held] = layer.values
    layer._anybit_room = (keys, values)
    return keys, values


# --- installing -------------------------------------------------------------------------------------------------------


def _install(layer: nn.Module, short: ShortWay, follower: nn.Module | None) -> None:
    """The layer's forward: the short way in the plain case, its own code otherwise."""
    own, held = own_forward(layer), weakref.ref(layer)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not torch.compiler.is_compiling() and _is_plain_call(hidden_states, short, kwargs):
            cosine, sine = kwargs["position_embeddings"]
            mask = kwargs.get("attention_mask")
            found = _layer_of(kwargs["past_key_values"], short.index, short, hidden_states, mask)
            if found is not None:
                # a hook may look at y, or change it, before the next norm reads it
                this = held()
                leads = follower is not None and this is not None and not (
                    this._forward_hooks or follower._forward_pre_hooks)
                with on_device(hidden_states.device):
                    return short(hidden_states, cosine, sine, found, mask, leads=leads)
        return own(hidden_states, *args, **kwargs)

    layer.forward = forward
    _leave_when_moved(layer, short, own)


def _leave_when_moved(layer: nn.Module, short: ShortWay, own: Callable[..., Any]) -> None:
    """The host's way again once the layer's weights lie elsewhere (`model.to(device)`).

    Launches hold addresses, and the joined weights are held by the short way alone.
    """
    held, where, address = weakref.ref(layer), short.weight.device, short.weight.data_ptr()
    short_way: list[ShortWay] = [short]

    def moved(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        this = held()
        assert this is not None
        type(this)._apply(this, fn, recurse)  # type: ignore[no-untyped-call]
        if short_way and (short_way[0].weight.device != where or short_way[0].weight.data_ptr() != address):
            short_way.clear()
            this.forward = own
            this.__dict__.pop("_apply", None)
        return this

    layer._apply = moved  # type: ignore[method-assign]


def _is_plain_call(x: Tensor, short: ShortWay, kwargs: dict[str, Any]) -> bool:
    """True for few tokens on the block's device, with a rotation and a cache, that nobody watches."""
    rotation, weight = kwargs.get("position_embeddings"), short.weight
    if x.dim() != 3 or x.numel() > LARGEST_M * x.shape[2] or x.dtype != weight.dtype or x.device != weight.device:
        return False
    if not (x.is_contiguous() and x.numel() and isinstance(rotation, tuple)):
        return False
    if torch.is_grad_enabled() or not short.is_whole:
        return False
    shape = (x.shape[1], short.attention.dim)
    return kwargs.get("past_key_values") is not None and not any(kwargs.get(name) for name in RECORDED) and all(
        t.dtype == x.dtype and t.shape[1:] == shape and t.shape[0] in (1, x.shape[0]) and t.stride(-1) == 1
        for t in rotation) and rotation[0].stride() == rotation[1].stride()
