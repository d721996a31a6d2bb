"""The products of a decoder block on a GPU: layers that read the same input joined, or one after another.

What a layer computes beyond a product of quantized rows (a factor of its input, a quantized output) is left to the
layer: it is called with rows as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from anybit.hosts.modules import AnybitLinear
from anybit.kernels.catalogue import Stored
from anybit.kernels.triton.block import AS_THEY_ARE, Rows, Wanted
from anybit.kernels.triton.units import Product, join, wanted_by
from anybit.numerics.formats import number_format

__all__ = ["Products", "products_of"]


@dataclass(frozen=True)
class Products:
    """Layers that read the same input.

    runs   one call for all, or one for each: rows -> [M, N of all, or of its layer]
    rows   N of each layer
    bits   of their activations, the fewest; 16 where none are quantized
    """

    runs: tuple[Callable[[Rows], Tensor], ...]
    rows: tuple[int, ...]
    bits: int
    _wanted: dict[int, Wanted] = field(default_factory=dict)

    def wanted(self, tokens: int, device: torch.device) -> Wanted:
        """What they all read."""
        found = self._wanted.get(tokens)
        if found is None:
            products = [run for run in self.runs if isinstance(run, Product)]
            alike = len(products) == len(self.runs)
            found = self._wanted[tokens] = wanted_by(products, tokens, device) if alike else AS_THEY_ARE
        return found

    def __call__(self, rows: Rows) -> list[Tensor]:
        """[M, N] of each layer; rows of joined layers lie as far apart as the whole is wide."""
        if len(self.runs) == len(self.rows):
            return [run(rows) for run in self.runs]
        return list(torch.split(self.runs[0](rows), list(self.rows), dim=1))


def products_of(
    modules: Sequence[nn.Module], dtype: torch.dtype, *, is_alone: bool = False
) -> Products | None:
    """The layers as few calls; None if one of them is no linear layer. Joined layers keep windows on the whole.

    is_alone  their kernels quantize what they read: whoever makes it does not
    """
    sizes = [getattr(module, "out_features", None) for module in modules]
    if any(not isinstance(size, int) or not isinstance(m, (AnybitLinear, nn.Linear))
           for size, m in zip(sizes, modules, strict=True)):
        return None
    rows = tuple(cast("list[int]", sizes))
    schemes = [m.product.scheme for m in modules if isinstance(m, AnybitLinear)]
    bits = min((number_format(s.activation.element).bits for s in schemes if s.activation is not None), default=16)
    ours = [m for m in modules if isinstance(m, AnybitLinear) and _is_a_product(m)]
    if len(ours) < len(modules) or is_alone:
        return Products(tuple(partial(_called, m) for m in modules), rows, bits)
    whole = _joined(ours)
    if whole is not None:
        return Products((Product(*whole, dtype),), rows, bits)
    return Products(tuple(Product(m.product.stored, m.product.bias, dtype) for m in ours), rows, bits)


def _is_a_product(module: AnybitLinear) -> bool:
    """True if the layer is the product of its stored weight with the rows, quantized by its kernel or not at all."""
    product = module.product
    quantizes = product.scheme.activation is not None
    return product.pre_scale is None and product.scheme.output is None and quantizes == product.stored.quantizes_input


def _joined(modules: Sequence[AnybitLinear]) -> tuple[Stored, Tensor | None] | None:
    """The layers' weights below each other, and their biases; their modules then hold windows on it."""
    biases = [m.product.bias for m in modules]
    given = [b for b in biases if b is not None]
    if given and (len(given) < len(biases) or len({b.dtype for b in given}) > 1):
        return None
    found = join([m.product.stored for m in modules])
    if found is None:
        return None
    whole, windows = found
    for module, window in zip(modules, windows, strict=True):
        module.rebind(window)
    return whole, torch.cat(given) if given else None


def _called(module: nn.Module, rows: Rows) -> Tensor:
    return cast("Tensor", module(rows.values))
