"""A declared key-value cache, carried out inside transformers' attention.

Every attention hands its keys (after the rotary embedding) and values to `past_key_values.update`. There they are
quantized, once a token, and attention reads back what the codes mean: with a cache, without one, whichever attention
implementation runs. transformers' own dynamic and static caches then keep the codes: a row of bytes for each token and
head instead of its numbers. Caches of other classes get the dequantized numbers; the result is the same.

compressed-tensors does the same in its own models (compressed_tensors/modeling/kvcache.py, 0.14), which keep numbers.
Rules: docs/kv_cache.md. Scales are read and checked by checkpoints/dialects/_shared/kv_scales.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import (  # from their own module: a compiler follows no lazy import
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from anybit.checkpoints.checkpoint import Checkpoint
from anybit.errors import Inconsistent, Unsupported
from anybit.hosts.naming import Naming
from anybit.kernels.linear.tiled_torch import as_bits
from anybit.numerics.activations import E4M3, E4M3_MAX, QuantizedActivation, quantize
from anybit.numerics.codec import decode
from anybit.numerics.scales import quotient
from anybit.schemes import ActivationSpec, KVCacheSpec, Scheme

NAME: Final = "anybit_kv_cache"  # the child of an attention module that holds its scales
_PAST: Final = ("past_key_values", "layer_past", "past_key_value")  # the cache in an attention's forward
_LATENT_PROJECTION: Final = "kv_b_proj"
_STORES: Final = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


@dataclass
class CacheArithmetic:
    """What is done to keys and values, as the Product of a linear layer says it: without `activation`, nothing."""

    scheme: Scheme


class KVQuantizer(nn.Module):
    """Scales and arithmetic of one attention's keys and values.

    The scales are buffers of bit patterns: `model.to(torch.bfloat16)` would round floats.
    """

    def __init__(
        self, spec: KVCacheSpec, key: Tensor | None, value: Tensor | None, *, is_latent: bool = False
    ) -> None:
        """Scales float32 [1] or [heads], None is 1.0; with `is_latent` one head holds latents, scaled as keys."""
        super().__init__()
        self.spec = spec
        self.product = CacheArithmetic(Scheme("float32", activation=spec.activation))
        self.is_latent = is_latent
        for name, scale in (("key", key), ("value", value)):
            self.register_buffer(f"{name}_scale", as_bits(torch.ones(1) if scale is None else scale), persistent=False)

    @property
    def is_on(self) -> bool:
        """False once the activation quantization of its scheme was taken away."""
        return self.product.scheme.activation is not None

    def scale(self, name: str) -> Tensor:
        """The scale of "key" or "value": float32 [1, 1, 1] or [heads, 1, 1]."""
        return cast("Tensor", getattr(self, f"{name}_scale")).view(torch.float32).reshape(-1, 1, 1)

    def quantized(self, x: Tensor, scale: Tensor) -> QuantizedActivation:
        """Codes of keys or values [batch, heads, tokens, head_dim]; a dynamic scale is that of this call."""
        activation = cast("ActivationSpec", self.product.scheme.activation)
        x = x.detach().float()
        if self.spec.dynamic:
            dims = (0, 2, 3) if self.spec.granularity == "head" and x.dim() == 4 else tuple(range(x.dim()))
            scale = quotient(x.abs().amax(dims, keepdim=True), E4M3_MAX)
            scale = torch.where(scale == 0, 1.0, scale)
        return quantize(x, activation, {"scale": scale})

    def on_values(self, x: Tensor, scale: Tensor) -> Tensor:
        """x quantized and dequantized, in its dtype; gradients pass as if nothing had happened."""
        return _with_gradient(self.quantized(x, scale).dequantize().to(x.dtype), x)

    def update(self, cache: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What `cache.update` is asked for: all keys and values so far, these included; `cache` may be None.

        key, value [batch, heads, tokens, head_dim].
        """
        key_scale = self.scale("key")
        value_scale = key_scale if self.is_latent and key.shape[1] == 1 else self.scale("value")
        if cache is None:
            return self.on_values(key, key_scale), self.on_values(value, value_scale)
        if not _keeps_rows(cache, args[0] if args else kwargs["layer_idx"]):
            given = self.on_values(key, key_scale), self.on_values(value, value_scale)
            return cast("tuple[Tensor, Tensor]", cache.update(*given, *args, **kwargs))
        rows = [to_rows(self.quantized(x, s), self.spec) for x, s in ((key, key_scale), (value, value_scale))]
        all_keys, all_values = cache.update(*rows, *args, **kwargs)
        return self._from_rows(all_keys, key, key_scale), self._from_rows(all_values, value, value_scale)

    def _from_rows(self, rows: Tensor, new: Tensor, scale: Tensor) -> Tensor:
        return _with_gradient(from_rows(rows, self.spec, scale, new.shape[-1]).to(new.dtype), new)

    def extra_repr(self) -> str:
        """The declared cache, and whether it is carried out."""
        return str(self.spec) if self.is_on else f"{self.spec}, switched off"


# --- rows: what a cache keeps of one token and head -------------------------------------------------------------------


def to_rows(found: QuantizedActivation, spec: KVCacheSpec) -> Tensor:
    """Quantized keys or values [.., tokens, width] as bytes [.., tokens, `KVCacheSpec.row_bytes(width)`] uint8.

    Codes (4-bit ones in pairs, the first in the low half), then the scales that belong to the token alone: those of
    blocks, or the dynamic one of its call as float32. A scale from the file is not repeated.
    """
    codes = found.codes.view(torch.uint8)
    if found.scale_codes is not None:  # NVFP4
        if codes.shape[-1] % 2:
            codes = nn.functional.pad(codes, (0, 1))
        return torch.cat([codes[..., ::2] | codes[..., 1::2] << 4, found.scale_codes], dim=-1)
    if not spec.dynamic:
        return codes
    scale = found.scale.expand(*codes.shape[:-1], 1).contiguous().view(torch.uint8)
    return torch.cat([codes, scale], dim=-1)


def from_rows(rows: Tensor, spec: KVCacheSpec, scale: Tensor, width: int) -> Tensor:
    """What rows mean: float32 [.., tokens, width], bit for bit what `QuantizedActivation.dequantize` gives.

    scale  the stored one, which a dynamic cache does not use
    """
    activation = spec.activation
    if activation.group_size:
        pairs = -(-width // 2)
        packed, blocks = rows[..., :pairs], rows[..., pairs:]
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :width]
        block_scale = decode(E4M3, blocks) / (1 / scale)  # the recipe's order: it holds the reciprocal
        return QuantizedActivation(codes, spec.element, block_scale, activation.group_size).dequantize()
    if spec.dynamic:
        scale = rows[..., width:].contiguous().view(torch.float32)
    return decode(spec.element, rows[..., :width].contiguous()).mul_(scale)


def _keeps_rows(cache: Any, layer: int) -> bool:
    """True if the cache's store for this layer takes whatever dtype it gets first, and holds no numbers yet."""
    if type(cache) not in (DynamicCache, StaticCache):
        return False
    if layer >= len(cache.layers):
        return cache.layer_class_to_replicate in _STORES
    store = cache.layers[layer]
    return type(store) in _STORES and (store.keys is None or _holds_rows(store))


def _holds_rows(store: Any) -> bool:
    keys = getattr(store, "keys", None)
    return isinstance(keys, Tensor) and keys.dtype == torch.uint8


class _Straight(torch.autograd.Function):
    """`exact` forwards; backwards its last tokens are the new ones, and their gradient is that of `new`."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, new: Tensor) -> Tensor:
        ctx.tokens = new.shape[-2]
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, Tensor]:
        return None, grads[0][..., -ctx.tokens :, :]


def _with_gradient(exact: Tensor, new: Tensor) -> Tensor:
    if torch.is_grad_enabled() and new.requires_grad:
        return cast("Tensor", _Straight.apply(exact, new))  # type: ignore[no-untyped-call]
    return exact


# --- into a model -----------------------------------------------------------------------------------------------------


class _Handed:
    """The cache as an attention module sees it; without one, an empty cache that keeps nothing."""

    def __init__(self, quantizer: KVQuantizer, cache: Any) -> None:
        self._quantizer = quantizer
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._quantizer.update(self._cache, key_states, value_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if self._cache is not None:
            return getattr(self._cache, name)
        return getattr(DynamicCache(), name)


def install(
    model: nn.Module, checkpoint: Checkpoint, naming: Naming, device_of: Callable[[str], torch.device]
) -> list[str]:
    """Carry out the cache that `checkpoint` declares in every attention of a filled model.

    Returns the names of scales that the model has no attention for (layers that this transformers leaves out). Does
    nothing if no cache is declared. Raises Damaged for unsound scales, Unsupported for a model whose attention cannot
    be reached.
    """
    spec = checkpoint.kv_cache
    if spec is None:
        return []
    attentions = {path: past for path, module in model.named_modules() if (past := _past_of(module)) is not None}
    if not attentions:
        raise Unsupported(
            "the declared key-value cache cannot be carried out in this architecture", where=type(model).__name__,
            found="no attention that hands keys and values to a cache", wanted=str(spec), remedy="--kv-cache none",
        )
    homes = _homes(checkpoint, naming)
    scales = {homes[name]: (name, pair) for name, pair in checkpoint.read_kv_scales().items() if name in homes}
    for path, past in attentions.items():
        name, (key, value) = scales.pop(path, ("", (None, None)))
        attention = model.get_submodule(path)
        for scale in (key, value):
            _demand_heads(name, scale, model)
        quantizer = KVQuantizer(spec, key, value, is_latent=hasattr(attention, _LATENT_PROJECTION))
        attention.add_module(NAME, quantizer.to(device_of(path)))
        if name in spec.latent:
            attention.get_submodule(_LATENT_PROJECTION).register_forward_hook(_on_output(quantizer))
        else:
            attention.register_forward_pre_hook(_hand_over(*past), with_kwargs=True)
    without_home = [n for n in spec.scales if n not in homes] + [name for name, _ in scales.values()]
    return sorted({tensor for name in without_home for tensor in spec.scales[name] if tensor})


def switch(model: nn.Module, *, on: bool) -> int:
    """Carry the declared cache out, or not, from now on; the number of attentions that this concerns.

    A cache that was filled before is not converted: begin a new one.
    """
    found = [m for m in model.modules() if isinstance(m, KVQuantizer)]
    for quantizer in found:
        quantizer.product.scheme = Scheme("float32", activation=quantizer.spec.activation if on else None)
    return len(found)


def _past_of(module: nn.Module) -> tuple[str, int] | None:
    """Name and position of the cache among the arguments of an attention module; None for any other module."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "update" not in code.co_names:
        return None
    names = list(inspect.signature(forward).parameters)[1:]
    return next(((name, names.index(name)) for name in _PAST if name in names), None)


def _homes(checkpoint: Checkpoint, naming: Naming) -> dict[str, str]:
    """Attention of the checkpoint -> its path in the model, by the layers inside it."""
    cache = checkpoint.kv_cache
    inside = {name.rpartition(".")[0]: name for name in checkpoint.layers}
    found = {}
    for attention in cache.scales if cache is not None else ():
        parameter = naming.parameter(f"{inside[attention]}.weight") if attention in inside else ""
        path = parameter.removesuffix(".weight").rpartition(".")[0] or attention
        if path in naming.modules:
            found[attention] = path
    return found


def _demand_heads(attention: str, scale: Tensor | None, model: nn.Module) -> None:
    config = cast("Any", model).config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    if scale is not None and scale.numel() not in (1, heads):
        raise Inconsistent(
            "scales of the key-value cache and the model's config disagree", where=attention,
            found=f"{scale.numel()} scales", wanted=f"1, or one for each of {heads} heads",
            remedy="the config belongs to another model: take both from one source",
        )


def _hand_over(name: str, position: int) -> Callable[..., Any]:
    """A forward pre-hook that puts ourselves between an attention and its cache."""

    def hook(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        quantizer = cast("KVQuantizer", attention.get_submodule(NAME))
        is_positional = len(args) > position
        cache = args[position] if is_positional else kwargs.get(name)
        if not quantizer.is_on:
            _demand_numbers(cache, attention)
            return None
        _demand_plain(cache)
        handed = _Handed(quantizer, cache)
        if is_positional:
            return (*args[:position], handed, *args[position + 1 :]), kwargs
        return args, {**kwargs, name: handed}

    return hook


def _on_output(quantizer: KVQuantizer) -> Callable[..., Any]:
    """A forward hook for the projection that latent keys and values come out of (docs/formats/quark.md §8)."""

    def hook(projection: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return quantizer.on_values(output, quantizer.scale("key")) if quantizer.is_on else None

    return hook


def _demand_numbers(cache: Any, attention: nn.Module) -> None:
    """Raise Inconsistent for a cache filled while the quantization was on: codes would be read as numbers."""
    layers = getattr(cache, "layers", None) or []
    index = getattr(attention, "layer_idx", None)
    if isinstance(index, int) and index < len(layers) and _holds_rows(layers[index]):
        raise Inconsistent("the cache holds codes, and its quantization was switched off since",
                           wanted="a new cache", remedy="begin the generation again")


def _demand_plain(cache: Any) -> None:
    if isinstance(cache, EncoderDecoderCache):
        raise Unsupported("the key-value cache of an encoder and decoder", found=type(cache).__name__,
                          wanted="a decoder's own cache", remedy="--kv-cache none")
