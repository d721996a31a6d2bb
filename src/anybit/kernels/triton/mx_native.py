"""Block-scaled products on chips that have them: the layout "mx-rows". Spec: `linear/triton_mx.py`.

Codes and their 8 bit scales go to the matrix unit as they are; global scales (NVFP4) multiply in the epilogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Final, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from anybit.kernels.linear.tiled_torch import as_bits
from anybit.kernels.linear.triton_mx import PAD, PINNED_M, Pair, configure, constants_of, pair_of
from anybit.kernels.request import Regime
from anybit.kernels.triton import mx_native_jit as jit
from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.quantizers import quantize
from anybit.numerics.packing import PackedCodes, pack_stream
from anybit.schemes import ActivationSpec, Scheme
from anybit.weights import Dense, QuantizedWeight, Weight

__all__ = ["MxRows", "StoredMx", "multiply"]

_ONE_FP4: Final = 2  # the code of 1.0
_NEUTRAL_SCALE: Final = {32: 127, 16: 0x38}  # of groups beyond K: 1.0 as e8m0, as e4m3
_VIEW: Final = {"e2m1": torch.uint8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class StoredMx:
    """A micro-scaled weight as the matrix unit reads it."""

    quantizes_input = True

    def __init__(self, weight: QuantizedWeight, *, pinned: bool = False) -> None:
        """`weight` [N, K] of a scheme that `pair_of` knows; `pinned` gives every M the same tiles."""
        self._pinned = pinned
        pair = pair_of(weight.scheme)
        assert pair is not None and len(weight.shape) == 2
        self.shape, self._pair = weight.shape, pair
        k = weight.shape[1]
        beyond = -k % PAD
        codes = pad(weight.codes, (0, beyond))
        self._codes = pack_stream(codes, 4, torch.uint8) if pair.w == "e2m1" else codes.contiguous()
        scale = weight.scales[0].view(torch.uint8)
        self._scale = pad(scale, (0, (k + beyond) // pair.group - scale.shape[1]), value=_NEUTRAL_SCALE[pair.group])
        self._coarse = weight.scales[1:]
        self._factor = _row_factors(weight) if self._coarse else None
        self._static = dict(weight.activation)
        self._weight = replace(weight, stored_codes=torch.empty(0), scales=(), bias=None, pre_scale=None, activation={})
        self._dtypes = {name: t.dtype for name, t in self._parts().items()}
        self._problem = _as_text(pair, weight.scheme, k)

    def _parts(self) -> dict[str, Tensor]:
        parts = {"codes": self._codes, "scale": self._scale}
        parts |= {f"coarse_{i}": t for i, t in enumerate(self._coarse)}
        parts |= {f"static_{name}": t for name, t in self._static.items()}
        if self._factor is not None:
            parts["factor"] = self._factor
        return parts

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name, floats as bit patterns."""
        return {name: as_bits(t) for name, t in self._parts().items()}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""
        real = {name: tensors[name].view(dtype) for name, dtype in self._dtypes.items()}
        self._codes, self._scale, self._factor = real["codes"], real["scale"], real.get("factor")
        self._coarse = tuple(real[f"coarse_{i}"] for i in range(len(self._coarse)))
        self._static = {name: real[f"static_{name}"] for name in self._static}

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Q(x) [M, K] times W^T, plus bias in float32: [M, N] in `out_dtype`."""
        static = self._static
        return cast("Tensor", torch.ops.anybit.mx_native.default(
            x, self._codes, self._scale, self._factor, static.get("global_scale"), static.get("scale"), bias,
            self._problem, self._pinned, out_dtype,
        ))

    def _canonical(self) -> QuantizedWeight:
        k = self.shape[1]
        codes: Tensor | PackedCodes = self._codes[:, :k]
        if self._pair.w == "e2m1":
            codes = PackedCodes(self._codes, 4, self._codes.shape[1] * 2, "stream", "unsigned").unpack()[:, :k]
        scale = self._scale[:, : -(-k // self._pair.group)]
        return replace(self._weight, stored_codes=codes, scales=(scale, *self._coarse))

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Decoded rows [.., K] for integer `index` [..]."""
        found = self._canonical().take_rows(index.reshape(-1)).dequantize()
        return found.to(dtype).reshape(*index.shape, self.shape[1])

    def dequantize(self) -> Tensor:
        """The float32 weight."""
        return self._canonical().dequantize()


class MxRows:
    """Implementation of `triton-mx-native`."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> StoredMx:
        """Codes and scales by row, K padded to 128; `dtype` plays no part."""
        if isinstance(weight, Dense):
            raise TypeError("a Dense weight belongs to torch-dense")
        return StoredMx(weight, pinned=pinned)


def _row_factors(weight: QuantizedWeight) -> Tensor:
    """All levels above the finest, combined: float32 [N]. The reference weight of one column of codes 1.0."""
    n = weight.shape[0]
    scheme = Scheme(weight.scheme.element, weight.scheme.scales[1:], weight.scheme.order)
    one = _ONE_FP4 if weight.scheme.element == "fp4_e2m1" else 0x38
    ones = torch.full((n, 1), one, dtype=torch.uint8, device=weight.scales[0].device)
    return replace(weight, scheme=scheme, shape=(n, 1), stored_codes=ones,
                   scales=weight.scales[1:]).dequantize()[:, 0].contiguous()


def _as_text(pair: Pair, scheme: Scheme, k: int) -> str:
    a = scheme.activation
    assert a is not None
    words = (pair.x, pair.w, pair.group, k, a.element, int(a.dynamic), a.recipe, a.group_size)
    return "|".join(str(word) for word in words)


@cache
def _from_text(text: str) -> tuple[Pair, int, ActivationSpec]:
    x, w, group, k, element, dynamic, recipe, size = text.split("|")
    return (Pair(x, w, int(group)), int(k), ActivationSpec(element, dynamic == "1", "group", recipe, int(size)))


def multiply(
    x: Tensor, codes: Tensor, scale: Tensor, factor: Tensor | None, global_scale: Tensor | None,
    static_scale: Tensor | None, bias: Tensor | None, problem: str, pinned: bool, out_dtype: torch.dtype,
) -> Tensor:
    """Q(x) [M, K] times W^T plus bias: [M, N]; codes, scale and factor as StoredMx keeps them."""
    pair, _, spec = _from_text(problem)
    m, n = x.shape[0], codes.shape[0]
    k = codes.shape[1] * (2 if pair.w == "e2m1" else 1)
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    static = {name: t for name, t in (("global_scale", global_scale), ("scale", static_scale)) if t is not None}
    xq = quantize(x, spec, static, columns=k, packed=pair.x == "e2m1")
    assert xq.scale_codes is not None
    config = configure(k, PINNED_M if pinned else m, arch_of(x.device), pair)
    kind = torch.float8_e4m3fn if pair.group == 16 else torch.uint8
    constants = constants_of(pair, config, has_outer=xq.outer is not None, has_factor=factor is not None,
                             has_bias=bias is not None)
    jit.mx_matmul[(-(-m // config.bm) * -(-n // config.bn),)](
        xq.codes.view(_VIEW[pair.x]), xq.scale_codes.view(kind), codes.view(_VIEW[pair.w]), scale.view(kind),
        out if xq.outer is None else xq.outer, out if factor is None else factor, out if bias is None else bias, out,
        m, n, k, **constants, num_warps=config.warps, num_stages=config.stages,
    )
    return out


_LIBRARY: Final = torch.library.Library("anybit", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "mx_native(Tensor x, Tensor codes, Tensor scale, Tensor? factor, Tensor? global_scale, Tensor? static_scale, "
    "Tensor? bias, str problem, bool pinned, ScalarType out_dtype) -> Tensor"
)
_LIBRARY.impl("mx_native", multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _shape_only(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=cast("torch.dtype", rest[-1]))


torch.library.register_fake("anybit::mx_native", _shape_only, lib=_LIBRARY)
