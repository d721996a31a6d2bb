"""What a torch device is called in `platforms.archs`. Needs no Triton."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["arch_of"]


@cache
def arch_of(device: torch.device) -> str:
    """The architecture of a torch device as `platforms` names it: "sm_90", "gfx942", "cpu"."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
