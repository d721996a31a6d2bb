"""Proof that a short way on a GPU computes what the host's block does: both run on probing inputs, cache included.

What may differ is where a float32 sum is rounded to 16 bits: a few of a token's numbers fall to the other side, and so
do codes of quantized activations. Keys and values, which only one norm, product and rotation make, show small changes
of these; the block's own contribution (y less the residual) shows the rest.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from anybit.hosts.blocks import run_host
from anybit.hosts.blocks_gpu import Norm, ShortWay

__all__ = ["is_norm_proven", "is_proven"]

_TOKENS: Final = 5  # held before the step
_SIZE: Final = 0.0625  # of the residual: small, so that rounding it hides little of what a block adds
# of the root of the mean square. One rounding to 8 significant bits makes 1.1e-3 of every number; the two ways share
# nearly all of theirs. A code that falls to the other side moves a number by a step: half of it for 4 bits at worst.
_MADE_ONCE: Final = 2.0**-9
_ADDED: Final = ((4, 2.0**-3.5), (8, 2.0**-6), (16, 2.0**-7))  # (bits of activations, share)


def is_proven(layer: nn.Module, short: ShortWay, config: Any, rotary: nn.Module) -> bool:
    """True if the block equals the host's for a growing cache or a static one; says in `short` for which."""
    weight = short.first.weight
    made = torch.Generator().manual_seed(short.index)
    x = torch.randn(1, _TOKENS + 2, weight.shape[0], generator=made) * _SIZE
    x = x.to(device=weight.device, dtype=weight.dtype)
    positions = torch.arange(_TOKENS + 2, device=x.device)[None] + 3
    try:
        with torch.inference_mode():
            cosine, sine = rotary(x, positions)
            if cosine.shape[-1] != short.attention.dim or cosine.dtype != x.dtype:
                return False
            short.grows = _grows(layer, short, config, x, positions, cosine, sine)
            short.is_static = _is_static(layer, short, config, x, positions, cosine, sine)
    except Exception:  # whatever the host's block is, it is not the one we know
        short.grows = short.is_static = False
    return short.grows or short.is_static


def is_norm_proven(module: nn.Module, found: Norm) -> bool:
    """True if the norm makes what the host's module does, but for single roundings."""
    made = torch.Generator().manual_seed(1)
    x = torch.randn(3, found.weight.shape[0], generator=made).to(device=found.weight.device, dtype=found.weight.dtype)
    try:
        with torch.inference_mode():
            return _close(found(x)[1].values, module(x), _MADE_ONCE)
    except Exception:  # not the norm that we know
        return False


def _grows(layer: nn.Module, short: ShortWay, config: Any, x: Tensor, positions: Tensor, cosine: Tensor,
           sine: Tensor) -> bool:  # fmt: skip
    """One token in an ordinary cache, without a mask."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    host = partial(run_host, layer, x, cosine, sine, positions)
    caches = [DynamicCache(config=config), DynamicCache(config=config)]
    for cache in caches:
        for i in range(_TOKENS):
            host(cache, slice(i, i + 1))
    own, kept = (cast("Any", cache.layers[short.index]) for cache in caches)
    if type(kept) is not DynamicLayer:
        return False
    last = slice(_TOKENS, _TOKENS + 1)
    wanted = host(caches[0], last)
    found = short(x[:, last].contiguous(), cosine[:, last], sine[:, last], kept, None)
    return _agree(short, x[:, last], found, wanted, kept, own)


def _is_static(layer: nn.Module, short: ShortWay, config: Any, x: Tensor, positions: Tensor, cosine: Tensor,
               sine: Tensor) -> bool:  # fmt: skip
    """Two tokens at once in a cache with room for more, with the mask that goes with it."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    room = _TOKENS + 4
    caches = [StaticCache(config=config, max_cache_len=room) for _ in range(2)]
    places = torch.arange(room, device=x.device)

    def mask(at: slice) -> Tensor:
        return (places[None, :] <= places[at, None])[None, None]

    def host(cache: Any, at: slice) -> Tensor:
        found = layer(x[:, at], attention_mask=mask(at), position_ids=positions[:, at], past_key_values=cache,
                      use_cache=True, position_embeddings=(cosine[:, at], sine[:, at]))
        return cast("Tensor", found[0] if isinstance(found, tuple) else found)

    for cache in caches:
        for i in range(_TOKENS):
            host(cache, slice(i, i + 1))
    own, kept = (cast("Any", cache.layers[short.index]) for cache in caches)
    if type(kept) is not StaticLayer or not isinstance(getattr(kept, "cumulative_length", None), Tensor):
        return False
    last = slice(_TOKENS, _TOKENS + 2)
    wanted = host(caches[0], last)
    found = short(x[:, last].contiguous(), cosine[:, last], sine[:, last], kept, mask(last))
    counts = torch.equal(own.cumulative_length, kept.cumulative_length)
    return counts and _agree(short, x[:, last], found, wanted, kept, own)


def _agree(short: ShortWay, x: Tensor, found: Tensor, wanted: Tensor, kept: Any, own: Any) -> bool:
    """True if y and the cache are the same within what roundings explain."""
    bits = min(p.bits for p in (short.qkv, short.o, short.gate_up, short.down))
    allowed = next((share for most, share in _ADDED if bits <= most))
    return _close(kept.keys, own.keys, _MADE_ONCE) and _close(kept.values, own.values, _MADE_ONCE) and _close(
        found.float() - x.float(), wanted.float() - x.float(), allowed)


def _close(found: Tensor, wanted: Tensor, allowed: float) -> bool:
    """True if the difference is at most a share of the numbers, both by the root of the mean square."""
    if found.shape != wanted.shape:
        return False
    error = (found.float() - wanted.float()).square().mean().sqrt()
    return bool(error <= allowed * wanted.float().square().mean().sqrt())
