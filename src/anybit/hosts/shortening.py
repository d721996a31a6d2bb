"""Fewer and shorter calls for decode steps, for a model that is loaded, through whichever door."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from anybit.hosts import blocks
from anybit.hosts.chain import chain_steps
from anybit.hosts.steps import run_small_steps_alone
from anybit.planning.plan import Plan


def shorten(model: Any, plan: Plan, device: torch.device) -> None:
    """Give the model's decoder blocks the short ways that are proven to equal its own; all of it lies on `device`.

    On a CPU small steps leave the processor to the packed products besides.
    """
    keeps_rows_apart = plan.policy.batch_invariant
    if device.type == "cpu":
        if any(unit.choice.layout == "planes" for unit in plan.units):
            run_small_steps_alone(model)
            if plan.dtype == "float32" and not keeps_rows_apart:
                chain_steps(model, blocks.shorten_steps(model))
    elif device.type == "cuda" and not keeps_rows_apart and find_spec("triton") is not None:
        from anybit.hosts import blocks_gpu

        with torch.cuda.device(model.device):
            blocks_gpu.shorten_steps(model, getattr(torch, plan.dtype))
