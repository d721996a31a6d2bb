"""anybit: any quantized LLM checkpoint, on any chip, proven right.

    import anybit

    checkpoint = anybit.open("path/to/folder")          # headers only: .dialect, .layers, .read(name)
    plan = anybit.plan(checkpoint)                      # what would run each layer here, and why
    model = anybit.load("path/to/folder")               # an ordinary transformers model
    anybit.enable()                                     # plain from_pretrained takes our dialects
    layer = anybit.linear(checkpoint.read(name))        # one layer as a torch module, for an engine of your own

`open` and `plan` import no torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from anybit.errors import AnybitError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anybit.checkpoints.checkpoint import Checkpoint
    from anybit.checkpoints.online import Online, Quantization
    from anybit.checkpoints.online_rules import Targets
    from anybit.hosts.plans import Written
    from anybit.planning.plan import Plan
    from anybit.platforms import Platform

__version__ = "0.1.0"
__all__ = ["AnybitError", "Online", "__version__", "enable", "linear", "load", "open", "plan"]


def __getattr__(name: str) -> Any:
    """`Online`, imported when it is asked for."""
    if name == "Online":
        from anybit.checkpoints.online import Online

        return Online
    raise AttributeError(f"module 'anybit' has no attribute {name!r}")


def open(path: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint's headers: dialect, layers with their schemes, and a reader for each.

    path  "smollm2" (the demo model), a folder, a .gguf file, or a hub id

    Raises AnybitError, which says where, what was found, what was wanted and what to do.
    """
    from anybit.checkpoints import open as open_checkpoint

    return open_checkpoint(path)


def plan(
    checkpoint: Checkpoint | str | os.PathLike[str],
    platform: Platform | str | None = None,
    *,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    targets: Targets = (),
    ignore: Sequence[str] = (),
    kernel: str | Sequence[str] | None = None,
    kv_cache: str = "auto",
    strict: bool = False,
    batch_invariant: bool = False,
    plan: Written | None = None,
) -> Plan:
    """What would run each layer on `platform` (a Platform, a name such as "mi300x", default: here), and why.

    quantization, targets, ignore  as for `load`: what would be quantized while loading, and which layers not
    kernel, kv_cache, strict, batch_invariant, plan  as for `load`

    No tensor is read and torch is not imported.
    """
    from anybit.checkpoints import open as open_checkpoint
    from anybit.checkpoints.checkpoint import Checkpoint
    from anybit.checkpoints.online import online
    from anybit.hosts.plans import make_plan
    from anybit.platforms import named

    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    if isinstance(platform, str):
        platform = named(platform)
    return make_plan(
        checkpoint, platform, dtype=dtype, quantization=online(quantization, targets, ignore), kernel=kernel,
        kv_cache=kv_cache, strict=strict, batch_invariant=batch_invariant, plan=plan,
    )


def load(
    path: str | os.PathLike[str] | Checkpoint,
    dtype: Any = None,
    device: Any = None,
    **options: Any,
) -> Any:
    """An ordinary transformers model whose quantized layers are ours: see `anybit.hosts.transformers.load`."""
    from anybit.hosts.transformers import load as load_model

    return load_model(path, dtype, device, **options)


def linear(weight: Any, scheme: str | None = None, **options: Any) -> Any:
    """One linear layer as a torch module on this machine's best kernels: see `anybit.hosts.layers.linear`."""
    from anybit.hosts.layers import linear as make

    return make(weight, scheme, **options)


def enable(*, strict: bool = False) -> None:
    """Make plain `AutoModelForCausalLM.from_pretrained` read our dialects: see `anybit.hosts.transformers.enable`."""
    from anybit.hosts.transformers import enable as take_over

    take_over(strict=strict)
