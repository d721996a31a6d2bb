"""One layer at run time: input transform, activation quantization, product, bias, output quantization, in this order.

The order and every rounding are those of the layer's Scheme; the stored weight comes from the kernel that the plan
chose. Sums are float32, so the result differs from the float64 product of the quantized operands by accumulation and
the final rounding to the dtype of x, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anybit.kernels.catalogue import Stored
from anybit.kernels.request import regime_of
from anybit.numerics.activations import quantize_dequantize
from anybit.schemes import Scheme
from anybit.weights import Weight


@dataclass
class Product:
    """y = Q(x * p) W^T + b for x [.., K].

    scheme       of the weight; its activation spec decides Q
    stored       the weight in a kernel's layout
    activation   tensors of static activation quantization
    pre_scale    [K] float32 or None
    bias         [N] or None
    """

    scheme: Scheme
    stored: Stored
    activation: Mapping[str, Tensor] = field(default_factory=dict)
    pre_scale: Tensor | None = None
    bias: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """True if nothing happens to x before the product or to y after it, but the bias."""
        return self.pre_scale is None and self.scheme.activation is None and self.scheme.output is None

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., K] in a float dtype -> [.., N] in the same dtype."""
        stored, scheme = self.stored, self.scheme
        quantizes = scheme.activation is not None and not stored.quantizes_input
        if not quantizes and self.pre_scale is None and scheme.output is None and x.shape[-1] and getattr(
                stored, "takes_any_shape", False):
            return stored.linear(x, regime_of(x.numel() // x.shape[-1]), self.bias, x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        tokens = rows.shape[0]
        if self.pre_scale is not None:
            rows = rows.float() * self.pre_scale
        if scheme.activation is not None and quantizes:
            rows = quantize_dequantize(rows.float(), scheme.activation, self.activation)
        y = stored.linear(rows, regime_of(tokens), self.bias, x.dtype)
        if scheme.output is not None:
            y = quantize_dequantize(y.float(), scheme.output, self.activation).to(x.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the input [.., K] for that of the output [.., N]: straight through the roundings."""
        rows = grad.reshape(-1, grad.shape[-1]).float() @ self.stored.dequantize()
        if self.pre_scale is not None:
            rows = rows * self.pre_scale
        return rows.to(grad.dtype).reshape(*grad.shape[:-1], rows.shape[-1])


def product_of(weight: Weight, stored: Stored, device: torch.device | str | None = None) -> Product:
    """The Product of a weight whose codes went into `stored`; the small tensors move to `device` (None: they stay)."""
    activation = {name: t.to(device) for name, t in getattr(weight, "activation", {}).items()}
    pre_scale: Tensor | None = getattr(weight, "pre_scale", None)
    return Product(
        scheme=weight.scheme,
        stored=stored,
        activation=activation,
        pre_scale=None if pre_scale is None else pre_scale.float().to(device),
        bias=None if weight.bias is None else weight.bias.to(device),
    )
