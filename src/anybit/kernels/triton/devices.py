"""What a torch device is called in `platforms.archs`, and how it is made the current one. Needs no Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

__all__ = ["arch_of", "on_device"]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels that are not torch's own go to the current device, which may be another one than the tensors'."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


@cache
def arch_of(device: torch.device) -> str:
    """The architecture of a torch device as `platforms` names it: "sm_90", "gfx942", "cpu"."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
