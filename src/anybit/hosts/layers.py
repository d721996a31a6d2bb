"""One linear layer by itself, for engines with a model of their own: `anybit.linear`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from anybit.errors import Inconsistent, Unsupported
from anybit.hosts.modules import AnybitLinear
from anybit.hosts.preparing import Preparing
from anybit.kernels.catalogue import Stored
from anybit.kernels.product import product_of
from anybit.kernels.request import Regime, Request
from anybit.planning import measured
from anybit.planning.choose import Choice, choose
from anybit.planning.measured import Measured
from anybit.platforms import Platform, detect
from anybit.schemes import dense
from anybit.weights import Dense, Weight

__all__ = ["Linear", "linear"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Linear(AnybitLinear):
    """y = Q(x) W^T + b with a packed weight, and how it was chosen.

    choice  the plan's choice for this layer: layout, kernels by number of tokens, prices, all refusals with reasons
    """

    def __init__(self, weight: Weight, stored: Stored, choice: Choice, device: torch.device) -> None:
        """The weight, stored in the layout of `choice`, on `device`."""
        super().__init__(product_of(weight, stored, device))
        self.choice = choice

    @property
    def kernels(self) -> Mapping[Regime, str]:
        """regime ("decode", "small", "prefill") -> kernel that runs it."""
        return self.choice.names


def linear(
    weight: Tensor | Weight,
    scheme: str | None = None,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    kernel: str | None = None,
    strict: bool = False,
    batch_invariant: bool = False,
) -> Linear:
    """A torch module for one linear layer, on the kernels that a plan of this machine chooses.

    weight   what `checkpoint.read(name)` gave; or a float tensor [N, K], quantized here if `scheme` is given
    scheme   a name of `--quantization` (docs/quantization.md), such as "int4_g128", "nvfp4", "fp8_per_channel"
    bias     [N], in place of the weight's own
    dtype    of the activations: bfloat16 (default on a GPU), float16 or float32 (default on a CPU)
    device   default the weight's own
    kernel   one that must run wherever it can; else its refusals are raised
    strict, batch_invariant  as for `anybit.load`

    The module takes x [.., K] and gives [.., N] in x's dtype; it records into a CUDA graph and compiles with
    fullgraph=True. Raises Unsupported where no kernel runs it, with all reasons, and for unknown names; Inconsistent
    for a bias of another size.
    """
    where = torch.device(device) if device is not None else _device_of(weight)
    dtype = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
    if dtype not in _DTYPES:
        raise Unsupported(f"no such dtype of activations: {dtype}", wanted="bfloat16, float16 or float32",
                          remedy="cast x, and the module gives its dtype back")
    made = _canonical(weight, scheme, bias).to(where)
    platform, known = _here(str(where))
    name = str(dtype).removeprefix("torch.")
    policy = known.policy(name, strict=strict, batch_invariant=batch_invariant)
    asked = Request("linear", made.scheme, tuple(made.shape), name)
    choice = choose(asked, platform, kernel, policy)
    if not isinstance(choice, Choice):
        reasons = dict.fromkeys(f"{r.kernel}: {reason.text}" for r in choice for reason in r.reasons)
        raise Unsupported("no kernel runs this layer here", found="; ".join(reasons), wanted=str(made.scheme),
                          remedy="another dtype or device, or without strict and batch_invariant")
    stored, choice = Preparing(platform, policy, dtype, is_named=kernel is not None)(choice, made, asked)
    return Linear(made, stored, choice, where)


@lru_cache(maxsize=16)
def _here(device: str) -> tuple[Platform, Measured]:
    """The platform and what was measured on it: asked of the driver once, not for each layer of a model."""
    platform = detect(device)
    return platform, measured.read(platform)


def _device_of(weight: Tensor | Weight) -> torch.device:
    if isinstance(weight, Tensor):
        return weight.device
    if isinstance(weight, Dense):
        return weight.tensor.device
    stored = weight.stored_codes
    return stored.device if isinstance(stored, Tensor) else stored.data.device


def _canonical(weight: Tensor | Weight, scheme: str | None, bias: Tensor | None) -> Weight:
    """The weight with its bias, quantized where a scheme is asked for."""
    from anybit.checkpoints.online import quantize

    if isinstance(weight, Tensor):
        weight = Dense(dense(str(weight.dtype).removeprefix("torch.")), weight)
    if len(weight.shape) != 2:
        raise Inconsistent("a linear layer has one matrix", found=f"shape {list(weight.shape)}", wanted="[N, K]",
                           remedy="take one expert of a stack: weight.expert(i)")
    if scheme is not None:
        wide = weight if isinstance(weight, Dense) else Dense(dense("float32"), weight.dequantize(), weight.bias)
        weight = quantize(wide, scheme)
    if bias is None:
        return weight
    if tuple(bias.shape) != (weight.shape[0],):
        raise Inconsistent("the bias does not fit the weight", found=f"shape {list(bias.shape)}",
                           wanted=f"[{weight.shape[0]}]", remedy="one number for each row of the weight")
    return replace(weight, bias=bias)
