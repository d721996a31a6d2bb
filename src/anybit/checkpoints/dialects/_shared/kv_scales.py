"""Where checkpoints keep the scales of a quantized key-value cache; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from anybit.checkpoints.contents import Contents

# end of a tensor's name -> the halves of the cache that it scales; longer ends first
_ENDS: Final[Mapping[str, str]] = {
    ".k_proj.k_scale": "k",
    ".v_proj.v_scale": "v",
    ".k_scale": "k",
    ".v_scale": "v",
    ".kv_scale": "kv",
}
_OUTPUT_ENDS: Final[Mapping[str, str]] = {".k_proj.output_scale": "k", ".v_proj.output_scale": "v"}


def kv_scales(contents: Contents, *, output_scales: bool = False) -> dict[str, tuple[str, str]]:
    """Attention module -> names of its (key, value) scale tensors, "" where one is missing.

    `output_scales` also takes the outputs of k_proj and v_proj, where compressed-tensors up to 0.5 kept them. Of two
    tensors for one half the one beside the attention wins over its projection's.
    """
    ends = {**_ENDS, **(_OUTPUT_ENDS if output_scales else {})}
    found: dict[str, dict[str, str]] = {}
    for name in contents.tensors:
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            continue
        halves = found.setdefault(name.removesuffix(end), {})
        for half in ends[end]:
            if half not in halves or len(name) < len(halves[half]):
                halves[half] = name
    return {attention: (halves.get("k", ""), halves.get("v", "")) for attention, halves in found.items()}
