"""Proof that a short way on a GPU computes what the host's block does: both run on probing inputs, cache included.

A block with quantized activations amplifies: one rounding that falls to the other side turns a code, and a code of four
bits is a large step. So the halves of the short way are given what the host's own parts read and made, seen by hooks:
attention from the residual, the rest from the host's answer of o. Each then differs by single roundings alone. Tokens
are at the last positions of the context, where some attentions scale their scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from anybit.hosts.blocks import far_positions
from anybit.hosts.blocks_gpu import Reader, ShortWay

__all__ = ["is_norm_proven", "is_proven"]

_TOKENS: Final = 5  # held before the step
_SIZE: Final = 0.0625  # of the residual: small, so that rounding it hides little of what a block adds
# of the root of the mean square, in roundings of the dtype (2^-8 or 2^-11): what one norm, product and rotation make,
# shared by both ways but for a float32 sum that falls to the other side; attention, whose weights the host rounds;
# what the other half adds, by bits of its activations, whose codes may turn with the norm's rounding
_MADE_ONCE: Final = 0.5
_ATTENDED: Final = 2.0
_ADDED: Final = ((4, 16.0), (8, 4.0), (16, 2.0))
_UNIT: Final = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def is_proven(layer: nn.Module, short: ShortWay, config: Any, rotary: nn.Module) -> bool:
    """True if the block equals the host's for a growing cache or a static one; says in `short` for which."""
    weight = short.weight
    made = torch.Generator().manual_seed(short.index)
    x = torch.randn(1, _TOKENS + 2, weight.shape[0], generator=made) * _SIZE
    x = x.to(device=weight.device, dtype=weight.dtype)
    positions = far_positions(config, _TOKENS + 2).to(x.device)
    try:
        with torch.inference_mode():
            cosine, sine = rotary(x, positions)
            if cosine.shape[-1] != short.attention.dim or cosine.dtype != x.dtype:
                return False
            probe = _Probe(layer, short, config, x, positions, (cosine, sine))
            short.grows, short.is_static = probe.grows(), probe.is_static()
    except Exception:  # whatever the host's block is, it is not the one we know
        short.grows = short.is_static = False
    return short.grows or short.is_static


def is_norm_proven(module: nn.Module, found: Reader) -> bool:
    """True if the norm makes what the host's module does, but for single roundings."""
    weight = found.norm.weight
    made = torch.Generator().manual_seed(1)
    x = torch.randn(3, weight.shape[0], generator=made).to(device=weight.device, dtype=weight.dtype)
    try:
        with torch.inference_mode():
            return _close(cast("Tensor", found(x)[1].values), module(x), _MADE_ONCE)
    except Exception:  # not the norm that we know
        return False


class _Probe:
    """One block with inputs x [1, tokens, hidden] at `positions`, and their rotation."""

    def __init__(
        self, layer: nn.Module, short: ShortWay, config: Any, x: Tensor, positions: Tensor,
        rotation: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        self.layer, self.short, self.config = layer, short, config
        self.x, self.positions, self.rotation = x, positions, rotation

    def host(self, cache: Any, at: slice, mask: Tensor | None) -> Tensor:
        """The block's own answer for tokens `at`."""
        found = self.layer(
            self.x[:, at], attention_mask=mask, position_ids=self.positions[:, at], past_key_values=cache,
            use_cache=True, position_embeddings=tuple(t[:, at] for t in self.rotation))
        return cast("Tensor", found[0] if isinstance(found, tuple) else found)

    def grows(self) -> bool:
        """One token in an ordinary cache, without a mask."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        caches = [DynamicCache(config=self.config) for _ in range(2)]
        for cache in caches:
            for i in range(_TOKENS):
                self.host(cache, slice(i, i + 1), None)
        if type(caches[1].layers[self.short.index]) is not DynamicLayer:
            return False
        return self._agree(caches, slice(_TOKENS, _TOKENS + 1), None)

    def is_static(self) -> bool:
        """Two tokens at once in a cache with room for more, with the mask that goes with it."""
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        room = _TOKENS + 4
        caches = [StaticCache(config=self.config, max_cache_len=room) for _ in range(2)]
        places = torch.arange(room, device=self.x.device)

        def mask(at: slice) -> Tensor:
            return (places[None, :] <= places[at, None])[None, None]

        for cache in caches:
            for i in range(_TOKENS):
                self.host(cache, slice(i, i + 1), mask(slice(i, i + 1)))
        own, kept = (cast("Any", cache.layers[self.short.index]) for cache in caches)
        if type(kept) is not StaticLayer or not isinstance(getattr(kept, "cumulative_length", None), Tensor):
            return False
        last = slice(_TOKENS, _TOKENS + 2)
        agree = self._agree(caches, last, mask(last))
        return agree and torch.equal(own.cumulative_length, kept.cumulative_length)

    def _agree(self, caches: list[Any], at: slice, mask: Tensor | None) -> bool:
        """True if both halves make what the host's parts do from the same, and store the same."""
        short, hidden = self.short, self.x.shape[2]
        own, kept = (cast("Any", cache.layers[short.index]) for cache in caches)
        if kept.keys.dtype != self.x.dtype or not short.is_whole:  # a quantized cache, parts with hooks
            return False
        with _seen(self.layer) as seen:
            wanted = self.host(caches[0], at, mask).reshape(-1, hidden)
        if any(len(found) != 1 for found in seen.values()):
            return False
        read, o, middle = (seen[name][0].flatten(0, -2) for name in ("read", "o", "middle"))
        x = self.x[:, at].contiguous()
        attended = short.attend(x, self.rotation[0][:, at], self.rotation[1][:, at], kept, mask)
        total, down = short.feed(x.view(-1, hidden), o, kept, x.shape[1])
        bits = min(p.bits for p in (short.gate_up, short.down))
        added = next(share for most, share in _ADDED if bits <= most)
        return (
            _close(kept.keys, own.keys, _MADE_ONCE) and _close(kept.values, own.values, _MADE_ONCE)
            and _close(attended, read, _ATTENDED) and _close(total, middle, _MADE_ONCE)
            and _close(total + down - total, wanted - middle, added)
        )  # fmt: skip


@contextmanager
def _seen(layer: Any) -> Iterator[dict[str, list[Tensor]]]:
    """What o reads and makes, and what the second norm reads, while the block runs."""
    seen: dict[str, list[Tensor]] = {"read": [], "o": [], "middle": []}
    o, norm = layer.self_attn.o_proj, layer.post_attention_layernorm
    handles = [o.register_forward_pre_hook(lambda _, args: seen["read"].append(args[0].clone())),
               o.register_forward_hook(lambda _, __, made: seen["o"].append(made.clone())),
               norm.register_forward_pre_hook(lambda _, args: seen["middle"].append(args[0].clone()))]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _close(found: Tensor, wanted: Tensor, roundings: float) -> bool:
    """True if the difference is at most so many roundings of the dtype, by the root of the mean square."""
    if found.shape != wanted.shape:
        return False
    error = (found.float() - wanted.float()).square().mean().sqrt()
    return bool(error <= roundings * _UNIT[wanted.dtype] * wanted.float().square().mean().sqrt())
