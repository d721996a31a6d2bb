"""Single steps on a CPU: torch's own small operations on one thread, the packed products on all.

A decode step of one token has hundreds of operations that are too small to share. torch shares some of them anyway
(attention), and its second thread then spins between them for milliseconds on the core where our pool's worker would
run: on two cores a step took 1.3 to 5 times as long. So while a model computes a step of a few tokens, torch's number
of threads is 1 and the packed products keep the number there was before.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from anybit.kernels.native.block import release_scratch
from anybit.kernels.native.planes import keep_threads

MOST_TOKENS = 8  # the decode regime


def run_small_steps_alone(model: nn.Module) -> None:
    """Install the hooks on a model whose packed layers run on the CPU."""
    model.register_forward_pre_hook(_before, with_kwargs=True)
    model.register_forward_hook(_after, always_call=True)


_aside = threading.local()  # torch's number of threads belongs to the calling thread, so what was put aside does too


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():  # a compiled step has few small operations, and a graph cannot hold this
        return
    given = args[0] if args else kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    threads = torch.get_num_threads()
    if isinstance(given, Tensor) and given.shape[:2].numel() <= MOST_TOKENS and threads > 1:
        keep_threads(threads)
        _aside.threads = threads
        torch.set_num_threads(1)


def _after(model: nn.Module, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    release_scratch()  # what blocks of a prompt worked in
    threads = getattr(_aside, "threads", 0)
    if threads:
        _aside.threads = 0
        torch.set_num_threads(threads)
        keep_threads(0)
