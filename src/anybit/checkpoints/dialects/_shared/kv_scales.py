"""Where checkpoints keep the scales of a quantized key-value cache, and what those scales may be.

Names and shapes come from headers (torch-free); values are checked when they are read. Rules of the dialects:
docs/formats/compressed_tensors.md §8, fp8.md §5, modelopt.md §8, quark.md §8. What a cache does with them is the
host's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.contents import FLOAT_DTYPES, Contents, TensorInfo
from anybit.errors import Unsupported
from anybit.schemes import KVCacheSpec

if TYPE_CHECKING:
    from torch import Tensor

# end of a tensor's name -> the halves of the cache that it scales; longer ends first
_ENDS: Final[Mapping[str, str]] = {
    ".qkv_proj.k_scale": "k",
    ".qkv_proj.v_scale": "v",
    ".k_proj.k_scale": "k",
    ".v_proj.v_scale": "v",
    ".k_scale": "k",
    ".v_scale": "v",
    ".kv_scale": "kv",
}
_OUTPUT_ENDS: Final[Mapping[str, str]] = {".k_proj.output_scale": "k", ".v_proj.output_scale": "v"}
# written beside the scales and used by no runtime (docs/formats/compressed_tensors.md §8)
_COMPANIONS: Final = (".k_zero_point", ".v_zero_point", ".q_zero_point", ".q_scale")


def kv_scales(contents: Contents, *, output_scales: bool = False) -> dict[str, tuple[str, str]]:
    """Attention module -> names of its (key, value) scale tensors, "" where one is missing.

    `output_scales` also takes the outputs of k_proj and v_proj, where compressed-tensors up to 0.5 kept them. Of two
    tensors for one half the one beside the attention wins over its projection's.
    """
    ends = {**_ENDS, **(_OUTPUT_ENDS if output_scales else {})}
    found: dict[str, dict[str, str]] = {}
    any_end = tuple(ends)
    for name in [name for name in contents.tensors if name.endswith(any_end)]:  # of 300,000 names few are scales
        end = next(end for end in ends if name.endswith(end))
        halves = found.setdefault(name.removesuffix(end), {})
        for half in ends[end]:
            if half not in halves or len(name) < len(halves[half]):
                halves[half] = name
    return {attention: (halves.get("k", ""), halves.get("v", "")) for attention, halves in found.items()}


def demand_scales(contents: Contents, cache: KVCacheSpec) -> KVCacheSpec:
    """`cache`, if its scales can be scales: floats, one number each, or one a head where it says so.

    Raises Unsupported naming the tensor. Values are checked by `read_scales`.
    """
    for name in {name for pair in cache.scales.values() for name in pair if name}:
        info = contents.tensors[name]
        if info.dtype not in FLOAT_DTYPES:
            raise _unsound(info, f"{info.dtype}", " or ".join(FLOAT_DTYPES))
        if info.elements != 1 and (cache.granularity == "tensor" or not info.elements):
            raise _unsound(info, f"{info.elements:,} numbers, shape {list(info.shape)}", "one number")
    return cache


def _unsound(info: TensorInfo, found: str, wanted: str) -> Unsupported:
    return Unsupported(
        "a scale of the key-value cache that no known runtime uses", where=f"{info.file.name}: {info.name}",
        found=found, wanted=wanted, remedy="export the model with one scale a layer for keys and one for values",
    )


def companions(contents: Contents, cache: KVCacheSpec) -> set[str]:
    """Tensors that writers store beside the scales of `cache` and that belong to no layer."""
    named = {f"{attention}{leaf}" for attention in cache.scales for leaf in _COMPANIONS}
    return named & contents.tensors.keys()


def read_scales(
    cache: KVCacheSpec, read: Callable[[str], Tensor]
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Attention -> scales of keys and values, float32 [1] or [heads]; None where the file has none.

    Raises Damaged, naming the tensor, for NaN, infinite, zero and negative ones (-1.0 is vLLM's mark for "not set",
    and no file means it).
    """
    from anybit.checkpoints.checks import refuse_bad_scales

    def half(name: str) -> Tensor | None:
        if not name:
            return None
        scale = read(name).float().reshape(-1)
        refuse_bad_scales(scale, name, allow_zero=False, allow_negative=False)
        return scale

    return {attention: (half(k), half(v)) for attention, (k, v) in cache.scales.items()}


def remarks(cache: KVCacheSpec) -> tuple[str, ...]:
    """What a reader should know about missing scales of a declared cache."""
    if cache.dynamic:
        return ()
    if not cache.scales:
        return (f"a key-value cache in {cache.element} is declared without scales: taken as 1.0",)
    missing = [f"{name}.{half}" for name, pair in cache.scales.items() for half, tensor in zip("kv", pair, strict=True)
               if not tensor]
    more = f" and {len(missing) - 1} more" if missing[1:] else ""
    return (f"missing scales of the key-value cache, taken as 1.0: {missing[0]}{more}",) if missing else ()
