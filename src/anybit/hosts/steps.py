"""Single steps on a CPU: torch's own small operations on one thread, the packed products on all.

A decode step of one token has hundreds of operations that are too small to share. torch shares some of them anyway
(attention), and its second thread then spins between them for milliseconds on the core where our pool's worker would
run: on two cores a step took 1.3 to 5 times as long. So while a model computes a step of a few tokens, torch's number
of threads is 1 and the packed products keep the number there was before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anybit.kernels.native.planes import keep_threads

MOST_TOKENS = 8  # the decode regime


def run_small_steps_alone(model: nn.Module) -> None:
    """Install the hooks on a model whose packed layers run on the CPU."""
    model.register_forward_pre_hook(_before, with_kwargs=True)
    model.register_forward_hook(_after, always_call=True)


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = args[0] if args else kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    threads = torch.get_num_threads()
    if isinstance(given, Tensor) and given.shape[:2].numel() <= MOST_TOKENS and threads > 1:
        keep_threads(threads)
        model._anybit_threads = threads  # type: ignore[assignment]
        torch.set_num_threads(1)


def _after(model: nn.Module, *_: Any) -> None:
    threads = model.__dict__.pop("_anybit_threads", 0)
    if threads:
        torch.set_num_threads(threads)
        keep_threads(0)
