"""All decoder blocks of a model as one call for a step of one token, where the whole is proven to equal the host's.

`blocks.py` proves and shortens single blocks; between them the host still spends more time in Python than a small model
in arithmetic. A chain takes the place of the base model's forward in the plain case only: one token after others, no
mask that hides any, ordinary growing caches, nothing recorded, no hooks on the blocks; everything else goes the host's
way, block by block.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from anybit.hosts.blocks import ShortWay, close, is_plain_layer, own_forward, room_of
from anybit.hosts.modules import are_in_place
from anybit.kernels.native.block import Caches, Chain

_PROBE: Final = (1, 2, 3, 5, 7, 4)  # tokens; the last one's step is compared
_PLAIN: Final = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
_KNOWN: Final = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"}


def chain_steps(model: nn.Module, shorts: Mapping[nn.Module, ShortWay]) -> int:
    """Give every base model whose blocks all have a short way its chain; how many blocks are in chains."""
    chained = 0
    for base in model.modules():
        layers = getattr(base, "layers", None)
        parts = [getattr(base, name, None) for name in ("embed_tokens", "norm", "rotary_emb")]
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or any(part is None for part in parts):
            continue
        found = [shorts[layer] for layer in layers if layer in shorts]
        if [short.index for short in found] == list(range(len(layers))):
            chained += _give(base, list(layers), found)
    return chained


def _give(base: nn.Module, layers: list[nn.Module], shorts: list[ShortWay]) -> int:
    try:
        steps = _Steps(base, layers, shorts)
        if not _is_proven(base, steps):
            return 0
    except Exception:  # whatever the host's model is, it is not the one we know
        return 0
    own = own_forward(base)

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = steps(kwargs) if not args else None
        return own(*args, **kwargs) if found is None else found

    base.forward = forward
    return len(layers)


class _Steps:
    """Single steps of one base model."""

    def __init__(self, base: nn.Module, layers: list[nn.Module], shorts: list[ShortWay]) -> None:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self.output = BaseModelOutputWithPast
        self._base = cast("Any", weakref.proxy(base))  # a cycle would keep a deleted model for a while
        self._layers = [(layer, short.forward) for layer, short in zip(layers, shorts, strict=True)]
        self._found = tuple(found for short in shorts for found in short.found)
        self._chain = Chain([short.block for short in shorts])

    def __call__(self, given: dict[str, Any]) -> Any | None:
        """The host's answer to forward(**given), or None where this is not the plain case."""
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        if not isinstance(ids, Tensor) or ids.shape != (1, 1) or ids.device.type != "cpu" or cache is None:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not given.get("use_cache"):
            return None
        others = ((name, value) for name, value in given.items() if name not in _KNOWN and value is not None)
        if any(value is not _PLAIN.get(name) for name, value in others):
            return None
        if given.get("inputs_embeds") is not None or self._config_records() or not self._are_ours():
            return None
        held = self._caches(cache)
        if held is None or not _is_next(given, held[1]):
            return None
        return self._step(ids, cache, *held)

    def _config_records(self) -> bool:
        config = self._base.config
        return any(getattr(config, name, plain) is not plain for name, plain in _PLAIN.items())

    def _are_ours(self) -> bool:
        """True while every block has the short way that it was given, and nobody listens."""
        return all(
            layer.__dict__.get("forward") is forward and not layer._forward_hooks and not layer._forward_pre_hooks
            for layer, forward in self._layers
        ) and are_in_place(self._found)

    def _step(self, ids: Tensor, cache: Any, caches: Caches, tokens: int) -> Any | None:
        base = self._base
        x = base.embed_tokens(ids)
        cosine, sine = base.rotary_emb(x, position_ids=torch.tensor([[tokens]]))
        if any(t.dtype != torch.float32 or not t.is_contiguous() for t in (x, cosine, sine)):
            return None
        if cosine.numel() != self._chain.blocks[0].dim:
            return None
        y = self._chain.step(x, cosine, sine, caches, tokens)
        for layer, (keys, values) in zip(cache.layers, caches.rooms, strict=True):
            layer.keys, layer.values = keys.narrow(2, 0, tokens + 1), values.narrow(2, 0, tokens + 1)
        cache._anybit_seen = [(layer.keys, layer.values) for layer in cache.layers]
        return self.output(last_hidden_state=base.norm(y), past_key_values=cache)

    def _caches(self, cache: Any) -> tuple[Caches, int] | None:
        """Buffers with room for one token more, and the tokens they hold; None for other caches."""
        layers: list[Any] = list(getattr(cache, "layers", ()))
        if len(layers) != len(self._layers) or getattr(cache, "offloading", False):
            return None
        seen: list[tuple[Tensor, Tensor]] = getattr(cache, "_anybit_seen", [])
        held: Caches | None = getattr(cache, "_anybit_caches", None)
        if (
            held is not None and len(seen) == len(layers) and seen[0][0].shape[2] < held.room
            and all(layer.keys is k and layer.values is v for layer, (k, v) in zip(layers, seen, strict=True))
        ):
            return held, int(seen[0][0].shape[2])
        if not all(is_plain_layer(cache, i) for i in range(len(layers))):
            return None
        lengths = {int(layer.keys.shape[2]) for layer in layers}
        if len(lengths) != 1 or lengths == {0}:
            return None
        tokens = lengths.pop()
        held = cache._anybit_caches = Caches([room_of(layer, tokens) for layer in layers])
        return held, tokens


def _is_next(given: dict[str, Any], tokens: int) -> bool:
    """True if mask and position say what they say without being given: a token after all the others."""
    mask, position = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == (1, tokens + 1) and bool(mask.all())):
        return False
    return position is None or (isinstance(position, Tensor) and position.shape == (1, 1) and int(position) == tokens)


def _is_proven(base: nn.Module, steps: _Steps) -> bool:
    """True if a step and what it leaves in the cache equal the host's."""
    from transformers import DynamicCache

    config = cast("Any", base).config.get_text_config()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.inference_mode():
            caches = [DynamicCache(config=config), DynamicCache(config=config)]
            before, last = (torch.tensor([tokens]) for tokens in (_PROBE[:-1], _PROBE[-1:]))
            for cache in caches:
                base(input_ids=before, past_key_values=cache, use_cache=True)
            wanted = base(input_ids=last, past_key_values=caches[0], use_cache=True)
            found = steps({"input_ids": last, "past_key_values": caches[1], "use_cache": True})
    finally:
        torch.set_num_threads(threads)
    if found is None or type(wanted) is not type(found) or wanted.past_key_values is not caches[0]:
        return False
    if any(value is not None for name, value in wanted.items() if name not in found):
        return False
    same = [(found.last_hidden_state, wanted.last_hidden_state)]
    for own, ours in zip(*(cast("Any", cache).layers for cache in caches), strict=True):
        same += [(ours.keys, own.keys), (ours.values, own.values)]
    return all(close(a, b) for a, b in same)
